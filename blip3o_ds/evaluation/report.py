"""Evaluates a model by generation on a dataset: its two readings beside two baselines.

The noise of an image depends only on the seed and its key, so neither batch size, number of ranks nor the images around
it change its result.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
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
from blip3o_ds.flow.flow import EVALUATION_STREAM, normals
from blip3o_ds.flow.solvers import posterior_mean, sample
from blip3o_ds.progress import Progress
from blip3o_ds.runs.pretrained import Pretrained

_LABELS = {
    "posterior_mean": "DiT posterior mean",
    "sampled": "DiT sampled",
    "ridge": "ridge from EVA",
    "mean_embedding": "mean embedding",
}
READINGS = tuple(_LABELS)

Gather = Callable[[Any], list[Any]]  # this rank's object -> every rank's, in rank order


@dataclass(frozen=True)
class EvalResult:
    """The metrics of one dataset: `readings[reading][metric]` for `READINGS` and `METRICS`."""

    readings: dict[str, dict[str, float]]
    num_samples: int  # that were evaluated
    dataset_samples: int  # in the whole dataset
    space: str  # "raw" embeddings, or "unit_norm" ones with normalization full, which cannot be inverted
    sampler: SamplerConfig

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
) -> EvalResult:
    """Generate the embeddings of `dataset` and compare them with the true ones.

    There are four readings: `posterior_mean` (one network evaluation from noise: the least distortion), `sampled` (the
    ODE solved: the right distribution; Blau & Michaeli 2018), `ridge` and `mean_embedding`. Metrics are computed on raw
    embeddings, after inverting the normalisation; with `full`, which cannot be inverted, on unit-norm ones, and the
    generated ones are taken as they are. Where `settings.max_samples` are fewer, they are spread over the dataset.

    Each rank takes every `world_size`-th sample, `gather` collects their sums, and every rank returns the whole
    result. Some ranks run the model once more than others, so its forward pass must not communicate.

    Raises DataError for an empty dataset, and Blip3oError, naming the image, for an embedding that is not finite.
    """
    indices = spread_indices(len(dataset), settings.max_samples)
    if not indices:
        raise DataError("the dataset to evaluate is empty")
    pretrained = replace(pretrained, baselines=pretrained.baselines.to(pretrained.device))
    normalizer = pretrained.normalizer
    train_mean = normalizer.inverse("clip", pretrained.baselines.clip_mean)
    accumulators = {reading: MetricAccumulator(train_mean, reading) for reading in READINGS}
    own = indices[rank::world_size]
    progress = Progress("evaluating", len(own))
    done = 0
    for batch in read_batches(dataset, own, settings.batch_size):
        target, generated = _generate(pretrained, batch, settings.sampler)
        for reading, embeddings in generated.items():
            accumulators[reading].update(embeddings, target, batch.positions)
        done += len(batch.keys)
        progress.at(done)
    payload = {reading: accumulator.payload() for reading, accumulator in accumulators.items()}
    ranks = [payload] if gather is None else gather(payload)
    return EvalResult(
        readings={name: Collected.join([payloads[name] for payloads in ranks]).compute() for name in READINGS},
        num_samples=len(indices),
        dataset_samples=len(dataset),
        space="unit_norm" if normalizer.mode == "full" else "raw",
        sampler=settings.sampler,
    )


def format_table(results: dict[str, EvalResult]) -> str:
    """The results of several datasets as plain text: a table each, then an explanation of the columns."""
    blocks = []
    for split, result in results.items():
        part = "" if result.num_samples == result.dataset_samples else f" of {result.dataset_samples}"
        title = f"{split} ({result.num_samples} images{part}, {result.space.replace('_', '-')} embeddings)"
        rows = {row_label(name, result.sampler): result.readings[name] for name in READINGS}
        blocks.append("\n".join(table(title, rows)))
    return "\n\n".join([*blocks, LEGEND])


def table(title: str, rows: dict[str, dict[str, float]]) -> list[str]:
    """The lines of a table of metrics by label; a metric that an older run did not have yet is a dash."""
    width = max(map(len, rows))
    lines = [title, " " * width + "".join(f"{metric.column:>9}" for metric in METRICS.values())]
    for label, metrics in rows.items():
        lines.append(f"{label:<{width}}" + "".join(_cell(metrics.get(name)) for name in METRICS))
    return lines


def evaluation_noise(
    keys: Sequence[str], k: int, shape: tuple[int, int], seed: int, device: torch.device | str
) -> Tensor:
    """The noise [B, N, D] from which sample `k` of the images with these `keys` (B) is generated; `shape` is (N, D).

    Each row is a function of seed, key and `k` alone, and of the kind of device; no row is that of a training step.
    """
    positions = torch.from_numpy(key_hashes(keys).astype(np.int64))  # all 64 bits, as the hash reads them again
    return normals(seed, positions, EVALUATION_STREAM + k, shape, device)


@torch.no_grad()
def _generate(pretrained: Pretrained, batch: Batch, sampler: SamplerConfig) -> tuple[Tensor, dict[str, Tensor]]:
    """The true embeddings, and the generated ones by reading, in the space of the stored embeddings."""
    model, flow, normalizer, device = pretrained.model, pretrained.flow, pretrained.normalizer, pretrained.device
    eva, clip = normalizer({name: batch[name].to(device).float() for name in ("eva", "clip")}).values()
    noise = evaluation_noise(batch.keys, 0, (clip.shape[1], clip.shape[2]), sampler.seed, device)
    generated = {
        "posterior_mean": posterior_mean(model, flow, eva, noise),
        "sampled": sample(model, flow, eva, noise, sampler),
        "ridge": pretrained.baselines.predict_ridge(eva),
        "mean_embedding": pretrained.baselines.predict_mean(eva),
    }
    return normalizer.inverse("clip", clip), {name: normalizer.inverse("clip", y) for name, y in generated.items()}


LEGEND = (
    "cos: clip_similarity, cos-c: clip_similarity_centered (training mean subtracted), >x: share of images above,\n"
    "norm: norm_ratio, R@k: retrieval_rk, frechet: frechet_diagonal, var: variance_ratio (1 is right for norm, var)"
)


def row_label(reading: str, sampler: SamplerConfig) -> str:
    """The name of a reading in tables and figures."""
    guidance = "" if sampler.guidance_scale == 1 else f", guidance {sampler.guidance_scale:g}"
    steps = f"{sampler.steps} step{'s' if sampler.steps > 1 else ''}"
    settings = f" ({steps} {sampler.solver}{guidance})" if reading == "sampled" else ""
    return _LABELS[reading] + settings


def _cell(value: float | None) -> str:
    return f"{'-' if value is None else format_value(value):>9}"


def format_value(value: float) -> str:
    """A metric as tables show it."""
    if 0 < abs(value) < 0.001:
        return f"{value:.1e}"
    return f"{value:.3f}" if abs(value) < 1000 else f"{value:.2e}"
