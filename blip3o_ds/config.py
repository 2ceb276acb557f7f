"""Every setting of a run, in one typed schema; presets, YAML files, flags and dotted overrides all end up here.

Everything about a setting stands in its field (see `setting`): default, meaning, flag, whether it may change on resume.
This module imports nothing heavy: the resolved `RunConfig` is passed on as values.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import ValidationError, model_validator

from blip3o_ds.errors import ConfigError
from blip3o_ds.settings import Section, Settings, flatten, nearest, parse_override, read_yaml, setting

PRESETS_DIR = Path(__file__).parent / "presets"

FLOW, OPTIM = "blip3o_ds.flow", "blip3o_ds.training.optim"  # where the tables are that names are looked up in
TokenLayout = Literal["patch_only", "cls_patch"]
OnDamage = Literal["error", "skip"]  # either is reported


class ModelConfig(Section):
    """Shape of the DiT."""

    eva_dim: int = setting(4096, "width of the condition's patch embeddings", from_data=True, ge=1)
    clip_dim: int = setting(1024, "width of the generated patch embeddings", from_data=True, ge=1)
    grid_size: int = setting(16, "patches along one side of the image", from_data=True, ge=1)
    token_layout: TokenLayout = setting(
        "patch_only", "tokens of an image: the patches; cls_patch has the CLS token before them", flag="--training_mode"
    )
    hidden_size: int = setting(768, "width of the DiT", aliases="dim width d_model", ge=2)
    num_layers: int = setting(12, "DiT blocks", aliases="layers depth", ge=1)
    num_heads: int = setting(12, "query heads of an attention layer", aliases="heads", ge=1)
    num_kv_heads: int = setting(4, "key and value heads; divides num_heads", aliases="kv_heads", ge=1)
    ffn_dim: int = setting(3072, "inner width of the SwiGLU layer", aliases="intermediate_size mlp_dim", ge=1)
    attention: Literal["full", "none"] = setting(
        "full", "none: blocks without attention, an MLP of each token by itself, to compare with"
    )
    rope_theta: float = setting(10000.0, "base of the rotary frequencies", gt=0)
    cross_attention_rope: bool = setting(True, "rotate queries and keys of cross-attention too: both grids are equal")
    norm_eps: float = setting(1e-6, "epsilon of every RMSNorm", gt=0)
    timestep_embed_dim: int = setting(256, "sines and cosines of the timestep, together", ge=2)

    @property
    def num_tokens(self) -> int:
        """N: the patches of the grid, and CLS if the layout has it."""
        return self.grid_size**2 + (self.token_layout == "cls_patch")

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @model_validator(mode="after")
    def _heads_divide(self) -> ModelConfig:
        for part, whole in (("num_heads", "hidden_size"), ("num_kv_heads", "num_heads")):
            divisor, number = getattr(self, part), getattr(self, whole)
            if number % divisor:
                nearest = min((d for d in range(1, number + 1) if number % d == 0), key=lambda d: abs(d - divisor))
                raise ValueError(
                    f"model.{part} = {divisor} does not divide model.{whole} = {number}; "
                    f"the nearest number that does is {nearest}"
                )
        if self.head_dim % 2:
            raise ValueError(
                f"model.hidden_size / model.num_heads = {self.head_dim} must be even: rotary positions rotate pairs of "
                "channels"
            )
        if self.timestep_embed_dim % 2:
            raise ValueError(f"model.timestep_embed_dim = {self.timestep_embed_dim} must be even (sines and cosines)")
        return self


class FlowConfig(Section):
    """The flow from noise to CLIP embeddings; each name is looked up in its table in `blip3o_ds.flow`."""

    path: str = setting("linear", "path from noise to data; linear: (1-t) noise + t clip", table=f"{FLOW}.path:PATHS")
    prediction: str = setting(
        "gaussian",
        "output of the network; gaussian: what it adds to the linear-Gaussian prior",
        table=f"{FLOW}.prediction:PREDICTIONS",
    )
    loss_weight: str = setting(
        "posterior",
        "what the loss compares; posterior: clean embeddings, relative to what the prior leaves open at each t",
        table=f"{FLOW}.prediction:LOSS_WEIGHTS",
    )
    timestep_law: str = setting(
        "prior",
        "distribution of t in training; prior: every share of the prior's variance alike",
        table=f"{FLOW}.timesteps:TIMESTEP_LAWS",
    )
    calibration_share: float = setting(
        0.01,
        "share of the images, of one of the five folds, that teach only how far the output is trusted on new ones",
        ge=0,
        le=0.2,
    )
    noise_share: float = setting(0.5, "share of the training samples at t = 0, for the posterior mean", ge=0, lt=1)
    logit_mean: float = setting(0.0, "mean of logit(t), for logit_normal")
    logit_std: float = setting(1.0, "standard deviation of logit(t), for logit_normal", gt=0)
    timestep_shift: float = setting(1.0, "above 1: more training and sampling near the noise", aliases="shift", gt=0)
    cond_dropout: float = setting(
        0.1, "share of samples trained without condition, for guidance", aliases="dropout cfg_dropout", ge=0, lt=1
    )
    min_time_to_data: float = setting(0.05, "floor of 1-t in the velocity that the loss compares", gt=0, lt=1)


class SamplerConfig(Section):
    """How embeddings are generated."""

    steps: int = setting(25, "steps of the solver", may_change=True, ge=1)
    solver: str = setting("euler", "solver of the ODE", table=f"{FLOW}.solvers:SOLVERS", may_change=True)
    guidance_scale: float = setting(
        1.0, "classifier-free guidance; 1 is none", aliases="guidance cfg cfg_scale", may_change=True, ge=0
    )
    seed: int = setting(0, "seed of the noise", may_change=True, ge=0)


class DataConfig(Section):
    """What is read, and in which order."""

    train_dir: str | None = setting(
        None,
        "the training set, a folder or URL; of a resumed run the same, wherever it lies now",
        flag="--chunked_embeddings_dir DIR",
        aliases="data data_dir dataset",
        may_change=True,
    )
    eval_dirs: tuple[str, ...] = setting(
        (), "held-out sets, each named by its path's last part", aliases="eval_dir val_dir val_dirs", may_change=True
    )
    normalization: Literal["minimal", "full", "standardize"] = setting(
        "minimal",
        "minimal: raw embeddings, no normalisation; full: unit L2 norm of each token; "
        "standardize: by mean and variance of each channel in the training set",
    )
    max_shards: int | None = setting(None, "use only the first N shards", flag="--max_shards N", ge=1)
    window_shards: int = setting(16, "samples are shuffled within a window of this many shuffled shards", ge=1)
    prefetch_steps: int = setting(2, "steps that are read ahead", aliases="prefetch", may_change=True, ge=1)
    cache_dir: str | None = setting(None, "folder for shards of a URL; null: in the temporary one", may_change=True)
    cache_gb: float = setting(100.0, "limit of cache_dir in GiB; two windows of shards at least", may_change=True, gt=0)
    on_bad_sample: OnDamage = setting("error", "skip: replace and report damaged samples", may_change=True)
    on_bad_shard: OnDamage = setting("error", "skip: replace and report damaged shards", may_change=True)


class TrainConfig(Section):
    """Optimisation, its precision, and what is written when."""

    output_dir: str | None = setting(None, "where run folders are made", flag="--output_dir DIR", may_change=True)
    num_epochs: int | None = setting(
        None,
        "length of the run in epochs; 10 if max_steps is null too",
        flag="--num_epochs N",
        aliases="epochs max_epochs",
        excludes="train.max_steps",
        ge=1,
    )
    max_steps: int | None = setting(
        None, "length of the run in steps", aliases="steps num_steps iterations", excludes="train.num_epochs", ge=1
    )
    micro_batch_size: int = setting(
        8, "samples per rank and pass", flag="--batch_size N", aliases="batch_size batch bs", may_change=True, ge=1
    )
    gradient_accumulation_steps: int = setting(
        1,
        "micro-batches per optimizer step; the global batch is micro_batch_size times this times the ranks",
        aliases="accumulation grad_accum accumulation_steps",
        may_change=True,
        ge=1,
    )
    optimizer: str = setting("adamw", "optimizer", table=f"{OPTIM}:OPTIMIZERS", aliases="optim")
    learning_rate: float = setting(5e-4, "peak of the learning rate", flag="--learning_rate X", aliases="lr", gt=0)
    schedule: str = setting(
        "cosine", "learning rate after the warmup", table=f"{OPTIM}:SCHEDULES", aliases="lr_schedule scheduler"
    )
    min_lr_ratio: float = setting(0.1, "the learning rate ends at this share of its peak", aliases="min_lr", ge=0, le=1)
    warmup_steps: int = setting(100, "steps in which the learning rate rises to its peak", aliases="warmup", ge=0)
    weight_decay: float = setting(0.01, "of matrices; norms, biases, vectors have none", aliases="wd decay", ge=0)
    adam_beta1: float = setting(0.9, "decay of Adam's first moment", aliases="beta1 betas", ge=0, lt=1)
    adam_beta2: float = setting(0.95, "decay of Adam's second moment", aliases="beta2", ge=0, lt=1)
    adam_eps: float = setting(1e-8, "epsilon of Adam", aliases="eps epsilon", gt=0)
    max_grad_norm: float = setting(
        1.0, "the gradient is clipped to this norm", aliases="grad_clip clip_grad gradient_clipping", gt=0
    )
    precision: Literal["bf16", "fp16", "fp32"] = setting(
        "bf16", "of forward and backward; fp16 has loss scaling", aliases="dtype mixed_precision bf16 fp16"
    )
    activation_checkpointing: bool = setting(
        False,
        "recompute activations in the backward pass: less memory, a third more work",
        aliases="gradient_checkpointing checkpointing",
        may_change=True,
    )
    deepspeed_config: str | None = setting(
        None,
        "DeepSpeed JSON file, ready ones in ds_configs/; ZeRO-2 if null",
        flag="--deepspeed_config FILE",
        aliases="deepspeed ds_config",
        may_change=True,
    )
    ema_decay: float = setting(0.999, "decay of the weights' moving average; 0: none", aliases="ema", ge=0, lt=1)
    seed: int = setting(0, "seed of initialisation, sample order and noise", ge=0)
    timeout_seconds: float = setting(
        600.0, "a rank that waits this long for another ends the run", aliases="timeout", may_change=True, gt=0
    )
    max_skipped_steps: int = setting(0, "non-finite steps skipped in a row before a rollback", may_change=True, ge=0)
    max_rollbacks: int = setting(1, "rollbacks before the run stops", aliases="rollbacks", may_change=True, ge=0)
    overfit_test_size: int | None = setting(
        None, "train and evaluate on only N samples", flag="--overfit_test_size N", ge=1
    )
    debug_mode: bool = setting(
        False, "log gradient norms by block and loss by timestep", flag="--debug_mode", aliases="debug", may_change=True
    )
    log_every: int = setting(10, "steps between lines of metrics", may_change=True, ge=1)
    eval_every: int = setting(500, "steps between evaluations; 0: only at the end", may_change=True, ge=0)
    save_every: int = setting(500, "steps between checkpoints; 0: only at the end", may_change=True, ge=0)
    keep_last: int = setting(3, "newest checkpoints that are kept", may_change=True, ge=1)
    keep_every: int | None = setting(None, "checkpoints at multiples of it are never deleted", may_change=True, ge=1)

    @model_validator(mode="after")
    def _one_length(self) -> TrainConfig:
        if None not in (self.num_epochs, self.max_steps):
            both = f"train.num_epochs = {self.num_epochs} and train.max_steps = {self.max_steps}"
            raise ValueError(f"{both} exclude each other; set one of them to null")
        return self

    def global_batch(self, world_size: int) -> int:
        """Samples of one step, over all ranks."""
        return self.micro_batch_size * self.gradient_accumulation_steps * world_size


class EvalConfig(Section):
    """Evaluation by generation, during the run and at its end."""

    sampler: SamplerConfig = SamplerConfig()
    max_samples: int | None = setting(
        256, "samples of each set that are evaluated during a run; at its end it is all", may_change=True, ge=1
    )
    num_samples: int = setting(
        3, "times that an image is sampled, for scores of the distribution", aliases="samples k", may_change=True, ge=2
    )
    batch_size: int = setting(16, "images generated at once", may_change=True, ge=1)


class RunConfig(Section):
    """One run, whole."""

    model: ModelConfig = ModelConfig()
    flow: FlowConfig = FlowConfig()
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    eval: EvalConfig = EvalConfig()


SETTINGS = Settings(RunConfig)

get_memory_optimized_config: Callable[..., tuple[str, ModelConfig, float]]  # see `__getattr__`


def preset_names() -> list[str]:
    """The names that `--model_size` takes."""
    return sorted(path.stem for path in PRESETS_DIR.glob("*.yaml"))


def load_run_config(
    preset: str | None = "base",
    config_file: str | Path | None = None,
    overrides: Sequence[str] = (),
    flags: dict[str, Any] | None = None,
) -> RunConfig:
    """Resolve a run's settings: preset, then YAML file, then flags, then `section.key=value` overrides.

    Pydantic's `model_fields_set` of each section tells afterwards which settings were given. A resumed run needs no
    preset; a flag that is None was not given. A ConfigError names the field, its value, what is expected, and the
    nearest valid name.
    """
    layers = [preset_settings(preset)] if preset else []
    layers += [_load_yaml(Path(config_file))] if config_file is not None else []
    given = {name: value for name, value in (flags or {}).items() if value is not None}
    return build_run_config(SETTINGS.merge([*layers, given, *map(parse_override, overrides)]))


def preset_settings(preset: str) -> dict[str, Any]:
    """The settings of a preset as a layer of dotted names; ConfigError for one that does not exist."""
    if preset not in preset_names():
        raise ConfigError(f"model size {preset!r} is unknown{nearest(preset, preset_names())}")
    return _load_yaml(PRESETS_DIR / f"{preset}.yaml")


def build_run_config(settings: dict[str, Any]) -> RunConfig:
    """Validate nested settings into a `RunConfig`; every problem found is listed in one `ConfigError`."""
    try:
        return RunConfig.model_validate(settings)
    except ValidationError as error:
        raise ConfigError(SETTINGS.explain(error)) from None


def get_blip3o_clip_config(
    model_size: str = "base", training_mode: str = "patch_only", **model_fields: Any
) -> ModelConfig:
    """The `ModelConfig` of a preset, with any of its fields replaced; raises ConfigError for one that is not valid."""
    flags = {"model.token_layout": training_mode, **{f"model.{name}": value for name, value in model_fields.items()}}
    return load_run_config(model_size, flags=flags).model


def _load_yaml(path: Path) -> dict[str, Any]:
    """The settings of a file as a layer of dotted names."""
    return flatten(read_yaml(path, "configuration", RunConfig))


if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        if name == "get_memory_optimized_config":  # the planner's, which is built on this module
            from blip3o_ds.planning import memory

            return memory.get_memory_optimized_config
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
