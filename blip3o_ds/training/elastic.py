"""Loading a checkpoint on another number of ranks, or at another ZeRO stage, than the one that wrote it.

DeepSpeed's universal checkpoint undoes its sharding of Adam's moments, but drops every other optimizer state and loads
only into the stage it came from. So states are set here, parameter by parameter, through DeepSpeed's safe_set
functions, with weights and moving average from the checkpoint's safetensors.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor

from blip3o_ds.errors import CheckpointError
from blip3o_ds.runs.checkpoint import Checkpoint
from blip3o_ds.training.ema import STATE_KEY, link_states
from blip3o_ds.training.engine import Engine
from blip3o_ds.training.peers import on_rank_zero

logger = logging.getLogger(__name__)

Moment = Callable[[str, str], Tensor]  # (parameter's name, exp_avg or exp_avg_sq) -> values in any shape


def load_elastic(engine: Engine, checkpoint: Checkpoint) -> None:
    """Restore weights, Adam's moments, moving average, schedule and counters; every rank must call it.

    Rank 0 converts into a folder beside the checkpoint, which is removed again. A `CheckpointError` says that DeepSpeed
    could not convert it.
    """
    logger.info(
        "%s was written by %d ranks at ZeRO stage %d; converting it for %d at stage %d",
        *(checkpoint.path, checkpoint.world_size, checkpoint.zero_stage, dist.get_world_size(), engine.zero_stage),
    )
    folder = checkpoint.path
    # What DeepSpeed keeps beside the weights: schedule, step counts and, at stage 0, torch's optimizer state.
    counters = engine.read(sorted(folder.glob("*mp_rank_00_model_states.pt"))[0])
    work = folder.parent / ".universal"
    try:
        target = work / folder.name
        moment = _torch_moments(engine, counters) if checkpoint.zero_stage == 0 else _universal(folder, target)
        _set_states(engine, folder, moment, counters["global_steps"] - counters["skipped_steps"])
    finally:
        dist.barrier()
        if dist.get_rank() == 0:
            shutil.rmtree(work, ignore_errors=True)
    engine.restore_counters(counters)
    shards = sorted(folder.glob("*zero_pp_rank_0_mp_rank_00_optim_states.pt"))
    if shards and hasattr(engine.optimizer, "loss_scaler"):
        state = engine.read(shards[0])["optimizer_state_dict"]
        engine.optimizer.loss_scaler = state.get("loss_scaler", engine.optimizer.loss_scaler)


def _universal(folder: Path, target: Path) -> Moment:
    """Convert into the folder `target` on rank 0, and read the result on every rank."""
    on_rank_zero(lambda: _convert(folder, target))

    def moment(name: str, key: str) -> Tensor:
        content = torch.load(target / "zero" / name / f"{key}.pt", weights_only=True)
        return content["param"] if isinstance(content, dict) else content

    return moment


def _convert(folder: Path, target: Path) -> None:
    """DeepSpeed's own converter; it unpickles freely, so every file is first read in a way that runs no code."""
    from blip3o_ds.training.snapshot import read_file  # imports deepspeed

    for file in sorted(folder.glob("**/*.pt")):
        read_file(file, "meta")
    settings = argparse.Namespace(
        input_folder=str(folder),
        output_folder=str(target),
        num_extract_workers=1,  # more are processes, forked from one that holds a process group
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,
    )
    try:
        from deepspeed.checkpoint import ds_to_universal

        shutil.rmtree(target, ignore_errors=True)
        target.mkdir(parents=True)
        silent = contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO())
        with silent[0], silent[1], _small_groups():
            ds_to_universal.main(settings)
    except Exception as error:  # DeepSpeed raises anything
        logger.exception("conversion of %s failed", folder)
        raise CheckpointError(
            f"{folder}: DeepSpeed could not convert it to a universal checkpoint: {error!r}"
        ) from None


@contextlib.contextmanager
def _small_groups() -> Iterator[None]:
    """Let DeepSpeed convert groups of few numbers.

    It takes all of a group's padding off the last rank's part, and fails where the padding is longer than that: with
    one number on two ranks, or nine on sixteen. Such a part is padding alone.
    """
    from deepspeed.checkpoint.constants import GROUP_PADDINGS
    from deepspeed.checkpoint.zero_checkpoint import ZeROCheckpoint

    strip = ZeROCheckpoint._strip_tensor_paddings

    def strip_at_most_all(self: Any, sd: Any) -> None:
        states, paddings = self._get_param_group_states(sd), self._get_optimizer_state(sd, GROUP_PADDINGS)
        for group, state in (states or {}).items() if paddings else ():
            sizes = [value.numel() for name, value in state.items() if name != "step" and torch.is_tensor(value)]
            paddings[group] = min([paddings[group], *sizes])
        strip(self, sd)

    ZeROCheckpoint._strip_tensor_paddings = strip_at_most_all
    try:
        yield
    finally:
        ZeROCheckpoint._strip_tensor_paddings = strip


