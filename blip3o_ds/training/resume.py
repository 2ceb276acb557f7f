"""The folder that a run trains into: a new one, or that of a run to resume, with what must not have changed since.

A resumed run takes the steps that the interrupted one would have taken, so every setting that decides them is fixed.
"""

from __future__ import annotations

import contextlib
import logging
import os
import platform
import socket
import subprocess
from collections.abc import Iterator
from importlib.metadata import version
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import blip3o_ds
from blip3o_ds.config import SETTINGS, RunConfig, build_run_config
from blip3o_ds.errors import CheckpointError, ConfigError
from blip3o_ds.files import wait_for_lock
from blip3o_ds.runs.folder import LOCK, RUN_CONFIG, create_run, newest_run, read_run_config
from blip3o_ds.settings import flatten
from blip3o_ds.training.peers import on_rank_zero

logger = logging.getLogger(__name__)

TRAIN_DATA = "train_data"  # in the run's configuration file: the digest of the training set's manifest


def resumed_config(given: RunConfig, resume: str) -> tuple[RunConfig, Path]:
    """The settings of the run to resume, changed by those that `given` states, and its folder.

    `resume` is that folder, or `latest` for the newest run in `train.output_dir`. A `ConfigError` names a changed
    setting that decides what the remaining steps compute.
    """
    folder = newest_run(_output_dir(given)) if resume == "latest" else Path(resume)
    saved, _ = _read_run(folder)
    layers = [flatten(saved.model_dump()), flatten(given.model_dump(exclude_unset=True))]
    config = build_run_config(SETTINGS.merge(layers))
    for name, setting in SETTINGS.items():
        before, now = attrgetter(name)(saved), attrgetter(name)(config)
        if before != now and not setting.may_change:
            raise ConfigError(f"{name} was {before!r} when {folder} began and is {now!r} now; resume with the former")
    return config, folder


def prepare_run_dir(config: RunConfig, resumed: Path | None, data: str) -> Path:
    """The folder of the run that is resumed, or a new one in `train.output_dir`; every rank calls it.

    `data` is the digest of the training set's manifest; a `ConfigError` says that it is not that of the resumed run.
    """

    def prepare() -> Path:
        if resumed is None:
            return create_run(_output_dir(config), config, {**describe_environment(), TRAIN_DATA: data})
        _check_same_data(config, resumed, data)
        return resumed

    folder = on_rank_zero(prepare)
    if resumed and resumed != folder:
        found = f"rank {dist.get_rank()} finds {resumed} to resume, rank 0 {folder}"
        raise CheckpointError(f"{found}; name the run: --resume {folder}")
    return folder


@contextlib.contextmanager
def sole_trainer(folder: Path, wait_seconds: float) -> Iterator[None]:
    """Keep other processes from training into a run's folder; every rank calls it, and rank 0 holds the lock.

    A `CheckpointError` says that another run is in it, after `wait_seconds` in which one that is ending can end. The
    lock ends with its process, and nodes that share the folder see it; where there are no locks, nobody is kept out.
    """
    path = folder / LOCK
    with contextlib.ExitStack() as stack:

        def take() -> None:
            try:
                stack.enter_context(wait_for_lock(path, wait_seconds, f"that trains into {folder}"))
                path.write_text(f"process {os.getpid()} on {socket.gethostname()}", encoding="utf-8")
            except BlockingIOError:
                holder = path.read_text(encoding="utf-8", errors="replace") or "another process"
                raise CheckpointError(
                    f"{folder}: {holder[:200]} trains into it; wait for its end, or end it, and resume then. If that "
                    f"host is gone, and its file server does not know, remove {path}"
                ) from None
            except OSError as error:
                logger.warning("%s: no lock, so nothing keeps another process from training into it: %s", folder, error)

        on_rank_zero(take)
        yield


def _output_dir(config: RunConfig) -> Path:
    if config.train.output_dir is None:
        raise ConfigError("train.output_dir is not set; give --output_dir DIR, where runs are kept")
    output = Path(config.train.output_dir)
    if set("[]*?") & set(str(output.absolute())):  # the run would train and save
        raise ConfigError(
            f"train.output_dir = {output}: DeepSpeed takes a path with one of [ ] * ? for a pattern, and could not "
            "resume the run; give another folder"
        )
    return output


def keep_global_batch(config: RunConfig, run_dir: Path, world_size: int) -> RunConfig:
    """The settings with which `world_size` ranks take the run's global batch: samples per step stay what they were.

    The micro-batch is at most the one that is set, so that it fits in memory; accumulation makes up for the rest. A
    `ConfigError` says on how many ranks that is possible.
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
    fitted = {"micro_batch_size": micro, "gradient_accumulation_steps": share // micro}
    stated = ", ".join(f"train.{name} = {value}" for name, value in fitted.items())
    logger.info("the global batch stays %d on %d ranks: %s", batch, world_size, stated)
    return config.model_copy(update={"train": train.model_copy(update=fitted)})


def describe_environment() -> dict[str, Any]:
    """Versions, machine and git state, stored with a run's settings."""
    root = Path(blip3o_ds.__file__).parent
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        git = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:  # no git on this machine
        git = ""
    cpu = platform.processor() or platform.machine()
    return {
        "versions": package_versions(),
        "git": git or None,
        "machine": torch.cuda.get_device_name() if torch.cuda.is_available() else cpu,
        "world_size": dist.get_world_size(),
        "threads_per_rank": torch.get_num_threads(),
    }


def package_versions() -> dict[str, str]:
    """The versions of this package and of what computes its results."""
    return {
        "blip3o_ds": blip3o_ds.__version__,
        "torch": torch.__version__,
        "deepspeed": version("deepspeed"),
        "python": platform.python_version(),
    }


def _check_same_data(config: RunConfig, run_dir: Path, data: str) -> None:
    saved, content = read_run_config(run_dir)
    before, now = saved.data.train_dir, config.data.train_dir
    # Runs of before the digest was kept are known by the path.
    if data != content[TRAIN_DATA] if TRAIN_DATA in content else before != now:
        raise ConfigError(
            f"data.train_dir = {now} does not hold the samples with which {run_dir} began ({before}): its manifest "
            "lists other shards; give the dataset as it was (damage in it can be skipped: data.on_bad_shard = skip), "
            "or begin another run"
        )


def _read_run(run_dir: Path) -> tuple[RunConfig, int]:
    """The settings with which a run began, and on how many ranks."""
    config, content = read_run_config(run_dir)
    world_size = content.get("world_size")
    if not isinstance(world_size, int) or world_size < 1:
        problem = f"expected the number of ranks under `world_size`, found {world_size!r}"
        raise CheckpointError(f"{run_dir / RUN_CONFIG}: {problem}")
    return config, world_size
