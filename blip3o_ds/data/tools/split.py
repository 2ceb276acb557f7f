"""Dividing a dataset into a training and a held-out part by key: `split`, which writes two manifests and no sample.

The smaller part is read once, for its statistics; those of the other are what is left of the whole.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

from blip3o_ds.data.format.manifest import MANIFEST_NAME, Manifest
from blip3o_ds.data.format.moments import (
    ChannelMoments,
    merge_moments,
    moments_of_stats,
    no_moments,
    sample_moments,
    stats_of_moments,
)
from blip3o_ds.data.format.selection import Selection, SplitPart
from blip3o_ds.data.reading.dataset import EmbeddingDataset
from blip3o_ds.data.reading.remote import is_remote
from blip3o_ds.errors import DataError
from blip3o_ds.progress import Progress

_READ_THREADS = min(4, os.cpu_count() or 1)
_Moments = dict[str, ChannelMoments]  # by tensor


def split(location: str | Path, dst: str | Path, fraction: float) -> dict[str, Any]:
    """Write `dst/train` and `dst/eval`, datasets that read their samples from the one at `location`.

    A sample belongs to `eval` when its key hashes below `fraction`, so about that share does. After an append, the
    same command brings the split up to date, and every sample stays on its side. Folders refer to each other by
    relative paths. Returns counts; raises DataError for a part without samples, or a `dst` that holds something else.
    """
    if not 0 < fraction < 1:
        raise DataError(f"fraction must lie between 0 and 1, found {fraction}")
    dataset = EmbeddingDataset(location)
    if dataset.manifest.selection is not None:
        raise DataError(f"{location}: a split already; split {dataset.manifest.selection.of} by another fraction")
    folders = {part: Path(dst) / part for part in get_args(SplitPart)}
    selections = {part: Selection(_reference(location, folder), fraction, part) for part, folder in folders.items()}
    for part, folder in folders.items():
        _check_free(folder, selections[part])
    smaller: SplitPart = "eval" if fraction <= 0.5 else "train"
    counts, moments = _read_part(dataset, selections[smaller])
    dataset.close()
    manifests = _manifests(dataset.manifest, selections, smaller, counts, moments)
    for part, manifest in manifests.items():
        folders[part].mkdir(parents=True, exist_ok=True)
        manifest.save(folders[part])
    return {
        f"{part}_{name}": value
        for part, manifest in manifests.items()
        for name, value in (("samples", manifest.num_samples), ("shards", len(manifest.shards)))
    }


def _reference(location: str | Path, folder: Path) -> str:
    if is_remote(location):
        return str(location)
    return os.path.relpath(Path(location).resolve(), folder.resolve())


def _check_free(folder: Path, selection: Selection) -> None:
    if (folder / MANIFEST_NAME).exists() and Manifest.load(folder).selection != selection:
        raise DataError(f"{folder}: holds another dataset; remove it, or choose another folder")


def _read_part(dataset: EmbeddingDataset, selection: Selection) -> tuple[list[int], _Moments]:
    """How many samples of each shard are selected, and the moments of all of them."""
    moments = no_moments(dataset.spec)
    counts = []
    with ThreadPoolExecutor(_READ_THREADS) as pool:
        shards = range(len(dataset.shard_sizes))
        found = pool.map(lambda shard: _read_shard(dataset, shard, selection), shards)
        for count, of_shard in Progress("split", len(shards), "shards").over(found):
            counts.append(count)
            moments = merge_moments(moments, of_shard)
    return counts, moments


def _read_shard(dataset: EmbeddingDataset, shard: int, selection: Selection) -> tuple[int, _Moments]:
    moments = no_moments(dataset.spec)
    rows = selection.rows(dataset.keys(shard)).tolist()
    for row in rows:
        moments = merge_moments(moments, sample_moments(dataset.read(shard, row).tensors))
    return len(rows), moments


def _manifests(
    whole: Manifest, selections: dict[SplitPart, Selection], smaller: SplitPart, counts: list[int], moments: _Moments
) -> dict[SplitPart, Manifest]:
    rest = {name: total.without(moments[name]) for name, total in moments_of_stats(whole.stats).items()}
    manifests: dict[SplitPart, Manifest] = {}
    for part, selection in selections.items():
        sizes = counts if part == smaller else [s.num_samples - c for s, c in zip(whole.shards, counts, strict=True)]
        if sum(sizes) == 0:
            raise DataError(
                f"a fraction of {selection.fraction} leaves no sample of {whole.num_samples} in {part}; choose one "
                "nearer to a half"
            )
        shards = [replace(s, num_samples=n) for s, n in zip(whole.shards, sizes, strict=True) if n]
        own = moments if part == smaller else rest
        manifests[part] = Manifest(whole.spec, tuple(shards), stats_of_moments(own), whole.extra, selection)
    return manifests
