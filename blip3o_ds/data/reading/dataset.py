"""A dataset for reading: samples by (shard, index), from a folder, a URL or a split of either.

Opening one reads only the manifest; a shard is opened, and fetched where it is far away, when it is first read.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from blip3o_ds.data.format.codec import decode_all
from blip3o_ds.data.format.manifest import MANIFEST_NAME, Manifest, ShardInfo, folds_of
from blip3o_ds.data.format.schema import TokenLayout
from blip3o_ds.data.reading.bad_samples import SLOW_READ_SECONDS, BadSamples, Replacements
from blip3o_ds.data.reading.cache import CacheFull, Prefetcher, ShardCache, ShardLease
from blip3o_ds.data.reading.remote import RemoteFolder, is_remote, linked_location
from blip3o_ds.data.reading.shard import Sample, ShardReader
from blip3o_ds.errors import DataError

_OPEN_SHARDS = 64  # a window of the order is 16 shards; the next one opens while this one is still in use
_CACHE_WAIT_SECONDS = 60.0  # for other processes of the node to let go of shards in a full cache


@dataclass(frozen=True, eq=False)
class _OpenShard:
    reader: ShardReader
    rows: Sequence[int]  # the samples' places in the shard: all of them, or those of a split
    lease: ShardLease  # keeps a cached shard from being evicted


class EmbeddingDataset:
    """A dataset opened for reading by (shard, index); shards open on first use. Safe for several threads.

    `location` is a folder, a URL (`https://`, `s3://`, `gs://`, …) or `pipe:COMMAND {name}`; shards that are not on a
    file system are kept in at most `cache_gb` GiB of `cache_dir` (see `ShardCache`). `max_shards` and `max_samples`
    keep only the first of each. `token_layout="patch_only"` reads a `cls_patch` dataset without token 0 (the manifest's
    statistics still include it). Raises DataError: here for a wrong manifest, on reading for a missing or damaged
    shard; unless the policy in `bad_samples` is `skip`, which gives another sample instead (see `Replacements`).
    """

    def __init__(
        self,
        location: str | Path,
        max_shards: int | None = None,
        max_samples: int | None = None,
        token_layout: TokenLayout | None = None,
        cache_dir: str | Path | None = None,
        cache_gb: float = 100.0,
        bad_samples: BadSamples | None = None,
    ) -> None:
        for name, limit in (("max_shards", max_shards), ("max_samples", max_samples)):
            if limit is not None and limit < 1:
                raise DataError(f"{name} must be at least 1, found {limit}")
        self.location = str(location)
        self.manifest = load_manifest(location)
        self._source = ShardFiles(shards_location(location, self.manifest), cache_dir, cache_gb)
        self.spec = self.manifest.spec.viewed_as(token_layout)
        shards = self.manifest.shards[:max_shards]
        self.shard_sizes = _truncated([shard.num_samples for shard in shards], max_samples)
        if not self.shard_sizes:
            raise DataError(f"{location}: the dataset's {MANIFEST_NAME} lists no samples")
        self.bad_samples = BadSamples() if bad_samples is None else bad_samples
        self._replacements = Replacements(self.bad_samples, [shard.name for shard in shards], self.shard_sizes)
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
        self._source.close()
        with self._lock:
            self._open_shards.clear()

    def read(self, shard: int, index: int) -> Sample:
        """Sample `index` of shard number `shard`, as `spec` says, fp8-e4m3 multiplied out to bf16."""
        out = Sample.empty(self.spec)
        return Sample(self.read_into(shard, index, out), decode_all(out))

    def read_into(self, shard: int, index: int, out: Mapping[str, Tensor]) -> str:
        """Copy a sample, as it is stored, into `out`, such as a batch's rows; returns its key.

        `out` has a contiguous CPU tensor for each of `stored_tensors(spec)`, by its name.
        """
        self._check_place(shard, index)
        for place in self._replacements.places(shard, index):
            try:
                opened = self._opened(place[0])
            except CacheFull:  # says nothing about the shard
                raise
            except DataError as error:
                self._replacements.add_shard(place[0], error)
                continue
            row = opened.rows[place[1]]
            try:
                started = time.monotonic()
                key = opened.reader.read_into(row, out, self._skip_tokens)
                if (seconds := time.monotonic() - started) > SLOW_READ_SECONDS:
                    self.bad_samples.slow(str(opened.reader.path), seconds)
            except DataError as error:
                self._replacements.add_sample(place, opened.reader.keys[row], error)
                continue
            if place != (shard, index):
                self.bad_samples.replaced()
            return key
        raise DataError(f"{self.location}: none of its samples can be read; `blip3o-ds data verify` says why")

    def will_need(self, shard: int, index: int) -> bool:
        """Have the system read a sample into the page cache in the background; False if there is nothing to do."""
        if shard in self._replacements.bad_shards:
            return False
        reader, row = self._locate(shard, index)
        return reader.will_need(row)

    def meta(self, shard: int, index: int) -> dict[str, Any]:
        """What came with the sample: caption and other fields."""
        reader, row = self._locate(shard, index)
        return reader.meta(row)

    def folds(self, keys: Sequence[str], folds: int) -> np.ndarray:
        """The fold of each key's image, [B] int64: all views of an image are in one."""
        return folds_of([self.spec.image_of(key) for key in keys], folds)

    def keys(self, shard: int) -> list[str]:
        """The keys of all samples of a shard, in order, whatever `max_samples`."""
        opened = self._opened(shard)
        return [opened.reader.keys[row] for row in opened.rows]

    def key(self, shard: int, index: int) -> str:
        reader, row = self._locate(shard, index)
        return reader.keys[row]

    def _locate(self, shard: int, index: int) -> tuple[ShardReader, int]:
        self._check_place(shard, index)
        opened = self._opened(shard)
        return opened.reader, opened.rows[index]

    def _check_place(self, shard: int, index: int) -> None:
        if not 0 <= index < self.shard_sizes[shard]:
            raise IndexError(f"sample {index} of shard {shard}, which has {self.shard_sizes[shard]}")

    def _opened(self, shard: int) -> _OpenShard:
        with self._lock:
            opened = self._open_shards.get(shard)
            if opened is not None:
                self._open_shards.move_to_end(shard)
                return opened
            opening = self._opening.setdefault(shard, threading.Lock())
        with opening:  # one thread opens it, perhaps over the network; only those that need the same shard wait
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
        try:
            file = self._source.open(info)
        except CacheFull:
            with self._lock:
                self._open_shards.clear()  # they hold the cache's room, and are opened again when they are needed
            file = self._source.open(info, wait_seconds=_CACHE_WAIT_SECONDS)
        reader = ShardReader(file.path)
        rows = self.manifest.rows(reader.keys)
        found = ShardInfo(info.name, len(rows), reader.index.num_bytes, reader.index.sha256)
        if found != info or reader.spec != self.manifest.spec.without_views():
            raise DataError(
                f"{reader.path}: its index does not belong to the {MANIFEST_NAME} of {self.location} (the index says "
                f"{found.num_samples} samples in {found.num_bytes} bytes, the manifest {info.num_samples} in "
                f"{info.num_bytes}); "
                + ("copy the dataset again, whole" if self.manifest.selection is None else "split the dataset again")
            )
        return _OpenShard(reader, rows, file)


