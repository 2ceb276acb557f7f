"""Which of how many processes this one is, from what a launcher left in the environment.

Understands the DeepSpeed and PyTorch launchers, `srun`, SLURM job arrays, and an array of `srun` steps.
"""

from __future__ import annotations

from collections.abc import Mapping

from blip3o_ds.errors import ConfigError
from blip3o_ds.slurm import Place, step_place


def find_place(environment: Mapping[str, str]) -> Place:
    """The place of this process; that of a single process where no launcher has been.

    Raises ConfigError for an array with gaps: its tasks cannot know their number; and for an incomplete step.
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
                "submit one without, such as --array=0-7, of any length: what is done already is skipped"
            )
    return Place(task * place.world_size + place.rank, tasks * place.world_size, place.local_rank)
