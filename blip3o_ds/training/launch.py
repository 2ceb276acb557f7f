"""Joining the ranks of a run, whoever started them: deepspeed, torchrun, srun, or nobody.

DeepSpeed reads no SLURM variables, neither under `srun` nor under `deepspeed --launcher slurm` (which is srun); here
they become the five variables that torch.distributed reads.
"""

from __future__ import annotations

import datetime
import os
import re
import socket
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch

from blip3o_ds.errors import ConfigError, TrainingError
from blip3o_ds.slurm import Place, required, step_place
from blip3o_ds.training.compiling import use_compile_lock

_LAUNCHER = "RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"
_MPI_SIZES = "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE"


def init_distributed(timeout_seconds: float) -> tuple[int, int, torch.device]:
    """Join the process group that the launcher describes (see `rendezvous`): `(rank, world, device)`.

    nccl where there is CUDA, gloo otherwise. Where not all ranks come within `timeout_seconds`, a `TrainingError`.
    """
    cuda = torch.cuda.is_available()
    if not cuda:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.update(rendezvous(os.environ, torch.cuda.device_count()))
    use_compile_lock()
    import deepspeed

    # DeepSpeed calls collectives by names that newer PyTorch renames; a user of this project cannot fix that.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\.c10d_logger")
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


def rendezvous(environment: Mapping[str, str], num_devices: int) -> dict[str, str]:
    """The variables to add to `environment` so that this process can join its group; none under a launcher.

    The process sees `num_devices` accelerators, 0 on CPU. A `ConfigError` names what is missing of a launcher's
    variables, and the right way to start under SLURM or MPI: a rank that took itself for the only one would train on
    its own.
    """
    if "RANK" in environment:
        return _check_launcher(environment)
    if (place := step_place(environment)) is not None:
        return _slurm_step(environment, place, num_devices)
    if environment.get("WORLD_SIZE", "1") != "1":
        return _check_launcher(environment)
    for name in _MPI_SIZES:
        if environment.get(name, "1") != "1":
            raise ConfigError(
                f"{name} = {environment[name]}: this is one of several processes of an MPI launcher, whose variables "
                "are not read; use deepspeed, torchrun or srun"
            )
    if "SLURM_JOB_ID" in environment and int(environment.get("SLURM_NTASKS", 1)) > 1:
        raise ConfigError(
            f"SLURM job {environment['SLURM_JOB_ID']} has SLURM_NTASKS = {environment['SLURM_NTASKS']} tasks, and this "
            "process is none of them but was started beside them: put `srun` before the command"
        )
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", **address}


def _check_launcher(environment: Mapping[str, str]) -> dict[str, str]:
    if missing := [name for name in _LAUNCHER if not environment.get(name)]:
        given = ", ".join(f"{name} = {environment[name]}" for name in _LAUNCHER if environment.get(name))
        raise ConfigError(
            f"{given}, but {', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not set; a launcher (deepspeed, "
            "torchrun) sets all of them: unset the variables to train on one process"
        )
    return {}


def free_port() -> int:
    """A port on 127.0.0.1 that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def first_host(node_list: str) -> str:
    """The first host of a SLURM node list: `gpu[03-05,9],login1 -> gpu03`."""
    first = re.split(r",(?![^\[]*\])", node_list)[0]
    return re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", first)


def _slurm_step(environment: Mapping[str, str], place: Place, num_devices: int) -> dict[str, str]:
    """One task of a step is one rank; the step's first host is the meeting point, since task 0 runs there."""
    local_rank = place.local_rank
    if num_devices == 1:
        local_rank = 0  # bound to its own GPU (--gpus-per-task, --gpu-bind), which it knows as number 0
    elif num_devices and local_rank >= num_devices:
        raise ConfigError(
            f"task {local_rank} of node {environment.get('SLURMD_NODENAME')} has no GPU: {num_devices} are visible "
            "there; set --ntasks-per-node to the GPUs of a node"
        )
    # The port is the same on all ranks, and another for each job and step, which may share a node; it lies below those
    # that Linux hands out by itself (32768 and up).
    job, step = int(required(environment, "SLURM_JOB_ID")), int(environment["SLURM_STEP_ID"])
    node_list = environment.get("SLURM_STEP_NODELIST") or required(environment, "SLURM_JOB_NODELIST")
    return {
        "RANK": str(place.rank),
        "WORLD_SIZE": str(place.world_size),
        "LOCAL_RANK": str(local_rank),
        "MASTER_ADDR": environment.get("MASTER_ADDR") or first_host(node_list),
        "MASTER_PORT": environment.get("MASTER_PORT") or str(10_000 + (job * 7 + step) % 20_000),
    }


def _unlink_shared_memory() -> None:
    """Take the name off this rank's 66 MiB for DeepSpeed's all-reduce on CPU, so that they go with the processes."""
    where = "_".join(os.environ[name] for name in ("MASTER_ADDR", "MASTER_PORT", "RANK"))
    try:
        torch.distributed.barrier()  # until all ranks have mapped it
    finally:
        Path(f"/dev/shm/deepspeed_allreduce_buffer_{os.getuid()}_{where}").unlink(missing_ok=True)
