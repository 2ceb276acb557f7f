"""Mending a dataset in place: `repair` rebuilds indexes, and writes shards again without their bad samples.

A shard that loses samples is written under a new number, and the manifest, replaced last, names it in place of the
old one: whenever it is interrupted, the dataset is the one before or the one after.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from blip3o_ds.data.format.index import ShardIndex, index_path
from blip3o_ds.data.format.manifest import Manifest, ShardInfo
from blip3o_ds.data.format.moments import merge_moments, no_moments, stats_of_moments
from blip3o_ds.data.format.tar import Member, TarWalk
from blip3o_ds.data.format.writer import ShardWriter, sole_writer
from blip3o_ds.data.reading.remote import is_remote
from blip3o_ds.data.reading.source import Folder
from blip3o_ds.data.tools.append import next_number
from blip3o_ds.data.tools.examine import ShardReport, compare_stats, examine_all, read_sample
from blip3o_ds.errors import DataError

logger = logging.getLogger(__name__)


@dataclass
class RepairReport:
    """What `repair` did."""

    indexes_rebuilt: int = 0
    shards_rewritten: int = 0
    manifest_rewritten: bool = False
    samples: int = 0  # of the dataset now
    unvouched: int = 0  # kept out of tars whose checksum is wrong: they look sound and may not be
    dropped: list[dict[str, str]] = field(default_factory=list)  # shard, key and error of each sample left out


@dataclass
class _Plan:
    """What becomes of one shard."""

    info: ShardInfo  # as the manifest is to list it
    report: ShardReport
    rewrite: bool = False
    vouched: bool = True  # the tar is as it was written
    empty: bool = False  # all its samples are in other shards
    repeated: frozenset[str] = frozenset()  # keys that earlier shards have


def repair(dataset_dir: str | Path, workers: int | None = None) -> RepairReport:
    """Mend the dataset in a folder, after looking at all of it (see `verify`, also for `workers`).

    An index that is missing, damaged or of another tar is rebuilt from a tar whose checksum is right. A tar with bad
    or repeated samples, or cut short, is written again without them. A manifest that is older than a shard, or has
    wrong statistics, is brought up to date.

    Raises DataError, and leaves the dataset as it was, for what it cannot mend: a missing tar, a wrong checksum with
    nothing in the tar to account for it, a shard without a sound sample, a damaged manifest.
    """
    if is_remote(str(dataset_dir)):
        raise DataError(f"{dataset_dir}: a dataset behind a URL cannot be mended in place; repair the folder it is of")
    folder = Path(dataset_dir)
    with sole_writer(folder):
        return _repair(folder, workers)


def _repair(folder: Path, workers: int | None) -> RepairReport:
    manifest = Manifest.load(folder)
    if manifest.selection is not None:
        raise DataError(f"{folder}: a split; repair {manifest.selection.of}, and split it again")
    plans = _plan(folder, manifest, workers)
    result = RepairReport()
    written: list[Path] = []
    try:
        repaired = _carry_out(plans, folder, manifest, result, written)
    except BaseException:
        for path in written:
            path.unlink(missing_ok=True)
        raise
    if repaired is not manifest:
        repaired.save(folder)
        result.manifest_rewritten = True
    for name in {info.name for info in manifest.shards} - {info.name for info in repaired.shards}:
        (folder / name).unlink(missing_ok=True)
        index_path(folder / name).unlink(missing_ok=True)
    result.samples = repaired.num_samples
    return result


def _plan(folder: Path, manifest: Manifest, workers: int | None) -> list[_Plan]:
    plans, refusals = [], []
    seen: set[str] = set()
    for info, report in zip(manifest.shards, examine_all(Folder(folder), manifest, workers), strict=True):
        sound = [key for number, key in enumerate(report.keys) if number not in report.bad]
        repeated = frozenset(seen.intersection(sound))
        seen.update(sound)
        try:
            plans.append(_judge(info, report, repeated, len(set(sound)) != len(sound)))
        except DataError as error:
            refusals.append(str(error))
    if refusals:
        raise DataError("; ".join(refusals) + "; nothing was changed")
    return plans


def _judge(info: ShardInfo, report: ShardReport, repeated: frozenset[str], repeats_itself: bool) -> _Plan:
    """What to do with a shard; raises DataError where nothing can be done."""
    if not report.sha256:
        raise DataError(report.damage[0])
    found = report.num_bytes, report.sha256
    index = report.index
    vouched = found == (info.num_bytes, info.sha256) or (index is not None and found == (index.num_bytes, index.sha256))
    if report.bad or report.is_broken or repeated or repeats_itself:
        return _Plan(info, report, rewrite=True, vouched=vouched, repeated=repeated)
    if not vouched:
        raise DataError(
            f"{report.path}: its checksum is wrong and every sample in it looks sound, so any of them may be damaged; "
            "copy or write this shard again"
        )
    return _Plan(ShardInfo(info.name, len(report.keys), *found), report)


def _carry_out(
    plans: Sequence[_Plan], folder: Path, manifest: Manifest, result: RepairReport, written: list[Path]
) -> Manifest:
    """Write the new shards and indexes; the manifest to replace the old one with, or the same if it is right."""
    number = next_number(manifest)
    totals = no_moments(manifest.spec)
    for plan in plans:
        if plan.rewrite:
            target = folder / f"shard_{number:05d}.tar"
            written += [target, index_path(target)]
            index = _rewrite(plan, target, manifest, result)
            if index is None:
                continue
            plan.info = ShardInfo(target.name, len(index.keys), index.num_bytes, index.sha256)
            number += 1
        else:
            index = plan.report.own_index()
            if not _is_right(plan.report, index):
                index.save(index_path(plan.report.path))
                result.indexes_rebuilt += 1
        totals = merge_moments(totals, index.moments)
    shards = tuple(plan.info for plan in plans if not plan.empty)
    stats_differ = any(compare_stats(name, stats, totals[name]) for name, stats in manifest.stats.items())
    if shards == manifest.shards and not stats_differ:
        return manifest
    return replace(manifest, shards=shards, stats=stats_of_moments(totals))


def _is_right(report: ShardReport, own: ShardIndex) -> bool:
    index = report.index
    return index is not None and report.index_agrees and (index.num_bytes, index.sha256) == (own.num_bytes, own.sha256)


def _rewrite(plan: _Plan, target: Path, manifest: Manifest, result: RepairReport) -> ShardIndex | None:
    """Write the sound samples of a shard to `target`; None, and no file, where all samples are in other shards."""
    path = plan.report.path
    writer = ShardWriter(target, manifest.spec, {})
    done: set[str] = set()
    repeats = 0
    try:
        for member in _members(plan):
            try:
                if member.key in plan.repeated or member.key in done:
                    repeats += 1
                    raise DataError(f"{path}: key {member.key!r} comes twice in the dataset")
                tensors, meta = read_sample(member, manifest.spec, f"{path}: sample {member.key!r}")
                writer.write_stored(member.key, tensors, meta)
                done.add(member.key)
            except DataError as error:
                logger.warning("left out: %s", error)
                result.dropped.append({"shard": path.name, "key": member.key, "error": str(error)})
        if not done and repeats:
            writer.abort()
            plan.empty = True
            return None
        if not done:
            raise DataError(f"{path}: holds no sound sample; copy or write this shard again; nothing was changed")
        index = writer.finish()
    except BaseException:
        writer.abort()
        raise
    result.shards_rewritten += 1
    result.unvouched += 0 if plan.vouched else len(done)
    return index


def _members(plan: _Plan) -> Iterator[Member]:
    """The samples of a tar that is written again; where it breaks off, by its index if the manifest vouches for it."""
    path, index = plan.report.path, plan.report.index
    if (
        not plan.report.is_broken
        or index is None
        or (index.num_bytes, index.sha256) != (plan.info.num_bytes, plan.info.sha256)
    ):
        yield from TarWalk(path)
        return
    with open(path, "rb") as file:
        for number, key in enumerate(index.keys):
            content = []
            for kind in ("tensors", "meta"):
                file.seek(int(index.members[f"{kind}_offset"][number]))
                content.append(file.read(int(index.members[f"{kind}_size"][number])))
            yield Member(key, content[0], 0, content[1], 0)
