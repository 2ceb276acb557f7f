"""Every setting of a run, in one typed schema; YAML files, presets, dotted overrides and flags all land here.

An unknown key, a wrong type or an impossible combination is a `ConfigError` that names the field, what was found, and
the nearest valid name. This module imports nothing heavy: the resolved `RunConfig` is passed on as values.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from blip3o_ds.errors import ConfigError

PRESETS_DIR = Path(__file__).parent / "presets"

EITHER = {"train.num_epochs": "max_steps", "train.max_steps": "num_epochs"}

TokenLayout = Literal["patch_only", "cls_patch"]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)


class ModelConfig(_Section):
    """Shape of the DiT; the defaults are the `base` preset on EVA-CLIP-8B and CLIP ViT-L/14."""

    eva_dim: int = Field(4096, ge=1)  # width of the condition's patch embeddings
    clip_dim: int = Field(1024, ge=1)  # width of the generated patch embeddings
    grid_size: int = Field(16, ge=1)  # patches along one side of the image
    token_layout: TokenLayout = "patch_only"  # cls_patch: token 0 is CLS
    hidden_size: int = Field(768, ge=2)
    num_layers: int = Field(12, ge=1)
    num_heads: int = Field(12, ge=1)
    num_kv_heads: int = Field(4, ge=1)
    ffn_dim: int = Field(3072, ge=1)
    rope_theta: float = Field(10000.0, gt=0)
    cross_attention_rope: bool = True
    norm_eps: float = Field(1e-6, gt=0)
    timestep_embed_dim: int = Field(256, ge=2)
    linear_skip: Literal["none", "zero", "ridge"] = "none"  # per-token linear map from EVA added to the output

    @property
    def num_tokens(self) -> int:
        """N: the patches of the grid, and CLS where the layout has one."""
        return self.grid_size**2 + (self.token_layout == "cls_patch")

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @model_validator(mode="after")
    def _heads_divide(self) -> ModelConfig:
        if self.hidden_size % self.num_heads:
            nearest = _nearest_divisor(self.hidden_size, self.num_heads)
            raise ValueError(
                f"model.num_heads = {self.num_heads} does not divide model.hidden_size = {self.hidden_size}; "
                f"the nearest number that does is {nearest}"
            )
        if self.num_heads % self.num_kv_heads:
            nearest = _nearest_divisor(self.num_heads, self.num_kv_heads)
            raise ValueError(
                f"model.num_kv_heads = {self.num_kv_heads} does not divide model.num_heads = {self.num_heads}; "
                f"the nearest number that does is {nearest}"
            )
        if self.head_dim % 2:
            raise ValueError(
                f"model.hidden_size / model.num_heads = {self.head_dim} is odd, and rotary positions turn pairs; "
                "choose them so that the head dimension is even"
            )
        if self.timestep_embed_dim % 2:
            raise ValueError(f"model.timestep_embed_dim = {self.timestep_embed_dim} must be even (sines and cosines)")
        return self


class FlowConfig(_Section):
    """Rectified flow: `x_t = (1-t) noise + t clip`."""

    prediction: Literal["sample", "velocity"] = "sample"  # what the network outputs; the loss is on the velocity
    timestep_law: Literal["uniform", "logit_normal"] = "uniform"
    logit_mean: float = 0.0
    logit_std: float = Field(1.0, gt=0)
    timestep_shift: float = Field(1.0, gt=0)  # > 1 spends more of training and sampling near the noise
    cond_dropout: float = Field(0.1, ge=0, lt=1)  # share of samples trained without condition, for guidance
    min_time_to_data: float = Field(0.05, gt=0, lt=1)  # floor of 1-t in the velocity of `prediction: sample`


class SamplerConfig(_Section):
    """How embeddings are generated."""

    steps: int = Field(25, ge=1)
    solver: Literal["euler", "midpoint", "heun"] = "euler"
    guidance_scale: float = Field(1.0, ge=0)  # 1: none
    seed: int = Field(0, ge=0)


class DataConfig(_Section):
    """What is read and in which order."""

    train_dir: str | None = None  # a dataset's folder or URL; --chunked_embeddings_dir
    eval_dirs: tuple[str, ...] = ()  # held-out datasets' folders or URLs, each named by its last path component
    normalization: Literal["minimal", "full", "standardize"] = "minimal"
    max_shards: int | None = Field(None, ge=1)
    window_shards: int = Field(16, ge=1)  # samples are shuffled within a window of this many shuffled shards
    prefetch_steps: int = Field(2, ge=1)
    cache_dir: str | None = None  # shards of a URL, on a disk of the node; by default in the temporary folder
    cache_gb: float = Field(100.0, gt=0)  # bound of cache_dir, GiB; two windows of shards should fit
    on_bad_sample: Literal["error", "skip"] = "error"  # skip: another of its shard takes its place, and is reported
    on_bad_shard: Literal["error", "skip"] = "error"  # skip: another shard's samples take the place of its own


class TrainConfig(_Section):
    """Optimisation, its precision, and what is written when."""

    output_dir: str | None = None
    num_epochs: int | None = Field(None, ge=1)  # 10 where neither this nor max_steps is given
    max_steps: int | None = Field(None, ge=1)
    micro_batch_size: int = Field(8, ge=1)  # samples per rank and forward pass
    gradient_accumulation_steps: int = Field(1, ge=1)
    learning_rate: float = Field(5e-4, gt=0)
    min_lr_ratio: float = Field(0.1, ge=0, le=1)  # the cosine ends at this share of learning_rate
    warmup_steps: int = Field(100, ge=0)
    weight_decay: float = Field(0.01, ge=0)  # not on norms, biases and other vectors
    adam_beta1: float = Field(0.9, ge=0, lt=1)
    adam_beta2: float = Field(0.95, ge=0, lt=1)
    adam_eps: float = Field(1e-8, gt=0)
    max_grad_norm: float = Field(1.0, gt=0)
    precision: Literal["bf16", "fp16", "fp32"] = "bf16"
    activation_checkpointing: bool = False
    deepspeed_config: str | None = None  # JSON file; without one, ZeRO-2
    ema_decay: float = Field(0.999, ge=0, lt=1)  # 0: no averaging
    seed: int = Field(0, ge=0)
    timeout_seconds: float = Field(600.0, gt=0)  # a rank that has waited so long for another ends the run
    max_skipped_steps: int = Field(0, ge=0)  # non-finite steps in a row that are skipped before the run goes back
    max_rollbacks: int = Field(1, ge=0)  # times that it goes back to the last checkpoint before it stops
    overfit_test_size: int | None = Field(None, ge=1)  # train and evaluate on the first so many samples alone
    debug_mode: bool = False
    log_every: int = Field(10, ge=1)
    eval_every: int = Field(500, ge=0)  # 0: only at the end
    save_every: int = Field(500, ge=0)  # 0: only at the end
    keep_last: int = Field(3, ge=1)
    keep_every: int | None = Field(None, ge=1)  # checkpoints of steps that this divides are kept for good

    @model_validator(mode="after")
    def _one_length(self) -> TrainConfig:
        if self.num_epochs is not None and self.max_steps is not None:
            raise ValueError(
                f"train.num_epochs = {self.num_epochs} and train.max_steps = {self.max_steps} both say how long to "
                "train; set one of them to null"
            )
        return self


class EvalConfig(_Section):
    """Evaluation by generation, during the run and at its end."""

    sampler: SamplerConfig = SamplerConfig()
    max_samples: int | None = Field(256, ge=1)  # per split, during the run; the final evaluation takes all
    batch_size: int = Field(16, ge=1)


class RunConfig(_Section):
    """One run, whole."""

    model: ModelConfig = ModelConfig()
    flow: FlowConfig = FlowConfig()
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    eval: EvalConfig = EvalConfig()

    @model_validator(mode="after")
    def _skip_needs_sample(self) -> RunConfig:
        if self.model.linear_skip != "none" and self.flow.prediction != "sample":
            raise ValueError(
                f"model.linear_skip = {self.model.linear_skip} maps EVA to the clean embedding, and flow.prediction = "
                "velocity does not output it; set flow.prediction to sample or model.linear_skip to none"
            )
        return self


def preset_names() -> list[str]:
    """The names that `--model_size` takes."""
    return sorted(path.stem for path in PRESETS_DIR.glob("*.yaml"))


def load_run_config(
    preset: str = "base",
    config_file: str | Path | None = None,
    overrides: Sequence[str] = (),
    flags: dict | None = None,
) -> RunConfig:
    """Resolve a run's settings: preset, then YAML file, then flags, then `section.key=value` overrides.

    `flags` maps dotted names to values that are already typed (`None` values are left out).

    Raises:
        ConfigError: naming the field, its value, what is expected, and the nearest valid name.
    """
    settings = _load_preset(preset)
    if config_file is not None:
        _merge(settings, _load_yaml(Path(config_file)))
    for name, value in (flags or {}).items():
        if value is not None:
            _set_dotted(settings, name, value)
    for override in overrides:
        name, equals, text = override.partition("=")
        if not equals:
            raise ConfigError(f"--set {override}: expected section.key=value, for example train.ema_decay=0.999")
        _set_dotted(settings, name.strip(), _parse_value(name, text))
    return build_run_config(settings)


def build_run_config(settings: dict) -> RunConfig:
    """Validate nested settings into a `RunConfig`; every problem found is listed in one `ConfigError`."""
    try:
        return RunConfig.model_validate(settings)
    except ValidationError as error:
        raise ConfigError("; ".join(_explain(item) for item in error.errors())) from None


def get_blip3o_clip_config(
    model_size: str = "base", training_mode: str = "patch_only", **model_fields: Any
) -> ModelConfig:
    """The `ModelConfig` of a preset, with any of its fields replaced.

    Raises:
        ConfigError: the preset, a field or a value is not valid.
    """
    model = {**_load_preset(model_size).get("model", {}), "token_layout": training_mode, **model_fields}
    return build_run_config({"model": model, "flow": {"prediction": "sample"}}).model


def get_memory_optimized_config(
    available_memory_gb: float, training_mode: str = "patch_only", batch_size: int = 32
) -> tuple[str, ModelConfig, float]:
    """The largest preset whose training step fits one GPU, by the planner: `(model_size, config, memory_gb)`.

    Raises:
        ConfigError: not even the smallest preset fits.
    """
    from blip3o_ds.planning.memory import choose_model_size  # the planner builds on this module

    model_size, memory_gb = choose_model_size(available_memory_gb, training_mode, batch_size)
    return model_size, get_blip3o_clip_config(model_size, training_mode), memory_gb


def _load_preset(name: str) -> dict:
    if name not in preset_names():
        raise ConfigError(f"model size {name!r} is unknown{_did_you_mean(name, preset_names())}")
    return _load_yaml(PRESETS_DIR / f"{name}.yaml")


def _load_yaml(path: Path) -> dict:
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such configuration file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not a YAML file: {error}") from None
    if not isinstance(settings, dict):
        raise ConfigError(f"{path}: expected sections ({', '.join(RunConfig.model_fields)}), found {settings!r}")
    return settings


def _merge(base: dict, update: dict) -> None:
    for key, value in update.items():
        if isinstance(value, dict) and isinstance(base.get(key), dict):
            _merge(base[key], value)
        else:
            base[key] = value


def _set_dotted(settings: dict, name: str, value: Any) -> None:
    *sections, key = name.split(".")
    for section in sections:
        settings = settings.setdefault(section, {})
        if not isinstance(settings, dict):
            raise ConfigError(f"{name}: {section} is a value, not a section")
    if value is not None:
        settings.pop(EITHER.get(name, ""), None)  # the later word on how long to train replaces the earlier
    settings[key] = value


def _parse_value(name: str, text: str) -> Any:
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {name}: {text!r} is not a YAML value: {error}") from None
    if isinstance(value, str):  # YAML 1.1 reads 5e-4 as text, people mean the number
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _explain(item: dict) -> str:
    names = [str(part) for part in item["loc"]]
    field = ".".join(names)
    if item["type"] == "extra_forbidden":
        return f"{field} is not a setting{_did_you_mean(field, _field_names())}"
    if item["type"] == "value_error":  # our own validators name the fields themselves
        return str(item["ctx"]["error"])
    return f"{field} = {item['input']!r}: {item['msg'].lower()}"


def _did_you_mean(name: str, valid: list[str]) -> str:
    near = difflib.get_close_matches(name, valid, n=1, cutoff=0.0)
    last = difflib.get_close_matches(name.rpartition(".")[2], [v.rpartition(".")[2] for v in valid], n=1, cutoff=0.8)
    if last:
        near = [v for v in valid if v.rpartition(".")[2] == last[0]]
    known = f"; valid: {', '.join(valid)}" if len(valid) <= 12 else ""
    return f"; did you mean {near[0]}?{known}"


def _field_names(section: type[BaseModel] = RunConfig, prefix: str = "") -> list[str]:
    names = []
    for name, info in section.model_fields.items():
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
            names += _field_names(info.annotation, f"{prefix}{name}.")
        else:
            names.append(prefix + name)
    return names


def _nearest_divisor(whole: int, wanted: int) -> int:
    return min((d for d in range(1, whole + 1) if whole % d == 0), key=lambda d: abs(d - wanted))
