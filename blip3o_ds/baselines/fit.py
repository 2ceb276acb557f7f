"""Fitting the baselines to a dataset, streamed: a look at its scales, sums of products, and the residuals' modes.

Samples are divided into folds by image (`DatasetSpec.image_of`). All is on normalised embeddings.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from blip3o_ds.baselines.baselines import Baselines
from blip3o_ds.baselines.ridge import RidgeFit, Sums, fit_ridge
from blip3o_ds.data.format.schema import TokenLayout
from blip3o_ds.data.normalization import Normalizer
from blip3o_ds.data.reading.dataset import EmbeddingDataset
from blip3o_ds.data.reading.loader import read_batches, spread_indices
from blip3o_ds.errors import DataError
from blip3o_ds.flow.prior import LinearGaussian, Surroundings
from blip3o_ds.progress import Progress

logger = logging.getLogger(__name__)

FOLDS = 5
FIT_BATCH = 8  # samples read and multiplied at once
MAX_FIT_SAMPLES = 2048  # of 256 tokens: 128 tokens per channel of 4096; more take time and change little
SURVEY_SAMPLES = 128  # that decide the origin and the principal directions of the surroundings
COST_SAMPLES = 64  # about 16,000 tokens, four times the channels of EVA-CLIP-8B
BASIS_WIDTH = 128  # principal directions of EVA in which the surroundings are seen
MAX_DIRECTIONS = 16  # in which coverage is measured
SHRINKAGE = 10.0  # samples that the separable model of the modes' variance counts as
LARGEST = 1e15  # of an embedding's numbers: sums of squares stay far below what fp32 holds
LEAST_VARIANCE = 1e-4  # of a mode, relative to the mean of all modes


def fit_baselines(
    dataset: EmbeddingDataset,
    normalizer: Normalizer,
    max_samples: int = MAX_FIT_SAMPLES,
    device: torch.device | str = "cpu",
) -> Baselines:
    """Fit to the tokens of `dataset`, at most those of `max_samples` spread evenly over it, in three readings.

    Memory is that of seven matrices [F, F] in float64, with F = De + 9 * 128 features.

    Raises:
        DataError: the dataset is empty, or an embedding is not finite or absurdly large.
    """
    reading = _Reading(dataset, normalizer, spread_indices(len(dataset), max_samples), device)
    eva_mean, eva_std, covariance, clip_mean = _survey(reading)
    basis = _leading(covariance, BASIS_WIDTH).float()
    surroundings = Surroundings(eva_mean, basis, dataset.spec.token_layout == "cls_patch")
    sums = _collect(reading, surroundings, clip_mean)
    total = Sums.total(sums)
    ridge, context = fit_ridge([part.first(len(eva_mean)) for part in sums]), fit_ridge(sums)
    del sums
    clip_mean_of_all = (clip_mean + total.y / total.count).float()
    spread = total.yy / total.count - torch.outer(total.y, total.y) / total.count**2
    channels = torch.linalg.eigh(context.covariance)[1].float()
    prior = LinearGaussian(
        eva_mean=eva_mean,
        eva_std=eva_std,
        basis=basis,
        weight=_with_bias(context.whole.weight, context.whole.bias + clip_mean),
        fold_weights=torch.stack([_with_bias(fold.weight, fold.bias + clip_mean) for fold in context.folds]),
        channels=channels,
        variance=torch.ones(dataset.spec.num_tokens, len(clip_mean), device=device),
    )
    prior = _with_variance(prior, reading)
    baselines = Baselines(
        clip_mean=clip_mean_of_all,
        directions=torch.linalg.eigh(spread)[1].flip(1)[:, :MAX_DIRECTIONS].float().contiguous(),
        ridge_weight=ridge.whole.weight.float(),
        ridge_bias=(ridge.whole.bias + clip_mean).float(),
        ridge_noise=_factor(ridge.covariance).float(),
        prior=prior,
        num_samples=len(reading.indices),
        dataset_samples=len(dataset),
        ridge_r2=ridge.r2,
        prior_r2=context.r2,
    )
    _report(ridge, context)
    return baselines.to("cpu")


def ridge_cost(
    src: str | Path, dst: str | Path, token_layout: TokenLayout | None = None, max_samples: int = COST_SAMPLES
) -> dict[str, Any]:
    """R2 on images left out, of the ridge of each token, of two datasets of the same samples: `r2_source`, `r2_stored`.

    The fits use `max_samples` spread evenly over the datasets; R2 is None where no image can be left out. At the width
    of EVA-CLIP-8B a fit takes minutes on a few cores, seconds on a GPU.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    found, count = [], 0
    for path in (src, dst):
        dataset = EmbeddingDataset(path, token_layout=token_layout)
        indices = spread_indices(len(dataset), max_samples)
        reading = _Reading(dataset, Normalizer("minimal"), indices, device)
        eva_mean, _, _, clip_mean = _survey(reading)
        found.append(fit_ridge(_collect(reading, partial(torch.sub, other=eva_mean), clip_mean)).r2)
        count = len(indices)
    return {"samples": count, "r2_source": found[0], "r2_stored": found[1]}


