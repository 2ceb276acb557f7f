"""How close generated embeddings are to the true ones: similarity, error, retrieval, and distribution.

Sums are kept in float64 and per image, so that several ranks together give exactly the metrics of one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from blip3o_ds.errors import Blip3oError

CENTRING_TOLERANCE = 1e-6  # a difference this small relative to its operands is rounding of fp32, not a direction
TIE_TOLERANCE = 1e-9  # cosines in float64 that differ by less are equal
RETRIEVAL_CHUNK = 1024  # rows of the similarity matrix in memory at once


@dataclass(frozen=True)
class Collected:
    """What the metrics are computed from: g are the generated token embeddings, c the true ones, m their mean."""

    similarity: Tensor  # [images] mean over tokens of cos(g, c); the cosine with a zero vector is 0
    centered: Tensor  # [images] the same of cos(g - m, c - m)
    mse: Tensor  # [images]
    norm: Tensor  # [images] mean token norm of g
    target_norm: Tensor  # [images] and of c
    pooled: Tensor  # [images, 2, D] mean over tokens of g - m and c - m
    channel_sums: Tensor  # [4, D] over all tokens: g - m, (g - m)^2, c - m, (c - m)^2
    num_tokens: int

    @cached_property
    def rank(self) -> Tensor:
        """How many wrong true images are at least as near as the right one, [images]."""
        return _retrieval_rank(*self.pooled.double().unbind(dim=1))

    @cached_property
    def means(self) -> tuple[Tensor, Tensor]:
        """Mean of each channel of g and c, relative to m, [D] each."""
        return self.channel_sums[0] / self.num_tokens, self.channel_sums[2] / self.num_tokens

    @cached_property
    def variances(self) -> tuple[Tensor, Tensor]:
        """Variance of each channel of g and c, [D] each."""
        squares = self.channel_sums[1] / self.num_tokens, self.channel_sums[3] / self.num_tokens
        of_generated, of_true = (
            (sq - mean.square()).clamp(min=0) for sq, mean in zip(squares, self.means, strict=True)
        )
        return of_generated, of_true

    def share_above(self, threshold: float) -> Tensor:
        return (self.similarity > threshold).double().mean()

    def share_retrieved(self, k: int) -> Tensor:
        return (self.rank < k).double().mean()

    def frechet_diagonal(self) -> Tensor:
        (mean, target_mean), (variance, target_variance) = self.means, self.variances
        return ((mean - target_mean).square() + (variance.sqrt() - target_variance.sqrt()).square()).sum()


@dataclass(frozen=True)
class Metric:
    """One metric: the head of its column in tables, and how it is computed."""

    column: str
    compute: Callable[[Collected], Tensor]


METRICS = {
    # Without centring, any vector near m has a high similarity.
    "clip_similarity": Metric("cos", lambda c: c.similarity.mean()),
    "clip_similarity_centered": Metric("cos-c", lambda c: c.centered.mean()),
    # Shares of the images whose own clip_similarity is above a threshold.
    "high_quality": Metric(">0.7", lambda c: c.share_above(0.7)),
    "very_high_quality": Metric(">0.8", lambda c: c.share_above(0.8)),
    "excellent_quality": Metric(">0.9", lambda c: c.share_above(0.9)),
    "mse": Metric("mse", lambda c: c.mse.mean()),
    "norm_ratio": Metric("norm", lambda c: _ratio(c.norm.mean(), c.target_norm.mean())),
    # Shares of the generated images whose pooled, centred embedding has the true image as its nearest by cosine, or
    # among its five nearest, of all true images. Ties count against, so a constant output retrieves nothing.
    "retrieval_r1": Metric("R@1", lambda c: c.share_retrieved(1)),
    "retrieval_r5": Metric("R@5", lambda c: c.share_retrieved(5)),
    # Squared Fréchet distance between the token distributions as normal ones with diagonal covariance (Dowson & Landau
    # 1982; the FID of Heusel et al. 2017 without covariances).
    "frechet_diagonal": Metric("frechet", lambda c: c.frechet_diagonal()),
    # Mean over channels of the tokens' variance, generated over true.
    "variance_ratio": Metric("var", lambda c: _ratio(c.variances[0].mean(), c.variances[1].mean())),
}
METRIC_NAMES = tuple(METRICS)


class MetricAccumulator:
    """Collects generated and true embeddings batch by batch, then computes every one of `METRICS`.

    A ratio whose denominator is zero is 0.
    """

    def __init__(self, train_mean: Tensor, label: str = "generated") -> None:
        """`train_mean` is m, [D]; `label` names the generated embeddings in errors."""
        self._mean = train_mean.detach().double().cpu()
        self._label = label
        self._per_image: list[Tensor] = []  # [B, 5] each: similarity, centred similarity, mse, norm of g, norm of c
        self._pooled: list[Tensor] = []  # [B, 2, D] each: g, c, centred by m
        self._channel_sums = torch.zeros(4, len(train_mean), dtype=torch.float64)  # of g-m, (g-m)^2, c-m, (c-m)^2
        self._num_tokens = 0

    def update(self, generated: Tensor, target: Tensor, indices: Tensor | Sequence[int] | None = None) -> None:
        """Add a batch of images, `generated` and `target` [B, N, D]; `indices` [B] name the images in errors.

        Raises:
            ValueError: the shapes differ from each other or from the training mean.
            Blip3oError: an embedding is not finite; the first such image is named.
        """
        self._check_shapes(generated, target)
        first = sum(len(batch) for batch in self._per_image)
        numbers = range(first, first + len(target)) if indices is None else [int(i) for i in indices]
        _check_finite(self._label, generated, numbers)
        _check_finite("true", target, numbers)

        mean = self._mean.to(target.device)
        generated, target = generated.detach().double(), target.detach().double()
        per_image = torch.stack(
            (
                _cosine(generated, target).mean(dim=1),
                _cosine(_centre(generated, mean), _centre(target, mean)).mean(dim=1),
                (generated - target).square().mean(dim=(1, 2)),
                generated.norm(dim=-1).mean(dim=1),
                target.norm(dim=-1).mean(dim=1),
            ),
            dim=1,
        )
        pooled = torch.stack((_centre(generated.mean(dim=1), mean), _centre(target.mean(dim=1), mean)), dim=1)
        self._per_image.append(per_image.cpu())
        self._pooled.append(pooled.float().cpu())
        for side, deviation in enumerate((generated - mean, target - mean)):
            self._channel_sums[2 * side] += deviation.sum(dim=(0, 1)).cpu()
            self._channel_sums[2 * side + 1] += deviation.square().sum(dim=(0, 1)).cpu()
        self._num_tokens += target.shape[0] * target.shape[1]

    def payload(self) -> dict[str, Tensor]:
        """Everything collected so far, as CPU tensors that another process can join with `from_payloads`."""
        dim = len(self._mean)
        return {
            "train_mean": self._mean,
            "per_image": torch.cat([torch.zeros(0, 5, dtype=torch.float64), *self._per_image]),
            "pooled": torch.cat([torch.zeros(0, 2, dim), *self._pooled]),
            "channel_sums": self._channel_sums,
            "num_tokens": torch.tensor(self._num_tokens),
        }

    @classmethod
    def from_payloads(cls, payloads: Sequence[dict[str, Tensor]], label: str = "generated") -> MetricAccumulator:
        """Join what several ranks collected over disjoint images."""
        joined = cls(payloads[0]["train_mean"], label)
        for payload in payloads:
            joined._per_image.append(payload["per_image"])
            joined._pooled.append(payload["pooled"])
            joined._channel_sums += payload["channel_sums"]
            joined._num_tokens += int(payload["num_tokens"])
        return joined

    def compute(self) -> dict[str, float]:
        """Every one of `METRICS` over all images added.

        Raises:
            Blip3oError: no image was added.
        """
        payload = self.payload()
        per_image = payload["per_image"]
        if len(per_image) == 0:
            raise Blip3oError("there is no image to evaluate; the dataset, or the chosen part of it, is empty")
        similarity, centered, mse, norm, target_norm = per_image.unbind(dim=1)
        pooled, sums, count = payload["pooled"], self._channel_sums, self._num_tokens
        collected = Collected(similarity, centered, mse, norm, target_norm, pooled, sums, count)
        return {name: float(metric.compute(collected)) for name, metric in METRICS.items()}

    def _check_shapes(self, generated: Tensor, target: Tensor) -> None:
        if generated.shape != target.shape or target.ndim != 3 or target.shape[-1] != len(self._mean):
            raise ValueError(
                f"expected generated and target of one shape [B, N, {len(self._mean)}], "
                f"found {list(generated.shape)} and {list(target.shape)}"
            )


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


def _retrieval_rank(generated: Tensor, target: Tensor) -> Tensor:
    """How many wrong true images are at least as near as the right one, [images]; inputs [images, D], centred."""
    generated = torch.nn.functional.normalize(generated, dim=-1, eps=1e-300)
    target = torch.nn.functional.normalize(target, dim=-1, eps=1e-300)
    own = (generated * target).sum(dim=-1)
    ranks = []
    for rows, right in zip(generated.split(RETRIEVAL_CHUNK), own.split(RETRIEVAL_CHUNK), strict=True):
        as_near = (rows @ target.T >= right[:, None] - TIE_TOLERANCE).sum(dim=1)
        ranks.append(as_near - 1)  # the right image itself
    return torch.cat(ranks)


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    return numerator / denominator if denominator > 0 else torch.zeros_like(numerator)
