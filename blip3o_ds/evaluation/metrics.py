"""How close generated embeddings are to the true ones: similarity, error, retrieval, and distribution.

Sums are kept in float64 and per image, so that several ranks together give exactly the metrics of one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import normalize

from blip3o_ds.errors import Blip3oError

# Of each image, means over tokens: cos(g, c), where the cosine with a zero vector is 0; cos(g - m, c - m); the squared
# error; the norm of g and of c.
PER_IMAGE = ("similarity", "centered", "mse", "norm", "target_norm")
CENTRING_TOLERANCE = 1e-6  # a difference this small relative to its operands is rounding of fp32, not a direction
TIE_TOLERANCE = 1e-9  # cosines in float64 that differ by less are equal
RETRIEVAL_CHUNK = 1024  # rows of the similarity matrix in memory at once


@dataclass(frozen=True)
class Collected:
    """What the metrics are computed from: g are the generated token embeddings, c the true ones, m their mean."""

    per_image: Tensor  # [images, 5] float64: the columns `PER_IMAGE`
    pooled: Tensor  # [images, 2, D] mean over tokens of g - m and c - m
    channel_sums: Tensor  # [4, D] float64, over all tokens: g - m, (g - m)^2, c - m, (c - m)^2
    num_tokens: int

    @staticmethod
    def join(parts: Sequence[Collected]) -> Collected:
        """What was collected over disjoint images, by batches or by ranks."""
        return Collected(
            torch.cat([part.per_image for part in parts]),
            torch.cat([part.pooled for part in parts]),
            sum((part.channel_sums for part in parts), torch.zeros_like(parts[0].channel_sums)),
            sum(part.num_tokens for part in parts),
        )

    def compute(self) -> dict[str, float]:
        """Every one of `METRICS`; a ratio whose denominator is zero is 0. Raises Blip3oError if there is no image."""
        if len(self.per_image) == 0:
            raise Blip3oError("there is no image to evaluate; the dataset, or the chosen part of it, is empty")
        return {name: float(metric.compute(self)) for name, metric in METRICS.items()}

    def column(self, name: str) -> Tensor:
        return self.per_image[:, PER_IMAGE.index(name)]

    @cached_property
    def rank(self) -> Tensor:
        """How many wrong true images are at least as near as the right one, [images]."""
        generated, target = normalize(self.pooled.double(), dim=-1, eps=1e-300).unbind(dim=1)
        own = (generated * target).sum(dim=-1)
        ranks = []
        for rows, right in zip(generated.split(RETRIEVAL_CHUNK), own.split(RETRIEVAL_CHUNK), strict=True):
            as_near = (rows @ target.T >= right[:, None] - TIE_TOLERANCE).sum(dim=1)
            ranks.append(as_near - 1)  # the right image itself
        return torch.cat(ranks)

    @cached_property
    def means(self) -> Tensor:
        """Mean of each channel of g and c, relative to m, [2, D]."""
        return self.channel_sums[0::2] / self.num_tokens

    @cached_property
    def variances(self) -> Tensor:
        """Variance of each channel of g and c, [2, D]."""
        return (self.channel_sums[1::2] / self.num_tokens - self.means.square()).clamp(min=0)

    def share_above(self, threshold: float) -> Tensor:
        return (self.column("similarity") > threshold).double().mean()

    def share_retrieved(self, k: int) -> Tensor:
        return (self.rank < k).double().mean()

    def frechet_diagonal(self) -> Tensor:
        mean_gap, std_gap = self.means.diff(dim=0), self.variances.sqrt().diff(dim=0)
        return (mean_gap.square() + std_gap.square()).sum()


@dataclass(frozen=True)
class Metric:
    """One metric: the head of its column in tables, how it is computed, and what comparisons need to know."""

    column: str
    compute: Callable[[Collected], Tensor]
    ideal: float | None = None  # its value for perfect embeddings: the nearest is the best; None: none is better
    any_length: bool = False  # the same for raw and unit-norm embeddings, so that the two may be compared


METRICS = {
    # Without centring, any vector near m has a high similarity.
    "clip_similarity": Metric("cos", lambda c: c.column("similarity").mean(), ideal=1, any_length=True),
    "clip_similarity_centered": Metric("cos-c", lambda c: c.column("centered").mean(), ideal=1),
    # Shares of the images whose own clip_similarity is above a threshold.
    "high_quality": Metric(">0.7", lambda c: c.share_above(0.7), ideal=1, any_length=True),
    "very_high_quality": Metric(">0.8", lambda c: c.share_above(0.8), ideal=1, any_length=True),
    "excellent_quality": Metric(">0.9", lambda c: c.share_above(0.9), ideal=1, any_length=True),
    "mse": Metric("mse", lambda c: c.column("mse").mean(), ideal=0),
    "norm_ratio": Metric("norm", lambda c: _ratio(c.column("norm").mean(), c.column("target_norm").mean()), ideal=1),
    # Shares of the generated images whose pooled, centred embedding has the true image as its nearest by cosine, or
    # among its five nearest, of all true images. Ties count against, so a constant output retrieves nothing.
    "retrieval_r1": Metric("R@1", lambda c: c.share_retrieved(1), ideal=1),
    "retrieval_r5": Metric("R@5", lambda c: c.share_retrieved(5), ideal=1),
    # Squared Fréchet distance between the token distributions as normal ones with diagonal covariance (Dowson & Landau
    # 1982; the FID of Heusel et al. 2017 without covariances).
    "frechet_diagonal": Metric("frechet", lambda c: c.frechet_diagonal(), ideal=0),
    # Mean over channels of the tokens' variance, generated over true.
    "variance_ratio": Metric("var", lambda c: _ratio(c.variances[0].mean(), c.variances[1].mean()), ideal=1),
}
METRIC_NAMES = tuple(METRICS)


class MetricAccumulator:
    """Collects generated and true embeddings batch by batch; `payload` is what it has, to be joined with other ranks'.

    `train_mean` is m, [D]; `label` names the generated embeddings in errors.
    """

    def __init__(self, train_mean: Tensor, label: str = "generated") -> None:
        self._mean = train_mean.detach().double().cpu()
        self._label = label
        D = len(train_mean)
        nothing = torch.zeros(0, len(PER_IMAGE), dtype=torch.float64)
        self._parts = [Collected(nothing, torch.zeros(0, 2, D), torch.zeros(4, D, dtype=torch.float64), 0)]

    def update(self, generated: Tensor, target: Tensor, indices: Tensor | Sequence[int] | None = None) -> None:
        """Add a batch of images, `generated` and `target` [B, N, D]; `indices` [B] name the images in errors.

        Raises ValueError for other shapes, and Blip3oError for an embedding that is not finite, with its image.
        """
        D = len(self._mean)
        if generated.shape != target.shape or target.ndim != 3 or target.shape[-1] != D:
            raise ValueError(
                f"expected generated and target of one shape [B, N, {D}], "
                f"found {list(generated.shape)} and {list(target.shape)}"
            )
        first = sum(len(part.per_image) for part in self._parts)
        numbers = range(first, first + len(target)) if indices is None else [int(i) for i in indices]
        _check_finite(self._label, generated, numbers)
        _check_finite("true", target, numbers)

        mean = self._mean.to(target.device)
        generated, target = generated.detach().double(), target.detach().double()
        per_image = (
            _cosine(generated, target).mean(dim=1),
            _cosine(_centre(generated, mean), _centre(target, mean)).mean(dim=1),
            (generated - target).square().mean(dim=(1, 2)),
            generated.norm(dim=-1).mean(dim=1),
            target.norm(dim=-1).mean(dim=1),
        )
        pooled = torch.stack([_centre(side.mean(dim=1), mean) for side in (generated, target)], dim=1).float()
        deviations = (generated - mean, target - mean)
        sums = torch.stack([x.sum(dim=(0, 1)) for d in deviations for x in (d, d.square())])
        tokens = target.shape[0] * target.shape[1]
        first_part = self._parts[0]  # has the sums of all batches
        self._parts[0] = replace(first_part, channel_sums=first_part.channel_sums + sums.cpu())
        self._parts.append(Collected(torch.stack(per_image, dim=1).cpu(), pooled.cpu(), torch.zeros(()), tokens))

    def payload(self) -> Collected:
        return Collected.join(self._parts)


def _check_finite(label: str, embeddings: Tensor, indices: Sequence[int]) -> None:
    finite = embeddings.isfinite().all(dim=-1).all(dim=-1)
    if finite.all():
        return
    image = indices[int((~finite).nonzero()[0])]
    raise Blip3oError(
        f"image {image}: its {label} embedding holds NaN or infinity, so metrics cannot be computed; the checkpoint "
        "has diverged or the dataset is damaged (check it with blip3o-ds data verify DIR)"
    )


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    lengths = a.norm(dim=-1) * b.norm(dim=-1)
    return torch.where(lengths > 0, (a * b).sum(dim=-1) / lengths, torch.zeros_like(lengths))


def _centre(x: Tensor, mean: Tensor) -> Tensor:
    deviation = x - mean
    rounding = deviation.norm(dim=-1, keepdim=True) <= CENTRING_TOLERANCE * mean.norm()
    return deviation.masked_fill(rounding, 0.0)


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    return numerator / denominator if denominator > 0 else torch.zeros_like(numerator)
