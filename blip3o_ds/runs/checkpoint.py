"""A checkpoint on disk: a folder `step_XXXXXXXX` whose `checkpoint.json` records size and SHA-256 of every other file.

That file, the seal, is written last: a folder without a seal, or with files that differ from it, is not a checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blip3o_ds.errors import CheckpointError
from blip3o_ds.files import atomic_write_json, parse_json, sha256_file

logger = logging.getLogger(__name__)

SEAL = "checkpoint.json"


@dataclass(frozen=True)
class Checkpoint:
    """A sealed checkpoint: its folder, its step, and the JSON that training stored as its state."""

    path: Path
    step: int
    world_size: int
    zero_stage: int
    state: dict[str, Any]


def find_checkpoint(folder: Path, step: int | None = None, files: Sequence[str] | None = None) -> Checkpoint | None:
    """The newest checkpoint in `folder` that passes `verify_checkpoint`, or the one of `step`; None if there is none.

    Damaged checkpoints are skipped with a warning. It is a `CheckpointError` if that of `step` is missing or damaged,
    or if all are damaged: whoever took that for none would begin anew, over what can perhaps be saved.
    """
    paths = sorted(folder.glob("step_*"), reverse=True)
    if step is not None:
        wanted = folder / f"step_{step:08d}"
        if wanted in paths:
            return verify_checkpoint(wanted, files)
        there = ", ".join(path.name for path in paths) or "none"
        raise CheckpointError(f"{folder}: there is no checkpoint of step {step}; found: {there}")
    damaged = []
    for path in paths:
        try:
            return verify_checkpoint(path, files)
        except CheckpointError as error:
            logger.warning("checkpoint %s; trying the one before it", error)
            damaged.append(str(error))
    if damaged:
        raise CheckpointError(
            f"{folder}: no checkpoint is whole: {'; '.join(damaged)}. Nothing was changed; copy the files that differ "
            "from a backup, or start another run"
        )
    return None


def verify_checkpoint(path: Path, names: Sequence[str] | None = None) -> Checkpoint:
    """Compare the files of the checkpoint `path` with its seal: all of them, or only `names` if no others are read.

    A `CheckpointError` says that it is not finished, or which file is missing or differs.
    """
    if not (path / SEAL).is_file():
        raise CheckpointError(f"{path} is damaged: {SEAL} is missing, it was not finished")
    # An OSError is not caught: a file system that fails for a while says nothing about the checkpoint.
    seal = parse_json((path / SEAL).read_bytes(), path / SEAL, CheckpointError, f"{path} is damaged")
    if seal.pop("sha256", None) != _digest(seal):
        raise CheckpointError(f"{path} is damaged: {SEAL} is not as it was written")
    files = seal["files"]
    for name in files if names is None else names:
        file, recorded = path / name, files.get(name)
        if recorded is None or not file.is_file():
            raise CheckpointError(f"{path} is damaged: {name} is missing")
        size = file.stat().st_size
        if size != recorded["bytes"]:
            raise CheckpointError(f"{path} is damaged: {name} has {size} bytes, {recorded['bytes']} were written")
        if sha256_file(file) != recorded["sha256"]:
            raise CheckpointError(f"{path} is damaged: {name} has another checksum than when it was written")
    return Checkpoint(path, seal["step"], seal["world_size"], seal["zero_stage"], seal["state"])


def seal_checkpoint(folder: Path, checkpoint: Checkpoint, files: dict[str, dict[str, Any]]) -> None:
    """Make `folder` a checkpoint: write what `checkpoint` holds, and `bytes` and `sha256` of each of `files`."""
    content = {name: getattr(checkpoint, name) for name in ("step", "world_size", "zero_stage", "state")}
    content["files"] = files
    atomic_write_json(folder / SEAL, {**content, "sha256": _digest(content)})


def _digest(seal: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(seal, sort_keys=True).encode()).hexdigest()
