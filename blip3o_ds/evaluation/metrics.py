"""How good generated embeddings are: proper scores of K samples an image, distribution, similarity and retrieval.

Sums are kept in float64 and per image, so that several ranks together give the metrics of one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import normalize

from blip3o_ds.errors import Blip3oError
from blip3o_ds.evaluation.scores import frechet_distance, length, score_coverage, score_samples

# For each image: the scores of its K samples (see `scores`), then, of its first sample g, means over tokens: cos(g, c),
# where the cosine with a zero vector is 0; cos(g - m, c - m); the squared error; the norm of g and of c.
PER_IMAGE = (
    *("energy", "energy_pooled", "energy_whole", "spread", "mean_error", "coverage"),
    *("similarity", "centered", "mse", "norm", "target_norm"),
)
CENTRING_TOLERANCE = 1e-6  # a difference this small relative to its operands is rounding of fp32, not a direction
TIE_TOLERANCE = 1e-9  # cosines in float64 that differ by less are equal
RETRIEVAL_CHUNK = 1024  # rows of the similarity matrix in memory at once


@dataclass(frozen=True)
class Collected:
    """What the metrics are computed from: g are the samples' tokens, c the true ones, m their training mean."""

    per_image: Tensor  # [images, 11] float64: the columns `PER_IMAGE`
    pooled: Tensor  # [images, 2, D] mean over tokens of g - m, of the first samples, and of c - m
    token_sums: Tensor  # [2, D] float64, over all tokens, of g - m, mean over the samples, and of c - m
    token_products: Tensor  # [2, D, D] float64, the same of (g - m) (g - m)^T and (c - m) (c - m)^T
    num_tokens: int

    @staticmethod
    def join(parts: Sequence[Collected]) -> Collected:
        """What was collected over disjoint images, by several ranks."""
        return Collected(
            torch.cat([part.per_image for part in parts]),
            torch.cat([part.pooled for part in parts]),
            sum((part.token_sums for part in parts[1:]), parts[0].token_sums),
            sum((part.token_products for part in parts[1:]), parts[0].token_products),
            sum(part.num_tokens for part in parts),
        )

    def compute(self) -> dict[str, float]:
        """The `METRICS`, without those that these images do not determine; a ratio whose denominator is zero is 0.

        Raises Blip3oError if there is no image.
        """
        if len(self.per_image) == 0:
            raise Blip3oError("there is no image to evaluate; the dataset, or the chosen part of it, is empty")
        computed = {name: metric.compute(self) for name, metric in METRICS.items()}
        return {name: float(value) for name, value in computed.items() if value is not None}

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
        """Mean of the tokens g and c, relative to m, [2, D]."""
        return self.token_sums / self.num_tokens

    @cached_property
    def covariances(self) -> Tensor:
        """Covariance of the tokens g and c, [2, D, D]."""
        return self.token_products / self.num_tokens - self.means[:, :, None] * self.means[:, None, :]

    @cached_property
    def variances(self) -> Tensor:
        """Variance of each channel of g and c, [2, D]."""
        return self.covariances.diagonal(dim1=1, dim2=2).clamp(min=0)

    def spread_skill(self) -> Tensor | None:
        """None if there is a spread, but no error of the mean beyond what the spread explains."""
        spread, error = self.column("spread").mean(), self.column("mean_error").mean()
        return None if spread > 0 and error <= 0 else _ratio(spread, 2 * error)

    def coverage(self) -> Tensor | None:
        """None of point estimates, and without directions."""
        covered = self.column("coverage").mean()
        return None if covered.isnan() else covered

    def share_above(self, threshold: float) -> Tensor:
        return (self.column("similarity") > threshold).double().mean()

    def share_retrieved(self, k: int) -> Tensor:
        return (self.rank < k).double().mean()

    def frechet_pooled(self) -> Tensor | None:
        """None of too few images for a covariance."""
        images, _, D = self.pooled.shape
        if images <= D:
            return None
        sides = self.pooled.double().transpose(0, 1)  # [2, images, D]
        means = sides.mean(dim=1)
        deviations = sides - means[:, None]
        return frechet_distance(means, deviations.mT @ deviations / images)

    def frechet_diagonal(self) -> Tensor:
        mean_gap, std_gap = self.means.diff(dim=0), self.variances.sqrt().diff(dim=0)
        return (mean_gap.square() + std_gap.square()).sum()


