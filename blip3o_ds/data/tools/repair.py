"""Repairing a dataset in place: `repair` rebuilds indexes, and copies shards without their bad samples.

A copy gets a new number, and the manifest, replaced last, names it in place of the old shard: whenever a repair is
interrupted, the dataset is the one before or the one after.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from blip3o_ds.data.format.index import ShardIndex, index_path
from blip3o_ds.data.format.manifest import Manifest, ShardInfo
from blip3o_ds.data.format.moments import merge_moments, no_moments, stats_of_moments
from blip3o_ds.data.format.tar import Member, TarWalk
from blip3o_ds.data.format.writer import ShardWriter, sole_writer
from blip3o_ds.data.reading.dataset import ShardFiles
from blip3o_ds.data.reading.remote import is_remote
from blip3o_ds.data.tools.append import next_number
from blip3o_ds.data.tools.verify import ShardReport, compare_stats, examine_all, read_sample
from blip3o_ds.errors import DataError

logger = logging.getLogger(__name__)


@dataclass
class RepairReport:
    """What `repair` did."""

    indexes_rebuilt: int = 0
    shards_rewritten: int = 0
    manifest_rewritten: bool = False
    samples: int = 0  # of the dataset now
    unvouched: int = 0  # kept from tars whose checksum is wrong: they look sound and may not be
    dropped: list[dict[str, str]] = field(default_factory=list)  # shard, key and error of each sample left out


def repair(dataset_dir: str | Path, workers: int | None = None) -> RepairReport:
    """Repair the dataset in a folder, after reading all of it (see `verify`, also for `workers`).

    An index that is missing, damaged or of another tar is rebuilt from a tar whose checksum is right. A tar with bad
    or repeated samples, or cut short, is copied without them. A manifest that is older than a shard, or has wrong
    statistics, is brought up to date.

    Raises DataError, and leaves the dataset as it was, for what it cannot repair: a missing tar, a wrong checksum with
    nothing in the tar to account for it, a shard without a sound sample, a damaged manifest.
    """
    if is_remote(str(dataset_dir)):
        raise DataError(f"{dataset_dir}: cannot be repaired behind a URL; repair the folder that is served there")
    folder = Path(dataset_dir)
    with sole_writer(folder):
        manifest = Manifest.load(folder)
        if manifest.selection is not None:
            raise DataError(f"{folder}: a split; repair {manifest.selection.of}, and split it again")
        repaired = _Repaired(folder, manifest)
        refusals = []
        reports = examine_all(ShardFiles(folder), manifest, workers)
        try:
            for info, report in zip(manifest.shards, reports, strict=True):
                try:
                    repaired.add(info, report)
                except DataError as error:
                    refusals.append(str(error))
            if refusals:
                raise DataError("; ".join(refusals) + "; nothing was changed")
            for path, index in repaired.indexes.items():
                index.save(path)
        except BaseException:
            reports.close()
            for path in repaired.copies:
                path.unlink(missing_ok=True)
            raise
        return repaired.replace(manifest)


class _Repaired:
    """The repaired dataset, as far as its shards have been examined."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.copies: list[Path] = []  # files that nothing names yet
        self.indexes: dict[Path, ShardIndex] = {}  # to be saved
        self._folder, self._spec = folder, manifest.spec
        self._result = RepairReport()
        self._shards: list[ShardInfo] = []
        self._keys: set[str] = set()
        self._moments = no_moments(manifest.spec)
        self._number = next_number(manifest)

    def add(self, info: ShardInfo, report: ShardReport) -> None:
        """Take a shard as it is, with its index rebuilt, or as a copy; raises DataError where nothing can be done."""
        if not report.sha256:
            raise DataError(report.damage[0])
        found = (report.num_bytes, report.sha256)
        is_indexed = report.index is not None and found == (report.index.num_bytes, report.index.sha256)
        is_vouched = is_indexed or found == (info.num_bytes, info.sha256)
        name = info.name
        is_repeating = len(set(report.keys)) < len(report.keys) or not self._keys.isdisjoint(report.keys)
        if report.bad or report.is_broken or is_repeating:
            copy = self._copy(info, report)
            if copy is None:
                return
            index, name = copy, self.copies[-2].name
            if not is_vouched:
                self._result.unvouched += len(index.keys)
        elif is_vouched:
            index = report.found.build(*found)
            if not (report.index_agrees and is_indexed):
                self.indexes[index_path(report.path)] = index
        else:
            raise DataError(
                f"{report.path}: its checksum is wrong and every sample in it looks sound, so any of them may be "
                "damaged; copy or write this shard again"
            )
        self._keys.update(index.keys)
        self._shards.append(ShardInfo(name, len(index.keys), index.num_bytes, index.sha256))
        self._moments = merge_moments(self._moments, index.moments)

    def replace(self, manifest: Manifest) -> RepairReport:
        """Replace `manifest` if it is not right, then remove the shards that it does not name any more."""
        result, shards = self._result, tuple(self._shards)
        result.indexes_rebuilt = len(self.indexes)
        differ = [compare_stats(name, stats, self._moments[name]) for name, stats in manifest.stats.items()]
        if shards != manifest.shards or any(differ):
            replace(manifest, shards=shards, stats=stats_of_moments(self._moments)).save(self._folder)
            result.manifest_rewritten = True
        for name in {info.name for info in manifest.shards} - {info.name for info in shards}:
            (self._folder / name).unlink(missing_ok=True)
            index_path(self._folder / name).unlink(missing_ok=True)
        result.samples = sum(info.num_samples for info in shards)
        return result

    def _copy(self, info: ShardInfo, report: ShardReport) -> ShardIndex | None:
        """Write the sound samples of a shard to a new one; None, and no file, if other shards have all of them."""
        target = self._folder / f"shard_{self._number:05d}.tar"
        self.copies += [target, index_path(target)]
        writer = ShardWriter(target, self._spec, {})
        kept: set[str] = set()
        num_repeats = 0
        try:
            for member in _members(info, report):
                where = f"{report.path}: sample {member.key!r}"
                try:
                    if member.key in self._keys or member.key in kept:
                        num_repeats += 1
                        raise DataError(f"{where}: its key comes twice in the dataset")
                    writer.write_stored(member.key, *read_sample(member, self._spec, where))
                    kept.add(member.key)
                except DataError as error:
                    logger.warning("left out: %s", error)
                    self._result.dropped.append({"shard": info.name, "key": member.key, "error": str(error)})
            if kept:
                self._number += 1
                self._result.shards_rewritten += 1
                return writer.finish()
        finally:
            writer.abort()
        if not num_repeats:
            raise DataError(f"{report.path}: holds no sound sample; copy or write this shard again")
        return None


def _members(info: ShardInfo, report: ShardReport) -> Iterator[Member]:
    """The samples of a tar; where it breaks off, by its index if the manifest vouches for that."""
    index = report.index
    if not report.is_broken or index is None or (index.num_bytes, index.sha256) != (info.num_bytes, info.sha256):
        yield from TarWalk(report.path)
        return
    with open(report.path, "rb") as file:
        for number, key in enumerate(index.keys):
            content = []
            for kind in ("tensors", "meta"):
                file.seek(int(index.members[f"{kind}_offset"][number]))
                content.append(file.read(int(index.members[f"{kind}_size"][number])))
            yield Member(key, tensors=content[0], meta=content[1])
