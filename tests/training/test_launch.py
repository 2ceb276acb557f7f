"""A process's place among the ranks, from what each launcher leaves in the environment."""

from __future__ import annotations

import pytest

from blip3o_ds.errors import ConfigError
from blip3o_ds.training.launch import first_host, rendezvous

# What srun of SLURM 22.05 set for the second task of the second of two nodes.
STEP = {
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NTASKS": "4",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_JOB_NODELIST": "gpu[01-02]",
    "SLURM_STEP_NODELIST": "gpu[01-02]",
    "SLURMD_NODENAME": "gpu02",
}

LAUNCHED = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1234"}


def test_a_task_of_srun_is_a_rank_and_meets_the_others_on_the_first_host():
    found = rendezvous(STEP, num_devices=2)

    assert found.pop("MASTER_PORT").isdigit()
    assert found == {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "gpu01"}


def test_all_tasks_of_a_step_get_one_port_and_neighbouring_jobs_and_steps_others():
    def port(**changes: str) -> str:
        return rendezvous({**STEP, **changes}, 0)["MASTER_PORT"]

    assert port(SLURM_PROCID="0", SLURM_LOCALID="0") == port()
    neighbours = [port(SLURM_JOB_ID=str(4711 + job), SLURM_STEP_ID=str(step)) for job in range(7) for step in range(5)]
    assert len(set(neighbours)) == len(neighbours)
    assert all(1024 < int(p) < 32768 for p in [*neighbours, port(SLURM_JOB_ID="67043327")])


def test_a_step_on_part_of_the_job_meets_on_its_own_first_host():
    assert rendezvous({**STEP, "SLURM_STEP_NODELIST": "gpu02"}, 0)["MASTER_ADDR"] == "gpu02"


def test_what_the_user_set_for_the_meeting_point_stays():
    found = rendezvous({**STEP, "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "1234"}, 2)

    assert (found["MASTER_ADDR"], found["MASTER_PORT"]) == ("10.0.0.1", "1234")


def test_a_task_bound_to_its_own_gpu_uses_number_0():
    assert rendezvous(STEP, num_devices=1)["LOCAL_RANK"] == "0"


def test_more_tasks_than_gpus_on_a_node_is_refused():
    with pytest.raises(ConfigError, match=r"task 2 of node gpu02 has no GPU: 2 are visible"):
        rendezvous({**STEP, "SLURM_LOCALID": "2"}, num_devices=2)


def test_a_launcher_that_set_the_rank_is_left_alone():
    assert rendezvous({**STEP, **LAUNCHED}, num_devices=2) == {}


def test_the_batch_script_itself_is_not_taken_for_a_task():
    with pytest.raises(ConfigError, match="put `srun` before the command"):
        rendezvous({"SLURM_JOB_ID": "4711", "SLURM_PROCID": "0", "SLURM_NTASKS": "8"}, num_devices=4)


@pytest.mark.parametrize("environment", [{}, {"SLURM_JOB_ID": "4711", "SLURM_PROCID": "0"}])
def test_a_process_on_its_own_is_a_world_of_one(environment):
    found = rendezvous(environment, num_devices=0)

    assert (found["RANK"], found["WORLD_SIZE"], found["MASTER_ADDR"]) == ("0", "1", "127.0.0.1")


@pytest.mark.parametrize("missing", list(LAUNCHED))
@pytest.mark.parametrize("value", ["", None])
def test_half_of_a_launchers_variables_are_an_error_that_names_the_others(missing, value):
    environment = {name: text for name, text in LAUNCHED.items() if name != missing}
    if value is not None:
        environment[missing] = value

    with pytest.raises(ConfigError, match=rf"RANK = .*but {missing} is not set; a launcher"):
        rendezvous(environment, num_devices=0)


@pytest.mark.parametrize("alone", ["RANK", "WORLD_SIZE"])
def test_one_of_a_launchers_variables_alone_is_an_error(alone):
    with pytest.raises(ConfigError, match=rf"{alone} = 2, but .* are not set"):
        rendezvous({alone: "2"}, num_devices=0)


@pytest.mark.parametrize("name", ["OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE"])
def test_one_process_of_several_of_mpi_does_not_train_on_its_own(name):
    with pytest.raises(ConfigError, match=f"{name} = 2: .*use deepspeed, torchrun or srun"):
        rendezvous({name: "2"}, num_devices=0)
    assert rendezvous({name: "1"}, num_devices=0)["WORLD_SIZE"] == "1"
    assert rendezvous({**LAUNCHED, name: "2"}, num_devices=0) == {}
    assert rendezvous({**STEP, name: "2"}, num_devices=2)["RANK"] == STEP["SLURM_PROCID"]


# As `scontrol show hostnames` expands them; tests/cluster asks it.
@pytest.mark.parametrize(
    ("names", "first"),
    [("a", "a"), ("gpu[03-05,9],login1", "gpu03"), ("r[1-2]n[07-08]", "r1n07"), ("login1,gpu[3-4]", "login1")],
)
def test_the_first_host_of_a_node_list(names, first):
    assert first_host(names) == first
