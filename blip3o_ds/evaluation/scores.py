"""Scores of several samples an image against its true embedding, and the Fréchet distance: formulas on tensors.

Differences have the precision of the embeddings, fp32 or float64, and every sum is float64. One sample or one pair of
samples at a time, so that K samples cost little more memory than one.
"""

from __future__ import annotations

from itertools import combinations

import torch
from torch import Tensor


def score_samples(samples: Tensor, target: Tensor) -> dict[str, Tensor]:
    """Scores [B] float64 of each image, from samples [K, B, N, D] and the true embedding x [B, N, D].

    `energy` is E|s-x| - E|s-s'|/2 (Gneiting & Raftery 2007) with the mean over the K(K-1)/2 pairs, without bias: that
    of a token, mean over tokens; `energy_pooled` that of the mean over tokens; `energy_whole` that of all tokens as one
    vector. `spread` is E|s-s'|^2, `mean_error` the squared error of the mean of infinitely many samples, estimated
    without bias from K; both are sums over channels, means over tokens. With K = 1, a point estimate, nothing spreads.
    """
    errors, gaps = _distances(samples, target)  # [K, B, N], [pairs, B, N]
    pooled = samples.mean(dim=2, dtype=torch.float64), target.mean(dim=1, dtype=torch.float64)
    spread = gaps.square().mean(dim=(0, 2))
    return {
        "energy": _energy(errors, gaps).mean(dim=1),
        "energy_pooled": _energy(*_distances(*pooled)),
        "energy_whole": _energy(length(errors, dim=2), length(gaps, dim=2)),
        "spread": spread,
        "mean_error": errors.square().mean(dim=(0, 2)) - spread / 2,  # a sample's error less its variance
    }


def score_coverage(samples: Tensor, target: Tensor, directions: Tensor) -> Tensor:
    """How often the true value lies among the samples [K, B, N, D], relative to what is right; [B] float64.

    Along each of the `directions` [D, P], x [B, N, D] lies within the least and the greatest of K samples of its own
    distribution with probability (K-1)/(K+1), by the ranks of K+1 equals; 1 is therefore right. NaN for K = 1.
    """
    K = len(samples)
    if K == 1:
        return target.new_full(target.shape[:1], torch.nan, dtype=torch.float64)
    true = target.double() @ directions  # [B, N, P]
    values = torch.stack([one.double() @ directions for one in samples])
    inside = (values.amin(dim=0) <= true) & (true <= values.amax(dim=0))
    return inside.double().mean(dim=(1, 2)) * (K + 1) / (K - 1)


def frechet_distance(means: Tensor, covariances: Tensor) -> Tensor:
    """Squared Fréchet distance of two normal distributions (Dowson & Landau 1982), from [2, D] and [2, D, D] float64.

    |m1-m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)); the root has the eigenvalues of C2^(1/2) C1 C2^(1/2), which is symmetric.
    Covariances may be singular.
    """
    first, second = covariances
    values, vectors = torch.linalg.eigh(second)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.mT
    product = root @ first @ root
    eigenvalues = torch.linalg.eigvalsh((product + product.mT) / 2).clamp(min=0)
    rounding = len(product) * torch.finfo(product.dtype).eps * eigenvalues.max()  # its root would not be small
    overlap = eigenvalues.masked_fill(eigenvalues < rounding, 0).sqrt().sum()
    distance = means.diff(dim=0).square().sum() + first.trace() + second.trace() - 2 * overlap
    return distance.clamp(min=0)


def length(x: Tensor, dim: int = -1) -> Tensor:
    """The Euclidean norm over one dimension, float64."""
    return torch.linalg.vector_norm(x, dim=dim, dtype=torch.float64)


def _distances(samples: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """|s-x| of each sample, [K, ...], and |s-s'| of each pair, [K(K-1)/2, ...]; zero [1, ...] if there is none."""
    errors = torch.stack([length(one - target) for one in samples])
    pairs = [length(one - other) for one, other in combinations(samples, 2)]
    return errors, torch.stack(pairs) if pairs else torch.zeros_like(errors)


def _energy(errors: Tensor, gaps: Tensor) -> Tensor:
    return errors.mean(dim=0) - gaps.mean(dim=0) / 2
