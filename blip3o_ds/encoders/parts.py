"""An extraction that several processes share: which parts of the source are done, and how they become one dataset.

Each part is a small dataset in `DST/.parts`, done when `part_0000000.json` is beside it; a process that finds all done
moves their shards together and writes the manifest. Every step may be repeated, even by two processes at once.
"""

from __future__ import annotations

import glob
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from blip3o_ds.data.format.index import index_path
from blip3o_ds.data.format.manifest import MANIFEST_NAME, Manifest, ShardInfo
from blip3o_ds.data.format.moments import merge_moments, moments_of_stats, no_moments, stats_of_moments
from blip3o_ds.data.format.schema import DatasetSpec
from blip3o_ds.data.format.writer import shard_paths
from blip3o_ds.encoders.images import ImagePart
from blip3o_ds.errors import DataError
from blip3o_ds.files import atomic_write_bytes, atomic_write_json, fsync_dir, read_json

logger = logging.getLogger(__name__)

BROKEN_NAME = "broken_images.jsonl"
_PARTS = ".parts"


class Extraction:
    """The state of an extraction into `dst`, all of it on disk.

    An extraction can only be resumed with the `weights`, `samples_per_shard` and `parts` (name and size) that it was
    started with.
    """

    def __init__(
        self,
        dst: Path,
        spec: DatasetSpec,
        samples_per_shard: int,
        weights: dict[str, str],
        parts: list[ImagePart],
    ) -> None:
        self._dst = dst
        self._manifest = dst / MANIFEST_NAME  # written last
        self._spec = spec
        self._weights = weights
        self.parts = parts
        self._plan = {
            "spec": spec.to_dict(),
            "samples_per_shard": samples_per_shard,
            **weights,
            "num_parts": len(parts),
            "parts_sha256": hashlib.sha256(json.dumps([(part.name, part.size) for part in parts]).encode()).hexdigest(),
        }

    def is_finished(self) -> bool:
        """Whether the dataset exists; raises DataError if another one does."""
        if not self._manifest.exists():
            return False
        self._compare(Manifest.load(self._dst).extra.get("extraction"), self._manifest)
        return True

    def begin(self, numbers: Iterable[int]) -> list[int]:
        """Record the plan, or compare it with the recorded one; returns which of these parts are not done.

        Raises DataError if another extraction was started in the folder, or the folder holds another dataset.
        """
        if self.is_finished():
            return []
        path = self._dst / _PARTS / "plan.json"
        if path.exists():
            self._compare(read_json(path), path)
        elif self._dst.is_dir() and shard_paths(self._dst):
            if self.is_finished():  # by another process, just now
                return []
            raise DataError(f"{self._dst}: holds shards that another command wrote; choose another folder")
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            atomic_write_json(path, self._plan)
        return [number for number in numbers if not self._done_path(number).exists()]

    def part_folder(self, number: int) -> Path:
        return self._dst / _PARTS / f"part_{number:07d}"

    def mark_done(self, number: int, counts: dict[str, int]) -> None:
        """`counts` has at least the `samples` of the part, which may be 0."""
        atomic_write_json(self._done_path(number), counts)

    def parts_left(self) -> int:
        """The number of parts that no process has finished; 0 once the dataset exists."""
        done = glob.glob("part_*.json", root_dir=self._dst / _PARTS)
        return 0 if self._manifest.exists() else len(self.parts) - len(done)

    def num_samples(self) -> int | None:
        """The size of the finished dataset; None before."""
        return Manifest.load(self._dst).num_samples if self._manifest.exists() else None

    def finish_if_last(self) -> None:
        """Join the parts if all are done; another process may be doing the same."""
        try:
            if self.parts_left():
                return
            if not self.is_finished():
                self._join()
        except (DataError, FileNotFoundError):
            if not self.is_finished():  # otherwise another process was faster and removed the parts
                raise
        shutil.rmtree(self._dst / _PARTS, ignore_errors=True)  # another process may be removing them too

    def _done_path(self, number: int) -> Path:
        return self.part_folder(number).with_suffix(".json")

    def _join(self) -> None:
        shards: list[ShardInfo] = []
        moments = no_moments(self._spec)
        broken = b""
        for number in range(len(self.parts)):
            folder = self.part_folder(number)
            if (folder / BROKEN_NAME).exists():
                broken += (folder / BROKEN_NAME).read_bytes()
            if read_json(self._done_path(number))["samples"] == 0:
                continue
            part = Manifest.load(folder)
            for info in part.shards:
                target = self._dst / f"shard_{len(shards):05d}.tar"
                _move(folder / info.name, target)
                _move(index_path(folder / info.name), index_path(target))
                shards.append(replace(info, name=target.name))
            moments = merge_moments(moments, moments_of_stats(part.stats))
        if broken:
            atomic_write_bytes(self._dst / BROKEN_NAME, broken)
        if not shards:
            raise DataError(f"{self._dst}: no image could be used; see {BROKEN_NAME} in it")
        fsync_dir(self._dst)
        extra = {**self._weights, "extraction": self._plan}
        Manifest(self._spec, tuple(shards), stats_of_moments(moments), extra).save(self._dst)
        logger.info("%s is finished: %d shards", self._dst, len(shards))

    def _compare(self, found: Any, path: Path) -> None:
        if found == self._plan:
            return
        names = [name for name in self._plan if not isinstance(found, dict) or found.get(name) != self._plan[name]]
        raise DataError(
            f"{path}: was started with another {', '.join(names)}; continue with the same arguments and images, or "
            "choose another folder (`blip3o-ds data append` joins two)"
        )


def _move(source: Path, target: Path) -> None:
    try:
        os.replace(source, target)
    except FileNotFoundError:
        if not target.exists():
            raise
