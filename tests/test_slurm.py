"""The place of a process, from what each launcher leaves in the environment."""

from __future__ import annotations

import pytest

from blip3o_ds.errors import ConfigError
from blip3o_ds.slurm import Place, find_place

STEP = {"SLURM_STEP_ID": "0", "SLURM_LOCALID": "1"}
ARRAY = {"SLURM_ARRAY_TASK_MIN": "4", "SLURM_ARRAY_TASK_MAX": "10", "SLURM_ARRAY_TASK_STEP": "2"}


@pytest.mark.parametrize(
    ("environment", "place"),
    [
        ({}, Place(0, 1, 0)),
        ({"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}, Place(5, 8, 1)),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}, Place(0, 1, 0)),  # a batch script is one process
        ({**STEP, "SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "4"}, Place(3, 4, 1)),
        ({**STEP, "SLURM_PROCID": "3", "SLURM_NTASKS": "4"}, Place(3, 4, 1)),
        ({**ARRAY, "SLURM_ARRAY_TASK_ID": "8", "SLURM_ARRAY_TASK_COUNT": "4"}, Place(2, 4, 0)),
        (
            {
                **STEP,
                **ARRAY,
                "SLURM_ARRAY_TASK_ID": "8",
                "SLURM_ARRAY_TASK_COUNT": "4",
                "SLURM_PROCID": "1",
                "SLURM_STEP_NUM_TASKS": "2",
            },
            Place(5, 8, 1),
        ),
    ],
)
def test_each_launcher_is_understood(environment, place):
    assert find_place(environment) == place


@pytest.mark.parametrize("task", ["4", "10"])
def test_an_array_with_gaps_is_refused(task):
    with pytest.raises(ConfigError, match="the array has gaps; submit one without"):
        find_place({**ARRAY, "SLURM_ARRAY_TASK_ID": task, "SLURM_ARRAY_TASK_COUNT": "2"})
