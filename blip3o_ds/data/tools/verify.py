"""Checking a dataset whole: `verify` reads every byte of it once, and goes by the tars, not by their indexes.

What it finds of each shard (`examine_all`) is also what `repair` acts on.
"""

from __future__ import annotations

import json
import os
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
from torch import Tensor

from blip3o_ds.data.format.codec import check_values, decode_all, parse_header
from blip3o_ds.data.format.index import IndexBuilder, ShardIndex, index_path
from blip3o_ds.data.format.manifest import ChannelStats, Manifest, ShardInfo
from blip3o_ds.data.format.moments import ChannelMoments, merge_moments, no_moments, sample_moments
from blip3o_ds.data.format.schema import DatasetSpec
from blip3o_ds.data.format.tar import Member, TarWalk
from blip3o_ds.data.format.writer import shard_paths
from blip3o_ds.data.reading.dataset import ShardFiles, load_manifest, shards_location
from blip3o_ds.data.reading.remote import is_remote
from blip3o_ds.errors import DataError
from blip3o_ds.progress import Progress


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


class ShardReport:
    """What a shard holds, and what is wrong with it."""

    def __init__(self, path: Path, spec: DatasetSpec) -> None:
        self.path = path
        self.num_bytes, self.sha256 = 0, ""
        self.selected = 0  # samples in the tar that the manifest selects
        self.damage: list[str] = []  # of the tar as a whole
        self.bad: list[str] = []  # what is wrong with a sample
        self.is_broken = False  # the tar cannot be read to its end
        self.index: ShardIndex | None = None  # as it is on disk
        self.index_agrees = False  # it says of every sample what the tar does
        self.index_problems: list[str] = []
        self.found = IndexBuilder(spec)  # of all samples in the tar, with the moments of the sound ones
        self.keys = self.found.keys
        self.selected_moments = no_moments(spec)

    @property
    def problems(self) -> list[str]:
        return [*self.damage, *self.bad, *self.index_problems]


def examine_all(files: ShardFiles, manifest: Manifest, workers: int | None) -> Generator[ShardReport, None, None]:
    """The report of every shard, in the manifest's order; `workers` are read at a time, in threads.

    Hashing and arithmetic release Python's global lock. Never raises for what is wrong with a shard.
    """
    workers = min(8, os.cpu_count() or 1) if workers is None else workers
    if workers < 1:
        raise DataError(f"workers must be at least 1, found {workers}")
    pool = ThreadPoolExecutor(workers)
    try:
        reports = pool.map(lambda info: _examine(files, info, manifest), manifest.shards)
        yield from Progress("verify", len(manifest.shards), "shards").over(reports)
    finally:
        pool.shutdown(cancel_futures=True)  # after an error nobody wants the rest