def _torch_moments(engine: Engine, counters: dict[str, Any]) -> Moment:
    """Read a checkpoint without ZeRO, in which torch numbers the states in the order of the optimizer's groups."""
    numbers = {name: i for i, name in enumerate(engine.stepped_names)}
    state = counters["optimizer"]["state"]
    return lambda name, key: state[numbers[name]][key]


def _set_states(engine: Engine, folder: Path, moment: Moment, applied_steps: int) -> None:
    ema_file = folder / "ema.safetensors"
    with contextlib.ExitStack() as stack:
        weights = stack.enter_context(safe_open(folder / "model.safetensors", "pt"))
        averages: Any = stack.enter_context(safe_open(ema_file, "pt")) if ema_file.exists() else None
        keys = ["exp_avg", "exp_avg_sq", *([STATE_KEY] if averages else [])]
        if applied_steps:
            _create_states(engine, keys, applied_steps)
        if hasattr(engine.optimizer, "checkpoint_event_prologue"):
            engine.optimizer.checkpoint_event_prologue()  # ZeRO-3: let go of gathered parameters
        for name, parameter in engine.module.named_parameters():
            _set(engine, parameter, None, weights.get_tensor(name))
            for key in keys if applied_steps else []:
                value = averages.get_tensor(name) if key == STATE_KEY else moment(name, key)
                _set(engine, parameter, key, value)
        for name, buffer in engine.module.named_buffers():
            if name in weights.keys():  # noqa: SIM118 (not a dict)
                buffer.copy_(weights.get_tensor(name))
    _cast_from_masters(engine.optimizer)


def _create_states(engine: Engine, keys: list[str], applied_steps: int) -> None:
    """Make room for the states, as the first step would, on the fp32 tensors that this rank steps."""
    base = engine.base_optimizer
    flat = getattr(engine.optimizer, "fp32_partitioned_groups_flat", None)  # ZeRO-3 takes them out of the groups
    stepped = flat or [tensor for group in base.param_groups for tensor in group["params"]]
    for tensor in stepped:
        device = tensor.device if base.param_groups[0].get("fused") else "cpu"
        base.state[tensor] = {
            "step": torch.tensor(float(applied_steps), device=device),
            **{key: torch.zeros_like(tensor, requires_grad=False) for key in keys},
        }
    link_states(engine.optimizer)


def _set(engine: Engine, parameter: Any, key: str | None, value: Tensor) -> None:
    """Give this rank's part of a whole fp32 tensor to the master weight (key None) or to one of its states."""
    import deepspeed.utils as of

    value = value.flatten().to(device=parameter.device, dtype=torch.float32)
    state = [key] if key else []
    if hasattr(parameter, "ds_id"):  # ZeRO-3; its setter of whole tensors fails where ranks do not divide them
        share = parameter.ds_tensor.numel()
        padded = torch.nn.functional.pad(value, (0, share * dist.get_world_size() - value.numel()))
        part = padded.narrow(0, share * dist.get_rank(), share)
        (of.safe_set_local_optimizer_state if key else of.safe_set_local_fp32_param)(parameter, part, *state)
    elif hasattr(parameter, "_hp_mapping"):  # ZeRO-1 and 2
        (of.safe_set_full_optimizer_state if key else of.safe_set_full_fp32_param)(parameter, value, *state)
    else:
        target = engine.optimizer.state[parameter][key] if key else parameter.data
        target.copy_(value.view_as(target))


def _cast_from_masters(optimizer: Any) -> None:
    """Bring the parameters that the forward pass uses in line with the fp32 master weights."""
    if hasattr(optimizer, "update_lp_params"):  # ZeRO-1 and 2
        optimizer.update_lp_params()
    elif hasattr(optimizer, "fp32_partitioned_groups_flat"):  # ZeRO-3
        for i in range(len(optimizer.fp32_partitioned_groups_flat)):
            optimizer._reassign_or_swap_out_partitioned_parameters(i)
        if optimizer.persistent_parameters:
            optimizer.persistent_parameters[0].partition(optimizer.persistent_parameters)
        optimizer.checkpoint_event_epilogue()
