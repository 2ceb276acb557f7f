"""Which task of an `srun` step this process is, from what SLURM left in its environment.

A batch script has SLURM_PROCID and SLURM_NTASKS too and is no task: only `srun` sets SLURM_STEP_ID.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from blip3o_ds.errors import ConfigError


@dataclass(frozen=True)
class Place:
    """Process `rank` of `world_size`, and the `local_rank`-th of its machine."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0


def step_place(environment: Mapping[str, str]) -> Place | None:
    """The place of this task in its step, None where the process is no task of one.

    Raises ConfigError where one of a step's variables is missing.
    """
    if "SLURM_STEP_ID" not in environment:
        return None
    world_size = environment.get("SLURM_STEP_NUM_TASKS") or required(environment, "SLURM_NTASKS")
    rank, local_rank = required(environment, "SLURM_PROCID"), required(environment, "SLURM_LOCALID")
    return Place(int(rank), int(world_size), int(local_rank))


def required(environment: Mapping[str, str], name: str) -> str:
    """A variable that every task of a step has; ConfigError where it is missing."""
    try:
        return environment[name]
    except KeyError:
        raise ConfigError(f"{name} is missing though SLURM_STEP_ID is set: start the process by srun") from None
