"""Checkpoints that are whole or absent, written while training goes on.

A step waits until its state is copied to host memory. A thread of every rank then writes, syncs and reads back its own
files in a hidden folder; when all ranks have, rank 0 records sizes and SHA-256 in `checkpoint.json` and renames the
folder to `step_00000500`. A folder without a matching `checkpoint.json` is not a checkpoint.
"""

from __future__ import annotations

import datetime
import logging
import os
import shutil
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.distributed as dist
from torch import Tensor

from blip3o_ds.errors import CheckpointError
from blip3o_ds.files import atomic_write_bytes, fsync_dir
from blip3o_ds.runs.checkpoint import Checkpoint, find_checkpoint, seal_checkpoint
from blip3o_ds.training.elastic import load_elastic
from blip3o_ds.training.ema import each_weight
from blip3o_ds.training.engine import Engine
from blip3o_ds.training.peers import gather, on_rank_zero

logger = logging.getLogger(__name__)

WRITING_TIMEOUT = datetime.timedelta(minutes=30)  # between the first rank that has written its files and the last
CLOSING_SECONDS = 10

Writers = dict[str, Callable[[Any], Any]]  # file name -> what writes it


@dataclass
class TrainState:
    """Where a run stands, the same on every rank; the ranks' random number generators lie in the checkpoint too."""

    total_steps: int  # the learning rate's schedule depends on it
    step: int = 0  # the last one that was taken, or skipped
    best: dict[str, Any] | None = None  # `step`, `metric` and `score` of the best evaluation
    skipped_in_a_row: int = 0
    rollbacks: int = 0
    loader: dict[str, int] = field(default_factory=dict)  # position in the data, as the loader states it

    def to_json(self) -> dict[str, Any]:
        """What `checkpoint.json` holds; the step stands there already."""
        return {name: value for name, value in asdict(self).items() if name != "step"}

    @staticmethod
    def of(checkpoint: Checkpoint) -> TrainState:
        """The state that a checkpoint holds; old ones lack what was added later."""
        return TrainState(step=checkpoint.step, **checkpoint.state)


