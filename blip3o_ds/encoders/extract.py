"""Encodes images with a pair of encoders and writes the paired embeddings as a dataset.

It can be interrupted at any time and run again with the same arguments, on any number of processes: complete shards are
kept, and only the rest is done again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from blip3o_ds.data.format.parts import PartedDataset
from blip3o_ds.data.format.schema import DatasetSpec, StorageDType, TokenLayout
from blip3o_ds.data.format.writer import DatasetWriter
from blip3o_ds.encoders.encoder import EncoderSpec, PatchEncoder
from blip3o_ds.encoders.images import ImagePart, ImageRecord, image_parts
from blip3o_ds.encoders.registry import find_spec, load_encoder
from blip3o_ds.errors import DataError, EncoderError
from blip3o_ds.progress import Progress

logger = logging.getLogger(__name__)

BROKEN_NAME = "broken_images.jsonl"
_SHARDS_PER_PART = 8  # when the source is a folder of files; a tar is one part
_MAX_DECODE_THREADS = 8
_MAX_ASPECT_RATIO = 64


def extract(
    images: str | Path,
    dst: str | Path,
    *,
    condition: str,
    target: str,
    condition_weights: str | None = None,
    target_weights: str | None = None,
    token_layout: TokenLayout = "patch_only",
    dtype: StorageDType = "bf16",
    samples_per_shard: int = 512,
    batch_size: int = 16,
    view_separator: str | None = None,
    device: str | torch.device | None = None,
    trust_remote_code: bool = False,
    rank: int = 0,
    world_size: int = 1,
) -> dict[str, Any]:
    """Encode every image of `images` (see `image_parts`) with two encoders of the registry into the dataset `dst`.

    Process `rank` of `world_size` takes every `world_size`-th part of the source, and whichever ends last joins them:
    the dataset does not depend on the number of processes. They share nothing but the file system, so they need not
    run at the same time. `dtype` is the dtype of the stored embeddings. Where the images are views, such as crops,
    `view_separator` says which are of one (see `DatasetSpec.image_of`).

    Returns this process's counts `written`, `skipped_existing` and `broken`, its `seconds`, `samples` of the finished
    dataset, and `parts_left` of all processes: 0 when it is finished. Raises EncoderError for encoders that do not fit
    together, and DataError without usable images, for another dataset in `dst`, and at the end for a damaged part.
    """
    # Before gigabytes are loaded.
    spec = _dataset_spec(find_spec(condition), find_spec(target), token_layout, dtype, view_separator)
    parts = image_parts(images, samples_per_shard * _SHARDS_PER_PART)
    weights = {
        "condition_weights": condition_weights or find_spec(condition).weights,
        "target_weights": target_weights or find_spec(target).weights,
    }
    plan = {"samples_per_shard": samples_per_shard, **weights, "parts_sha256": _digest(parts)}
    names = [part.name for part in parts]
    job = PartedDataset(Path(dst), spec, names, "extraction", plan, weights, log_name=BROKEN_NAME)
    todo = job.begin(rank, world_size)
    counts = _Counts([parts[number].size for number in todo])
    if todo:
        encode = partial(
            encode_images,
            condition=load_encoder(condition, condition_weights, device, trust_remote_code=trust_remote_code),
            target=load_encoder(target, target_weights, device, trust_remote_code=trust_remote_code),
            token_layout=token_layout,
            dtype=dtype,
            samples_per_shard=samples_per_shard,
            batch_size=batch_size,
            view_separator=view_separator,
            counts=counts,
        )
        job.write(todo, lambda number, folder: _encode_part(parts[number], folder, encode, counts))
    job.finish_if_last()
    return {**counts.summary(), "samples": job.num_samples(), "parts_left": job.parts_left()}


def _encode_part(
    part: ImagePart, folder: Path, encode: Callable[..., dict[str, Any]], counts: _Counts
) -> dict[str, int]:
    try:
        done = encode(part.records(), folder)
        return {"samples": done["written"] + done["skipped_existing"], "broken": done["broken"]}
    except NothingUsable:
        return {"samples": 0}
    finally:
        counts.end_part()


def _digest(parts: Sequence[ImagePart]) -> str:
    return hashlib.sha256(json.dumps([(part.name, part.size) for part in parts]).encode()).hexdigest()


class NothingUsable(DataError):
    """Not one image could be decoded."""


def encode_images(
    records: Iterable[ImageRecord],
    dst: Path,
    condition: PatchEncoder,
    target: PatchEncoder,
    *,
    token_layout: TokenLayout = "patch_only",
    dtype: StorageDType = "bf16",
    samples_per_shard: int = 512,
    batch_size: int = 16,
    view_separator: str | None = None,
    counts: _Counts | None = None,
) -> dict[str, Any]:
    """The core of `extract`, for given records and loaded encoders.

    An image that cannot be decoded is skipped, logged and listed in `dst/broken_images.jsonl`. After an interruption
    the result is bitwise the same if `batch_size` divides `samples_per_shard`; otherwise other images share a batch,
    and rounding may differ.
    """
    counts = counts or _Counts([1])
    before = counts.summary()
    spec = _dataset_spec(condition.spec, target.spec, token_layout, dtype, view_separator)
    extra = {"condition_weights": condition.options.weights, "target_weights": target.options.weights}
    with DatasetWriter(dst, spec, samples_per_shard=samples_per_shard, extra=extra, resume=True) as writer:
        todo = _without_existing(records, writer.done_keys(), counts)
        decode = partial(_decode, condition=condition, target=target)
        decoded = _decode_ahead(todo, decode, 2 * batch_size, dst / BROKEN_NAME, counts)
        with ThreadPoolExecutor(1, thread_name_prefix="write") as background:
            writing: Future[None] = background.submit(lambda: None)
            while batch := list(islice(decoded, batch_size)):
                tensors = {
                    "eva": condition(torch.stack([image.condition for image in batch]), token_layout).cpu(),
                    "clip": target(torch.stack([image.target for image in batch]), token_layout).cpu(),
                }
                writing.result()
                writing = background.submit(_write, writer, batch, tensors, counts)
            writing.result()
        done = {name: value - before[name] for name, value in counts.summary().items()}
        if not done["written"] + done["skipped_existing"]:
            raise NothingUsable(f"{dst}: no image could be used ({done['broken']} broken); see {BROKEN_NAME} in it")
    return done


def _dataset_spec(
    condition: EncoderSpec,
    target: EncoderSpec,
    token_layout: TokenLayout,
    dtype: StorageDType,
    view_separator: str | None,
) -> DatasetSpec:
    if condition.grid_size != target.grid_size:
        left, right = (f"{spec.grid_size}x{spec.grid_size}" for spec in (condition, target))
        raise EncoderError(f"a pair needs one grid of patches: {condition.name} gives {left}, {target.name} {right}")
    condition.require_layout(token_layout)
    target.require_layout(token_layout)
    num_tokens = condition.grid_size**2 + int(token_layout == "cls_patch")
    dims, names = (condition.embed_dim, target.embed_dim), (condition.name, target.name)
    pair = DatasetSpec.pair(num_tokens, token_layout, *dims, dtype, *names)
    return replace(pair, view_separator=view_separator)


@dataclass(frozen=True)
class _Decoded:
    """An image as the input of both encoders."""

    record: ImageRecord
    condition: Tensor  # [3, H, W]
    target: Tensor  # [3, H', W']
    meta: dict[str, Any]


class _Broken(Exception):
    """An image that cannot be decoded, and why."""


def _without_existing(records: Iterable[ImageRecord], done: set[str], counts: _Counts) -> Iterator[ImageRecord]:
    for record in records:
        if record.key in done:
            counts.add_existing(record)
        else:
            yield record


def _decode_ahead(
    records: Iterable[ImageRecord],
    decode: Callable[[ImageRecord], _Decoded],
    lookahead: int,
    path: Path,
    counts: _Counts,
) -> Iterator[_Decoded]:
    """Decode in threads, at most `lookahead` images in advance, in their order; `path` lists the broken ones."""
    path.unlink(missing_ok=True)  # every run meets all broken images again
    available = len(os.sched_getaffinity(0))  # a scheduler may give this process fewer cores than the machine has
    pool = ThreadPoolExecutor(min(_MAX_DECODE_THREADS, available), thread_name_prefix="decode")
    submitted = ((record, pool.submit(decode, record)) for record in records)
    try:
        pending = deque(islice(submitted, lookahead))
        while pending:
            record, future = pending.popleft()
            try:
                yield future.result()
            except _Broken as fault:
                counts.broken += 1
                logger.warning("skipped %s: %s", record.source, fault)
                entry = {"key": record.key, "source": record.source, "fault": str(fault)}
                with open(path, "a", encoding="utf-8") as file:
                    file.write(json.dumps(entry) + "\n")
            pending.extend(islice(submitted, 1))
    finally:
        pool.shutdown(cancel_futures=True)


def _decode(record: ImageRecord, condition: PatchEncoder, target: PatchEncoder) -> _Decoded:
    try:
        image, meta = record.load()
        if max(image.size) > _MAX_ASPECT_RATIO * min(image.size):
            raise ValueError(f"{image.size[0]}x{image.size[1]} pixels are a strip, not an image")
    except Exception as error:  # decoders raise almost anything on a damaged file; it is reported, not lost
        raise _Broken(f"{type(error).__name__}: {error}") from None
    inputs = condition.preprocess(image)
    same = condition.spec.input_format == target.spec.input_format
    return _Decoded(record, inputs, inputs if same else target.preprocess(image), meta)


def _write(writer: DatasetWriter, batch: list[_Decoded], tensors: dict[str, Tensor], counts: _Counts) -> None:
    for row, image in enumerate(batch):
        writer.write(image.record.key, {name: x[row] for name, x in tensors.items()}, image.meta)
    counts.add_written(len(batch), batch[-1].record)


class _Counts:
    """What a process did with the images of its parts, and how far it is in them; `sizes` are those of the parts."""

    def __init__(self, sizes: Sequence[int]) -> None:
        self.written = self.skipped_existing = self.broken = 0
        self._started = time.monotonic()
        self._sizes, self._total, self._ended = deque(sizes), sum(sizes), 0
        self._progress = Progress("encoding", self._total)

    def end_part(self) -> None:
        self._ended += self._sizes.popleft()

    def add_existing(self, record: ImageRecord) -> None:
        self.skipped_existing += 1
        if not self.written:
            self._progress.resume_at(self._done(record))

    def add_written(self, count: int, last: ImageRecord) -> None:
        self.written += count
        done, rate = self._done(last), self.written / (time.monotonic() - self._started)
        detail = f"{self.written} images, {rate:.3g}/s, {done / self._total:.1%} of this process's share"
        self._progress.at(done, detail)

    def summary(self) -> dict[str, Any]:
        counts = {"written": self.written, "skipped_existing": self.skipped_existing, "broken": self.broken}
        return {**counts, "seconds": time.monotonic() - self._started}

    def _done(self, record: ImageRecord) -> float:
        """The share of all parts that ends with this record of the current part."""
        return self._ended + record.progress * self._sizes[0]
