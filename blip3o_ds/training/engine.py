"""The DeepSpeed engine of a run: forward, backward, an honest report of each update, and its state on disk.

Only this file touches DeepSpeed's engine object; what others need of it is a method here.
"""

from __future__ import annotations

import copy
import datetime
import math
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.distributed import distributed_c10d

from blip3o_ds.config import TrainConfig
from blip3o_ds.errors import CheckpointError, ConfigError
from blip3o_ds.files import read_json
from blip3o_ds.planning.memory import MAX_BUCKET_ELEMENTS
from blip3o_ds.settings import nearest
from blip3o_ds.training.ema import attach_ema
from blip3o_ds.training.optim import build_optimizer, learning_rate_factor
from blip3o_ds.training.peers import gather

# What a DeepSpeed file may set as it likes; whatever else contradicts the run's own settings is refused.
FREE = ("stage", "reduce_bucket_size", "allgather_bucket_size", "initial_scale_power", "steps_per_print")


@dataclass(frozen=True)
class StepReport:
    """What an optimizer step did: whether it was applied, and the gradient's norm before clipping.

    `lowered_loss_scale`: it was skipped because fp16 overflowed, and the loss scale had room to fall.
    """

    applied: bool
    grad_norm: float
    learning_rate: float
    lowered_loss_scale: bool = False


