"""Adding the shards of other datasets to a set: `append`, without reading or rewriting a sample.

Tars are linked, or copied where a link is not possible, and count only when the manifest, replaced last, names them.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from blip3o_ds.data.format.index import ShardIndex, check_tar_size, index_path
from blip3o_ds.data.format.manifest import MANIFEST_NAME, Manifest, ShardInfo
from blip3o_ds.data.format.moments import merge_moments, moments_of_stats, stats_of_moments
from blip3o_ds.data.format.selection import key_hashes
from blip3o_ds.data.format.writer import sole_writer
from blip3o_ds.errors import DataError
from blip3o_ds.files import HashingFile, atomic_write, fsync_dir

_READ_THREADS = 8  # indexes are small files, and on a network file system each costs a round trip
_COPY_BYTES = 1 << 22
_NO_LINK = (errno.EXDEV, errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK)


@dataclass(frozen=True)
class _Set:
    """A dataset folder with shards of its own."""

    folder: Path
    manifest: Manifest

    def index(self, info: ShardInfo) -> ShardIndex:
        path = self.folder / info.name
        check_tar_size(path, info.num_bytes)
        index = ShardIndex.load(index_path(path))
        if (len(index.keys), index.sha256) != (info.num_samples, info.sha256) or index.spec != self.manifest.spec:
            raise DataError(f"{index_path(path)}: belongs to another shard than {self.folder / MANIFEST_NAME} lists")
        return index


def append(dataset_dir: str | Path, sources: Sequence[str | Path]) -> dict[str, Any]:
    """Add the shards of the datasets `sources` to the one in `dataset_dir`, in the order given.

    All must have the same specification, and no key may come twice. Shards already there keep their names and places;
    the new ones are numbered on. Needs 8 bytes of memory for each sample of all sets. Returns counts; raises DataError,
    and then leaves the dataset as it was.
    """
    folder = Path(dataset_dir)
    with sole_writer(folder):
        return _append(_open(folder), sources)


def _append(own: _Set, sources: Sequence[str | Path]) -> dict[str, Any]:
    added = [_open(Path(source)) for source in sources]
    for other in added:
        if differences := other.manifest.spec.differences(own.manifest.spec):
            raise DataError(f"{other.folder}: its spec is not that of {own.folder} ({differences}); convert it first")
    _refuse_duplicates([own, *added])
    placed: list[Path] = []
    try:
        shards = [*own.manifest.shards, *_place(own, added, placed)]
        fsync_dir(own.folder)
        merged = _merge(own.manifest, [other.manifest for other in added], tuple(shards))
        merged.extra["appended"] = [*own.manifest.extra.get("appended", []), *map(_origin, added)]
        merged.save(own.folder)
    except BaseException:
        for path in placed:
            path.unlink(missing_ok=True)
        raise
    return {
        "shards_added": len(shards) - len(own.manifest.shards),
        "samples_added": merged.num_samples - own.manifest.num_samples,
        "shards": len(shards),
        "samples": merged.num_samples,
    }


def next_number(manifest: Manifest) -> int:
    """The number of the next shard of a dataset."""
    numbers = [int(match[1]) for info in manifest.shards if (match := re.search(r"(\d+)\.tar$", info.name))]
    return max(numbers, default=-1) + 1


def _open(folder: Path) -> _Set:
    manifest = Manifest.load(folder)
    if manifest.selection is not None:
        raise DataError(
            f"{folder}: a split of {manifest.selection.of}, with no shards of its own; append whole datasets, and "
            "split the result again: every sample stays on its side"
        )
    return _Set(folder, manifest)


def _refuse_duplicates(sets: Sequence[_Set]) -> None:
    hashes = np.sort(np.concatenate([key_hashes(keys) for _, keys in _keys(sets)]))
    twice = np.unique(hashes[1:][hashes[1:] == hashes[:-1]])
    if twice.size == 0:
        return
    seen: dict[str, Path] = {}
    for path, keys in _keys(sets):  # equal hashes, so look at the keys themselves
        for i in np.flatnonzero(np.isin(key_hashes(keys), twice)):
            if (first := seen.setdefault(keys[i], path)) is not path:
                raise DataError(f"{path}: key {keys[i]!r} is in {first} as well; keys must be unique in a dataset")


def _keys(sets: Sequence[_Set]) -> Iterator[tuple[Path, list[str]]]:
    shards = [(member, info) for member in sets for info in member.manifest.shards]
    with ThreadPoolExecutor(_READ_THREADS) as pool:
        for (member, info), keys in zip(
            shards, pool.map(lambda pair: pair[0].index(pair[1]).keys, shards), strict=True
        ):
            yield member.folder / info.name, keys


def _place(own: _Set, added: Sequence[_Set], placed: list[Path]) -> Iterator[ShardInfo]:
    number = next_number(own.manifest)
    for other in added:
        for info in other.manifest.shards:
            source, target = other.folder / info.name, own.folder / f"shard_{number:05d}.tar"
            placed += [target, index_path(target)]
            _link_or_copy(source, target, info.sha256)
            _link_or_copy(index_path(source), index_path(target))
            yield replace(info, name=target.name)
            number += 1


def _link_or_copy(source: Path, target: Path, sha256: str | None = None) -> None:
    target.unlink(missing_ok=True)  # of an append that was killed: the manifest does not name it
    try:
        os.link(source, target)
        return
    except OSError as error:
        if error.errno not in _NO_LINK:
            raise
    with open(source, "rb") as reading, atomic_write(target) as writing:
        hashed = HashingFile(reading)
        while chunk := hashed.read(_COPY_BYTES):
            writing.write(chunk)
        if sha256 is not None and hashed.sha256 != sha256:
            raise DataError(f"{source}: its SHA-256 is {hashed.sha256}, its manifest says {sha256}")


def _merge(own: Manifest, added: Sequence[Manifest], shards: tuple[ShardInfo, ...]) -> Manifest:
    moments = moments_of_stats(own.stats)
    for other in added:
        moments = merge_moments(moments, moments_of_stats(other.stats))
    return Manifest(own.spec, shards, stats_of_moments(moments), dict(own.extra))


def _origin(other: _Set) -> dict[str, Any]:
    manifest = other.manifest
    return {"name": other.folder.resolve().name, "samples": manifest.num_samples, "extra": manifest.extra}