class _Reading:
    """The samples of the fit, read again for each pass: folds [B], eva [B, N, De] and clip [B, N, Dc], fp32."""

    def __init__(
        self, dataset: EmbeddingDataset, normalizer: Normalizer, indices: list[int], device: torch.device | str
    ) -> None:
        if not indices:
            raise DataError("the baselines need at least one training sample, the dataset has none")
        self.dataset, self.normalizer, self.indices, self.device = dataset, normalizer, indices, device

    def batches(self, purpose: str, indices: Sequence[int]) -> Iterator[tuple[list[int], Tensor, Tensor]]:
        progress, done = Progress(f"fitting the baselines, {purpose}", len(indices)), 0
        for batch in read_batches(self.dataset, indices, FIT_BATCH):
            pair = self.normalizer({name: batch[name].float() for name in ("eva", "clip")})
            eva, clip = (tensor.to(self.device) for tensor in pair.values())
            right = [(tensor.abs() < LARGEST).all(dim=(1, 2)) for tensor in (eva, clip)]  # not true of NaN either
            wrong = [key for key, fits in zip(batch.keys, (right[0] & right[1]).tolist(), strict=True) if not fits]
            if wrong:
                raise DataError(
                    f"{', '.join(wrong)}: NaN, infinity or a number above {LARGEST:g} in the embeddings; "
                    "blip3o-ds data verify DIR names every sample with NaN or infinity"
                )
            yield self.dataset.folds(batch.keys, FOLDS).tolist(), eva, clip
            done += len(batch.keys)
            progress.at(done)


def _survey(reading: _Reading) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """From some samples, EVA's mean and standard deviation [De], fp32, its covariance, and CLIP's mean [Dc], fp32.

    They only set origins and scales: sums near zero lose no digits.
    """
    chosen = [reading.indices[place] for place in spread_indices(len(reading.indices), SURVEY_SAMPLES)]
    origin: tuple[Tensor, Tensor] | None = None
    tensors = reading.dataset.spec.tensors
    sums = Sums.zeros(tensors["eva"].dim, tensors["clip"].dim, reading.device)
    for _, eva, clip in reading.batches("scales", chosen):
        origin = origin or (eva.mean(dim=(0, 1)), clip.mean(dim=(0, 1)))
        sums.add((eva - origin[0]).flatten(0, 1), (clip - origin[1]).flatten(0, 1))
    assert origin is not None  # `_Reading` has at least one sample
    shift = sums.x / sums.count
    covariance = sums.xx / sums.count - torch.outer(shift, shift)
    std = covariance.diagonal().clamp_min(0).sqrt().float()
    std = torch.where(std > 0, std, torch.ones_like(std))
    return (origin[0] + shift).float(), std, covariance, (origin[1] + sums.y / sums.count).float()


def _collect(reading: _Reading, features: Callable[[Tensor], Tensor], clip_mean: Tensor) -> list[Sums]:
    """The sums of every fold, of the features and of clip less its mean."""
    folds: list[Sums] = []
    for of, eva, clip in reading.batches("ridges", reading.indices):
        x, y = features(eva), clip - clip_mean
        folds = folds or [Sums.zeros(x.shape[-1], y.shape[-1], reading.device) for _ in range(FOLDS)]
        for fold in sorted(set(of)):
            rows = [row for row, found in enumerate(of) if found == fold]
            folds[fold].add(x[rows].flatten(0, 1), y[rows].flatten(0, 1))
    return folds


def _leading(covariance: Tensor, count: int) -> Tensor:
    """The leading eigenvectors `[D, count]`, or all, by subspace iteration: decomposing all of 4096 takes minutes.

    They only have to span what varies most, so a few iterations do.
    """
    D = len(covariance)
    if 2 * count >= D:
        return torch.linalg.eigh(covariance)[1].flip(1)[:, :count].contiguous()
    start = torch.randn(D, count + 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    span = torch.linalg.qr(start.to(covariance.device)).Q
    for _ in range(10):
        span = torch.linalg.qr(covariance @ span).Q
    vectors = torch.linalg.eigh(span.T @ covariance @ span)[1].flip(1)
    return (span @ vectors[:, :count]).contiguous()


def _with_variance(prior: LinearGaussian, reading: _Reading) -> LinearGaussian:
    """The prior with the variance of its modes: that of images which the mean has not seen.

    Each mode has one value an image, so with few images it is drawn towards a separable model, a variance by token mode
    times one by channel.
    """
    squares = torch.zeros_like(prior.variance, dtype=torch.float64)
    for of, eva, clip in reading.batches("residuals", reading.indices):
        squares += prior.to_modes(clip - prior.mean(eva, of)).square().sum(dim=0)
    count = len(reading.indices)
    variance = squares / count
    mean = variance.mean()
    if mean <= 0:
        return prior  # nothing is left to explain: any variance does
    separable = variance.mean(dim=1, keepdim=True) * variance.mean(dim=0, keepdim=True) / mean
    variance = (count * variance + SHRINKAGE * separable) / (count + SHRINKAGE)
    return replace(prior, variance=variance.clamp_min(LEAST_VARIANCE * mean).float())


def _with_bias(weight: Tensor, bias: Tensor) -> Tensor:
    return torch.cat([weight, bias[None]]).float()


def _factor(covariance: Tensor) -> Tensor:
    """The symmetric root."""
    values, vectors = torch.linalg.eigh(covariance)
    return (vectors * values.clamp_min(0).sqrt()) @ vectors.T


def _report(ridge: RidgeFit, context: RidgeFit) -> None:
    if context.r2 is None:
        logger.warning("all samples are of one image or fold: the baselines' errors are those in the sample, too small")
    else:
        numbers = ridge.r2, ridge.penalty, context.r2, context.penalty
        logger.info("R2 on images left out: ridge %.4f (penalty %.3g), of the surroundings %.4f (%.3g)", *numbers)
