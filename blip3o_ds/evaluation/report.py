"""Evaluates a model by generation on a dataset: its two readings beside two baselines.

The noise of an image depends only on the seed and its index, so batch size and number of ranks change no result.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from blip3o_ds.baselines import Baselines
from blip3o_ds.config import EvalConfig, SamplerConfig
from blip3o_ds.data.reading.batches import read_batches, spread_indices
from blip3o_ds.data.reading.dataset import EmbeddingDataset
from blip3o_ds.data.reading.loader import Batch
from blip3o_ds.errors import DataError
from blip3o_ds.evaluation.metrics import METRICS, MetricAccumulator
from blip3o_ds.flow.flow import Flow
from blip3o_ds.flow.solvers import posterior_mean, sample
from blip3o_ds.progress import Progress
from blip3o_ds.runs.pretrained import Pretrained

logger = logging.getLogger(__name__)

READINGS = ("posterior_mean", "sampled", "ridge", "mean_embedding")
EVALUATION_POSITIONS = 1 << 40  # past every position of training, so that no noise of training occurs here

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
        """Plain JSON."""
        return {**asdict(self), "sampler": self.sampler.model_dump(mode="json")}

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> EvalResult:
        """Back from `to_dict`."""
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

    Raises:
        DataError: the dataset is empty.
        Blip3oError: an embedding is not finite; the image is named.
    """
    indices = spread_indices(len(dataset), settings.max_samples)
    if not indices:
        raise DataError("the dataset to evaluate is empty")
    normalizer, baselines = pretrained.normalizer, pretrained.baselines.to(pretrained.device)
    train_mean = normalizer.inverse("clip", baselines.clip_mean)
    accumulators = {reading: MetricAccumulator(train_mean, reading) for reading in READINGS}
    own = indices[rank::world_size]
    progress = Progress("evaluating", len(own))
    done = 0
    for batch in read_batches(dataset, own, settings.batch_size):
        target, generated = _generate(pretrained, baselines, batch, settings.sampler)
        for reading, embeddings in generated.items():
            accumulators[reading].update(embeddings, target, batch.positions)
        done += len(batch.keys)
        progress.at(done)
    return EvalResult(
        readings=_join(accumulators, gather),
        num_samples=len(indices),
        dataset_samples=len(dataset),
        space="unit_norm" if normalizer.mode == "full" else "raw",
        sampler=settings.sampler,
    )


def format_table(results: dict[str, EvalResult]) -> str:
    """The results of several datasets as plain text: a table each, then an explanation of the columns."""
    blocks = [_block(split, result) for split, result in results.items()]
    return "\n\n".join([*blocks, LEGEND])


def evaluation_noise(
    flow: Flow, indices: Tensor, shape: tuple[int, int], seed: int, device: torch.device | str
) -> Tensor:
    """The noise [B, N, D] from which the images at `indices` [B] are generated; `shape` is (N, D)."""
    return flow.draw(indices + EVALUATION_POSITIONS, shape, seed, device)[0]


@torch.no_grad()
def _generate(
    pretrained: Pretrained, baselines: Baselines, batch: Batch, sampler: SamplerConfig
) -> tuple[Tensor, dict[str, Tensor]]:
    """The true embeddings, and the generated ones by reading, in the space of the stored embeddings."""
    model, flow, normalizer, device = pretrained.model, pretrained.flow, pretrained.normalizer, pretrained.device
    pair = normalizer({name: batch[name].to(device).float() for name in ("eva", "clip")})
    eva, clip = pair["eva"], pair["clip"]
    noise = evaluation_noise(flow, batch.positions, (clip.shape[1], clip.shape[2]), sampler.seed, device)
    generated = {
        "posterior_mean": posterior_mean(model, flow, eva, noise),
        "sampled": sample(model, flow, eva, noise, sampler),
        "ridge": baselines.predict_ridge(eva),
        "mean_embedding": baselines.predict_mean(eva),
    }
    return normalizer.inverse("clip", clip), {name: normalizer.inverse("clip", y) for name, y in generated.items()}


def _join(accumulators: dict[str, MetricAccumulator], gather: Gather | None) -> dict[str, dict[str, float]]:
    own = {reading: accumulator.payload() for reading, accumulator in accumulators.items()}
    ranks = [own] if gather is None else gather(own)
    return {
        reading: MetricAccumulator.from_payloads([payloads[reading] for payloads in ranks], reading).compute()
        for reading in accumulators
    }


LEGEND = (
    "cos: clip_similarity, cos-c: clip_similarity_centered (training mean subtracted), >x: share of images above,\n"
    "norm: norm_ratio, R@k: retrieval_rk, frechet: frechet_diagonal, var: variance_ratio (1 is right for norm, var)"
)


def row_label(reading: str, sampler: SamplerConfig) -> str:
    """The name of a reading in tables and figures."""
    guidance = "" if sampler.guidance_scale == 1 else f", guidance {sampler.guidance_scale:g}"
    steps = f"{sampler.steps} step{'s' if sampler.steps > 1 else ''}"
    return {
        "posterior_mean": "DiT posterior mean",
        "sampled": f"DiT sampled ({steps} {sampler.solver}{guidance})",
        "ridge": "ridge from EVA",
        "mean_embedding": "mean embedding",
    }[reading]


def table_head(width: int) -> str:
    """The line above the metrics, for labels of `width` characters."""
    return " " * width + "".join(f"{metric.column:>9}" for metric in METRICS.values())


def table_row(label: str, metrics: dict[str, float], width: int) -> str:
    """One line of metrics; one that an older run did not have yet is a dash."""
    return f"{label:<{width}}" + "".join(_cell(metrics.get(name)) for name in METRICS)


def _block(split: str, result: EvalResult) -> str:
    images = f"{result.num_samples} images"
    if result.num_samples < result.dataset_samples:
        images += f" of {result.dataset_samples}"
    space = "raw embeddings" if result.space == "raw" else "unit-norm embeddings"
    labels = {reading: row_label(reading, result.sampler) for reading in READINGS}
    width = max(len(label) for label in labels.values())
    lines = [f"{split} ({images}, {space})", table_head(width)]
    for reading, label in labels.items():
        metrics = result.readings[reading]
        lines.append(table_row(label, metrics, width))
    return "\n".join(lines)


def _cell(value: float | None) -> str:
    if value is None:
        return f"{'-':>9}"
    text = f"{value:.3f}" if abs(value) < 1000 else f"{value:.2e}"
    if 0 < abs(value) < 0.001:
        text = f"{value:.1e}"
    return f"{text:>9}"