@dataclass(frozen=True)
class Metric:
    """One metric: the head of its column in tables, how it is computed, and what comparisons need to know."""

    column: str | None  # None: it is only in JSON
    compute: Callable[[Collected], Tensor | None]  # None: these images do not determine it
    ideal: float | None = None  # its best value: the nearest to it is the best; None: none is better
    any_length: bool = False  # the same for raw and unit-norm embeddings, so that the two may be compared


METRICS = {
    # A strictly proper score: its expectation is least for samples of the right distribution, and for no others.
    "energy_score": Metric("energy", lambda c: c.column("energy").mean(), ideal=0),
    "energy_score_pooled": Metric(None, lambda c: c.column("energy_pooled").mean(), ideal=0),
    "energy_score_whole": Metric(None, lambda c: c.column("energy_whole").mean(), ideal=0),
    # E|s-s'|^2 over twice the squared error of the mean, of tokens: 1 is calibrated, less is overconfident.
    "spread_skill": Metric("spread", lambda c: c.spread_skill(), ideal=1),
    "mean_error": Metric("error", lambda c: c.column("mean_error").mean(), ideal=0),
    # Squared Fréchet distance between the distributions of tokens, and of pooled images, as normal ones (Dowson &
    # Landau 1982; Heusel et al. 2017). Its bias grows as images and samples get fewer, and favours noise that averages
    # out within an image; `frechet` is of all K samples, `frechet_pooled` of the first.
    "frechet": Metric("frechet", lambda c: frechet_distance(c.means, c.covariances), ideal=0),
    "frechet_pooled": Metric(None, lambda c: c.frechet_pooled(), ideal=0),
    "coverage": Metric("cover", lambda c: c.coverage(), ideal=1),
    # Without centring, any vector near m has a high similarity.
    "clip_similarity": Metric("cos", lambda c: c.column("similarity").mean(), ideal=1, any_length=True),
    "clip_similarity_centered": Metric("cos-c", lambda c: c.column("centered").mean(), ideal=1),
    # Shares of the images whose own clip_similarity is above a threshold.
    "high_quality": Metric(None, lambda c: c.share_above(0.7), ideal=1, any_length=True),
    "very_high_quality": Metric(">0.8", lambda c: c.share_above(0.8), ideal=1, any_length=True),
    "excellent_quality": Metric(None, lambda c: c.share_above(0.9), ideal=1, any_length=True),
    "mse": Metric(None, lambda c: c.column("mse").mean(), ideal=0),
    "norm_ratio": Metric("norm", lambda c: _ratio(c.column("norm").mean(), c.column("target_norm").mean()), ideal=1),
    # Shares of the generated images whose pooled, centred embedding has the true image as its nearest by cosine, or
    # among its five nearest, of all true images. Ties count against, so a constant output retrieves nothing.
    "retrieval_r1": Metric("R@1", lambda c: c.share_retrieved(1), ideal=1),
    "retrieval_r5": Metric("R@5", lambda c: c.share_retrieved(5), ideal=1),
    # The Fréchet distance of tokens without their correlations.
    "frechet_diagonal": Metric(None, lambda c: c.frechet_diagonal(), ideal=0),
    # Mean over channels of the tokens' variance, generated over true.
    "variance_ratio": Metric("var", lambda c: _ratio(c.variances[0].mean(), c.variances[1].mean()), ideal=1),
}
METRIC_NAMES = tuple(METRICS)


