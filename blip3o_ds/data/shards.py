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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from blip3o_ds.data.codec import decode, has_nonfinite, parse_header, read_dtype
from blip3o_ds.data.index import ShardIndex, check_tar_size, index_path
from blip3o_ds.data.schema import MANIFEST_NAME, DatasetSpec, Manifest, ShardInfo, TokenLayout
from blip3o_ds.data.writer import DatasetWriter
from blip3o_ds.errors import DataError

__all__ = ["DatasetWriter", "EmbeddingDataset", "Sample", "ShardReader"]

_OPEN_SHARDS = 64  # a window of the order is 16 shards; the next one opens while this one is still in use


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


class EmbeddingDataset:
    """A dataset folder opened for reading by (shard, index); shards open on first use. Safe for several threads.

    `max_shards` and `max_samples` keep only the first of each. `token_layout="patch_only"` reads a `cls_patch`
    dataset without token 0 (the manifest's statistics still include it). Raises DataError for a missing or
    incomplete folder.
    """

    def __init__(
        self,
        dataset_dir: str | Path,
        max_shards: int | None = None,
        max_samples: int | None = None,
        token_layout: TokenLayout | None = None,
    ) -> None:
        for name, limit in (("max_shards", max_shards), ("max_samples", max_samples)):
            if limit is not None and limit < 1:
                raise DataError(f"{name} must be at least 1, found {limit}")
        self.path = Path(dataset_dir)
        self.manifest = Manifest.load(self.path)
        self.spec = self.manifest.spec.viewed_as(token_layout)
        self.dtype = read_dtype(self.spec.dtype)
        shards = self.manifest.shards[:max_shards]
        self.shard_sizes = _truncated([shard.num_samples for shard in shards], max_samples)
        if not self.shard_sizes:
            raise DataError(f"{self.path / MANIFEST_NAME}: the dataset holds no samples")
        self._skip_tokens = self.manifest.spec.num_tokens - self.spec.num_tokens
        self._readers: OrderedDict[int, ShardReader] = OrderedDict()
        self._lock = threading.Lock()
        for shard in shards[: len(self.shard_sizes)]:
            check_tar_size(self.path / shard.name, shard.num_bytes)

    def __len__(self) -> int:
        return sum(self.shard_sizes)

    def read(self, shard: int, index: int) -> Sample:
        """Sample `index` of shard number `shard`: `eva` [N, eva_dim], `clip` [N, clip_dim] of `spec`."""
        eva = torch.empty(self.spec.num_tokens, self.spec.eva_dim, dtype=self.dtype)
        clip = torch.empty(self.spec.num_tokens, self.spec.clip_dim, dtype=self.dtype)
        return Sample(self.read_into(shard, index, eva, clip), eva, clip)

    def read_into(self, shard: int, index: int, eva: Tensor, clip: Tensor) -> str:
        """Copy a sample into contiguous CPU tensors of `dtype`, such as a batch's rows; returns its key."""
        return self._reader(shard, index).read_into(index, eva, clip, self._skip_tokens)

    def meta(self, shard: int, index: int) -> dict[str, Any]:
        """What came with the sample: caption and other fields."""
        return self._reader(shard, index).meta(index)

    def key(self, shard: int, index: int) -> str:
        return self._reader(shard, index).keys[index]

    def _reader(self, shard: int, index: int) -> ShardReader:
        if not 0 <= index < self.shard_sizes[shard]:
            raise IndexError(f"sample {index} of shard {shard}, which has {self.shard_sizes[shard]}")
        with self._lock:
            reader = self._readers.pop(shard, None) or self._open(shard)
            self._readers[shard] = reader
            # Only the reference goes: a thread still reading keeps the map alive until it is done.
            if len(self._readers) > _OPEN_SHARDS:
                self._readers.popitem(last=False)
        return reader

    def _open(self, shard: int) -> ShardReader:
        info = self.manifest.shards[shard]
        reader = ShardReader(self.path / info.name)
        found = ShardInfo(info.name, len(reader), reader.index.num_bytes, reader.index.sha256)
        if found != info or reader.spec != self.manifest.spec:
            raise DataError(
                f"{reader.path}: its index does not belong to {MANIFEST_NAME} (the index says {found.num_samples} "
                f"samples in {found.num_bytes} bytes, the manifest {info.num_samples} in {info.num_bytes}); "
                "copy the dataset again, whole"
            )
        return reader


def _truncated(sizes: list[int], max_samples: int | None) -> list[int]:
    if max_samples is None:
        return sizes
    kept: list[int] = []
    for size in sizes:
        left = max_samples - sum(kept)
        if left <= 0:
            break
        kept.append(min(size, left))
    return kept


def _map_file(path: Path, num_bytes: int) -> mmap.mmap:
    check_tar_size(path, num_bytes)
    with open(path, "rb") as file:
        # Asked of the open file as well: reading a map past the end of its file would kill the process.
        if os.fstat(file.fileno()).st_size != num_bytes:
            raise DataError(f"{path} changes while it is read; wait until it is copied")
        return mmap.mmap(file.fileno(), num_bytes, access=mmap.ACCESS_READ)