class CheckpointWriter:
    """Writes the checkpoints of a run into `folder`, one at a time; every rank calls `save` and `finish`.

    Kept are the `keep_last` newest, those of steps that `keep_every` divides, and the pinned one (`best` points to it).
    """

    def __init__(
        self, engine: Engine, folder: Path, *, with_ema: bool, keep_last: int, keep_every: int | None = None
    ) -> None:
        self.last: Checkpoint | None = None  # the newest that is complete
        self._engine = engine
        self._folder = folder
        self._kinds = ("model", "ema") if with_ema else ("model",)
        self._keep_last = keep_last
        self._keep_every = keep_every
        self._group = dist.new_group(backend="gloo", timeout=WRITING_TIMEOUT)  # the thread's own
        self._thread: threading.Thread | None = None
        self._outcome: Checkpoint | str | None = None  # of the thread: what it wrote, or why not

    def save(self, step: int, state: dict[str, Any], pinned_step: int | None = None) -> None:
        """Take the state of `step` and begin to write it to `folder/step_XXXXXXXX`, after `finish`.

        `state` is plain JSON; it comes back as `Checkpoint.state`.
        """
        self.finish()
        final = self._folder / f"step_{step:08d}"
        temporary = self._folder / f".{final.name}.partial"
        if dist.get_rank() == 0:
            self._folder.mkdir(parents=True, exist_ok=True)
            for left_over in self._folder.glob(".step_*.partial"):
                shutil.rmtree(left_over)
            temporary.mkdir()
        dist.barrier()
        checkpoint = Checkpoint(final, step, dist.get_world_size(), self._engine.zero_stage, state)
        self._thread = threading.Thread(
            target=self._write, args=(self._snapshot(temporary), temporary, checkpoint, pinned_step), daemon=True
        )
        self._thread.start()

    def finish(self) -> Checkpoint | None:
        """Wait for the last save; the newest complete checkpoint, or a `CheckpointError` if a rank could not write."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
            if isinstance(self._outcome, str):
                raise CheckpointError(self._outcome)
            self.last = self._outcome or self.last
        return self.last

    def close(self) -> None:
        """On the way out after an error: give a save that is under way a chance to complete."""
        if self._thread is not None:
            self._thread.join(CLOSING_SECONDS)

    def _snapshot(self, folder: Path) -> Writers:
        """Copies of all that this rank has to write, complete in host memory."""
        from blip3o_ds.training.snapshot import copy_to_host

        rank, cuda = dist.get_rank(), torch.cuda.is_available()
        contents = self._engine.snapshot(folder)
        rng = {"cpu": torch.get_rng_state(), **({"cuda": torch.cuda.get_rng_state()} if cuda else {})}
        writers: Writers = {f"rng_rank_{rank:05d}.pt": partial(torch.save, rng)}
        for kind in self._kinds:
            ema = kind == "ema" and self._engine.has_stepped  # before the first step the average is the weights
            weights = each_weight(self._engine.module, self._engine.optimizer, ema)
            copies = {name: copy_to_host(weight) for name, weight in weights if rank == 0}
            if rank == 0:
                writers[f"{kind}.safetensors"] = partial(_write_weights, copies)
        writers |= {name: partial(torch.save, content) for name, content in contents.items()}
        if cuda:
            torch.cuda.synchronize()
        return writers

    def _write(self, writers: Writers, temporary: Path, checkpoint: Checkpoint, pinned_step: int | None) -> None:
        """The thread: the same outcome on every rank, whichever failed."""
        try:
            reports = gather(_write_files(temporary, writers), self._group)
            outcome: list[Any] = [_complete(temporary, checkpoint, reports) if dist.get_rank() == 0 else None]
            dist.broadcast_object_list(outcome, group=self._group)
            self._outcome = outcome[0] or checkpoint
            if dist.get_rank() == 0 and self._outcome is checkpoint:
                self._drop_old(checkpoint.step, pinned_step)
                logger.info("checkpoint %s", checkpoint.path)
        except Exception as error:  # another rank is gone
            self._outcome = f"{checkpoint.path} was not completed: {error!r}"
        if isinstance(self._outcome, str):
            logger.error("%s", self._outcome)

    def _drop_old(self, saved_step: int, pinned_step: int | None) -> None:
        paths = {int(path.name[5:]): path for path in self._folder.glob("step_" + "[0-9]" * 8)}
        old = sorted(step for step in paths if step <= saved_step)[: -self._keep_last]
        kept = {step for step in old if step == pinned_step or (self._keep_every and step % self._keep_every == 0)}
        for step in sorted(set(old) - kept):
            try:
                shutil.rmtree(paths[step])
            except OSError as error:
                logger.warning("%s could not be removed (%s); the next save tries again", paths[step], error)
        if pinned_step is not None and (self._folder / f"step_{pinned_step:08d}").exists():
            atomic_write_bytes(self._folder / "best", f"step_{pinned_step:08d}".encode())


def newest_checkpoint(folder: Path) -> Checkpoint | None:
    """The newest checkpoint in `folder` whose files are whole, the same on every rank; every rank must call it.

    Newer ones, which are damaged, are renamed: the run will come to their steps again, and their weights may be whole.
    A `CheckpointError` says what is wrong with each if none is whole.
    """

    def find() -> Checkpoint | None:
        found = find_checkpoint(folder)
        if found is not None:
            for path in sorted(folder.glob("step_*")):
                if path.name > found.path.name:
                    logger.warning("%s was renamed to %s", path, _set_aside(path).name)
        return found

    return on_rank_zero(find)


def load_checkpoint(engine: Engine, checkpoint: Checkpoint) -> None:
    """Restore the engine (weights, moments, EMA, schedule) and this rank's RNG state; every rank must call it.

    The checkpoint may be of another number of ranks or another ZeRO stage. Its files must have been verified.
    A `CheckpointError` says that DeepSpeed cannot load or convert it, or that a file holds more than data.
    """
    from blip3o_ds.training.snapshot import read_file

    if (checkpoint.world_size, checkpoint.zero_stage) == (dist.get_world_size(), engine.zero_stage):
        engine.load(checkpoint.path)
    else:
        load_elastic(engine, checkpoint)
    writer = dist.get_rank() % checkpoint.world_size
    rng = read_file(checkpoint.path / f"rng_rank_{writer:05d}.pt")
    torch.set_rng_state(rng["cpu"])
    if "cuda" in rng and torch.cuda.is_available():
        torch.cuda.set_rng_state(rng["cuda"])


def _set_aside(path: Path) -> Path:
    """Rename a damaged checkpoint, after which nothing here touches it."""
    number = 1
    while (target := path.with_name(f"damaged_{path.name}" + (f"_{number}" if number > 1 else ""))).exists():
        number += 1
    return path.rename(target)


def _write_files(folder: Path, writers: Writers) -> dict[str, Any] | str:
    """What the seal will say of each file, or why they could not be written."""
    from blip3o_ds.training.snapshot import write_verified

    try:
        return {name: write_verified(folder / name, write) for name, write in writers.items()}
    except Exception as error:
        return f"rank {dist.get_rank()}: {error}"


def _complete(temporary: Path, checkpoint: Checkpoint, reports: list[dict[str, Any] | str]) -> str | None:
    """Seal and rename, or remove the folder and say what went wrong."""
    failures = [report for report in reports if isinstance(report, str)]
    try:
        if failures:
            raise OSError("; ".join(failures))
        files = {name: record for report in reports if isinstance(report, dict) for name, record in report.items()}
        for name, record in files.items():
            if (temporary / name).stat().st_size != record["bytes"]:  # as seen from here, on a shared file system
                raise OSError(f"{temporary / name} does not have the {record['bytes']} bytes that were written")
        seal_checkpoint(temporary, checkpoint, files)
        if checkpoint.path.exists():  # the same step again, after going back to an earlier one
            shutil.rmtree(checkpoint.path)
        os.rename(temporary, checkpoint.path)
        fsync_dir(checkpoint.path.parent)
        atomic_write_bytes(checkpoint.path.parent / "latest", checkpoint.path.name.encode())  # for DeepSpeed's tools
    except Exception as error:  # whatever it is, the other ranks wait to be told
        shutil.rmtree(temporary, ignore_errors=True)
        return f"{checkpoint.path} was not written: {error}"
    return None


def _write_weights(weights: dict[str, Tensor], file: Any) -> None:
    file.write(safetensors.torch.save(weights))