class MetricAccumulator:
    """Collects samples and true embeddings batch by batch; `payload` is what it has, to be joined with other ranks'.

    `train_mean` is m, [D]; `directions` [D, P] are those of `coverage`, the same on every rank; `label` names the
    samples in errors.
    """

    def __init__(self, train_mean: Tensor, directions: Tensor | None = None, label: str = "generated") -> None:
        self._mean = train_mean.detach().double()
        self._directions = None if directions is None else directions.detach().double()
        self._label = label
        D = len(train_mean)
        self._per_image = [torch.zeros(0, len(PER_IMAGE), dtype=torch.float64)]
        self._pooled = [torch.zeros(0, 2, D)]
        self._sums = torch.zeros(2, D, dtype=torch.float64)
        self._products = torch.zeros(2, D, D, dtype=torch.float64)
        self._num_tokens = 0

    def update(self, samples: Tensor, target: Tensor, names: Sequence[str]) -> None:
        """Add a batch of images: K samples of each, [K, B, N, D], and `target` [B, N, D]; `names` [B] are for errors.

        Raises ValueError for other shapes, and Blip3oError for an embedding that is not finite, with its image.
        """
        D = len(self._mean)
        if samples.shape[1:] != target.shape or samples.ndim != 4 or target.shape[-1] != D:
            raise ValueError(
                f"expected samples [K, B, N, {D}] and target [B, N, {D}], "
                f"found {list(samples.shape)} and {list(target.shape)}"
            )
        _check_finite(self._label, samples, names)
        _check_finite("true", target[None], names)
        self._add(samples.detach(), target.detach())

    def _add(self, samples: Tensor, target: Tensor) -> None:
        device = target.device
        mean = self._mean.to(device)
        dtype = torch.promote_types(torch.promote_types(samples.dtype, target.dtype), torch.float32)
        samples, target = samples.to(dtype), target.to(dtype)
        *centred, true = (x - mean.to(dtype) for x in (*samples, target))
        self._add_moments(centred, true)
        deviations = torch.stack([centred[0], true])  # [2, B, N, D]
        means = deviations.mean(dim=2, dtype=torch.float64)

        rounding = CENTRING_TOLERANCE * mean.norm()
        columns = {**score_samples(samples, target), **_similarities(samples[0], target)}
        columns["centered"] = _cosine(deviations[0], deviations[1], rounding).mean(dim=1)
        if self._directions is None:
            columns["coverage"] = torch.full_like(columns["energy"], torch.nan)
        else:
            columns["coverage"] = score_coverage(samples, target, self._directions.to(device))
        self._per_image.append(torch.stack([columns[name] for name in PER_IMAGE], dim=1).cpu())
        means = means.masked_fill(means.norm(dim=-1, keepdim=True) <= rounding, 0.0)
        self._pooled.append(means.float().transpose(0, 1).cpu())

    def _add_moments(self, samples: Sequence[Tensor], target: Tensor) -> None:
        """Add those of K samples and of the true embedding, less m, each [B, N, D]; the former are means over K."""
        self._sums, self._products = self._sums.to(target.device), self._products.to(target.device)
        for place, side in enumerate((samples, [target])):
            for one in side:
                tokens = one.double().flatten(0, 1)
                self._sums[place] += tokens.sum(dim=0) / len(side)
                self._products[place] += tokens.T @ tokens / len(side)
        self._num_tokens += target.shape[0] * target.shape[1]

    def payload(self) -> Collected:
        per_image, pooled = torch.cat(self._per_image), torch.cat(self._pooled)
        sums, products = (moment.to("cpu", copy=True) for moment in (self._sums, self._products))
        return Collected(per_image, pooled, sums, products, self._num_tokens)


def _check_finite(label: str, embeddings: Tensor, names: Sequence[str]) -> None:
    """`embeddings` are [K, B, N, D]."""
    if embeddings.sum(dtype=torch.float64).isfinite():
        return  # all of them are, by the quicker test
    finite = embeddings.isfinite().all(dim=-1).all(dim=-1).all(dim=0)
    if finite.all():
        return
    image = names[int((~finite).nonzero()[0])]
    raise Blip3oError(
        f"image {image}: its {label} embedding holds NaN or infinity, so metrics cannot be computed; the checkpoint "
        "has diverged or the dataset is damaged (check it with blip3o-ds data verify DIR)"
    )


def _similarities(generated: Tensor, target: Tensor) -> dict[str, Tensor]:
    """How near one sample is to the true embedding, both [B, N, D]: each [B] float64."""
    return {
        "similarity": _cosine(generated, target).mean(dim=1),
        "mse": (length(generated - target).square() / target.shape[2]).mean(dim=1),
        "norm": length(generated).mean(dim=1),
        "target_norm": length(target).mean(dim=1),
    }


def _cosine(a: Tensor, b: Tensor, least: Tensor | float = 0.0) -> Tensor:
    """Over the last dimension, float64; 0 where one of the two is not longer than `least`."""
    lengths = torch.stack([length(a), length(b)])
    cosine = (a * b).sum(dim=-1, dtype=torch.float64) / lengths.prod(dim=0)
    return torch.where((lengths > least).all(dim=0), cosine, torch.zeros_like(cosine))


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    return numerator / denominator if denominator > 0 else torch.zeros_like(numerator)
