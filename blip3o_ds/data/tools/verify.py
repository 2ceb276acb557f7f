"""Looking at a dataset without training on it: `verify` reads every byte, `stats` and `inspect` only what they show.

`verify` goes by the tars themselves, and so checks the indexes as well as the data. All results can be written as
JSON.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from blip3o_ds.data.format.manifest import ChannelStats, Manifest
from blip3o_ds.data.format.moments import merge_moments, no_moments
from blip3o_ds.data.format.writer import shard_paths
from blip3o_ds.data.reading.dataset import EmbeddingDataset
from blip3o_ds.data.reading.remote import is_remote
from blip3o_ds.data.reading.source import load_manifest, open_source, shards_location
from blip3o_ds.data.tools.examine import ShardReport, compare_stats, examine_all
from blip3o_ds.errors import DataError

_FIRST_KEYS = 10


@dataclass
class VerifyReport:
    """What `verify` found; `problems` is empty for a sound dataset. Counts are of what could be read."""

    problems: list[str] = field(default_factory=list)
    num_shards: int = 0
    num_samples: int = 0
    num_bytes: int = 0

    @property
    def ok(self) -> bool:
        return not self.problems

    def to_dict(self) -> dict[str, Any]:
        return {"ok": self.ok, **asdict(self)}


def verify(dataset_dir: str | Path, workers: int | None = None) -> VerifyReport:
    """Check a dataset whole: checksums, sizes, index against tar, shapes, values, keys and statistics.

    Goes on after a problem, so the report lists all of them, each with its file and key, in the order of the shards.
    `workers` shards are read at a time, each byte once; by default as many as there are cores, at most 8.
    """
    if workers is not None and workers < 1:
        raise DataError(f"workers must be at least 1, found {workers}")
    report = VerifyReport()
    try:
        manifest = load_manifest(dataset_dir)
        source = open_source(shards_location(dataset_dir, manifest))
    except DataError as error:
        report.problems.append(str(error))
        return report
    seen: dict[str, str] = {}
    moments = no_moments(manifest.spec)
    for shard in examine_all(source, manifest, workers):
        _add(report, shard, seen)
        moments = merge_moments(moments, shard.selected_moments)
    report.problems += _unlisted(dataset_dir, manifest)
    if report.ok:  # a missing or damaged sample would show here once more
        for name, stats in manifest.stats.items():
            report.problems += compare_stats(f"{dataset_dir}: manifest statistics of {name}", stats, moments[name])
    return report


def stats(dataset_dir: str | Path) -> dict[str, Any]:
    """Counts, sizes and statistics of a dataset, from its manifest alone.

    Per tensor: `mean` over channels, `std_min`, `std_median`, `std_max` over channels, and `rms_token_norm`, the root
    of the mean squared L2 norm of a token.
    """
    manifest = load_manifest(dataset_dir)
    spec = manifest.spec
    return {
        "samples": manifest.num_samples,
        "tokens": manifest.num_samples * spec.num_tokens,
        "shards": len(manifest.shards),
        "bytes": sum(info.num_bytes for info in manifest.shards),
        **spec.to_dict(),
        **{name: _summary(stats) for name, stats in manifest.stats.items()},
        **({"selection": asdict(manifest.selection)} if manifest.selection else {}),
        "extra": manifest.extra,
    }


def inspect(dataset_dir: str | Path, key: str | None = None) -> dict[str, Any]:
    """The specification and first keys of a dataset; or, with `key`, that sample's shapes, norms and metadata."""
    dataset = EmbeddingDataset(dataset_dir)
    if key is None:
        return {
            "spec": dataset.spec.to_dict(),
            **({"selection": asdict(dataset.manifest.selection)} if dataset.manifest.selection else {}),
            "samples": len(dataset),
            "shards": [asdict(info) for info in dataset.manifest.shards],
            "first_keys": [dataset.key(0, i) for i in range(min(_FIRST_KEYS, dataset.shard_sizes[0]))],
        }
    shard, index = _find(dataset, key)
    sample = dataset.read(shard, index)
    return {
        "key": key,
        "shard": dataset.manifest.shards[shard].name,
        "index": index,
        **{name: _describe(values) for name, values in sample.tensors.items()},
        "meta": dataset.meta(shard, index),
    }


def _add(report: VerifyReport, shard: ShardReport, seen: dict[str, str]) -> None:
    report.problems += shard.problems
    for key in shard.keys:
        if key in seen:
            report.problems.append(f"{shard.path}: key {key!r} appears in {seen[key]} as well")
        seen.setdefault(key, shard.path.name)
    report.num_shards += bool(shard.num_bytes)
    report.num_samples += shard.selected
    report.num_bytes += shard.num_bytes


def _unlisted(location: str | Path, manifest: Manifest) -> list[str]:
    if is_remote(location) or manifest.selection is not None:
        return []
    listed = {info.name for info in manifest.shards}
    return [
        f"{path}: not listed in the manifest; remove it, or repeat the command that wrote it"
        for path in shard_paths(Path(location))
        if path.name not in listed
    ]


def _summary(stats: ChannelStats) -> dict[str, float]:
    std = np.sqrt(stats.var)
    return {
        "mean": float(stats.mean.mean()),
        "std_min": float(std.min()),
        "std_median": float(np.median(std)),
        "std_max": float(std.max()),
        "rms_token_norm": math.sqrt(float((stats.var + np.square(stats.mean)).sum())),
    }


def _find(dataset: EmbeddingDataset, key: str) -> tuple[int, int]:
    for shard in range(len(dataset.manifest.shards)):
        keys = dataset.keys(shard)
        if key in keys:
            return shard, keys.index(key)
    raise DataError(f"{dataset.location}: no sample has the key {key!r}; its first key is {dataset.key(0, 0)!r}")


def _describe(values: Tensor) -> dict[str, Any]:
    norms = torch.linalg.vector_norm(values.double(), dim=-1)
    return {
        "shape": list(values.shape),
        "dtype": str(values.dtype).removeprefix("torch."),
        "mean": float(values.double().mean()),
        "std": float(values.double().std(correction=0)),
        "token_norm_min": float(norms.min()),
        "token_norm_mean": float(norms.mean()),
        "token_norm_max": float(norms.max()),
    }
