"""Generated embeddings written as a dataset of the same format, for whatever reads such a dataset next.

The CLIP embeddings are the model's; all other tensors, keys, captions and the order are those of the source.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch

from blip3o_ds.config import SamplerConfig
from blip3o_ds.data.format.writer import DatasetWriter
from blip3o_ds.data.normalization import Normalizer
from blip3o_ds.data.reading.dataset import EmbeddingDataset
from blip3o_ds.evaluation.report import evaluation_noise
from blip3o_ds.evaluation.subset import ProgressLog, read_batches
from blip3o_ds.files import atomic_folder
from blip3o_ds.flow.flow import Flow
from blip3o_ds.flow.prediction import Model
from blip3o_ds.flow.solvers import sample

logger = logging.getLogger(__name__)


def generate(
    model: Model,
    flow: Flow,
    normalizer: Normalizer,
    dataset: EmbeddingDataset,
    dst: str | Path,
    sampler: SamplerConfig,
    batch_size: int,
    device: torch.device | str,
    source: str,
) -> dict[str, Any]:
    """Generate an embedding for every sample of `dataset` and write them to the folder `dst`, whole or not at all.

    Every sample's metadata gains `generated`: solver, steps, guidance scale, seed, normalisation and `source`, the
    name of the model. Embeddings are raw ones, except with normalisation `full`, whose unit norm cannot be undone. The
    noise of a sample depends on the sampler's seed and the index alone, and is that of `evaluate`.

    Returns:
        `{"dataset": dst, "num_samples": n, "generated": {...}}`.

    Raises:
        FileExistsError: `dst` already holds something.
        DataError: an embedding cannot be written, for example because it is not finite.
    """
    facts = {**sampler.model_dump(mode="json"), "normalization": normalizer.mode, "source": source}
    with atomic_folder(dst) as folder, DatasetWriter(folder, dataset.spec, extra={"generated": facts}) as writer:
        _write_all(writer, model, flow, normalizer, dataset, sampler, batch_size, device, facts)
    return {"dataset": str(dst), "num_samples": len(dataset), "generated": facts}


def _write_all(
    writer: DatasetWriter,
    model: Model,
    flow: Flow,
    normalizer: Normalizer,
    dataset: EmbeddingDataset,
    sampler: SamplerConfig,
    batch_size: int,
    device: torch.device | str,
    facts: dict[str, Any],
) -> None:
    shape = dataset.spec.shape("clip")
    progress = ProgressLog(logger, "generating", len(dataset))
    for batch in read_batches(dataset, range(len(dataset)), batch_size):
        noise = evaluation_noise(flow, batch.positions, shape, sampler.seed, device)
        eva = normalizer({"eva": batch["eva"].to(device).float()})["eva"]
        clip = normalizer.inverse("clip", sample(model, flow, eva, noise, sampler)).cpu()
        for row, position in enumerate(batch.positions.tolist()):
            meta = {**dataset.meta(*dataset.place(position)), "generated": facts}
            stored = {name: x[row] for name, x in batch.tensors.items()}
            writer.write(batch.keys[row], {**stored, "clip": clip[row]}, meta)
        progress.at(int(batch.positions[-1]) + 1)
