"""Generated embeddings written as a dataset of the same format, shard by shard, for whatever reads such a dataset next.

The CLIP embeddings are the model's; all other tensors, captions and the order are those of the source. It can be
interrupted at any time and run again with the same arguments, on any number of processes: complete shards are kept.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from itertools import accumulate, pairwise, product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from blip3o_ds.config import EvalConfig, SamplerConfig
from blip3o_ds.data.format.parts import PartedDataset
from blip3o_ds.data.format.schema import DatasetSpec
from blip3o_ds.data.format.writer import DatasetWriter
from blip3o_ds.data.reading.dataset import EmbeddingDataset
from blip3o_ds.data.reading.loader import Batch, read_batches
from blip3o_ds.errors import ConfigError
from blip3o_ds.evaluation.report import evaluation_noise
from blip3o_ds.flow.solvers import sample
from blip3o_ds.progress import Progress
from blip3o_ds.runs.pretrained import Pretrained

VIEW_SEPARATOR = "_"  # between an image's key and the number of a sample, unless the source has another one


def generate(
    pretrained: Pretrained,
    dataset: EmbeddingDataset,
    dst: str | Path,
    settings: EvalConfig,
    source: str,
    *,
    num_samples: int = 1,
    rank: int = 0,
    world_size: int = 1,
) -> dict[str, Any]:
    """Generate `num_samples` embeddings for every image of `dataset` and write them as the dataset `dst`.

    Shard i of `dst` holds what was generated for shard i of the source, in its order. With several samples an image,
    they follow each other as views of it (see `DatasetSpec.image_of`) under the keys `<key>_0000`, `<key>_0001`, …,
    with the view separator of `dataset` if it has one; the number of a key that is a view goes on, `photo_0012` as
    `photo_00120000`. A single one has the image's key. The noise depends only on the sampler's seed, the image's key
    and the number of the sample, and is that of `evaluate`.
    Embeddings are raw ones, except with normalisation `full`, which cannot be inverted. Every sample's metadata gain
    `generated`: solver, steps, guidance scale, seed, normalisation, `source`, the name of the model, and `sample`, the
    number of the sample.

    Process `rank` of `world_size` takes every `world_size`-th shard, and whichever ends last writes the manifest. They
    share nothing but the file system, so they need not run at the same time. Shards that are complete are not
    generated again.

    Returns `num_samples` of the finished dataset (None before), how many of them were `written` by this call,
    `shards_left` of all processes (0 when it is finished), and `generated`, as above. Raises ConfigError for
    `num_samples` below 1, and DataError for another dataset in `dst`, or one that was begun with other arguments; and,
    after the other shards are done, for one that cannot be read or whose embeddings are not finite.
    """
    if num_samples < 1:
        raise ConfigError(f"num_samples = {num_samples}: expected at least 1 sample an image")
    facts = {**settings.sampler.model_dump(mode="json"), "normalization": pretrained.normalizer.mode, "source": source}
    plan = {
        **facts,
        "num_samples": num_samples,
        "weights_sha256": pretrained.weights_sha256(),
        "device": torch.device(pretrained.device).type,  # which changes noise and rounding
        "data": _identity(dataset),
    }
    shards = [info.name for info in dataset.manifest.shards[: len(dataset.shard_sizes)]]
    spec = dataset.spec
    if num_samples > 1:  # which are views of the image
        spec = spec.with_views(spec.view_separator or VIEW_SEPARATOR, dataset.location)
    job = PartedDataset(Path(dst), spec, shards, "generation", plan, {"generated": facts})
    todo = job.begin(rank, world_size)
    generation = _Generation(pretrained, dataset, spec, settings, num_samples, facts, todo)
    job.write(todo, generation.write_shard)
    job.finish_if_last()
    return {
        "dataset": str(dst),
        "num_samples": job.num_samples(),
        "written": generation.written,
        "shards_left": job.parts_left(),
        "generated": facts,
    }


def generate_batch(
    pretrained: Pretrained, eva: Tensor, draws: Sequence[tuple[str, int]], sampler: SamplerConfig
) -> Tensor:
    """CLIP embeddings `[B, N, Dc]` fp32 on the model's device, from EVA embeddings `[B, N, De]` as they are stored.

    `draws` (B) are the key of each image and the number of its sample, which choose the noise together with the
    sampler's seed.
    """
    eva = pretrained.normalizer({"eva": eva.to(pretrained.device).float()})["eva"]
    shape = (eva.shape[1], pretrained.config.model.clip_dim)
    noise = torch.cat([evaluation_noise([key], k, shape, sampler.seed, pretrained.device) for key, k in draws])
    return pretrained.normalizer.inverse("clip", sample(pretrained.model, pretrained.flow, eva, noise, sampler))


class _Generation:
    """Generates the shards `todo` of a dataset, a batch in memory at a time."""

    def __init__(
        self,
        pretrained: Pretrained,
        dataset: EmbeddingDataset,
        spec: DatasetSpec,
        settings: EvalConfig,
        num_samples: int,
        facts: dict[str, Any],
        todo: Sequence[int],
    ) -> None:
        self.written = 0
        self._pretrained = pretrained
        self._dataset = dataset
        self._spec = spec
        self._settings = settings
        self._num_samples = num_samples
        self._facts = facts
        self._next = dict(pairwise(todo))
        self._ends = list(accumulate(dataset.shard_sizes))
        total = num_samples * sum(dataset.shard_sizes[shard] for shard in todo)
        self._progress = Progress("generating", total, "embeddings")

    def write_shard(self, shard: int, folder: Path) -> dict[str, int]:
        """Write a dataset of one shard, generated from that `shard` of the source, unless it is there already."""
        dataset, size, end = self._dataset, self._dataset.shard_sizes[shard], self._ends[shard]
        dataset.prefetch([shard, self._next.get(shard, shard)])
        with DatasetWriter(folder, self._spec, size * self._num_samples, resume=True) as writer:
            if not writer.done_keys():  # otherwise it is complete: a writer keeps nothing less
                for batch in read_batches(dataset, range(end - size, end), self._settings.batch_size):
                    self._write_batch(writer, batch)
        return {"samples": size * self._num_samples}

    def _write_batch(self, writer: DatasetWriter, batch: Batch) -> None:
        metas = [self._dataset.meta(*self._dataset.place(position)) for position in batch.positions.tolist()]
        draws = list(product(range(len(batch.keys)), range(self._num_samples)))
        for start in range(0, len(draws), self._settings.batch_size):
            part = draws[start : start + self._settings.batch_size]
            keyed = [(batch.keys[row], k) for row, k in part]
            eva = batch["eva"][[row for row, _ in part]]
            clip = generate_batch(self._pretrained, eva, keyed, self._settings.sampler).cpu()
            for (row, k), embedding in zip(part, clip, strict=True):
                tensors = {name: x[row] for name, x in batch.tensors.items()} | {"clip": embedding}
                meta = {**metas[row], "generated": {**self._facts, "sample": k}}
                writer.write(self._sample_key(batch.keys[row], k), tensors, meta)
            self.written += len(part)
            self._progress.at(self.written)

    def _sample_key(self, key: str, k: int) -> str:
        """Distinct for distinct (key, k). A view's number goes on in it, so that the image stays the photograph.

        What is a view, the source says: without a view separator every key is an image, whatever it ends with.
        """
        if self._num_samples == 1:
            return key
        is_view = self._dataset.spec.image_of(key) != key
        return f"{key}{'' if is_view else self._spec.view_separator}{k:04d}"


def _identity(dataset: EmbeddingDataset) -> str:
    """What the samples of a dataset are, wherever it is: their number, and a digest of its shards and selection."""
    selection, sizes = dataset.manifest.selection, dataset.shard_sizes
    shards = [(info.sha256, size) for info, size in zip(dataset.manifest.shards, sizes, strict=False)]
    part = None if selection is None else (selection.fraction, selection.part)
    digest = hashlib.sha256(json.dumps([shards, part]).encode()).hexdigest()
    return f"{len(dataset)} samples in {len(sizes)} shards, sha256 {digest}"
