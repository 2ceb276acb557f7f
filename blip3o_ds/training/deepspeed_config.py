"""DeepSpeed's JSON settings, completed from ours.

Some of DeepSpeed's defaults do not suit this project (bf16 accumulation, buckets of gigabytes) and are replaced here. A
JSON file that contradicts the run's own settings is refused.
"""

from __future__ import annotations

from typing import Any

from blip3o_ds.config import TrainConfig
from blip3o_ds.errors import ConfigError
from blip3o_ds.files import read_json
from blip3o_ds.planning.memory import MAX_BUCKET_ELEMENTS

# What a file may set as it likes.
FREE = ("stage", "reduce_bucket_size", "allgather_bucket_size", "initial_scale_power", "steps_per_print")


def resolve_deepspeed_config(
    train: TrainConfig, world_size: int, num_parameters: int, ranks_per_node: int = 1
) -> dict[str, Any]:
    """The complete DeepSpeed settings: the JSON file's (or ZeRO-2), `"auto"` and absent ones filled from `train`.

    Raises:
        ConfigError: the file is missing or malformed, or contradicts a setting of the run.
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
        bucket = min(num_parameters, MAX_BUCKET_ELEMENTS)
        _fill(zero, {"reduce_bucket_size": bucket, "allgather_bucket_size": bucket}, source)
        if zero.get("zero_hpz_partition_size") == "auto":
            zero["zero_hpz_partition_size"] = ranks_per_node
    settings["zero_allow_untested_optimizer"] = True
    # Our own optimizer everywhere, because it carries the EMA; torch's fused AdamW is vectorised on CPU too.
    settings["zero_force_ds_cpu_optimizer"] = False
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
        elif settings[key] != value and key not in FREE:
            raise ConfigError(
                f"{source}: {prefix}{key} is {settings[key]!r} there and {value!r} by the run's settings; "
                'write "auto" in the file and decide it in the run'
            )