def read_sample(member: Member, spec: DatasetSpec, where: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a sample as stored, and its metadata; raises DataError for anything wrong with it."""
    for suffix, content in (("safetensors", member.tensors), ("json", member.meta)):
        if not content:
            raise DataError(f"{where}: its .{suffix} is missing")
    parse_header(member.tensors, spec, where)
    try:
        tensors = safetensors.torch.load(member.tensors)
    except safetensors.SafetensorError as error:
        raise DataError(f"{where}: its .safetensors is damaged ({error})") from error
    check_values(tensors, where)
    try:
        return tensors, json.loads(member.meta)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: its .json is damaged ({error})") from error


def compare_stats(label: str, stored: ChannelStats, found: ChannelMoments) -> list[str]:
    """What to report where statistics differ by more than rounding."""
    recomputed = found.to_stats()
    scale = np.sqrt(recomputed.var + np.square(recomputed.mean))  # of a channel's values
    mean_off = np.abs(stored.mean - recomputed.mean) > 1e-6 * scale
    var_off = np.abs(stored.var - recomputed.var) > 1e-6 * np.square(scale)
    if stored.count == recomputed.count and not mean_off.any() and not var_off.any():
        return []
    return [f"{label} differ from those of the data in {int((mean_off | var_off).sum())} channels"]


def _examine(files: ShardFiles, info: ShardInfo, manifest: Manifest) -> ShardReport:
    report = ShardReport(Path(info.name), manifest.spec)
    try:
        lease = files.open(info)
        report.path = path = lease.path
        if not path.is_file():
            raise DataError(f"{path}: listed in the manifest, but missing; copy the dataset again")
        _open_index(report, info, manifest)
        walk = TarWalk(path)
        _walk(walk, manifest, report)
    except DataError as error:
        report.damage.append(str(error))
        return report
    report.num_bytes, report.sha256 = walk.num_bytes, walk.sha256
    if walk.num_bytes != info.num_bytes:
        report.damage.append(f"{path}: {walk.num_bytes} bytes, the manifest says {info.num_bytes}; copy it again")
    elif walk.sha256 != info.sha256:
        report.damage.append(f"{path}: its SHA-256 is not the manifest's; copy or write it again")
    if walk.damage is not None:
        report.is_broken = True
        report.damage.append(f"{path}: the tar cannot be read after {len(report.keys)} samples ({walk.damage})")
    if report.selected != info.num_samples:
        report.damage.append(f"{path}: holds {report.selected} samples, the manifest says {info.num_samples}")
    if report.index is not None:
        disagreements = _compare_with_index(report, report.index)
        report.index_agrees = not disagreements and not report.is_broken
        report.index_problems += disagreements
    return report


def _open_index(report: ShardReport, info: ShardInfo, manifest: Manifest) -> None:
    path = index_path(report.path)
    try:
        index = ShardIndex.load(path)
    except DataError as error:
        report.index_problems.append(str(error))
        return
    if ShardInfo(info.name, len(manifest.rows(index.keys)), index.num_bytes, index.sha256) != info:
        report.index_problems.append(f"{path}: its sample count, size or checksum is not the manifest's")
    if differences := index.spec.differences(manifest.spec.without_views()):
        report.index_problems.append(f"{path}: its spec differs from the manifest's ({differences})")
    else:
        report.index = index


def _walk(walk: TarWalk, manifest: Manifest, report: ShardReport) -> None:
    spec = manifest.spec
    first_header: bytes | None = None
    for member in walk:
        is_selected = len(manifest.rows([member.key])) > 0
        report.selected += is_selected
        where = f"{report.path}: sample {member.key!r}"
        try:
            tensors, _ = read_sample(member, spec, where)
            length, offsets = parse_header(member.tensors, spec, where)
            first_header = first_header or member.tensors[:length]
            if member.tensors[:length] != first_header:
                raise DataError(f"{where}: its safetensors header is not that of the shard's other samples")
            moments = sample_moments(decode_all(tensors))
        except DataError as error:
            report.bad.append(str(error))
            report.found.add(member, {}, None)
            continue
        report.found.add(member, offsets, moments)
        if is_selected:
            report.selected_moments = merge_moments(report.selected_moments, moments)


def _compare_with_index(report: ShardReport, index: ShardIndex) -> list[str]:
    path, problems = index_path(report.path), []
    remedy = "`blip3o-ds data repair` rebuilds it"
    if report.keys != index.keys:
        return [f"{path}: its keys are not those of the tar; {remedy}"]
    differs = np.zeros(len(report.keys), dtype=bool)
    for name, listed in {**index.members, **index.tensors}.items():
        found = np.array(report.found.offsets[name])
        differs |= (found >= 0) & (found != listed)
    for number in np.flatnonzero(differs):
        problems.append(f"{report.path}: sample {report.keys[number]!r}: the index points elsewhere; {remedy}")
    for name, stored in index.moments.items():
        if report.found.moments[name].count == stored.count:
            problems += compare_stats(f"{path}: statistics of {name}", stored.to_stats(), report.found.moments[name])
    return problems
