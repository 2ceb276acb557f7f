"""A dataset that several processes write part by part: which parts are done, and how they become one dataset.

Each part is a small dataset in `DST/.parts`, done when `part_0000000.json` is beside it; a process that finds all done
moves their shards together and writes the manifest. Every step may be repeated, even by two processes at once.
"""

from __future__ import annotations

import glob
import logging
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from blip3o_ds.data.format.index import index_path
from blip3o_ds.data.format.manifest import MANIFEST_NAME, Manifest, ShardInfo
from blip3o_ds.data.format.moments import merge_moments, moments_of_stats, no_moments, stats_of_moments
from blip3o_ds.data.format.schema import DatasetSpec
from blip3o_ds.data.format.writer import BusyFolder, shard_paths
from blip3o_ds.errors import DataError
from blip3o_ds.files import atomic_write_bytes, atomic_write_json, fsync_dir, read_json
from blip3o_ds.settings import flatten

logger = logging.getLogger(__name__)

WritePart = Callable[[int, Path], dict[str, int]]  # writes part number i into a folder; returns counts, see `write`

_PARTS = ".parts"


class PartedDataset:
    """The dataset `dst` and the parts that it is written in, in their order; all of its state is on disk.

    Only the same `spec`, `plan` and number of `parts` can continue what was begun. The plan is JSON with all else that
    the samples depend on; the manifest keeps it as `extra[purpose]`. `parts` are names, for messages. Where parts leave
    a file `log_name` in their folder, it is joined too.
    """

    def __init__(
        self,
        dst: Path,
        spec: DatasetSpec,
        parts: Sequence[str],
        purpose: str,
        plan: dict[str, Any],
        extra: dict[str, Any],
        log_name: str | None = None,
    ) -> None:
        self._dst = dst
        self._manifest = dst / MANIFEST_NAME  # written last
        self._spec = spec
        self._parts = parts
        self._purpose = purpose
        # The separator on its own, since it changes the form of the whole specification.
        views = {"view_separator": spec.view_separator} if spec.view_separator else {}
        self._plan = {"spec": spec.without_views().to_dict(), **plan, **views, "num_parts": len(parts)}
        self._extra = extra
        self._log_name = log_name

    def begin(self, rank: int, world_size: int) -> list[int]:
        """Record the plan, or compare it with the recorded one; returns the parts of process `rank` that are not done.

        Raises DataError if the folder holds another dataset, or one that was begun with another plan.
        """
        self._record_plan()
        todo = [number for number in range(rank, len(self._parts), world_size) if not self._done_path(number).exists()]
        if self._is_finished():  # and its parts are removed
            todo = []
        logger.info("process %d of %d has %d of %d parts to write", rank, world_size, len(todo), len(self._parts))
        return todo

    def write(self, todo: Sequence[int], write_part: WritePart) -> None:
        """Write these parts.

        `write_part` leaves a dataset in the folder that it is given, and finds there what an interrupted call left. It
        returns at least the number of `samples`; if that is 0, there need be no dataset. A part that raises DataError
        does not stop the others, and is reported by a DataError at the end.
        """
        failures: list[DataError] = []
        for number in todo:
            name = self._parts[number]
            try:
                counts = write_part(number, self._part_folder(number))
            except BusyFolder:
                logger.warning("part %s: another process is writing it", name)
                continue
            except DataError as error:
                logger.error("part %s: %s", name, error)
                failures.append(error)
                continue
            atomic_write_json(self._done_path(number), counts)
            logger.info("part %s is done; %d of %d parts left in all", name, self.parts_left(), len(self._parts))
        if failures:
            raise DataError(
                f"{len(failures)} of {len(todo)} parts could not be written, the others are done; the first: "
                f"{failures[0]}"
            ) from failures[0]

    def finish_if_last(self) -> None:
        """Join the parts if all are done; another process may be doing the same."""
        try:
            if self.parts_left():
                return
            if not self._is_finished():
                self._join()
        except (DataError, FileNotFoundError):
            if not self._is_finished():  # otherwise another process was faster and removed the parts
                raise
        shutil.rmtree(self._dst / _PARTS, ignore_errors=True)  # another process may be removing them too

    def parts_left(self) -> int:
        """The number of parts that no process has finished; 0 once the dataset exists."""
        done = glob.glob("part_*.json", root_dir=self._dst / _PARTS)
        return 0 if self._manifest.exists() else len(self._parts) - len(done)

    def num_samples(self) -> int | None:
        """The size of the finished dataset; None before."""
        return Manifest.load(self._dst).num_samples if self._manifest.exists() else None

    def _record_plan(self) -> None:
        if self._is_finished():
            return
        path = self._dst / _PARTS / "plan.json"
        if path.exists():
            self._compare(read_json(path), path)
        elif self._dst.is_dir() and shard_paths(self._dst):
            if not self._is_finished():  # by another process, just now
                raise DataError(f"{self._dst}: holds shards that another command wrote; choose another folder")
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            atomic_write_json(path, self._plan)

    def _is_finished(self) -> bool:
        """Whether the dataset exists; raises DataError if another one does."""
        if not self._manifest.exists():
            return False
        found = Manifest.load(self._dst).extra.get(self._purpose)
        if not isinstance(found, dict):
            raise DataError(f"{self._manifest}: another command wrote this dataset; choose another folder")
        self._compare(found, self._manifest)
        return True

    def _compare(self, found: dict[str, Any], path: Path) -> None:
        there, here = flatten(found), flatten(self._plan)
        if there == here:
            return
        names = [name for name in {**here, **there} if there.get(name) != here.get(name)]
        differences = ", ".join(f"{name} ({there.get(name)!r}, now {here.get(name)!r})" for name in names)
        raise DataError(
            f"{path}: was started with another {differences}; continue with the same arguments and sources, or choose "
            "another folder (`blip3o-ds data append` joins two)"
        )

    def _part_folder(self, number: int) -> Path:
        return self._dst / _PARTS / f"part_{number:07d}"

    def _done_path(self, number: int) -> Path:
        return self._part_folder(number).with_suffix(".json")

    def _join(self) -> None:
        shards: list[ShardInfo] = []
        moments = no_moments(self._spec)
        log = b""
        for number in range(len(self._parts)):
            folder = self._part_folder(number)
            if self._log_name and (folder / self._log_name).exists():
                log += (folder / self._log_name).read_bytes()
            if read_json(self._done_path(number))["samples"] == 0:
                continue
            part = Manifest.load(folder)
            for info in part.shards:
                target = self._dst / f"shard_{len(shards):05d}.tar"
                _move(folder / info.name, target)
                _move(index_path(folder / info.name), index_path(target))
                shards.append(replace(info, name=target.name))
            moments = merge_moments(moments, moments_of_stats(part.stats))
        if self._log_name and log:
            atomic_write_bytes(self._dst / self._log_name, log)
        if not shards:
            raise DataError(f"{self._dst}: no part has a sample that could be used; see {self._log_name} in it")
        fsync_dir(self._dst)
        extra = {**self._extra, self._purpose: self._plan}
        Manifest(self._spec, tuple(shards), stats_of_moments(moments), extra).save(self._dst)
        logger.info("%s is finished: %d shards", self._dst, len(shards))


def _move(source: Path, target: Path) -> None:
    try:
        os.replace(source, target)
    except FileNotFoundError:
        if not target.exists():
            raise
