"""How close generated embeddings are to the true ones: similarity, error, retrieval, and distribution.

Sums are kept in float64 and per image, so that the slices of several ranks join into exactly the metrics of one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from blip3o_ds.errors import Blip3oError

METRIC_NAMES = (
    "clip_similarity",
    "clip_similarity_centered",
    "high_quality",
    "very_high_quality",
    "excellent_quality",
    "mse",
    "norm_ratio",
    "retrieval_r1",
    "retrieval_r5",
    "frechet_diagonal",
    "variance_ratio",
)
QUALITY_THRESHOLDS = {"high_quality": 0.7, "very_high_quality": 0.8, "excellent_quality": 0.9}
CENTRING_TOLERANCE = 1e-6  # a difference this small beside its operands is the rounding of fp32, not a direction
TIE_TOLERANCE = 1e-9  # cosines in float64 that differ by less are equal
RETRIEVAL_CHUNK = 1024  # rows of the similarity matrix in memory at once


class MetricAccumulator:
    """Collects generated and true embeddings batch by batch, then computes every metric of `METRIC_NAMES`.

    With g and c the generated and the true token embeddings, m the training mean of the true ones, and the cosine with
    a zero vector being 0:

    - `clip_similarity`: mean over images of the mean over tokens of cos(g, c).
    - `clip_similarity_centered`: the same with cos(g - m, c - m); without it, any vector near m scores high.
    - `high_quality`, `very_high_quality`, `excellent_quality`: shares of the images whose own `clip_similarity` is
      above 0.7, 0.8 and 0.9.
    - `mse`: mean of (g - c)^2 over images, tokens and channels.
    - `norm_ratio`: mean token norm of g over that of c.
    - `retrieval_r1`, `retrieval_r5`: images are pooled (mean over tokens), centred by m and compared by cosine; the
      share of generated images whose true image is the nearest, or among the five nearest, of all true images. Ties
      count against, so a constant output retrieves nothing.
    - `frechet_diagonal`: squared Fréchet distance between the two token distributions taken as normal with diagonal
      covariance (Dowson & Landau 1982; the FID of Heusel et al. 2017 without covariances):
      sum over channels of (mean_g - mean_c)^2 + (std_g - std_c)^2.
    - `variance_ratio`: mean over channels of the tokens' variance, generated over true.

    A ratio whose denominator is zero is 0.
    """

    def __init__(self, train_mean: Tensor, label: str = "generated") -> None:
        """`train_mean` is m, [D]; `label` names the generated side in errors."""
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
        """Every metric of `METRIC_NAMES` over all images added.

        Raises:
            Blip3oError: no image was added.
        """
        collected = self.payload()
        per_image = collected["per_image"]
        if len(per_image) == 0:
            raise Blip3oError("there is no image to evaluate; the dataset, or the part of it asked for, is empty")
        similarity, centered, mse, norm, target_norm = per_image.unbind(dim=1)
        values = {"clip_similarity": similarity.mean(), "clip_similarity_centered": centered.mean()}
        for name, threshold in QUALITY_THRESHOLDS.items():
            values[name] = (similarity > threshold).double().mean()
        values["mse"] = mse.mean()
        values["norm_ratio"] = _ratio(norm.mean(), target_norm.mean())
        rank = _retrieval_rank(*collected["pooled"].double().unbind(dim=1))
        values["retrieval_r1"] = (rank < 1).double().mean()
        values["retrieval_r5"] = (rank < 5).double().mean()
        values["frechet_diagonal"], values["variance_ratio"] = self._distribution()
        return {name: float(values[name]) for name in METRIC_NAMES}

    def _distribution(self) -> tuple[Tensor, Tensor]:
        mean, mean_square, target_mean, target_mean_square = self._channel_sums / self._num_tokens
        variance = (mean_square - mean.square()).clamp(min=0)
        target_variance = (target_mean_square - target_mean.square()).clamp(min=0)
        frechet = (mean - target_mean).square() + (variance.sqrt() - target_variance.sqrt()).square()
        return frechet.sum(), _ratio(variance.mean(), target_variance.mean())

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
        f"image {image}: its {label} embedding holds NaN or infinity, so no metric of it means anything; "
        "a diverged checkpoint or a damaged dataset gives this (blip3o-ds data verify DIR tells which)"
    )


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    lengths = a.norm(dim=-1) * b.norm(dim=-1)
    return torch.where(lengths > 0, (a * b).sum(dim=-1) / lengths, torch.zeros_like(lengths))


def _centre(x: Tensor, mean: Tensor) -> Tensor:
    deviation = x - mean
    rounding = deviation.norm(dim=-1, keepdim=True) <= CENTRING_TOLERANCE * mean.norm()
    return deviation.masked_fill(rounding, 0.0)


def _retrieval_rank(generated: Tensor, target: Tensor) -> Tensor:
    """How many wrong true images are at least as near as the right one, [n]; both inputs [n, D], centred."""
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
