"""Generated embeddings written as a dataset of the same format, for whatever reads such a dataset next.

The CLIP embeddings are the model's; all other tensors, keys, captions and the order are those of the source.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from blip3o_ds.config import EvalConfig, SamplerConfig
from blip3o_ds.data.format.writer import DatasetWriter
from blip3o_ds.data.reading.dataset import EmbeddingDataset
from blip3o_ds.data.reading.loader import read_batches
from blip3o_ds.evaluation.report import evaluation_noise
from blip3o_ds.files import atomic_folder
from blip3o_ds.flow.solvers import sample
from blip3o_ds.progress import Progress
from blip3o_ds.runs.pretrained import Pretrained


def generate(
    pretrained: Pretrained, dataset: EmbeddingDataset, dst: str | Path, settings: EvalConfig, source: str
) -> dict[str, Any]:
    """Generate an embedding for every sample of `dataset` and write them to the folder `dst`, whole or not at all.

    Every sample's metadata gains `generated`: solver, steps, guidance scale, seed, normalisation and `source`, the
    name of the model. Embeddings are raw ones, except with normalisation `full`, which cannot be inverted. The noise
    of a sample depends only on the sampler's seed and the index, and is that of `evaluate`.

    Returns `{"dataset": dst, "num_samples": n, "generated": {...}}`. Raises FileExistsError if `dst` holds something,
    and DataError for an embedding that cannot be written, for example because it is not finite.
    """
    sampler, mode = settings.sampler, pretrained.normalizer.mode
    facts = {**sampler.model_dump(mode="json"), "normalization": mode, "source": source}
    progress = Progress("generating", len(dataset))
    with atomic_folder(dst) as folder, DatasetWriter(folder, dataset.spec, extra={"generated": facts}) as writer:
        for batch in read_batches(dataset, range(len(dataset)), settings.batch_size):
            clip = generate_batch(pretrained, batch["eva"], batch.positions, sampler).cpu()
            for row, position in enumerate(batch.positions.tolist()):
                meta = {**dataset.meta(*dataset.place(position)), "generated": facts}
                stored = {name: x[row] for name, x in batch.tensors.items()}
                writer.write(batch.keys[row], {**stored, "clip": clip[row]}, meta)
            progress.at(int(batch.positions[-1]) + 1)
    return {"dataset": str(dst), "num_samples": len(dataset), "generated": facts}


def generate_batch(pretrained: Pretrained, eva: Tensor, positions: Tensor, sampler: SamplerConfig) -> Tensor:
    """CLIP embeddings `[B, N, Dc]` fp32 on the model's device, from EVA embeddings `[B, N, De]` as they are stored.

    `positions` `[B]` are the indices of the images, which choose the noise together with the sampler's seed.
    """
    eva = pretrained.normalizer({"eva": eva.to(pretrained.device).float()})["eva"]
    shape = (eva.shape[1], pretrained.config.model.clip_dim)
    noise = evaluation_noise(pretrained.flow, positions, shape, sampler.seed, pretrained.device)
    return pretrained.normalizer.inverse("clip", sample(pretrained.model, pretrained.flow, eva, noise, sampler))
