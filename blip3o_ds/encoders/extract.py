"""Pictures to a dataset of paired embeddings: decode, run both encoders, write shards.

It can be interrupted at any time and started again with the same arguments, on any number of processes: complete shards
stay, the rest is redone.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from blip3o_ds.data.format.schema import DatasetSpec, StorageDType, TokenLayout
from blip3o_ds.data.format.writer import BusyFolder, DatasetWriter
from blip3o_ds.encoders.encoder import EncoderSpec, PatchEncoder
from blip3o_ds.encoders.images import ImagePart, ImageRecord, image_parts
from blip3o_ds.encoders.parts import BROKEN_NAME, Extraction
from blip3o_ds.encoders.registry import find_spec, load_encoder
from blip3o_ds.errors import DataError, EncoderError
from blip3o_ds.progress import Progress

logger = logging.getLogger(__name__)

_SHARDS_PER_PART = 8  # of a folder of files; a tar is a part by itself
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
    device: str | torch.device | None = None,
    trust_remote_code: bool = False,
    rank: int = 0,
    world_size: int = 1,
) -> dict[str, Any]:
    """Encode every picture of `images` (see `image_parts`) with two encoders into the dataset `dst`.

    Process `rank` of `world_size` takes every `world_size`-th part of the source, and whichever ends last joins them:
    the dataset is the same however many there were. They meet in the file system alone, so they need not run at the
    same time. `condition` and `target` are names from the registry; `dtype` is that of the stored embeddings.
    Returns this process's counts `written`, `skipped_existing` and `broken`, its `seconds`, and `parts_left`, those of
    all processes that are not done: 0 when the dataset is finished. Raises EncoderError when the encoders do not fit
    together or cannot be loaded, DataError when there is no usable picture, a part cannot be read (the others are
    done first), or `dst` holds another dataset.
    """
    spec = _dataset_spec(find_spec(condition), find_spec(target), token_layout, dtype)  # before gigabytes are loaded
    parts = image_parts(images, samples_per_shard * _SHARDS_PER_PART)
    weights = {
        "condition_weights": condition_weights or find_spec(condition).weights,
        "target_weights": target_weights or find_spec(target).weights,
    }
    job = Extraction(Path(dst), spec, samples_per_shard, weights, [(part.name, part.size) for part in parts])
    log = _ProcessProgress()
    todo = job.begin(range(rank, len(parts), world_size))
    logger.info("process %d of %d has %d of %d parts to encode", rank, world_size, len(todo), len(parts))
    if todo:
        encoders = (
            load_encoder(condition, condition_weights, device, trust_remote_code=trust_remote_code),
            load_encoder(target, target_weights, device, trust_remote_code=trust_remote_code),
        )

        def encode(part: ImagePart, folder: Path) -> dict[str, Any]:
            return encode_images(
                part.records(),
                folder,
                *encoders,
                token_layout=token_layout,
                dtype=dtype,
                samples_per_shard=samples_per_shard,
                batch_size=batch_size,
                log=log,
            )

        _encode_parts(job, parts, todo, log, encode)
    job.finish_if_last()
    return {**log.counts.summary(), "samples": job.num_samples(), "parts_left": job.parts_left()}


def _encode_parts(
    job: Extraction,
    parts: list[ImagePart],
    todo: list[int],
    log: _ProcessProgress,
    encode: Callable[[ImagePart, Path], dict[str, Any]],
) -> None:
    """Encode the parts that are missing; one that cannot be read does not keep the others from being done."""
    faults: list[DataError] = []
    log.expect([parts[number].size for number in todo])
    for number in todo:
        try:
            done = encode(parts[number], job.part_folder(number))
            counts = {"samples": done["written"] + done["skipped_existing"], "broken": done["broken"]}
        except BusyFolder:
            logger.warning("part %s: another process is at it, and is left to finish it", parts[number].name)
            continue
        except NothingUsable:
            counts = {"samples": 0}
        except DataError as error:
            logger.error("part %s: %s", parts[number].name, error)
            faults.append(error)
            continue
        finally:
            log.end_part()
        job.mark_done(number, counts)
        logger.info("part %s is done; %d of %d parts left in all", parts[number].name, job.parts_left(), len(parts))
    if faults:
        raise DataError(
            f"{len(faults)} of {len(todo)} parts could not be encoded, the others are done; the first: {faults[0]}"
        ) from faults[0]


class NothingUsable(DataError):
    """Not one picture could be decoded."""


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
    log: _ProcessProgress | None = None,
) -> dict[str, Any]:
    """The core of `extract`, on records and encoders that are there already.

    A picture that cannot be decoded is skipped, logged and listed in `dst/broken_images.jsonl`. After an
    interruption the result is the same to the bit when `batch_size` divides `samples_per_shard`; otherwise
    batches fall elsewhere and may round differently.
    """
    spec = _dataset_spec(condition.spec, target.spec, token_layout, dtype)
    extra = {"condition_weights": condition.weights, "target_weights": target.weights}
    with DatasetWriter(dst, spec, samples_per_shard=samples_per_shard, extra=extra, resume=True) as writer:
        progress = _PartProgress(dst, log or _ProcessProgress())
        todo = progress.skip_existing(records, writer.done_keys())
        decoded = _decode_ahead(todo, condition, target, lookahead=2 * batch_size)
        with ThreadPoolExecutor(1, thread_name_prefix="write") as background:
            writing: Future[None] | None = None
            for batch in _batches(progress.skip_broken(decoded), batch_size):
                encoded = _encode(batch, condition, target, token_layout)
                if writing:
                    writing.result()
                writing = background.submit(_write, encoded, writer, progress)
            if writing:
                writing.result()
        counts = progress.counts
        if not counts.written + counts.skipped_existing:
            raise NothingUsable(f"{dst}: no picture could be used ({counts.broken} broken); see {BROKEN_NAME} in it")
    return counts.summary()


def _dataset_spec(
    condition: EncoderSpec, target: EncoderSpec, token_layout: TokenLayout, dtype: StorageDType
) -> DatasetSpec:
    if condition.grid_size != target.grid_size:
        raise EncoderError(
            f"a pair needs the same grid of patches: {condition.name} gives {condition.grid_size}x"
            f"{condition.grid_size}, {target.name} {target.grid_size}x{target.grid_size}"
        )
    condition.require_layout(token_layout)
    target.require_layout(token_layout)
    return DatasetSpec.pair(
        num_tokens=condition.grid_size**2 + int(token_layout == "cls_patch"),
        token_layout=token_layout,
        eva_dim=condition.embed_dim,
        clip_dim=target.embed_dim,
        dtype=dtype,
        condition_encoder=condition.name,
        target_encoder=target.name,
    )


@dataclass(frozen=True)
class _Decoded:
    """A picture ready for both encoders, or the reason why it is not."""

    record: ImageRecord
    condition: Tensor | None = None  # [3, H, W]
    target: Tensor | None = None  # [3, H', W']
    meta: dict[str, Any] | None = None
    fault: str = ""


def _decode_ahead(
    records: Iterable[ImageRecord], condition: PatchEncoder, target: PatchEncoder, lookahead: int
) -> Iterator[_Decoded]:
    """Decode in threads, at most `lookahead` pictures in advance, and yield in the records' order."""
    pending: deque[Future[_Decoded]] = deque()
    pool = ThreadPoolExecutor(min(_MAX_DECODE_THREADS, _available_cpus()), thread_name_prefix="decode")
    try:
        for record in records:
            pending.append(pool.submit(_decode, record, condition, target))
            if len(pending) >= lookahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _available_cpus() -> int:
    """Those that a scheduler left to this process, which may be fewer than the machine has."""
    return len(os.sched_getaffinity(0))


