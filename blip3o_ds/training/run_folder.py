"""The folder of a run: made with all settings in it, or found again with the settings that must not have changed."""

from __future__ import annotations

import datetime
import logging
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import blip3o_ds
from blip3o_ds.config import RunConfig
from blip3o_ds.errors import CheckpointError, ConfigError
from blip3o_ds.evaluation.runs import RUN_CONFIG, parse_run_config, read_json
from blip3o_ds.files import atomic_write_json

logger = logging.getLogger(__name__)

# A run is resumed only if these are as they were: they decide what the remaining steps compute. So does the global
# batch, which `keep_global_batch` sees to.
FIXED_ON_RESUME = (
    *("model", "flow", "data.train_dir", "data.normalization", "data.max_shards", "data.window_shards"),
    *("train.learning_rate", "train.min_lr_ratio", "train.warmup_steps", "train.weight_decay", "train.adam_beta1"),
    *("train.adam_beta2", "train.adam_eps", "train.max_grad_norm", "train.precision", "train.ema_decay", "train.seed"),
    *("train.overfit_test_size", "train.num_epochs", "train.max_steps"),
)


def prepare_run_dir(config: RunConfig, resume: str | None, rank: int) -> Path:
    """Make `output_dir/clip_repro_YYYYMMDD_HHMMSS` with `experiment_config.json`, or find the run to resume."""
    if config.train.output_dir is None:
        raise ConfigError("train.output_dir is not set; give --output_dir DIR, where runs are kept")
    outcome: list[Any] = [None, None]
    if rank == 0:
        try:
            output_dir = Path(config.train.output_dir)
            outcome[0] = str(_resumed_run(config, output_dir, resume) if resume else _new_run(config, output_dir))
        except (ConfigError, CheckpointError, OSError) as error:
            outcome[1] = error  # raised on every rank, so that none waits for another
    dist.broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    return Path(outcome[0])


def _new_run(config: RunConfig, output_dir: Path) -> Path:
    run_dir = output_dir / datetime.datetime.now().strftime("clip_repro_%Y%m%d_%H%M%S")
    run_dir.mkdir(parents=True)
    atomic_write_json(
        run_dir / RUN_CONFIG,
        {"config": config.model_dump(mode="json"), **describe_environment()},
    )
    return run_dir


def _resumed_run(config: RunConfig, output_dir: Path, resume: str) -> Path:
    if resume == "latest":
        runs = sorted(path for path in output_dir.glob("clip_repro_*") if (path / RUN_CONFIG).is_file())
        if not runs:
            raise CheckpointError(f"{output_dir}: there is no run to resume; leave --resume out to start one")
        run_dir = runs[-1]
    else:
        run_dir = Path(resume)
    saved, now = _read_run(run_dir)[0].model_dump(mode="json"), config.model_dump(mode="json")
    for name in FIXED_ON_RESUME:
        before, after = _lookup(saved, name), _lookup(now, name)
        if before != after:
            raise ConfigError(
                f"{name} was {before!r} when {run_dir} began and is {after!r} now; resume with the former"
            )
    return run_dir


def keep_global_batch(config: RunConfig, run_dir: Path, world_size: int) -> RunConfig:
    """The settings with which `world_size` ranks take the run's global batch: samples per step stay what they were.

    The micro-batch is at most the one that is set, so that it fits in memory; accumulation makes up for the rest.

    Raises:
        ConfigError: the ranks cannot share the global batch equally; says how many can.
    """
    saved, ranks_then = _read_run(run_dir)
    batch = saved.train.micro_batch_size * saved.train.gradient_accumulation_steps * ranks_then
    train = config.train
    if train.micro_batch_size * train.gradient_accumulation_steps * world_size == batch:
        return config
    share, rest = divmod(batch, world_size)
    if rest:
        possible = ", ".join(str(n) for n in range(1, batch + 1) if batch % n == 0)
        raise ConfigError(
            f"{run_dir} trains with a global batch of {batch} samples, which {world_size} ranks cannot share equally; "
            f"resume it on {possible} ranks"
        )
    micro = max(n for n in range(1, min(train.micro_batch_size, share) + 1) if share % n == 0)
    logger.info(
        "the global batch stays %d on %d ranks: train.micro_batch_size = %d, train.gradient_accumulation_steps = %d",
        *(batch, world_size, micro, share // micro),
    )
    fitted = {"micro_batch_size": micro, "gradient_accumulation_steps": share // micro}
    return config.model_copy(update={"train": train.model_copy(update=fitted)})


def _read_run(run_dir: Path) -> tuple[RunConfig, int]:
    """The settings with which a run began, and on how many ranks."""
    path = run_dir / RUN_CONFIG
    try:
        content = read_json(path)
    except FileNotFoundError:
        raise CheckpointError(f"{run_dir}: not a run folder, {RUN_CONFIG} is missing") from None
    world_size = content.get("world_size")
    if not isinstance(world_size, int) or world_size < 1:
        raise CheckpointError(f"{path}: expected the number of ranks under `world_size`, found {world_size!r}")
    return parse_run_config(path, content.get("config")), world_size


def _lookup(settings: dict, dotted: str) -> Any:
    for part in dotted.split("."):
        settings = settings.get(part)
    return settings


def describe_environment() -> dict[str, Any]:
    """Versions, machine and git state, to stand beside a run's settings."""
    import deepspeed

    root = Path(blip3o_ds.__file__).parent
    git = subprocess.run(
        ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40"],
        capture_output=True,
        text=True,
        check=False,
    )
    return {
        "versions": {
            "blip3o_ds": blip3o_ds.__version__,
            "torch": torch.__version__,
            "deepspeed": deepspeed.__version__,
            "python": platform.python_version(),
        },
        "git": git.stdout.strip() or None,
        "machine": torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else platform.processor() or platform.machine(),
        "world_size": dist.get_world_size(),
        "threads_per_rank": torch.get_num_threads(),
    }