class Engine:
    """DeepSpeed's engine behind the three calls of a step: forward and `backward` for each micro-batch, `finish_step`.

    The forward pass runs the module in the run's precision.
    """

    def __init__(self, model: nn.Module, train: TrainConfig, total_steps: int, device: torch.device) -> None:
        import deepspeed
        from deepspeed.utils.logging import logger as deepspeed_logger

        from blip3o_ds.training.snapshot import SnapshotEngine  # imports deepspeed

        deepspeed_logger.setLevel("WARNING")
        self.device = device
        self.num_parameters = sum(p.numel() for p in model.parameters())
        hosts = gather(socket.gethostname())
        ranks_per_node = hosts.count(socket.gethostname())
        settings = resolve_deepspeed_config(train, len(hosts), self.num_parameters, ranks_per_node)
        check_deepspeed_config(settings, train.deepspeed_config or "DeepSpeed settings")
        zero = settings["zero_optimization"]
        if device.type != "cuda" and zero.get("zero_quantized_weights"):
            raise ConfigError(f"{train.deepspeed_config}: zero_quantized_weights needs CUDA; this run is on the CPU")
        self.zero_stage = zero["stage"]
        self._autocast = self.zero_stage == 0 and train.precision == "bf16"
        self.base_optimizer = optimizer = build_optimizer(model, train, fused=device.type == "cuda")
        if train.ema_decay:
            attach_ema(optimizer, train.ema_decay)
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        self.stepped_names = [names[id(p)] for group in optimizer.param_groups for p in group["params"]]  # its order
        self._schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: learning_rate_factor(step, train, total_steps)
        )
        self._deepspeed, self.optimizer, _, _ = deepspeed.initialize(  # ZeRO's optimizer, or torch's own at stage 0
            model=model, optimizer=optimizer, lr_scheduler=self._schedule, config=settings, dist_init_required=False
        )
        self._snapshots = self._deepspeed.checkpoint_engine = SnapshotEngine()
        self.module: nn.Module = self._deepspeed.module
        # DeepSpeed's own groups have torch's default, half an hour, whatever the first group was given.
        for group in list(distributed_c10d._world.pg_map):
            distributed_c10d._set_pg_timeout(datetime.timedelta(seconds=train.timeout_seconds), group)

    @property
    def dtype(self) -> torch.dtype:
        return next(self.module.parameters()).dtype

    @property
    def learning_rate(self) -> float:
        return float(self._schedule.get_last_lr()[0])

    @property
    def global_steps(self) -> int:
        """Steps so far, skipped ones included."""
        return self._deepspeed.global_steps

    @property
    def skipped_steps(self) -> int:
        return self._deepspeed.skipped_steps

    @property
    def has_stepped(self) -> bool:
        """Whether any step was applied; before the first there is no moving average."""
        return self.global_steps > self.skipped_steps

    def __call__(self, *inputs: Tensor, **named: Tensor) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self._autocast):
            return self._deepspeed(*inputs, **named)

    def backward(self, loss: Tensor) -> None:
        """Add a micro-batch's gradient; the last one of a step leaves the update to `finish_step`."""
        self._deepspeed.backward(loss)
        if not self._deepspeed.is_gradient_accumulation_boundary():
            self._deepspeed.step()  # only counts the micro-batch

    def finish_step(self) -> StepReport:
        """Update the weights, after the last micro-batch of a step."""
        learning_rate = self.learning_rate
        if self.zero_stage == 0:
            return StepReport(*self._update_without_zero(), learning_rate)
        loss_scale = getattr(self.optimizer, "loss_scale", 1)
        self._deepspeed.step()
        if self._deepspeed.was_step_applied():
            return StepReport(True, float(self._deepspeed.get_global_grad_norm()), learning_rate)
        return StepReport(False, math.nan, learning_rate, lowered_loss_scale=loss_scale > 1)

    def _update_without_zero(self) -> tuple[bool, float]:
        # Without ZeRO DeepSpeed neither reports the norm nor notices that it is not finite.
        gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
        grad_norm = float(torch.nn.utils.get_total_norm(gradients))
        if math.isfinite(grad_norm):
            self._deepspeed.step()
            return True, grad_norm
        self._deepspeed.zero_grad()
        self._deepspeed.skipped_steps += 1
        # What step() does besides the update: the next micro-batch opens a new accumulation.
        self._deepspeed.micro_steps += 1
        self._deepspeed.global_steps += 1
        return False, grad_norm

    def snapshot(self, folder: Path) -> dict[str, Any]:
        """Copies (see `copy_to_host`) of what DeepSpeed stores in a checkpoint `folder`, by file name; a collective."""
        self._deepspeed.save_checkpoint(str(folder.parent), tag=folder.name, save_latest=False)
        return self._snapshots.take()

    def load(self, folder: Path) -> None:
        """Restore what a `snapshot` of as many ranks and the same ZeRO stage wrote to `folder`; a collective."""
        loaded, _ = self._deepspeed.load_checkpoint(str(folder.parent), tag=folder.name)
        if loaded is None:
            raise CheckpointError(f"{folder}: DeepSpeed could not load it")

    def read(self, file: Path) -> Any:
        """The content of one of a checkpoint's files; no code in it is run."""
        return self._snapshots.load(str(file), map_location="cpu")

    def restore_counters(self, counters: dict[str, Any]) -> None:
        """Take over the schedule and the step counts that DeepSpeed stored beside the weights."""
        self._schedule.load_state_dict(counters["lr_scheduler"])
        for group, rate in zip(self.base_optimizer.param_groups, self._schedule.get_last_lr(), strict=True):
            group["lr"] = rate
        for name in ("global_steps", "global_samples", "skipped_steps"):
            setattr(self._deepspeed, name, counters[name])


