"""Checking a dataset whole: `verify` reads every byte of it.

It goes by the tars themselves, so it checks the indexes as well as the data.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from blip3o_ds.data.format.moments import merge_moments, no_moments
from blip3o_ds.data.format.writer import shard_paths
from blip3o_ds.data.reading.remote import is_remote
from blip3o_ds.data.reading.source import ShardFiles, load_manifest, shards_location
from blip3o_ds.data.tools.examine import compare_stats, examine_all
from blip3o_ds.errors import DataError


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

    The report lists all problems, each with its file and key, in the order of the shards.
    `workers` shards are read at a time, each byte once; by default as many as there are cores, at most 8.
    """
    try:
        manifest = load_manifest(dataset_dir)
        files = ShardFiles(shards_location(dataset_dir, manifest))
    except DataError as error:
        return VerifyReport([str(error)])
    report = VerifyReport()
    seen: dict[str, str] = {}
    moments = no_moments(manifest.spec)
    for shard in examine_all(files, manifest, workers):
        report.problems += shard.problems
        for key in shard.keys:
            if key in seen:
                report.problems.append(f"{shard.path}: key {key!r} appears in {seen[key]} as well")
            seen.setdefault(key, shard.path.name)
        report.num_shards += bool(shard.num_bytes)
        report.num_samples += shard.selected
        report.num_bytes += shard.num_bytes
        moments = merge_moments(moments, shard.selected_moments)
    if not is_remote(dataset_dir) and manifest.selection is None:
        listed = {info.name for info in manifest.shards}
        for path in shard_paths(Path(dataset_dir)):
            if path.name not in listed:
                report.problems.append(
                    f"{path}: not listed in the manifest; remove it, or repeat the command that wrote it"
                )
    if report.ok:  # a missing or damaged sample would show here once more
        for name, stats in manifest.stats.items():
            report.problems += compare_stats(f"{dataset_dir}: manifest statistics of {name}", stats, moments[name])
    return report
