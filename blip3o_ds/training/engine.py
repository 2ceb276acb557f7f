"""The DeepSpeed engine of a run: its JSON settings completed from ours, AdamW, schedule, and honest step reports.

DeepSpeed leaves some things to chance (accumulation in bf16, silent skipping, bucket sizes of gigabytes); they are
set here, and a JSON file that contradicts the run's own settings is refused.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import math
import os
import socket
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from blip3o_ds.config import TrainConfig
from blip3o_ds.errors import ConfigError, TrainingError
from blip3o_ds.planning.memory import MAX_BUCKET_ELEMENTS
from blip3o_ds.training.ema import attach_ema
from blip3o_ds.training.launch import rendezvous


def init_distributed(timeout_seconds: float) -> tuple[int, int, torch.device]:
    """Join the process group that the launcher describes (see `launch.rendezvous`): `(rank, world, device)`.

    nccl where there is CUDA, gloo otherwise.

    Raises:
        TrainingError: not all ranks came within `timeout_seconds`.
    """
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.update(rendezvous(os.environ, torch.cuda.device_count()))
    import deepspeed

    # DeepSpeed calls collectives by names that newer PyTorch renames; nothing that a user of this project could mend.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\.c10d_logger")
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    backend, timeout = "nccl" if cuda else "gloo", datetime.timedelta(seconds=timeout_seconds)
    try:
        deepspeed.init_distributed(dist_backend=backend, timeout=timeout, verbose=False)
        if not cuda:
            _unlink_shared_memory()
    except torch.distributed.DistError as error:
        where = ", ".join(f"{name}={os.environ[name]}" for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"))
        raise TrainingError(
            f"the ranks did not find each other ({where}): {error}. Look at the other hosts' output for the one that "
            "failed first, and whether they reach MASTER_ADDR"
        ) from None
    return torch.distributed.get_rank(), torch.distributed.get_world_size(), device


def resolve_deepspeed_config(
    train: TrainConfig, world_size: int, num_parameters: int, ranks_per_node: int = 1
) -> dict[str, Any]:
    """The complete DeepSpeed settings: the JSON file's (or ZeRO-2), `"auto"` and absent ones filled from `train`.

    Raises:
        ConfigError: the file is missing or malformed, contradicts a setting of the run, or asks for what DeepSpeed
            cannot do.
    """
    settings = _read_json(train.deepspeed_config) if train.deepspeed_config else {"zero_optimization": {"stage": 2}}
    ours = {
        "train_micro_batch_size_per_gpu": train.micro_batch_size,
        "gradient_accumulation_steps": train.gradient_accumulation_steps,
        "train_batch_size": train.micro_batch_size * train.gradient_accumulation_steps * world_size,
        "gradient_clipping": train.max_grad_norm,
        "steps_per_print": 10**9,  # this project reports by itself
        "zero_optimization": {},
    }
    _fill(settings, ours, train.deepspeed_config or "DeepSpeed settings")
    for section in ("optimizer", "scheduler"):
        if section in settings:
            raise ConfigError(
                f"{train.deepspeed_config}: {section} is set here, but the run's train.* settings decide it; remove it"
            )
    stage = zero_stage(settings)
    if stage == 0 and train.precision == "fp16":
        raise ConfigError("train.precision = fp16 accumulates gradients in fp16 at ZeRO stage 0; use stage 1, 2 or 3")
    precision = _precision_settings(train.precision, stage)
    _fill(settings, precision, train.deepspeed_config or "DeepSpeed settings")
    if stage:
        # The defaults, 5e8 elements, would take gigabytes for a model of a few million parameters.
        bucket = min(num_parameters, MAX_BUCKET_ELEMENTS)
        zero = settings["zero_optimization"]
        for key in ("reduce_bucket_size", "allgather_bucket_size"):
            if zero.get(key, "auto") == "auto":
                zero[key] = bucket
        if zero.get("zero_hpz_partition_size") == "auto":
            zero["zero_hpz_partition_size"] = ranks_per_node
    settings["zero_allow_untested_optimizer"] = True
    # The optimizer is ours everywhere, so that the EMA rides on it; torch's fused AdamW is vectorised on CPU too.
    settings["zero_force_ds_cpu_optimizer"] = False
    return settings


def count_ranks_of_this_node() -> int:
    """How many ranks run on this host; a collective."""
    hosts: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(hosts, socket.gethostname())
    return hosts.count(socket.gethostname())


def set_collective_timeout(seconds: float) -> None:
    """End this process when it has waited so long for the others, in whichever of the process groups.

    Groups that DeepSpeed makes for itself have torch's default, half an hour, whatever the first group was given.
    """
    from torch.distributed import distributed_c10d

    for group in list(distributed_c10d._world.pg_map):
        distributed_c10d._set_pg_timeout(datetime.timedelta(seconds=seconds), group)


def zero_stage(settings: dict[str, Any]) -> int:
    """The ZeRO stage that DeepSpeed settings ask for."""
    return settings.get("zero_optimization", {}).get("stage", 0)


@dataclass(frozen=True)
class StepReport:
    """What an optimizer step did: whether it was applied, and the gradient's norm before clipping.

    `lowered_loss_scale`: it was skipped because fp16 overflowed, and the loss scale had room to fall.
    """

    applied: bool
    grad_norm: float
    lowered_loss_scale: bool = False


class Engine:
    """DeepSpeed's engine behind the four calls that training needs: forward, backward, step, and its learning rate.

    `forward` runs the module in the run's precision; `step` returns a `StepReport` after the last micro-batch of a
    step and None before it.
    """

    def __init__(self, model: nn.Module, train: TrainConfig, total_steps: int, device: torch.device) -> None:
        import deepspeed
        from deepspeed.utils.logging import logger as deepspeed_logger

        deepspeed_logger.setLevel("WARNING")
        world_size = torch.distributed.get_world_size()
        num_parameters = sum(p.numel() for p in model.parameters())
        self.settings = resolve_deepspeed_config(train, world_size, num_parameters, count_ranks_of_this_node())
        if device.type != "cuda" and self.settings.get("zero_optimization", {}).get("zero_quantized_weights"):
            raise ConfigError(
                f"{train.deepspeed_config}: zero_quantized_weights needs CUDA, and this run is on the CPU"
            )
        self.zero_stage = zero_stage(self.settings)
        self._autocast = self.zero_stage == 0 and train.precision == "bf16"
        self._max_grad_norm = train.max_grad_norm
        self.device = device
        optimizer = _build_optimizer(model, train, fused=device.type == "cuda")
        if train.ema_decay:
            attach_ema(optimizer, train.ema_decay)
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        self.stepped_names = [names[id(p)] for group in optimizer.param_groups for p in group["params"]]  # its order
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: learning_rate_factor(step, train, total_steps)
        )
        self.deepspeed, _, _, _ = deepspeed.initialize(
            model=model,
            optimizer=optimizer,
            lr_scheduler=schedule,
            config=self.settings,
            dist_init_required=False,
        )
        self.module: nn.Module = self.deepspeed.module
        set_collective_timeout(train.timeout_seconds)

    @property
    def dtype(self) -> torch.dtype:
        return next(self.module.parameters()).dtype

    @property
    def has_stepped(self) -> bool:
        """Whether any step was applied; before the first there is no moving average."""
        return self.deepspeed.global_steps > self.deepspeed.skipped_steps

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        return self.deepspeed.optimizer

    @property
    def learning_rate(self) -> float:
        return self.deepspeed.lr_scheduler.get_last_lr()[0]

    def __call__(self, *inputs: Tensor, **named: Tensor) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16) if self._autocast else contextlib.nullcontext():
            return self.deepspeed(*inputs, **named)

    def backward(self, loss: Tensor) -> None:
        self.deepspeed.backward(loss)

    def step(self) -> StepReport | None:
        boundary = self.deepspeed.is_gradient_accumulation_boundary()
        if not boundary:
            self.deepspeed.step()
            return None
        if self.zero_stage == 0:
            return self._step_without_zero()
        loss_scale = getattr(self.optimizer, "loss_scale", 1)
        self.deepspeed.step()
        if self.deepspeed.was_step_applied():
            return StepReport(True, float(self.deepspeed.get_global_grad_norm()))
        return StepReport(False, math.nan, lowered_loss_scale=loss_scale > 1)

    def _step_without_zero(self) -> StepReport:
        # Without ZeRO DeepSpeed neither reports the norm nor notices that it is not finite.
        gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
        grad_norm = float(torch.nn.utils.get_total_norm(gradients))
        if not math.isfinite(grad_norm):
            self.deepspeed.zero_grad()
            self.deepspeed.skipped_steps += 1
            # What step() does besides stepping: the next micro-batch opens a new accumulation.
            self.deepspeed.micro_steps += 1
            self.deepspeed.global_steps += 1
            return StepReport(False, grad_norm)
        self.deepspeed.step()
        return StepReport(True, grad_norm)


def learning_rate_factor(step: int, train: TrainConfig, total_steps: int) -> float:
    """Share of `learning_rate` at a step: linear warm-up to 1, then a cosine to `min_lr_ratio` at `total_steps`."""
    warmup = min(train.warmup_steps, max(total_steps - 1, 0))
    if step < warmup:
        return (step + 1) / (warmup + 1)
    progress = min((step - warmup) / max(total_steps - warmup, 1), 1.0)
    return train.min_lr_ratio + (1 - train.min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * progress))


def _build_optimizer(model: nn.Module, train: TrainConfig, fused: bool) -> torch.optim.AdamW:
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": train.weight_decay},
        {"params": vectors, "weight_decay": 0.0},  # norms, biases
    ]
    betas = (train.adam_beta1, train.adam_beta2)
    return torch.optim.AdamW(groups, lr=train.learning_rate, betas=betas, eps=train.adam_eps, fused=fused or None)


def _precision_settings(precision: str, stage: int) -> dict[str, Any]:
    fp32_accumulation = {"data_types": {"grad_accum_dtype": "fp32"}}
    if stage == 0 or precision == "fp32":
        # Stage 0 has no bf16 with fp32 accumulation: parameters stay fp32 and the forward runs under autocast.
        return {"bf16": {"enabled": False}, "fp16": {"enabled": False}, **fp32_accumulation}
    if precision == "bf16":
        return {"bf16": {"enabled": True}, "fp16": {"enabled": False}, **fp32_accumulation}
    return {
        "bf16": {"enabled": False},
        "fp16": {"enabled": True, "initial_scale_power": 16},
        **fp32_accumulation,
    }


def _unlink_shared_memory() -> None:
    """Take the name off this rank's memory for DeepSpeed's all-reduce on CPU, so that it goes with the processes.

    DeepSpeed never does; each rank of each run, however it ended, would leave 66 MiB of memory taken.
    """
    where = "_".join(os.environ[name] for name in ("MASTER_ADDR", "MASTER_PORT", "RANK"))
    try:
        torch.distributed.barrier()  # until all ranks have mapped it
    finally:
        Path(f"/dev/shm/deepspeed_allreduce_buffer_{os.getuid()}_{where}").unlink(missing_ok=True)


def _read_json(path: str) -> dict[str, Any]:
    try:
        settings = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(
            f"train.deepspeed_config = {path}: no such file; the shipped ones are in ds_configs/"
        ) from None
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}: not a JSON file: {error}") from None
    if not isinstance(settings, dict):
        raise ConfigError(f"{path}: expected DeepSpeed settings as a JSON object, found {type(settings).__name__}")
    return settings


def _fill(settings: dict[str, Any], ours: dict[str, Any], source: str, prefix: str = "") -> None:
    for key, value in ours.items():
        if isinstance(value, dict):
            section = settings.setdefault(key, {})
            if not isinstance(section, dict):
                raise ConfigError(f"{source}: {prefix}{key} is {section!r}; expected a JSON object {{...}}")
            _fill(section, value, source, f"{prefix}{key}.")
        elif settings.get(key, "auto") == "auto":
            settings[key] = value
        elif settings[key] != value and key not in ("initial_scale_power", "steps_per_print"):
            raise ConfigError(
                f"{source}: {prefix}{key} is {settings[key]!r} there and {value!r} by the run's settings; "
                'write "auto" in the file and decide it in the run'
            )