def resolve_deepspeed_config(
    train: TrainConfig, world_size: int, num_parameters: int, ranks_per_node: int = 1
) -> dict[str, Any]:
    """The complete DeepSpeed settings: the JSON file's (or ZeRO-2), `"auto"` and absent ones filled from `train`.

    A `ConfigError` says where the file is malformed or contradicts a setting of the run.
    """
    settings: dict[str, Any] = {"zero_optimization": {"stage": 2}}
    source = train.deepspeed_config or "DeepSpeed settings"
    if train.deepspeed_config:
        settings = read_json(source, ConfigError, "give train.deepspeed_config a file such as those in ds_configs/")
    for section in ("optimizer", "scheduler"):
        if section in settings:
            raise ConfigError(f"{source}: {section} is set here, but the run's train.* settings decide it; remove it")
    _fill(settings, {"zero_optimization": {"stage": 0}}, source)
    zero = settings["zero_optimization"]
    stage = zero["stage"]
    if stage == 0 and train.precision == "fp16":
        raise ConfigError("train.precision = fp16 accumulates gradients in fp16 at ZeRO stage 0; use stage 1, 2 or 3")
    fp16 = train.precision == "fp16"
    ours = {
        "train_micro_batch_size_per_gpu": train.micro_batch_size,
        "gradient_accumulation_steps": train.gradient_accumulation_steps,
        "train_batch_size": train.global_batch(world_size),
        "gradient_clipping": train.max_grad_norm,
        "steps_per_print": 10**9,  # this project logs by itself
        # Stage 0 has no bf16 with fp32 accumulation: parameters stay fp32 and the forward runs under autocast.
        "bf16": {"enabled": train.precision == "bf16" and stage > 0},
        "fp16": {"enabled": fp16, **({"initial_scale_power": 16} if fp16 else {})},
        "data_types": {"grad_accum_dtype": "fp32"},
    }
    _fill(settings, ours, source)
    if stage:
        # The defaults, 5e8 elements, would take gigabytes for a model of a few million parameters.
        bucket = min(num_parameters + num_parameters % 2, MAX_BUCKET_ELEMENTS)  # DeepSpeed refuses odd sizes
        _fill(zero, {"reduce_bucket_size": bucket, "allgather_bucket_size": bucket}, source)
        if zero.get("zero_hpz_partition_size") == "auto":
            zero["zero_hpz_partition_size"] = ranks_per_node
    settings["zero_allow_untested_optimizer"] = True
    # Our own optimizer everywhere, because it carries the EMA; torch's fused AdamW is vectorised on CPU too.
    settings["zero_force_ds_cpu_optimizer"] = False
    return settings


def check_deepspeed_config(settings: dict[str, Any], source: str) -> None:
    """Raise a `ConfigError` for a key of the file `source` that DeepSpeed does not know, or a value it does not take.

    DeepSpeed refuses an unknown key within a section, and passes over an unknown section.
    """
    from deepspeed.runtime.config import DeepSpeedConfig
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    asked = _Asked(copy.deepcopy(settings))
    try:
        DeepSpeedConfig(asked)
    except ValidationError as error:
        found = error.errors()[0]
        key = str(found["loc"][-1])
        section = next((name for name, value in settings.items() if isinstance(value, dict) and key in value), "")
        names = [found.alias or name for name, found in DeepSpeedZeroConfig.model_fields.items()]
        likely = nearest(key, names) if found["type"] == "extra_forbidden" and section == "zero_optimization" else ""
        problem = f"is not a key of DeepSpeed's{likely}" if found["type"] == "extra_forbidden" else found["msg"].lower()
        raise ConfigError(f"{source}: {section}.{key} = {found['input']!r}: {problem}") from None
    except TypeError as error:  # a section that is no section
        raise ConfigError(f"{source}: DeepSpeed does not take it: {error}") from None
    for key in sorted(settings.keys() - asked.names):
        raise ConfigError(f"{source}: {key} is not a key of DeepSpeed's{nearest(key, sorted(asked.names))}")


class _Asked(dict[str, Any]):
    """Settings that note by which names DeepSpeed asks for them, for it has no list of those that it knows."""

    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__(settings)
        self.names: set[str] = set()

    def get(self, name: str, default: Any = None) -> Any:
        self.names.add(name)
        return super().get(name, default)

    def __getitem__(self, name: str) -> Any:
        self.names.add(name)
        return super().__getitem__(name)

    def __contains__(self, name: object) -> bool:
        self.names.add(str(name))
        return super().__contains__(name)

    def keys(self) -> Any:
        return self  # it is asked whether a name is in them


def _fill(settings: dict[str, Any], ours: dict[str, Any], source: str, prefix: str = "") -> None:
    for key, value in ours.items():
        if isinstance(value, dict):
            section = settings.setdefault(key, {})
            if not isinstance(section, dict):
                raise ConfigError(f"{source}: {prefix}{key} is {section!r}; expected a JSON object {{...}}")
            _fill(section, value, source, f"{prefix}{key}.")
        elif settings.get(key, "auto") == "auto":
            settings[key] = value
        elif settings[key] != value and key not in FREE:
            raise ConfigError(
                f"{source}: {prefix}{key} is {settings[key]!r} there and {value!r} by the run's settings; "
                'write "auto" in the file and decide it in the run'
            )
