"""Pictures to a dataset of paired embeddings: decode, run both encoders, write shards.

It can be interrupted at any time and started again with the same arguments: complete shards stay, the rest is
redone.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from blip3o_ds.data.schema import DatasetSpec, StorageDType, TokenLayout
from blip3o_ds.data.shards import DatasetWriter
from blip3o_ds.encoders.encoder import EncoderSpec, PatchEncoder
from blip3o_ds.encoders.images import ImageRecord, iterate_images
from blip3o_ds.encoders.registry import find_spec, load_encoder
from blip3o_ds.errors import DataError, EncoderError

logger = logging.getLogger(__name__)

BROKEN_NAME = "broken_images.jsonl"
_LOG_SECONDS = 10.0
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
) -> dict[str, Any]:
    """Encode every picture of `images` (see `iterate_images`) with two encoders into the dataset `dst`.

    `condition` and `target` are names from the registry; `dtype` is that of the stored embeddings. Returns
    the counts `written`, `skipped_existing` and `broken`, and `seconds`. Raises EncoderError when the
    encoders do not fit together or cannot be loaded, DataError when there is no usable picture or `dst` holds
    another dataset.
    """
    records = iterate_images(images)
    _dataset_spec(find_spec(condition), find_spec(target), token_layout, dtype)  # before gigabytes are loaded
    return encode_images(
        records,
        Path(dst),
        load_encoder(condition, condition_weights, device, trust_remote_code=trust_remote_code),
        load_encoder(target, target_weights, device, trust_remote_code=trust_remote_code),
        token_layout=token_layout,
        dtype=dtype,
        samples_per_shard=samples_per_shard,
        batch_size=batch_size,
    )


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
) -> dict[str, Any]:
    """The core of `extract`, on records and encoders that are there already.

    A picture that cannot be decoded is skipped, logged and listed in `dst/broken_images.jsonl`. After an
    interruption the result is the same to the bit when `batch_size` divides `samples_per_shard`; otherwise
    batches fall elsewhere and may round differently.
    """
    spec = _dataset_spec(condition.spec, target.spec, token_layout, dtype)
    extra = {"condition_weights": condition.weights, "target_weights": target.weights}
    with DatasetWriter.resume(dst, spec, samples_per_shard=samples_per_shard, extra=extra) as writer:
        progress = _Progress(dst)
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
        if not progress.written + progress.skipped_existing:
            raise DataError(f"{dst}: no picture could be used ({progress.broken} broken); see {BROKEN_NAME} in it")
    return progress.summary()


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
    return DatasetSpec(
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
    pool = ThreadPoolExecutor(min(_MAX_DECODE_THREADS, os.cpu_count() or 1), thread_name_prefix="decode")
    try:
        for record in records:
            pending.append(pool.submit(_decode, record, condition, target))
            if len(pending) >= lookahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


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
    eva: Tensor  # [B, N, De], on the CPU
    clip: Tensor  # [B, N, Dc], on the CPU


def _encode(
    batch: list[_Decoded], condition: PatchEncoder, target: PatchEncoder, token_layout: TokenLayout
) -> _EncodedBatch:
    eva = condition(torch.stack([sample.condition for sample in batch]), token_layout)
    clip = target(torch.stack([sample.target for sample in batch]), token_layout)
    return _EncodedBatch(batch, eva.cpu(), clip.cpu())


def _write(batch: _EncodedBatch, writer: DatasetWriter, progress: _Progress) -> None:
    for index, sample in enumerate(batch.samples):
        writer.write(sample.record.key, batch.eva[index], batch.clip[index], sample.meta)
    progress.add_written(batch.samples)


class _Progress:
    """What has been done so far: the counts, the list of broken pictures, and a log line now and then."""

    def __init__(self, dst: Path) -> None:
        self.written = self.skipped_existing = self.broken = 0
        self._started = self._last_log = time.monotonic()
        self._first_share: float | None = None
        # Every run meets all broken pictures again, so the list starts anew.
        self._broken_path = dst / BROKEN_NAME
        self._broken_path.unlink(missing_ok=True)

    def skip_existing(self, records: Iterable[ImageRecord], done: set[str]) -> Iterator[ImageRecord]:
        for record in records:
            if record.key in done:
                self.skipped_existing += 1
                self._first_share = record.progress
            else:
                yield record

    def skip_broken(self, decoded: Iterable[_Decoded]) -> Iterator[_Decoded]:
        for sample in decoded:
            if sample.fault:
                self._add_broken(sample)
            else:
                yield sample

    def add_written(self, samples: list[_Decoded]) -> None:
        self.written += len(samples)
        now = time.monotonic()
        if now - self._last_log >= _LOG_SECONDS:
            self._last_log = now
            self._log(now - self._started, samples[-1].record.progress)

    def summary(self) -> dict[str, Any]:
        return {
            "written": self.written,
            "skipped_existing": self.skipped_existing,
            "broken": self.broken,
            "seconds": time.monotonic() - self._started,
        }

    def _add_broken(self, sample: _Decoded) -> None:
        self.broken += 1
        logger.warning("skipped %s: %s", sample.record.source, sample.fault)
        entry = {"key": sample.record.key, "source": sample.record.source, "fault": sample.fault}
        with open(self._broken_path, "a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")

    def _log(self, seconds: float, share: float) -> None:
        covered = share - (self._first_share or 0.0)
        remaining = seconds * (1 - share) / covered if covered > 0 else float("nan")
        logger.info(
            "%d images encoded, %.1f/s, %.0f %% of the source, about %.0f s left",
            self.written,
            self.written / seconds,
            100 * share,
            remaining,
        )
