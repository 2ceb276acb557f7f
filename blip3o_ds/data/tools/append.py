"""Adding the shards of other datasets to a set: `append`, without reading or rewriting a sample.

Tars are linked, or copied where a link is not possible, and count only when the manifest, replaced last, names them.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from blip3o_ds.data.format.index import ShardIndex, check_tar_size, index_path
from blip3o_ds.data.format.manifest import MANIFEST_NAME, Manifest, ShardInfo, key_hashes
from blip3o_ds.data.format.moments import merge_moments, moments_of_stats, stats_of_moments
from blip3o_ds.data.format.writer import sole_writer
from blip3o_ds.errors import DataError
from blip3o_ds.files import HashingFile, atomic_write, fsync_dir

_READ_THREADS = 8  # indexes are small files, and on a network file system each costs a round trip
_COPY_BYTES = 1 << 22
_NO_LINK = (errno.EXDEV, errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK)
_Set = tuple[Path, Manifest]  # a folder with shards of its own


def append(dataset_dir: str | Path, sources: Sequence[str | Path]) -> dict[str, Any]:
    """Add the shards of the datasets `sources` to the one in `dataset_dir`, in the order given.

    All must have the same specification, and no key may come twice. Shards already there keep their names and places;
    the new ones are numbered on. Needs 8 bytes of memory for each sample of all sets. Returns counts; raises DataError,
    and then leaves the dataset as it was.
    """
    folder = Path(dataset_dir)
    with sole_writer(folder):
        own = _load_whole(folder)
        added = [(Path(source), _load_whole(Path(source))) for source in sources]
        for source, other in added:
            if differences := other.spec.differences(own.spec):
                raise DataError(f"{source}: its spec is not that of {folder} ({differences}); convert it first")
        _refuse_duplicates([(folder, own), *added])
        placed: list[Path] = []
        try:
            merged = _merge(folder, own, added, placed)
            merged.save(folder)
        except BaseException:
            for path in placed:
                path.unlink(missing_ok=True)
            raise
    return {
        "shards_added": len(merged.shards) - len(own.shards),
        "samples_added": merged.num_samples - own.num_samples,
        "shards": len(merged.shards),
        "samples": merged.num_samples,
    }


def next_number(manifest: Manifest) -> int:
    """The number of the next shard of a dataset."""
    numbers = [int(match[1]) for info in manifest.shards if (match := re.search(r"(\d+)\.tar$", info.name))]
    return max(numbers, default=-1) + 1


def _load_whole(folder: Path) -> Manifest:
    manifest = Manifest.load(folder)
    if manifest.selection is not None:
        raise DataError(
            f"{folder}: a split of {manifest.selection.of}, with no shards of its own; append whole datasets, and "
            "split the result again: every sample stays on its side"
        )
    return manifest


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
    def read(folder: Path, manifest: Manifest, info: ShardInfo) -> tuple[Path, list[str]]:
        path = folder / info.name
        check_tar_size(path, info.num_bytes)
        index = ShardIndex.load(index_path(path))
        is_listed = (len(index.keys), index.sha256) == (info.num_samples, info.sha256)
        if not is_listed or index.spec != manifest.spec.without_views():
            raise DataError(f"{index_path(path)}: belongs to another shard than {folder / MANIFEST_NAME} lists")
        return path, index.keys

    shards = [(folder, manifest, info) for folder, manifest in sets for info in manifest.shards]
    with ThreadPoolExecutor(_READ_THREADS) as pool:
        yield from pool.map(lambda shard: read(*shard), shards)


def _merge(folder: Path, own: Manifest, added: Sequence[_Set], placed: list[Path]) -> Manifest:
    """The manifest of both, after the shards of `added` were placed in `folder`; `placed` collects the new files."""
    shards, moments = list(own.shards), moments_of_stats(own.stats)
    appended = list(own.extra.get("appended", []))
    number = next_number(own)
    for source, other in added:
        for info in other.shards:
            target = folder / f"shard_{number:05d}.tar"
            placed += [target, index_path(target)]
            _link_or_copy(source / info.name, target, info.sha256)
            _link_or_copy(index_path(source / info.name), index_path(target))
            shards.append(replace(info, name=target.name))
            number += 1
        moments = merge_moments(moments, moments_of_stats(other.stats))
        appended.append({"name": source.resolve().name, "samples": other.num_samples, "extra": other.extra})
    fsync_dir(folder)
    return Manifest(own.spec, tuple(shards), stats_of_moments(moments), {**own.extra, "appended": appended})


def _link_or_copy(source: Path, target: Path, sha256: str | None = None) -> None:
    target.unlink(missing_ok=True)  # of an append that was killed: the manifest does not name it
    source = source.resolve(strict=True)  # a link to a symbolic link would depend on the folder that it is in
    try:
        os.link(source, target)
        return
    except OSError as error:
        if error.errno not in _NO_LINK:
            raise
    with open(source, "rb") as raw, atomic_write(target) as copy:
        hashed = HashingFile(raw)
        shutil.copyfileobj(hashed, copy, _COPY_BYTES)
        if sha256 is not None and hashed.sha256 != sha256:
            raise DataError(f"{source}: its SHA-256 is {hashed.sha256}, its manifest says {sha256}")