def _decode(record: ImageRecord, condition: PatchEncoder, target: PatchEncoder) -> _Decoded:
    try:
        image, meta = record.load()
        if max(image.size) > _MAX_ASPECT_RATIO * min(image.size):
            raise ValueError(f"{image.size[0]}x{image.size[1]} pixels is no picture but a strip")
    except Exception as error:  # a damaged file makes the decoders raise almost anything; it is reported, not lost
        return _Decoded(record, fault=f"{type(error).__name__}: {error}")
    inputs = condition.preprocess(image)
    same = condition.spec.input_format == target.spec.input_format
    return _Decoded(record, inputs, inputs if same else target.preprocess(image), meta)


def _batches(decoded: Iterable[_Decoded], batch_size: int) -> Iterator[list[_Decoded]]:
    iterator = iter(decoded)
    while batch := list(islice(iterator, batch_size)):
        yield batch


@dataclass(frozen=True)
class _EncodedBatch:
    samples: list[_Decoded]
    tensors: dict[str, Tensor]  # by name [B, N, D], on the CPU


def _encode(
    batch: list[_Decoded], condition: PatchEncoder, target: PatchEncoder, token_layout: TokenLayout
) -> _EncodedBatch:
    eva = condition(torch.stack([sample.condition for sample in batch]), token_layout)
    clip = target(torch.stack([sample.target for sample in batch]), token_layout)
    return _EncodedBatch(batch, {"eva": eva.cpu(), "clip": clip.cpu()})


