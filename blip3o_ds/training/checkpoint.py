"""Checkpoints that are whole or absent: DeepSpeed's files, full fp32 weights, loader and RNG state, and a seal.

Everything is written to a hidden folder; when every rank has finished, rank 0 records each file's size and SHA-256 in
`checkpoint.json` and renames the folder to `step_00000500`. A folder without a matching `checkpoint.json` is not one.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.distributed as dist
from torch import Tensor

from blip3o_ds.errors import CheckpointError
from blip3o_ds.evaluation.runs import SEAL, Checkpoint
from blip3o_ds.files import atomic_write_bytes, atomic_write_json, fsync_dir, sha256_file
from blip3o_ds.training.ema import gather_weights
from blip3o_ds.training.engine import Engine


def save_checkpoint(
    engine: Engine, folder: Path, step: int, state: dict[str, Any], *, with_ema: bool, keep_last: int
) -> Path:
    """Write `folder/step_XXXXXXXX` (every rank must call it) and drop all but the `keep_last` newest ones.

    `state` is plain JSON; it comes back as `Checkpoint.state`.

    Raises:
        OSError: for example no space left; the half-written folder is removed and earlier checkpoints are untouched.
    """
    rank = dist.get_rank()
    final = folder / f"step_{step:08d}"
    temporary = folder / f".step_{step:08d}.partial"
    if rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        _remove_partial(folder)
        temporary.mkdir()
    dist.barrier()
    try:
        engine.deepspeed.save_checkpoint(str(folder), tag=temporary.name, save_latest=False)
        torch.save(_rng_state(), temporary / f"rng_rank_{rank:05d}.pt")
        _save_full_weights(engine, temporary, with_ema)
        dist.barrier()  # every rank's files are there
        if rank == 0:
            _seal(temporary, step, engine.zero_stage, state)
            if final.exists():  # the same step again, after a resume from an earlier one
                shutil.rmtree(final)
            os.rename(temporary, final)
            fsync_dir(folder)
            atomic_write_bytes(folder / "latest", final.name.encode())  # for DeepSpeed's own tools
            _drop_old(folder, keep_last)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    dist.barrier()
    return final


def load_checkpoint(engine: Engine, checkpoint: Checkpoint) -> None:
    """Restore the engine (weights, moments, EMA, schedule) and this rank's RNG state.

    Raises:
        CheckpointError: it was written by another number of ranks or at another ZeRO stage.
    """
    world_size = dist.get_world_size()
    if (checkpoint.world_size, checkpoint.zero_stage) != (world_size, engine.zero_stage):
        raise CheckpointError(
            f"{checkpoint.path} was written by {checkpoint.world_size} ranks at ZeRO stage {checkpoint.zero_stage}; "
            f"this run has {world_size} ranks at stage {engine.zero_stage}. Resume on the same, or start a new run"
        )
    loaded, _ = engine.deepspeed.load_checkpoint(str(checkpoint.path.parent), tag=checkpoint.path.name)
    if loaded is None:
        raise CheckpointError(f"{checkpoint.path}: DeepSpeed could not load it")
    rng_file = checkpoint.path / f"rng_rank_{dist.get_rank():05d}.pt"
    _restore_rng_state(torch.load(rng_file, weights_only=True))


def _save_full_weights(engine: Engine, folder: Path, with_ema: bool) -> None:
    kinds = {"model.safetensors": False, **({"ema.safetensors": True} if with_ema else {})}
    for name, ema in kinds.items():
        weights = gather_weights(engine.module, engine.optimizer, ema)
        if dist.get_rank() == 0:
            safetensors.torch.save_file(weights, folder / name)


def _seal(folder: Path, step: int, zero_stage: int, state: dict[str, Any]) -> None:
    files = {}
    for path in _files(folder):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
        files[str(path.relative_to(folder))] = {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
    seal = {
        "step": step,
        "world_size": dist.get_world_size(),
        "zero_stage": zero_stage,
        "state": state,
        "files": files,
    }
    atomic_write_json(folder / SEAL, seal)


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.is_file())


def _drop_old(folder: Path, keep_last: int) -> None:
    for path in sorted(folder.glob("step_*"))[:-keep_last]:
        shutil.rmtree(path)


def _remove_partial(folder: Path) -> None:
    for path in folder.glob(".step_*.partial"):
        shutil.rmtree(path)


def _rng_state() -> dict[str, Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _restore_rng_state(state: dict[str, Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
