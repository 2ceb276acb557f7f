"""What tests of the flow share: a prior of any size with random numbers in it, and a path from outside the package."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from blip3o_ds.flow.path import Path
from blip3o_ds.flow.prior import LinearGaussian

BASIS = 2  # principal directions of EVA


def random_prior(
    num_tokens: int, eva_dim: int, clip_dim: int, folds: int = 3, seed: int = 0, dtype: torch.dtype = torch.float32
) -> LinearGaussian:
    """A prior in which every number counts: no two modes have the same variance, no two folds the same mean."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    prior = LinearGaussian(
        eva_mean=normal(eva_dim),
        eva_std=normal(eva_dim).abs() + 0.5,
        basis=torch.linalg.qr(normal(eva_dim, eva_dim))[0][:, :BASIS].contiguous(),
        weight=0.3 * normal(eva_dim + 9 * BASIS + 1, clip_dim),
        fold_weights=0.3 * normal(folds, eva_dim + 9 * BASIS + 1, clip_dim),
        channels=torch.linalg.qr(normal(clip_dim, clip_dim))[0],
        variance=normal(num_tokens, clip_dim).exp(),
    )
    return LinearGaussian(**{name: value.to(dtype) for name, value in prior.tensors().items()})


class CosinePath(Path):
    """`alpha = sin(pi t / 2)`, `sigma = cos(pi t / 2)` (Nichol & Dhariwal 2021), of constant variance."""

    def alpha(self, t: Tensor) -> Tensor:
        return torch.sin(math.pi / 2 * t)

    def sigma(self, t: Tensor) -> Tensor:
        return torch.cos(math.pi / 2 * t)

    def d_alpha(self, t: Tensor) -> Tensor:
        return math.pi / 2 * torch.cos(math.pi / 2 * t)

    def d_sigma(self, t: Tensor) -> Tensor:
        return -math.pi / 2 * torch.sin(math.pi / 2 * t)