def _write(batch: _EncodedBatch, writer: DatasetWriter, progress: _PartProgress) -> None:
    for index, sample in enumerate(batch.samples):
        writer.write(sample.record.key, {name: x[index] for name, x in batch.tensors.items()}, sample.meta)
    progress.add_written(batch.samples)


@dataclass
class _Counts:
    """What was done with the pictures of one part, or of all parts of this process."""

    written: int = 0
    skipped_existing: int = 0
    broken: int = 0
    started: float = field(default_factory=time.monotonic)

    def summary(self) -> dict[str, Any]:
        counts = {"written": self.written, "skipped_existing": self.skipped_existing, "broken": self.broken}
        return {**counts, "seconds": time.monotonic() - self.started}


class _ProcessProgress:
    """The counts of a process over all of its parts, and how far it is in them."""

    def __init__(self) -> None:
        self.counts = _Counts()
        self.expect([1])

    def expect(self, sizes: list[int]) -> None:
        """The sizes of the parts that come, in order."""
        self._sizes, self._total, self._ended = deque(sizes), sum(sizes), 0
        self._progress = Progress("encoding", self._total)

    def end_part(self) -> None:
        self._ended += self._sizes.popleft()

    def skip(self, progress: float) -> None:
        """A picture was found done at `progress` (0..1) of the present part."""
        self.counts.skipped_existing += 1
        if not self.counts.written:
            self._progress.resume_at(self._done(progress))

    def add_written(self, count: int, progress: float) -> None:
        self.counts.written += count
        written, done = self.counts.written, self._done(progress)
        rate = written / (time.monotonic() - self.counts.started)
        self._progress.at(
            done, f"{written} images, {rate:.3g}/s, {done / self._total:.1%} of the share of this process"
        )

    def _done(self, progress: float) -> float:
        return self._ended + progress * self._sizes[0]


class _PartProgress:
    """What has been done of one part, and the list of its broken pictures."""

    def __init__(self, dst: Path, process: _ProcessProgress) -> None:
        self.counts = _Counts()
        self._process = process
        # Every run meets all broken pictures again, so the list is written from its start.
        self._broken_path = dst / BROKEN_NAME
        self._broken_path.unlink(missing_ok=True)

    def skip_existing(self, records: Iterable[ImageRecord], done: set[str]) -> Iterator[ImageRecord]:
        for record in records:
            if record.key in done:
                self.counts.skipped_existing += 1
                self._process.skip(record.progress)
            else:
                yield record

    def skip_broken(self, decoded: Iterable[_Decoded]) -> Iterator[_Decoded]:
        for sample in decoded:
            if sample.fault:
                self._add_broken(sample)
            else:
                yield sample

    def add_written(self, samples: list[_Decoded]) -> None:
        self.counts.written += len(samples)
        self._process.add_written(len(samples), samples[-1].record.progress)

    def _add_broken(self, sample: _Decoded) -> None:
        self.counts.broken += 1
        self._process.counts.broken += 1
        logger.warning("skipped %s: %s", sample.record.source, sample.fault)
        entry = {"key": sample.record.key, "source": sample.record.source, "fault": sample.fault}
        with open(self._broken_path, "a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
