"""Reading datasets: a folder of webdataset tars, an index beside each, and a manifest.

A sample is reached through the index and copied out of a memory map; the tar stays a plain one that `tar` and
`webdataset` read. The writer lives in `writer.py` and is offered here as well.
"""

from __future__ import annotations

import json
import mmap
import os
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from blip3o_ds.data.cache import CacheFull
from blip3o_ds.data.codec import decode, has_nonfinite, parse_header, read_dtype
from blip3o_ds.data.index import ShardIndex, check_tar_size, index_path
from blip3o_ds.data.schema import MANIFEST_NAME, DatasetSpec, ShardInfo, TokenLayout
from blip3o_ds.data.source import ShardFile, load_manifest, open_source, shards_location
from blip3o_ds.data.writer import DatasetWriter
from blip3o_ds.errors import DataError

__all__ = ["DatasetWriter", "EmbeddingDataset", "Sample", "ShardReader"]

_OPEN_SHARDS = 64  # a window of the order is 16 shards; the next one opens while this one is still in use
_CACHE_WAIT_SECONDS = 60.0  # for other processes of the node to let go of shards in a full cache


@dataclass(frozen=True, eq=False)
class Sample:
    """One image: `eva` [N, eva_dim] conditions, `clip` [N, clip_dim] is the target."""

    key: str
    eva: Tensor
    clip: Tensor


