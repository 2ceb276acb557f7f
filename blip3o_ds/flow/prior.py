"""What a linear model knows of the target before any network: its mean given EVA, and a Gaussian around it.

The mean is a ridge regression on a token and its surroundings. The Gaussian is diagonal in *modes*: a cosine transform
over the grid of tokens times the eigenvectors of the residual's channels. Neighbouring tokens err alike, and in a few
directions more than in the others; a covariance by token or by channel alone knows only one of the two.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from blip3o_ds.flow.path import Path, per_sample

NEIGHBOURS = tuple((row, column) for row in range(3) for column in range(3) if (row, column) != (1, 1))


@dataclass(frozen=True)
class Surroundings:
    """The features of a token that the mean is linear in, of width `De + 9k`.

    They are its own EVA embedding, the eight neighbours' and the mean of the image's patches; the latter in k principal
    directions. Beyond the edge of the grid there are zeros, which is the mean; the CLS token has no neighbours.
    """

    eva_mean: Tensor  # [De]
    basis: Tensor  # [De, k] orthonormal
    has_cls: bool

    def __call__(self, eva: Tensor) -> Tensor:
        """`[B, N, De]` of any dtype -> `[B, N, De + 9k]` fp32."""
        own = eva.float() - self.eva_mean
        first = int(self.has_cls)
        side = math.isqrt(own.shape[1] - first)
        reduced = own[:, first:] @ self.basis  # [B, side^2, k]
        grid = F.pad(reduced.unflatten(1, (side, side)), (0, 0, 1, 1, 1, 1))
        around = [grid[:, row : row + side, column : column + side] for row, column in NEIGHBOURS]
        near = F.pad(torch.cat(around, dim=-1).flatten(1, 2), (0, 0, first, 0))
        image = reduced.mean(dim=1, keepdim=True).expand(-1, own.shape[1], -1)
        return torch.cat([own, near, image], dim=-1)


@dataclass(frozen=True)
class LinearGaussian:
    """`clip | eva ~ Normal(mean(eva), covariance)`, all in fp32 and in the network's (normalised) space."""

    eva_mean: Tensor  # [De]
    eva_std: Tensor  # [De], positive
    basis: Tensor  # [De, k], of `Surroundings`
    weight: Tensor  # [De + 9k + 1, Dc]: of the features, and a last row that is added to every token
    fold_weights: Tensor  # [K, De + 9k + 1, Dc], each fitted without the images of its fold
    channels: Tensor  # [Dc, Dc] orthonormal: columns are eigenvectors of the residual's covariance
    variance: Tensor  # [N, Dc] of the modes, positive

    @cached_property
    def has_cls(self) -> bool:
        return math.isqrt(len(self.variance)) ** 2 != len(self.variance)

    @cached_property
    def surroundings(self) -> Surroundings:
        return Surroundings(self.eva_mean, self.basis, self.has_cls)

    @cached_property
    def tokens(self) -> Tensor:
        """The cosine transform over the grid, [N, N] orthonormal."""
        return token_modes(len(self.variance), self.has_cls).to(self.variance)

    @cached_property
    def std(self) -> Tensor:
        """[N, Dc], of the modes."""
        return self.variance.sqrt()

    @cached_property
    def rms(self) -> Tensor:
        """The root mean square of a residual's number, a scalar."""
        return self.variance.mean().sqrt()

    @property
    def num_folds(self) -> int:
        return len(self.fold_weights)

    def mean(self, eva: Tensor, folds: Sequence[int] | None = None) -> Tensor:
        """E[clip | eva] `[B, N, Dc]`, for eva `[B, N, De]`.

        With `folds` `[B]` each image is predicted by the map without that fold; to the map without its own, an image
        is a new one.
        """
        features = self.surroundings(eva)
        if folds is None:
            return _affine(features, self.weight)
        order = sorted(range(len(folds)), key=folds.__getitem__)  # known here, so that the device is asked for nothing
        back = sorted(range(len(folds)), key=order.__getitem__)
        sort, unsort = torch.tensor([order, back]).to(features.device, non_blocking=True)
        present = sorted(set(folds))
        parts = features[sort].split([folds.count(fold) for fold in present])
        found = [_affine(part, self.fold_weights[fold]) for fold, part in zip(present, parts, strict=True)]
        return torch.cat(found)[unsort]

    def standard_eva(self, eva: Tensor) -> Tensor:
        """eva with zero mean and unit variance in every channel."""
        return (eva.float() - self.eva_mean) / self.eva_std

    def to_modes(self, x: Tensor) -> Tensor:
        """`[..., N, Dc]` of the target's space in modes, of the same norm."""
        return self.tokens @ (x @ self.channels)

    def from_modes(self, modes: Tensor) -> Tensor:
        """The inverse of `to_modes`."""
        return (self.tokens.T @ modes) @ self.channels.T

    def sample(self, mean: Tensor, noise: Tensor) -> Tensor:
        """A draw of the Gaussian around `mean` from standard normal noise, both `[..., N, Dc]`."""
        return mean + self.from_modes(self.std * noise)

    def left_open(self, path: Path, t: Tensor) -> Tensor:
        """The variance of the clean embedding given x_t, `[B]`: the mean over modes, for t `[B]`."""
        signal = path.alpha(per_sample(t)).square() * self.variance
        noise = path.sigma(per_sample(t)).square()
        return (self.variance * noise / (signal + noise)).mean(dim=(1, 2))

    def to(self, device: torch.device | str) -> LinearGaussian:
        """The same on another device."""
        return replace(self, **{name: value.to(device) for name, value in self.tensors().items()})

    def tensors(self) -> dict[str, Tensor]:
        return {field.name: getattr(self, field.name) for field in fields(self)}


def _affine(x: Tensor, weight: Tensor) -> Tensor:
    return x @ weight[:-1] + weight[-1]


def token_modes(num_tokens: int, has_cls: bool) -> Tensor:
    """The orthonormal type-II cosine transform (Ahmed et al. 1974) over a square grid, [N, N]; CLS is its own mode.

    Rows are modes, columns tokens.
    """
    side = math.isqrt(num_tokens - has_cls)
    k = torch.arange(side, dtype=torch.float64)[:, None]
    n = torch.arange(side, dtype=torch.float64)[None, :]
    one = torch.cos(math.pi * (n + 0.5) * k / side) * math.sqrt(2 / side)
    one[0] = math.sqrt(1 / side)
    grid = torch.kron(one, one)
    return torch.block_diag(torch.ones(1, 1, dtype=torch.float64), grid) if has_cls else grid
