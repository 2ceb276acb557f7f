"""Dividing a dataset into a training and a held-out part by image: `split` writes two manifests and no sample.

The smaller part is read once, for its statistics; those of the other are what is left of the whole.
"""

from __future__ import annotations

import logging
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

from blip3o_ds.data.format.manifest import MANIFEST_NAME, Manifest, Selection, SplitPart
from blip3o_ds.data.format.moments import (
    ChannelMoments,
    merge_moments,
    moments_of_stats,
    no_moments,
    sample_moments,
    stats_of_moments,
)
from blip3o_ds.data.format.schema import DatasetSpec
from blip3o_ds.data.reading.dataset import EmbeddingDataset
from blip3o_ds.data.reading.remote import TRUSTED_URLS, is_remote
from blip3o_ds.errors import DataError
from blip3o_ds.progress import Progress

logger = logging.getLogger(__name__)

_READ_THREADS = min(4, os.cpu_count() or 1)


def split(location: str | Path, dst: str | Path, fraction: float, view_separator: str | None = None) -> dict[str, Any]:
    """Write `dst/train` and `dst/eval`, datasets that read their samples from the one at `location`.

    A sample belongs to `eval` when its image hashes below `fraction`, so about that share of the images does; a dataset
    whose samples are views, and that does not say so, needs its `view_separator` (see `DatasetSpec.image_of`). After
    an append, the same command brings the split up to date, and every sample stays on its side. Folders refer to each
    other by relative paths. Returns counts; raises DataError for a part without samples, or a `dst` that holds
    something else.
    """
    if not 0 < fraction < 1:
        raise DataError(f"fraction must lie between 0 and 1, found {fraction}")
    dataset = EmbeddingDataset(location)
    whole = dataset.manifest
    if whole.selection is not None:
        raise DataError(f"{location}: a split already; split {whole.selection.of} by another fraction")
    spec = whole.spec.with_views(view_separator, location)
    selections: dict[str, Selection] = {}
    for part in get_args(SplitPart):
        folder = Path(dst) / part
        of = str(location) if is_remote(location) else os.path.relpath(Path(location).resolve(), folder.resolve())
        selections[part] = Selection(of, fraction, part)
        if (folder / MANIFEST_NAME).exists():
            _check_same(folder, Manifest.load(folder), selections[part], spec)
    smaller, larger = ("eval", "train") if fraction <= 0.5 else ("train", "eval")
    counts, moments = _read_part(dataset, selections[smaller], spec)
    dataset.close()
    rest_counts = [info.num_samples - count for info, count in zip(whole.shards, counts, strict=True)]
    rest = {name: total.without(moments[name]) for name, total in moments_of_stats(whole.stats).items()}
    contents = {smaller: (counts, moments), larger: (rest_counts, rest)}
    whole = replace(whole, spec=spec)
    manifests = {part: _manifest(whole, selection, *contents[part]) for part, selection in selections.items()}
    result: dict[str, Any] = {}
    for part, manifest in manifests.items():
        folder = Path(dst) / part
        folder.mkdir(parents=True, exist_ok=True)
        manifest.save(folder)
        result |= {f"{part}_samples": manifest.num_samples, f"{part}_shards": len(manifest.shards)}
    if is_remote(location):
        logger.warning("to read these parts, whose samples are elsewhere, set %s=%s", TRUSTED_URLS, location)
    return result


def _check_same(folder: Path, found: Manifest, selection: Selection, spec: DatasetSpec) -> None:
    if found.selection != selection:
        raise DataError(f"{folder}: holds another dataset; remove it, or choose another folder")
    if found.spec.view_separator != spec.view_separator:
        raise DataError(
            f"{folder}: was split with view_separator {found.spec.view_separator!r}, not {spec.view_separator!r}, so "
            "samples would change sides; choose another folder, or remove it if no model was trained on it"
        )


def _read_part(
    dataset: EmbeddingDataset, selection: Selection, spec: DatasetSpec
) -> tuple[list[int], dict[str, ChannelMoments]]:
    """How many samples of each shard are selected, and the moments of all of them."""

    def read(shard: int) -> tuple[int, dict[str, ChannelMoments]]:
        moments = no_moments(dataset.spec)
        rows = selection.rows([spec.image_of(key) for key in dataset.keys(shard)]).tolist()
        for row in rows:
            moments = merge_moments(moments, sample_moments(dataset.read(shard, row).tensors))
        return len(rows), moments

    moments = no_moments(dataset.spec)
    counts = []
    shards = range(len(dataset.shard_sizes))
    with ThreadPoolExecutor(_READ_THREADS) as pool:
        for count, of_shard in Progress("split", len(shards), "shards").over(pool.map(read, shards)):
            counts.append(count)
            moments = merge_moments(moments, of_shard)
    return counts, moments


def _manifest(whole: Manifest, selection: Selection, counts: list[int], moments: dict[str, ChannelMoments]) -> Manifest:
    if sum(counts) == 0:
        raise DataError(
            f"a fraction of {selection.fraction} leaves no sample of {whole.num_samples} in {selection.part}; choose "
            "one nearer to a half"
        )
    shards = tuple(replace(info, num_samples=n) for info, n in zip(whole.shards, counts, strict=True) if n)
    return Manifest(whole.spec, shards, stats_of_moments(moments), whole.extra, selection)
