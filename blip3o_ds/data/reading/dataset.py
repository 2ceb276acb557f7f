"""Reading datasets: a folder of webdataset tars, an index beside each, and a manifest.

A sample is reached through the index and read without parsing the tar, which stays a plain one that `tar` and
`webdataset` read. The writer lives in `writer.py` and is offered here as well.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from io import FileIO
from itertools import chain
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from blip3o_ds.data.format.codec import (
    SampleMemory,
    StoredTensor,
    check_finite,
    check_scale,
    decode,
    parse_header,
    read_dtype,
    stored_tensors,
)
from blip3o_ds.data.format.index import ShardIndex, check_tar_size, index_path
from blip3o_ds.data.format.schema import MANIFEST_NAME, DatasetSpec, ShardInfo, TokenLayout
from blip3o_ds.data.format.writer import DatasetWriter
from blip3o_ds.data.reading.bad_samples import SLOW_READ_SECONDS, FaultLog
from blip3o_ds.data.reading.cache import CacheFull
from blip3o_ds.data.reading.source import ShardFile, load_manifest, open_source, shards_location
from blip3o_ds.errors import DataError

__all__ = ["DatasetWriter", "EmbeddingDataset", "Sample", "ShardReader"]

_OPEN_SHARDS = 64  # a window of the order is 16 shards; the next one opens while this one is still in use
_MAX_HEADER_BYTES = 1 << 16
_READAHEAD_BYTES = 1 << 17  # of Linux, where nobody raised it
_WILLNEED = os.POSIX_FADV_WILLNEED
_CACHE_WAIT_SECONDS = 60.0  # for other processes of the node to let go of shards in a full cache


@dataclass(frozen=True, eq=False)
class Sample:
    """One image: `eva` [N, eva_dim] conditions, `clip` [N, clip_dim] is the target."""

    key: str
    eva: Tensor
    clip: Tensor


class ShardReader:
    """Reads samples of one shard through its index. Safe to use from several threads.

    A sample comes by `preadv` straight into the caller's tensors. That is about as fast as a copy out of a memory map
    from the page cache, a few large requests instead of a fault for every few pages where the file is far away, and a
    DataError instead of the end of the process where the file was cut short under it.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.index = ShardIndex.load(index_path(self.path))
        self._file = _open_file(self.path, self.index.num_bytes)
        self._advice_bytes = _readahead_bytes(os.fstat(self._file.fileno()).st_dev)
        self._header, self._relative, self._in_file_order = self._common_header()

    @property
    def spec(self) -> DatasetSpec:
        return self.index.spec

    @property
    def keys(self) -> list[str]:
        return self.index.keys

    def __len__(self) -> int:
        return len(self.index.keys)

    def read(self, i: int) -> Sample:
        """Sample `i`, in the stored dtype (fp8-e4m3 as bf16), in memory of its own."""
        out = {tensor.name: torch.empty(tensor.shape, dtype=tensor.dtype) for tensor in self._in_file_order}
        return _decoded(self.read_into(i, out), out)

    def read_into(self, i: int, out: Mapping[str, Tensor], skip_tokens: int = 0) -> str:
        """Copy sample `i` without its first `skip_tokens` tokens, as it is stored; returns its key.

        `out` has a contiguous CPU tensor for each of the spec's `stored_tensors`, by its name: `eva`
        [N - skip_tokens, eva_dim], `clip` [N - skip_tokens, clip_dim], and the scales [N - skip_tokens] of fp8-e4m3.
        Raises DataError naming shard and key for a damaged header, a value that is not finite, or a read that fails.
        """
        memory = out if isinstance(out, SampleMemory) else SampleMemory(out)
        start = int(self.index.members["tensors_offset"][i])
        for name, offset in self._relative.items():
            if self.index.tensors[name][i] != start + offset:
                raise DataError(f"{self._where(i)}: the index gives another offset for {name} than the sample's header")
        header = bytearray(len(self._header))
        pieces: list[Any] = [header]
        for tensor in self._in_file_order:
            if skip_tokens:
                pieces.append(bytearray(skip_tokens * (tensor.num_bytes // tensor.shape[0])))
            for piece in memory.pieces[tensor.name]:
                pieces.append(piece.bytes)
                start = self._read_at(start, pieces, i)
                pieces = []
                if header != self._header:
                    self._refuse_header(i)
                if piece.has_nonfinite():
                    check_finite(memory[tensor.name], tensor.name, self._where(i))
        for side in ("eva", "clip"):
            if (scale := memory.get(f"{side}_scale")) is not None:
                check_scale(scale, side, self._where(i))
        return self.keys[i]

    def will_need(self, i: int) -> bool:
        """Have the system read sample `i` into the page cache in the background; False where it is there already."""
        start, size = (int(self.index.members[name][i]) for name in ("tensors_offset", "tensors_size"))
        if self._is_cached(start) and self._is_cached(start + size - 1):
            return False
        for piece in range(start, start + size, self._advice_bytes):
            os.posix_fadvise(self._file.fileno(), piece, min(self._advice_bytes, start + size - piece), _WILLNEED)
        return True

    def meta(self, i: int) -> dict[str, Any]:
        """What came with sample `i`: its caption and whatever else the source had."""
        content = bytearray(int(self.index.members["meta_size"][i]))
        self._read_at(int(self.index.members["meta_offset"][i]), [content], i)
        try:
            return json.loads(content)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{self._where(i)}: its .json is damaged ({error})") from error

    def _where(self, i: int) -> str:
        return f"{self.path}: sample {self.keys[i]}"

    def _common_header(self) -> tuple[bytearray, dict[str, int], list[StoredTensor]]:
        """The header of the first sample that has a sound one; the others need one comparison of bytes with it."""
        errors = []
        for i in range(len(self)):
            try:
                content, where = self._read_header(i), self._where(i)
                length, relative = parse_header(content, self.spec, where)
                return content[:length], relative, _in_file_order(self.spec, length, relative, where)
            except DataError as error:
                errors.append(error)
        raise errors[0]

    def _read_header(self, i: int) -> bytearray:
        """The start of a sample's file, which holds at least its header."""
        content = bytearray(min(int(self.index.members["tensors_size"][i]), _MAX_HEADER_BYTES))
        self._read_at(int(self.index.members["tensors_offset"][i]), [content], i)
        return content

    def _read_at(self, offset: int, pieces: list[Any], i: int) -> int:
        """Fill arrays of bytes one after another with the file's from `offset`, for sample `i`; returns their end."""
        end = offset + sum(map(len, pieces))
        while True:
            try:
                count = os.preadv(self._file.fileno(), pieces, offset)
            except OSError as error:
                raise DataError(
                    f"{self._where(i)}: reading failed: {error.strerror}; see to the file system"
                ) from error
            offset += count
            if offset == end:
                return end
            if count == 0:
                raise DataError(
                    f"{self._where(i)}: the file ends before the sample does (nothing at byte {offset}): it was cut "
                    "short while it was read; copy it again"
                )
            while count >= len(pieces[0]):
                count -= len(pieces.pop(0))
            pieces[0] = memoryview(pieces[0])[count:]

    def _is_cached(self, offset: int) -> bool:
        try:
            return os.preadv(self._file.fileno(), [bytearray(1)], offset, os.RWF_NOWAIT) == 1
        except OSError:  # it would have to wait, or this file system cannot tell
            return False

    def _refuse_header(self, i: int) -> NoReturn:
        parse_header(self._read_header(i), self.spec, self._where(i))  # says what differs, if it can
        raise DataError(f"{self._where(i)}: its safetensors header is not that of the shard's other samples")


@dataclass(frozen=True, eq=False)
class _OpenShard:
    reader: ShardReader
    rows: np.ndarray | None  # of a split: its samples' places in the shard
    file: ShardFile  # keeps a cached shard from being evicted

    def row(self, index: int) -> int:
        return index if self.rows is None else int(self.rows[index])


class EmbeddingDataset:
    """A dataset opened for reading by (shard, index); shards open on first use. Safe for several threads.

    `location` is a folder, a URL (`https://`, `s3://`, `gs://`, …) or `pipe:COMMAND {name}`; shards that are not on a
    file system are kept in at most `cache_gb` GiB of `cache_dir` (see `ShardCache`). Opening reads the manifest alone,
    however many shards there are. `max_shards` and `max_samples` keep only the first of each.
    `token_layout="patch_only"` reads a `cls_patch` dataset without token 0 (the manifest's statistics still include
    it). Raises DataError: here for a missing or wrong manifest, on reading for a missing or damaged shard.

    Where the policy in `faults` is `skip`, `read` and `read_into` give another sample instead of that error: for a bad
    sample the next sound one of its shard, from the first again after the last; for a shard that cannot be opened, or
    has no sound sample, the sample `index` modulo its size of the next shard, in the same way. So the sample that is
    read depends on the data and the place alone, and its key says which it was. Sizes and order are the manifest's.
    What was found bad once is not tried again.
    """

    def __init__(
        self,
        location: str | Path,
        max_shards: int | None = None,
        max_samples: int | None = None,
        token_layout: TokenLayout | None = None,
        cache_dir: str | Path | None = None,
        cache_gb: float = 100.0,
        faults: FaultLog | None = None,
    ) -> None:
        for name, limit in (("max_shards", max_shards), ("max_samples", max_samples)):
            if limit is not None and limit < 1:
                raise DataError(f"{name} must be at least 1, found {limit}")
        self.location = str(location)
        self.manifest = load_manifest(location)
        self._source = open_source(shards_location(location, self.manifest), cache_dir, cache_gb)
        self.spec = self.manifest.spec.viewed_as(token_layout)
        self.dtype = read_dtype(self.spec.dtype)
        shards = self.manifest.shards[:max_shards]
        self.shard_sizes = _truncated([shard.num_samples for shard in shards], max_samples)
        if not self.shard_sizes:
            raise DataError(f"{location}: the dataset's {MANIFEST_NAME} lists no samples")
        self.faults = FaultLog() if faults is None else faults
        self._bad_shards: set[int] = set()
        self._bad_samples: set[tuple[int, int]] = set()
        self._skip_tokens = self.manifest.spec.num_tokens - self.spec.num_tokens
        self._shard_ends = np.cumsum(self.shard_sizes)
        self._open_shards: OrderedDict[int, _OpenShard] = OrderedDict()
        self._opening: dict[int, threading.Lock] = {}
        self._max_open = _OPEN_SHARDS
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return int(self._shard_ends[-1])

    def place(self, index: int) -> tuple[int, int]:
        """`(shard, index in the shard)` of the sample at sequential `index` of the dataset."""
        shard = int(np.searchsorted(self._shard_ends, index, side="right"))
        return shard, index - (int(self._shard_ends[shard - 1]) if shard else 0)

    def prefetch(self, shards: Sequence[int]) -> None:
        """These shards are read now and next: fetch the ones of a URL in the background, and close all others."""
        with self._lock:
            self._max_open = max(_OPEN_SHARDS, len(shards))
            for shard in self._open_shards.keys() - set(shards):
                del self._open_shards[shard]
        self._source.keep([self.manifest.shards[shard] for shard in shards])

    def close(self) -> None:
        """Let go of all shards and end the reading ahead."""
        self._source.close()
        with self._lock:
            self._open_shards.clear()

    def read(self, shard: int, index: int) -> Sample:
        """Sample `index` of shard number `shard`: `eva` [N, eva_dim], `clip` [N, clip_dim] of `spec`."""
        out = {tensor.name: torch.empty(tensor.shape, dtype=tensor.dtype) for tensor in stored_tensors(self.spec)}
        return _decoded(self.read_into(shard, index, out), out)

    def read_into(self, shard: int, index: int, out: Mapping[str, Tensor]) -> str:
        """Copy a sample as it is stored into a contiguous CPU tensor for each of `stored_tensors(spec)`, by its name.

        Such as a batch's rows; returns the sample's key.
        """
        self._check_place(shard, index)
        for other in chain(range(shard, len(self.shard_sizes)), range(shard)):
            found = self._read_from(other, index, out)
            if found is not None:
                place, key = found
                if place != (shard, index):
                    self.faults.replaced()
                return key
        raise DataError(f"{self.location}: none of its samples can be read; `blip3o-ds data verify` says why")

    def will_need(self, shard: int, index: int) -> bool:
        """Have the system read a sample into the page cache in the background; False where there is nothing to do."""
        if shard in self._bad_shards:
            return False
        reader, row = self._locate(shard, index)
        return reader.will_need(row)

    def meta(self, shard: int, index: int) -> dict[str, Any]:
        """What came with the sample: caption and other fields."""
        reader, row = self._locate(shard, index)
        return reader.meta(row)

    def keys(self, shard: int) -> list[str]:
        """The keys of a shard's samples, in order, all of them whatever `max_samples`."""
        opened = self._opened(shard)
        keys = opened.reader.keys
        return keys if opened.rows is None else [keys[row] for row in opened.rows]

    def key(self, shard: int, index: int) -> str:
        reader, row = self._locate(shard, index)
        return reader.keys[row]

    def _locate(self, shard: int, index: int) -> tuple[ShardReader, int]:
        """The reader of a shard, and the sample's place in it."""
        self._check_place(shard, index)
        opened = self._opened(shard)
        return opened.reader, opened.row(index)

    def _check_place(self, shard: int, index: int) -> None:
        if not 0 <= index < self.shard_sizes[shard]:
            raise IndexError(f"sample {index} of shard {shard}, which has {self.shard_sizes[shard]}")

    def _read_from(self, shard: int, index: int, out: Mapping[str, Tensor]) -> tuple[tuple[int, int], str] | None:
        """Read the first sound sample of a shard from `index` on, around its end; its place and key, if there is one.

        Raises the first fault instead where the policy says so.
        """
        if shard in self._bad_shards:
            return None
        name, size = self.manifest.shards[shard].name, self.shard_sizes[shard]
        try:
            opened = self._opened(shard)
        except CacheFull:  # says nothing about the shard
            raise
        except DataError as error:
            self.faults.bad_shard(name, error)
            self._bad_shards.add(shard)
            return None
        for step in range(size):
            place = shard, (index + step) % size
            if place in self._bad_samples:
                continue
            row = opened.row(place[1])
            try:
                return place, self._read_row(opened.reader, row, out)
            except DataError as error:
                self.faults.bad_sample(name, opened.reader.keys[row], error)
                self._bad_samples.add(place)
        self.faults.bad_shard(name, DataError(f"{opened.reader.path}: none of its {size} samples can be read"))
        self._bad_shards.add(shard)
        return None

    def _read_row(self, reader: ShardReader, row: int, out: Mapping[str, Tensor]) -> str:
        started = time.monotonic()
        key = reader.read_into(row, out, self._skip_tokens)
        if (seconds := time.monotonic() - started) > SLOW_READ_SECONDS:
            self.faults.slow(str(reader.path), seconds)
        return key

    def _opened(self, shard: int) -> _OpenShard:
        with self._lock:
            opened = self._open_shards.get(shard)
            if opened is not None:
                self._open_shards.move_to_end(shard)
                return opened
            opening = self._opening.setdefault(shard, threading.Lock())
        with opening:  # one thread opens it, perhaps over the network, and holds up those alone who want the same
            opened = self._open_shards.get(shard)
            if opened is None:
                opened = self._open(shard)
                with self._lock:
                    self._open_shards[shard] = opened
                    self._opening.pop(shard, None)
                    # Only the reference goes: a thread still reading keeps the file open until it is done.
                    if len(self._open_shards) > self._max_open:
                        self._open_shards.popitem(last=False)
        return opened

    def _open(self, shard: int) -> _OpenShard:
        info = self.manifest.shards[shard]
        file = self._fetch(info)
        reader = ShardReader(file.path)
        selection = self.manifest.selection
        rows = None if selection is None else selection.rows(reader.keys)
        count = len(reader) if rows is None else len(rows)
        found = ShardInfo(info.name, count, reader.index.num_bytes, reader.index.sha256)
        if found != info or reader.spec != self.manifest.spec:
            raise DataError(
                f"{reader.path}: its index does not belong to the {MANIFEST_NAME} of {self.location} (the index says "
                f"{found.num_samples} samples in {found.num_bytes} bytes, the manifest {info.num_samples} in "
                f"{info.num_bytes}); "
                + ("copy the dataset again, whole" if selection is None else "split the dataset again")
            )
        return _OpenShard(reader, rows, file)

    def _fetch(self, info: ShardInfo) -> ShardFile:
        try:
            return self._source.open(info)
        except CacheFull:
            with self._lock:
                self._open_shards.clear()  # they hold the cache's room, and are opened again when they are needed
            return self._source.open(info, wait_seconds=_CACHE_WAIT_SECONDS)


def _truncated(sizes: list[int], max_samples: int | None) -> list[int]:
    if max_samples is None:
        return sizes
    kept: list[int] = []
    for size in sizes:
        if max_samples <= 0:
            break
        kept.append(min(size, max_samples))
        max_samples -= size
    return kept


def _decoded(key: str, stored: Mapping[str, Tensor]) -> Sample:
    return Sample(key, *(decode(stored[side], stored.get(f"{side}_scale")) for side in ("eva", "clip")))


def _open_file(path: Path, num_bytes: int) -> FileIO:
    check_tar_size(path, num_bytes)
    try:
        return open(path, "rb", buffering=0)
    except OSError as error:
        raise DataError(f"{path} cannot be opened: {error.strerror}") from error


@cache
def _readahead_bytes(device: int) -> int:
    """How much the system reads ahead of a file on this device, at which it also cuts off advice to read."""
    number = f"{os.major(device)}:{os.minor(device)}"
    # A file system has an entry of the first kind, a partition of a disk one of the second.
    for setting in (f"/sys/class/bdi/{number}/read_ahead_kb", f"/sys/dev/block/{number}/../queue/read_ahead_kb"):
        with suppress(OSError, ValueError):
            return max(_READAHEAD_BYTES, int(Path(setting).read_text()) << 10)
    return _READAHEAD_BYTES


def _in_file_order(spec: DatasetSpec, length: int, offsets: dict[str, int], where: str) -> list[StoredTensor]:
    """The tensors as they follow each other in a sample's file, after a header of `length` bytes."""
    tensors = sorted(stored_tensors(spec), key=lambda tensor: offsets[tensor.name])
    for tensor in tensors:
        if offsets[tensor.name] != length:
            raise DataError(
                f"{where}: tensor {tensor.name} starts at byte {offsets[tensor.name]} of the sample's file, expected "
                f"{length}: its safetensors header is damaged; write this shard again"
            )
        length += tensor.num_bytes
    return tensors
