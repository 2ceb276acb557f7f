"""Generated embeddings written as a dataset of the same format, for whatever reads such a dataset next.

EVA embeddings, keys, captions and order are those of the source; the CLIP embeddings are the model's.
"""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path
from typing import Any

import torch

from blip3o_ds.config import SamplerConfig
from blip3o_ds.data.normalization import Normalizer
from blip3o_ds.data.shards import EmbeddingDataset
from blip3o_ds.data.writer import DatasetWriter
from blip3o_ds.errors import DataError
from blip3o_ds.evaluation.report import evaluation_noise
from blip3o_ds.evaluation.subset import ProgressLog, locate, read_batches
from blip3o_ds.files import fsync_dir
from blip3o_ds.flow.objective import FlowObjective, Model
from blip3o_ds.flow.solvers import sample

logger = logging.getLogger(__name__)


def generate(
    model: Model,
    flow: FlowObjective,
    normalizer: Normalizer,
    dataset: EmbeddingDataset,
    dst: str | Path,
    sampler: SamplerConfig,
    batch_size: int,
    device: torch.device | str,
    seed: int | None = None,
    source: str | None = None,
) -> dict[str, Any]:
    """Generate an embedding for every sample of `dataset` and write them to the folder `dst`, whole or not at all.

    Every sample's metadata gains `generated`: solver, steps, guidance scale, seed, normalisation and `source`, the
    name of the model. Embeddings are raw ones, except with normalisation `full`, where they have unit norm. The noise
    of a sample depends on seed (None: the sampler's) and index alone, and is that of `evaluate`.

    Returns:
        `{"dataset": dst, "num_samples": n, "generated": {...}}`.

    Raises:
        DataError: `dst` already holds something, or an embedding cannot be written, for example because it is not
            finite.
    """
    dst = Path(dst)
    if dst.exists() and (not dst.is_dir() or any(dst.iterdir())):
        raise DataError(f"{dst} already exists; remove it or give another folder")
    seed = sampler.seed if seed is None else seed
    facts = {
        "solver": sampler.solver,
        "steps": sampler.steps,
        "guidance_scale": sampler.guidance_scale,
        "seed": seed,
        "normalization": normalizer.mode,
        "source": source,
    }
    temporary = dst.with_name(f".{dst.name}.{os.getpid()}.tmp")
    try:
        with DatasetWriter(temporary, dataset.spec, extra={"generated": facts}) as writer:
            _write_all(writer, model, flow, normalizer, dataset, sampler, batch_size, device, seed, facts)
        os.replace(temporary, dst)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    fsync_dir(dst.parent)
    return {"dataset": str(dst), "num_samples": len(dataset), "generated": facts}


def _write_all(
    writer: DatasetWriter,
    model: Model,
    flow: FlowObjective,
    normalizer: Normalizer,
    dataset: EmbeddingDataset,
    sampler: SamplerConfig,
    batch_size: int,
    device: torch.device | str,
    seed: int,
    facts: dict[str, Any],
) -> None:
    shape = (dataset.spec.num_tokens, dataset.spec.clip_dim)
    progress = ProgressLog(logger, "generating", len(dataset))
    for batch in read_batches(dataset, range(len(dataset)), batch_size):
        noise = evaluation_noise(flow, batch.positions, shape, seed, device)
        eva = normalizer.eva(batch.eva.to(device).float())
        clip = normalizer.clip_inverse(sample(model, flow, eva, noise, sampler)).cpu()
        for row, position in enumerate(batch.positions.tolist()):
            meta = {**dataset.meta(*locate(dataset, position)), "generated": facts}
            writer.write(batch.keys[row], batch.eva[row], clip[row], meta)
        progress.at(int(batch.positions[-1]) + 1)
