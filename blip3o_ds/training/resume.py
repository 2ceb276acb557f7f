"""The folder that a run trains into: a new one, or that of a run to resume, with what must not have changed since.

A resumed run takes the steps that the interrupted one would have taken, so every setting that decides them is fixed.
"""

from __future__ import annotations

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
from blip3o_ds.runs.folder import RUN_CONFIG, create_run, newest_run, read_run_config

logger = logging.getLogger(__name__)

# A run is resumed only if these are as they were: they decide what the remaining steps compute. So does the global
# batch, which `keep_global_batch` sees to.
FIXED_ON_RESUME = (
    *("model", "flow", "data.train_dir", "data.normalization", "data.max_shards", "data.window_shards"),
    *("train.optimizer", "train.schedule"),
    *("train.learning_rate", "train.min_lr_ratio", "train.warmup_steps", "train.weight_decay", "train.adam_beta1"),
    *("train.adam_beta2", "train.adam_eps", "train.max_grad_norm", "train.precision", "train.ema_decay", "train.seed"),
    *("train.overfit_test_size", "train.num_epochs", "train.max_steps"),
)


def prepare_run_dir(config: RunConfig, resume: str | None, rank: int) -> Path:
    """Make a run folder in `train.output_dir`, or find the one to resume; every rank calls it and gets the same."""
    if config.train.output_dir is None:
        raise ConfigError("train.output_dir is not set; give --output_dir DIR, where runs are kept")
    outcome: list[Any] = [None, None]
    if rank == 0:
        try:
            output_dir = Path(config.train.output_dir)
            if resume:
                outcome[0] = newest_run(output_dir) if resume == "latest" else Path(resume)
                _check_fixed(config, outcome[0])
            else:
                outcome[0] = create_run(output_dir, config, describe_environment())
        except (ConfigError, CheckpointError, OSError) as error:
            outcome[1] = error  # raised on every rank, so that none waits for another
    dist.broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def keep_global_batch(config: RunConfig, run_dir: Path, world_size: int) -> RunConfig:
    """The settings with which `world_size` ranks take the run's global batch: samples per step stay what they were.

    The micro-batch is at most the one that is set, so that it fits in memory; accumulation makes up for the rest.

    Raises:
        ConfigError: the ranks cannot share the global batch equally; says how many can.
    """
    saved, ranks_then = _read_run(run_dir)
    batch = saved.train.global_batch(ranks_then)
    train = config.train
    if train.global_batch(world_size) == batch:
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


def describe_environment() -> dict[str, Any]:
    """Versions, machine and git state, stored with a run's settings."""
    import deepspeed

    root = Path(blip3o_ds.__file__).parent
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40"]
    git = subprocess.run(command, capture_output=True, text=True, check=False)
    cpu = platform.processor() or platform.machine()
    return {
        "versions": {
            "blip3o_ds": blip3o_ds.__version__,
            "torch": torch.__version__,
            "deepspeed": deepspeed.__version__,
            "python": platform.python_version(),
        },
        "git": git.stdout.strip() or None,
        "machine": torch.cuda.get_device_name() if torch.cuda.is_available() else cpu,
        "world_size": dist.get_world_size(),
        "threads_per_rank": torch.get_num_threads(),
    }


def _check_fixed(config: RunConfig, run_dir: Path) -> None:
    saved, now = _read_run(run_dir)[0].model_dump(mode="json"), config.model_dump(mode="json")
    for name in FIXED_ON_RESUME:
        before, after = _lookup(saved, name), _lookup(now, name)
        if before != after:
            raise ConfigError(
                f"{name} was {before!r} when {run_dir} began and is {after!r} now; resume with the former"
            )


def _read_run(run_dir: Path) -> tuple[RunConfig, int]:
    """The settings with which a run began, and on how many ranks."""
    config, content = read_run_config(run_dir)
    world_size = content.get("world_size")
    if not isinstance(world_size, int) or world_size < 1:
        raise CheckpointError(
            f"{run_dir / RUN_CONFIG}: expected the number of ranks under `world_size`, found {world_size!r}"
        )
    return config, world_size


def _lookup(settings: Any, dotted: str) -> Any:
    for part in dotted.split("."):
        settings = settings.get(part)
    return settings
