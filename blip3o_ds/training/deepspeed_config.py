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


def resolve_deepspeed_config(
    train: TrainConfig, world_size: int, num_parameters: int, ranks_per_node: int = 1
) -> dict[str, Any]:
    """The complete DeepSpeed settings: the JSON file's (or ZeRO-2), `"auto"` and absent ones filled from `train`.

    Raises:
        ConfigError: the file is missing or malformed, contradicts a setting of the run, or asks for what DeepSpeed
            cannot do.
    """
    settings: dict[str, Any] = {"zero_optimization": {"stage": 2}}
    if train.deepspeed_config:
        remedy = "train.deepspeed_config names a file of DeepSpeed settings; the shipped ones are in ds_configs/"
        settings = read_json(train.deepspeed_config, ConfigError, remedy)
    source = train.deepspeed_config or "DeepSpeed settings"
    ours = {
        "train_micro_batch_size_per_gpu": train.micro_batch_size,
        "gradient_accumulation_steps": train.gradient_accumulation_steps,
        "train_batch_size": train.global_batch(world_size),
        "gradient_clipping": train.max_grad_norm,
        "steps_per_print": 10**9,  # this project logs by itself
        "zero_optimization": {},
    }
    _fill(settings, ours, source)
    for section in ("optimizer", "scheduler"):
        if section in settings:
            raise ConfigError(f"{source}: {section} is set here, but the run's train.* settings decide it; remove it")
    stage = zero_stage(settings)
    if stage == 0 and train.precision == "fp16":
        raise ConfigError("train.precision = fp16 accumulates gradients in fp16 at ZeRO stage 0; use stage 1, 2 or 3")
    _fill(settings, _precision_settings(train.precision, stage), source)
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
    # Our own optimizer everywhere, because it carries the EMA; torch's fused AdamW is vectorised on CPU too.
    settings["zero_force_ds_cpu_optimizer"] = False
    return settings


def zero_stage(settings: dict[str, Any]) -> int:
    """The ZeRO stage that DeepSpeed settings ask for."""
    return settings.get("zero_optimization", {}).get("stage", 0)


def _precision_settings(precision: str, stage: int) -> dict[str, Any]:
    # Stage 0 has no bf16 with fp32 accumulation: parameters stay fp32 and the forward runs under autocast.
    bf16, fp16 = precision == "bf16" and stage > 0, precision == "fp16"
    return {
        "bf16": {"enabled": bf16},
        "fp16": {"enabled": fp16, **({"initial_scale_power": 16} if fp16 else {})},
        "data_types": {"grad_accum_dtype": "fp32"},
    }


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