class ShardReader:
    """Reads samples of one shard through its index and a memory map. Safe to use from several threads."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.index = ShardIndex.load(index_path(self.path))
        self._map = _map_file(self.path, self.index.num_bytes)
        start = int(self.index.members["tensors_offset"][0])
        size = int(self.index.members["tensors_size"][0])
        content = self._map[start : start + min(size, 1 << 16)]
        # All samples of a shard have the same header, so the others need one comparison of bytes.
        length, self._relative = parse_header(content, self.index.spec, f"{self.path}: sample {self.keys[0]}")
        self._header = content[:length]

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
        dtype = read_dtype(self.spec.dtype)
        eva = torch.empty(self.spec.num_tokens, self.spec.eva_dim, dtype=dtype)
        clip = torch.empty(self.spec.num_tokens, self.spec.clip_dim, dtype=dtype)
        return Sample(self.read_into(i, eva, clip), eva, clip)

    def read_into(self, i: int, eva: Tensor, clip: Tensor, skip_tokens: int = 0) -> str:
        """Copy sample `i` without its first `skip_tokens` tokens into contiguous CPU tensors; returns its key.

        `eva` is [N - skip_tokens, eva_dim] and `clip` [N - skip_tokens, clip_dim], both of the dtype that samples
        are read in. Raises DataError naming shard and key for a damaged header or a value that is not finite.
        """
        where = f"{self.path}: sample {self.keys[i]}"
        start = int(self.index.members["tensors_offset"][i])
        if self._map[start : start + len(self._header)] != self._header:
            parse_header(self._map[start : start + (1 << 16)], self.spec, where)  # says what differs, if it can
            raise DataError(f"{where}: its safetensors header is not that of the shard's first sample")
        for name, offset in self._relative.items():
            if self.index.tensors[name][i] != start + offset:
                raise DataError(f"{where}: the index gives another offset for {name} than the sample's header")
        for side, out in (("eva", eva), ("clip", clip)):
            self._copy(i, side, out, skip_tokens)
            if has_nonfinite(out):
                raise DataError(f"{where}: {side} holds NaN or infinity; `blip3o-ds data verify` checks the rest")
        return self.keys[i]

    def meta(self, i: int) -> dict[str, Any]:
        """What came with sample `i`: its caption and whatever else the source had."""
        start = int(self.index.members["meta_offset"][i])
        try:
            return json.loads(self._map[start : start + int(self.index.members["meta_size"][i])])
        except ValueError as error:
            raise DataError(f"{self.path}: sample {self.keys[i]}: its .json is damaged ({error})") from error

    def _copy(self, i: int, side: str, out: Tensor, skip_tokens: int) -> None:
        start = int(self.index.tensors[side][i])
        if self.spec.dtype != "fp8-e4m3":
            begin = start + skip_tokens * out.shape[1] * out.dtype.itemsize
            target = out.view(torch.uint8).numpy().reshape(-1)
            np.copyto(target, np.frombuffer(self._map, np.uint8, target.size, begin))
            return
        stored = self._bytes(start + skip_tokens * out.shape[1], out.numel()).view(torch.float8_e4m3fn)
        scale_start = int(self.index.tensors[f"{side}_scale"][i]) + 4 * skip_tokens
        scale = self._bytes(scale_start, 4 * out.shape[0]).view(torch.float32)
        out.copy_(decode(stored.view(out.shape), scale))

    def _bytes(self, start: int, count: int) -> Tensor:
        return torch.from_numpy(np.frombuffer(self._map, np.uint8, count, start).copy())


@dataclass(frozen=True, eq=False)
class _OpenShard:
    reader: ShardReader
    rows: np.ndarray | None  # of a split: its samples' places in the shard
    file: ShardFile  # keeps a cached shard from being evicted


class EmbeddingDataset:
    """A dataset opened for reading by (shard, index); shards open on first use. Safe for several threads.

    `location` is a folder, a URL (`https://`, `s3://`, `gs://`, …) or `pipe:COMMAND {name}`; shards that are not on a
    file system are kept in at most `cache_gb` GiB of `cache_dir` (see `ShardCache`). Opening reads the manifest alone,
    however many shards there are. `max_shards` and `max_samples` keep only the first of each.
    `token_layout="patch_only"` reads a `cls_patch` dataset without token 0 (the manifest's statistics still include
    it). Raises DataError: here for a missing or wrong manifest, on reading for a missing or damaged shard.
    """

    def __init__(
        self,
        location: str | Path,
        max_shards: int | None = None,
        max_samples: int | None = None,
        token_layout: TokenLayout | None = None,
        cache_dir: str | Path | None = None,
        cache_gb: float = 100.0,
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
        self._skip_tokens = self.manifest.spec.num_tokens - self.spec.num_tokens
        self._num_samples = sum(self.shard_sizes)
        self._open_shards: OrderedDict[int, _OpenShard] = OrderedDict()
        self._opening: dict[int, threading.Lock] = {}
        self._max_open = _OPEN_SHARDS
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return self._num_samples

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
        eva = torch.empty(self.spec.num_tokens, self.spec.eva_dim, dtype=self.dtype)
        clip = torch.empty(self.spec.num_tokens, self.spec.clip_dim, dtype=self.dtype)
        return Sample(self.read_into(shard, index, eva, clip), eva, clip)

    def read_into(self, shard: int, index: int, eva: Tensor, clip: Tensor) -> str:
        """Copy a sample into contiguous CPU tensors of `dtype`, such as a batch's rows; returns its key."""
        reader, row = self._locate(shard, index)
        return reader.read_into(row, eva, clip, self._skip_tokens)

    def meta(self, shard: int, index: int) -> dict[str, Any]:
        """What came with the sample: caption and other fields."""
        reader, row = self._locate(shard, index)
        return reader.meta(row)

    def key(self, shard: int, index: int) -> str:
        reader, row = self._locate(shard, index)
        return reader.keys[row]

    def _locate(self, shard: int, index: int) -> tuple[ShardReader, int]:
        """The reader of a shard, and the sample's place in it."""
        if not 0 <= index < self.shard_sizes[shard]:
            raise IndexError(f"sample {index} of shard {shard}, which has {self.shard_sizes[shard]}")
        with self._lock:
            opened = self._open_shards.get(shard)
            if opened is not None:
                self._open_shards.move_to_end(shard)
                return opened.reader, index if opened.rows is None else int(opened.rows[index])
            opening = self._opening.setdefault(shard, threading.Lock())
        with opening:  # one thread opens it, perhaps over the network, and holds up those alone who want the same
            if shard not in self._open_shards:
                opened = self._open(shard)
                with self._lock:
                    self._open_shards[shard] = opened
                    self._opening.pop(shard, None)
                    # Only the reference goes: a thread still reading keeps the map alive until it is done.
                    if len(self._open_shards) > self._max_open:
                        self._open_shards.popitem(last=False)
        return self._locate(shard, index)

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


def _map_file(path: Path, num_bytes: int) -> mmap.mmap:
    check_tar_size(path, num_bytes)
    with open(path, "rb") as file:
        # Asked of the open file as well: reading a map past the end of its file would kill the process.
        if os.fstat(file.fileno()).st_size != num_bytes:
            raise DataError(f"{path} changes while it is read; wait until it is copied")
        return mmap.mmap(file.fileno(), num_bytes, access=mmap.ACCESS_READ)
