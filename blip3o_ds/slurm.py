"""Which process this is of how many, from the environment that a launcher or SLURM set.

A batch script has SLURM_PROCID and SLURM_NTASKS too, but is not a task: only `srun` sets SLURM_STEP_ID.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from blip3o_ds.errors import ConfigError


@dataclass(frozen=True)
class Place:
    """Process `rank` of `world_size`, which is number `local_rank` on its machine."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0


def find_place(environment: Mapping[str, str]) -> Place:
    """The place of a process that shares work with others: tasks of a launcher, `srun`, a job array, or both of SLURM.

    Raises ConfigError for an array with gaps, whose tasks cannot know their number, and for an incomplete step.
    """

    def number(name: str, default: int) -> int:
        return int(environment.get(name, default))

    if "WORLD_SIZE" in environment:
        return Place(number("RANK", 0), number("WORLD_SIZE", 1), number("LOCAL_RANK", 0))
    place = step_place(environment) or Place()
    task, tasks = 0, number("SLURM_ARRAY_TASK_COUNT", 1)
    if "SLURM_ARRAY_TASK_ID" in environment:
        first, step = number("SLURM_ARRAY_TASK_MIN", 0), number("SLURM_ARRAY_TASK_STEP", 1)
        task = (number("SLURM_ARRAY_TASK_ID", 0) - first) // step
        if not 0 <= task < tasks or (number("SLURM_ARRAY_TASK_MAX", 0) - first) // step != tasks - 1:
            raise ConfigError(
                f"SLURM_ARRAY_TASK_ID = {environment['SLURM_ARRAY_TASK_ID']} of {tasks} tasks: the array has gaps; "
                "submit one without, such as --array=0-7, of any length: finished parts are skipped"
            )
    return Place(task * place.world_size + place.rank, tasks * place.world_size, place.local_rank)


def step_place(environment: Mapping[str, str]) -> Place | None:
    """The place of this task in its `srun` step, None if the process is not a task of one."""
    if "SLURM_STEP_ID" not in environment:
        return None
    world_size = environment.get("SLURM_STEP_NUM_TASKS") or required(environment, "SLURM_NTASKS")
    rank, local_rank = required(environment, "SLURM_PROCID"), required(environment, "SLURM_LOCALID")
    return Place(int(rank), int(world_size), int(local_rank))


def required(environment: Mapping[str, str], name: str) -> str:
    """A variable that every task of a step has; ConfigError if it is missing."""
    if name not in environment:
        raise ConfigError(f"{name} is missing though SLURM_STEP_ID is set: start the process by srun")
    return environment[name]
