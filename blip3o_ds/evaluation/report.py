"""Evaluates a model by generation on a dataset: its two readings beside baselines that need no training.

The noise of an image depends only on the seed and its key, so neither batch size, number of ranks nor the images around
it change its result.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from textwrap import wrap
from typing import Any

import numpy as np
import torch
from torch import Tensor

from blip3o_ds.config import EvalConfig, SamplerConfig
from blip3o_ds.data.format.manifest import key_hashes
from blip3o_ds.data.reading.dataset import EmbeddingDataset
from blip3o_ds.data.reading.loader import Batch, read_batches, spread_indices
from blip3o_ds.errors import DataError
from blip3o_ds.evaluation.metrics import METRICS, Collected, MetricAccumulator
from blip3o_ds.flow.flow import BASELINE_STREAM, EVALUATION_STREAM, normals
from blip3o_ds.flow.solvers import posterior_mean, sample
from blip3o_ds.progress import Progress
from blip3o_ds.runs.pretrained import Pretrained

MODEL_READINGS = ("posterior_mean", "sampled")  # the others are baselines
_LABELS = {
    "posterior_mean": "DiT posterior mean",
    "sampled": "DiT sampled",
    "linear_gaussian": "linear-Gaussian sampled",
    "ridge_noise": "ridge + Gaussian noise",
    "context_ridge": "ridge of 3x3 tokens",
    "ridge": "ridge from EVA",
    "mean_embedding": "mean embedding",
}

Gather = Callable[[Any], list[Any]]  # this rank's object -> every rank's, in rank order


@dataclass(frozen=True)
class EvalResult:
    """The metrics of one dataset, `readings[reading][metric]`: `MODEL_READINGS`, then baselines."""

    readings: dict[str, dict[str, float]]
    num_samples: int  # that were evaluated
    dataset_samples: int  # in the whole dataset
    space: str  # "raw" embeddings, or "unit_norm" ones with normalization full, which cannot be inverted
    sampler: SamplerConfig
    samples_per_image: int = 1  # in readings that are sampled; results of older versions do not state it

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "sampler": self.sampler.model_dump(mode="json")}

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> EvalResult:
        return cls(**{**content, "sampler": SamplerConfig(**content["sampler"])})


def evaluate(
    pretrained: Pretrained,
    dataset: EmbeddingDataset,
    settings: EvalConfig,
    rank: int = 0,
    world_size: int = 1,
    gather: Gather | None = None,
    num_folds: int = 0,
) -> EvalResult:
    """Generate the embeddings of `dataset` and compare them with the true ones.

    The model has two readings: `posterior_mean` (one network evaluation from noise: the least distortion) and `sampled`
    (the ODE solved, from `settings.num_samples` noises: the right distribution; Blau & Michaeli 2018). Those of the
    baselines follow. Metrics are computed on raw embeddings, after inverting the normalisation; with `full`, which
    cannot be inverted, on unit-norm ones, and the generated ones are taken as they are. Where `settings.max_samples`
    images are fewer, they are spread over the dataset.

    Images that the prior was fitted to are guessed as new ones, each by the map of those `num_folds` that has not seen
    it; with 0 all count as new, and are guessed by the map of all.

    Each rank takes every `world_size`-th image, `gather` collects their sums, and every rank returns the whole result.
    Some ranks run the model once more than others, so its forward pass must not communicate.

    Raises DataError for an empty dataset, and Blip3oError, naming the image, for an embedding that is not finite.
    """
    indices = spread_indices(len(dataset), settings.max_samples)
    if not indices:
        raise DataError("the dataset to evaluate is empty")
    pretrained = replace(pretrained, baselines=pretrained.baselines.to(pretrained.device))
    normalizer = pretrained.normalizer
    train_mean, directions = _training_facts(pretrained)
    accumulators: dict[str, MetricAccumulator] = {}
    own = indices[rank::world_size]
    progress = Progress("evaluating", len(own))
    done = 0
    for batch in read_batches(dataset, own, settings.batch_size):
        folds = dataset.folds(batch.keys, num_folds).tolist() if num_folds else None
        target, generated = _generate(pretrained, batch, settings, folds)
        for reading, samples in generated.items():
            if reading not in accumulators:
                accumulators[reading] = MetricAccumulator(train_mean, directions, reading)
            accumulators[reading].update(samples, target, batch.keys)
        done += len(batch.keys)
        progress.at(done)
    return EvalResult(
        readings=_join_ranks(accumulators, gather or (lambda own: [own])),
        num_samples=len(indices),
        dataset_samples=len(dataset),
        space="unit_norm" if normalizer.mode == "full" else "raw",
        sampler=settings.sampler,
        samples_per_image=settings.num_samples,
    )


def format_table(results: dict[str, EvalResult]) -> str:
    """The results of several datasets as plain text: a table each, then an explanation of the columns."""
    blocks = []
    for split, result in results.items():
        part = "" if result.num_samples == result.dataset_samples else f" of {result.dataset_samples}"
        sampled = f"{result.samples_per_image} sample{'s' if result.samples_per_image > 1 else ''} each"
        title = f"{split} ({result.num_samples} images{part}, {sampled}, {result.space.replace('_', '-')} embeddings)"
        rows = {row_label(name, result.sampler): metrics for name, metrics in result.readings.items()}
        blocks.append("\n".join(table(title, rows)))
    return "\n\n".join([*blocks, legend()])


def table(title: str, rows: dict[str, dict[str, float]]) -> list[str]:
    """The lines of a table of metrics by label; a metric that a reading or an older run does not have is a dash."""
    width = max(map(len, rows))
    columns = {name: metric.column for name, metric in METRICS.items() if metric.column}
    lines = [title, " " * width + "".join(f"{column:>9}" for column in columns.values())]
    for label, metrics in rows.items():
        lines.append(f"{label:<{width}}" + "".join(_cell(metrics.get(name)) for name in columns))
    return lines


def evaluation_noise(
    keys: Sequence[str], k: int, shape: tuple[int, int], seed: int, device: torch.device | str
) -> Tensor:
    """The noise [B, N, D] from which sample `k` of the images with these `keys` (B) is generated; `shape` is (N, D).

    Each row is a function of seed, key and `k` alone, and of the kind of device; no row is that of a training step.
    """
    return normals(seed, _positions(keys), EVALUATION_STREAM + k, shape, device)


def baseline_noise(
    keys: Sequence[str], k: int, shape: tuple[int, int], seed: int, device: torch.device | str
) -> Tensor:
    """As `evaluation_noise`, for the baselines that sample; independent of it."""
    return normals(seed, _positions(keys), BASELINE_STREAM + k, shape, device)


def _positions(keys: Sequence[str]) -> Tensor:
    """All 64 bits of the hash of each key, int64 [B]."""
    return torch.from_numpy(key_hashes(keys).astype(np.int64))


def _training_facts(pretrained: Pretrained) -> tuple[Tensor, Tensor]:
    """Mean [D] of the training embeddings and directions [D, P] in which they vary, for embeddings as they are stored.

    The component of an embedding along a direction is the one that it has in the network's space.
    """
    normalizer, baselines = pretrained.normalizer, pretrained.baselines
    directions = (baselines.directions.T / normalizer.scale("clip", baselines.directions.T)).T
    return normalizer.inverse("clip", baselines.clip_mean), directions


@torch.no_grad()
def _generate(
    pretrained: Pretrained, batch: Batch, settings: EvalConfig, folds: Sequence[int] | None
) -> tuple[Tensor, dict[str, Tensor]]:
    """The true embeddings [B, N, D], and by reading K or 1 generated ones, [K, B, N, D], as they are stored."""
    model, flow, normalizer, device = pretrained.model, pretrained.flow, pretrained.normalizer, pretrained.device
    eva, clip = normalizer({name: batch[name].to(device).float() for name in ("eva", "clip")}).values()
    sampler, shape = settings.sampler, (clip.shape[1], clip.shape[2])
    noise, others = (
        torch.stack([draw(batch.keys, k, shape, sampler.seed, device) for k in range(settings.num_samples)])
        for draw in (evaluation_noise, baseline_noise)
    )
    generated = {
        "posterior_mean": posterior_mean(model, flow, eva, noise[0], folds)[None],
        "sampled": torch.stack([sample(model, flow, eva, one, sampler, folds) for one in noise]),
        **pretrained.baselines.readings(eva, others),
    }
    return normalizer.inverse("clip", clip), {name: normalizer.inverse("clip", y) for name, y in generated.items()}


def _join_ranks(accumulators: dict[str, MetricAccumulator], gather: Gather) -> dict[str, dict[str, float]]:
    """The metrics of each reading over all ranks; one reading at a time, because each holds two matrices [D, D]."""
    names = gather(list(accumulators))[0]  # rank 0 always has an image, others may have none and so no reading
    joined = {}
    for name in names:
        own = accumulators[name].payload() if name in accumulators else None
        joined[name] = Collected.join([part for part in gather(own) if part is not None]).compute()
    return joined


def legend() -> str:
    """How to read a table, then the metric in each column."""
    columns = ", ".join(
        f"{metric.column}:\N{NO-BREAK SPACE}{name}" for name, metric in METRICS.items() if metric.column
    )
    reading = (
        "energy: lower is better, only a sampler of the right distribution has the least; "
        "spread: 1 is calibrated, 0 is a point"
    )
    lines = wrap(f"{columns} (1 is right for cover, norm and var)", 120)
    return "\n".join([reading, *lines]).replace("\N{NO-BREAK SPACE}", " ")


def row_label(reading: str, sampler: SamplerConfig) -> str:
    """The name of a reading in tables and figures."""
    guidance = "" if sampler.guidance_scale == 1 else f", guidance {sampler.guidance_scale:g}"
    steps = f"{sampler.steps} step{'s' if sampler.steps > 1 else ''}"
    settings = f" ({steps} {sampler.solver}{guidance})" if reading == "sampled" else ""
    return _LABELS.get(reading, reading.replace("_", " ")) + settings


def _cell(value: float | None) -> str:
    return f"{'-' if value is None else format_value(value):>9}"


def format_value(value: float) -> str:
    """A metric as tables show it."""
    if 0 < abs(value) < 0.001:
        return f"{value:.1e}"
    return f"{value:.3f}" if abs(value) < 1000 else f"{value:.2e}"