def _truncated(sizes: list[int], max_samples: int | None) -> list[int]:
    """The sizes of the shards that hold the first `max_samples` samples, the last one cut to them."""
    if max_samples is None:
        return sizes
    ends = np.cumsum(sizes)
    last = int(np.searchsorted(ends, max_samples))
    return np.diff(np.minimum(ends[: last + 1], max_samples), prepend=0).tolist()


class ShardFiles:
    """The shards in a folder, or at a URL and kept in at most `cache_gb` GiB of `cache_dir` (see `ShardCache`)."""

    def __init__(self, location: str | Path, cache_dir: str | Path | None = None, cache_gb: float = 100.0) -> None:
        self._folder = Path(location)
        self._remote: RemoteFolder | None = None
        if is_remote(location):
            self._remote = RemoteFolder(str(location))
            self._cache = ShardCache(cache_dir, cache_gb)
            self._prefetcher = Prefetcher(self._cache, self._remote)

    def open(self, info: ShardInfo, wait_seconds: float = 0) -> ShardLease:
        """The shard as a local file with its index beside it, fetched first by `ShardCache.get` if it is at a URL."""
        if self._remote is None:
            return ShardLease(self._folder / info.name)
        return self._cache.get(self._remote, info, wait_seconds=wait_seconds)

    def keep(self, infos: Sequence[ShardInfo]) -> None:
        """These shards are read now and next: fetch and hold them in the background, and release all others."""
        if self._remote is not None:
            self._prefetcher.want(infos)

    def close(self) -> None:
        if self._remote is not None:
            self._prefetcher.close()


def load_manifest(location: str | Path) -> Manifest:
    """The manifest in a folder or at a URL; raises DataError that names the file or URL and the field."""
    if not is_remote(location):
        return Manifest.load(location)
    remote = RemoteFolder(str(location))
    return Manifest.parse(remote.read(MANIFEST_NAME), remote.url(MANIFEST_NAME))


def shards_location(location: str | Path, manifest: Manifest) -> str:
    """The folder or URL that holds the shards of the dataset at `location`: itself, or what it is a split of."""
    if manifest.selection is None:
        return str(location)
    return linked_location(str(location), manifest.selection.of)
