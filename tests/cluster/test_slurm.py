"""Training under a real SLURM of two nodes: every way to start it, and what happens when it is interrupted."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
import skimage.io

from blip3o_ds.data.reading.dataset import EmbeddingDataset
from blip3o_ds.data.tools.verify import verify
from blip3o_ds.planning.job_script import render_job
from blip3o_ds.training.launch import first_host
from tests.cluster.slurm import SlurmCluster
from tests.conftest import PROJECT, SMALL, train_command, write_embeddings

pytestmark = pytest.mark.slow

JOB = PROJECT / "scripts" / "train_clip_repro.job"
ONE_TASK_PER_NODE = ("--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=0", "--cpus-per-task=1")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_embeddings(tmp_path_factory.mktemp("data") / "train", 40)


SETTINGS = {"train.max_steps": 120, "train.save_every": 10, "train.keep_last": 2}


def flags(settings: dict) -> list[str]:
    return [f"--set={key}={json.dumps(value)}" for key, value in {**SMALL, **settings}.items()]


def submit(slurm: SlurmCluster, data: Path, output: Path, script: Path = JOB, settings: dict = SETTINGS) -> int:
    """Submit a training job on both nodes; its log and its runs go to `output`."""
    output.mkdir(exist_ok=True)
    environment = {"DATA_DIR": str(data), "OUTPUT_DIR": str(output), "MODEL_SIZE": "demo"}
    options = (*ONE_TASK_PER_NODE, f"--output={output}/%x_%j.out")
    return slurm.submit(script, *flags(settings), options=options, environment=environment)


def submit_command(slurm: SlurmCluster, output: Path, command: str) -> int:
    """Submit a batch script of one command, on both nodes."""
    output.mkdir(exist_ok=True)
    script = output / "job.sh"
    script.write_text(f"#!/bin/bash\n{command}\n")
    return slurm.submit(script, options=(*ONE_TASK_PER_NODE, f"--output={output}/%j.out"))


def losses(output: Path) -> list[float]:
    """Of the one run in `output`, by step."""
    [metrics] = output.glob("**/metrics.jsonl")
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    return [line["loss"] for line in lines if line["kind"] == "train"]


@pytest.fixture(scope="module")
def straight(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of two processes on one machine, under the deepspeed launcher, with nothing in their way."""
    output = tmp_path_factory.mktemp("straight")
    zero = ["--deepspeed_config", str(PROJECT / "ds_configs" / "zero1.json")]
    command = train_command(data, output, 2, SETTINGS, zero)
    done = subprocess.run(command, capture_output=True, text=True, cwd=PROJECT, timeout=240, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return output


def test_the_shipped_job_script_trains_on_two_nodes_as_one_machine_does(slurm, data, straight, tmp_path):
    job = submit(slurm, data, tmp_path)

    assert slurm.wait(job) == "COMPLETED", slurm.log(job)
    assert "global batch 8 = 2 ranks x 4" in slurm.log(job)
    assert losses(tmp_path) == losses(straight)


@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_other_launchers_train_on_two_nodes_too(slurm, data, straight, tmp_path, launcher):
    script = f"{PROJECT}/scripts/train_clip_reproduction.py --chunked_embeddings_dir {data} --output_dir {tmp_path} "
    script += f"--model_size demo --deepspeed_config {PROJECT}/ds_configs/zero1.json "
    script += " ".join(f"'{flag}'" for flag in flags({**SETTINGS, "train.save_every": 0}))
    hostfile = tmp_path / "hostfile"
    hostfile.write_text("node1 slots=1\nnode2 slots=1\n")
    torchrun = "srun torchrun --nnodes 2 --nproc_per_node 1 --rdzv_backend c10d --rdzv_endpoint node1:29500"
    deepspeed = f"deepspeed --launcher slurm --hostfile {hostfile} --no_ssh_check --master_addr node1"
    command = f"{torchrun if launcher == 'torchrun' else deepspeed} {script}"

    job = submit_command(slurm, tmp_path / "job", command)

    assert slurm.wait(job) == "COMPLETED", slurm.log(job)
    assert losses(tmp_path) == losses(straight)


def kill_rank_1(slurm: SlurmCluster, _job: int) -> None:
    [pid] = slurm.nodes[1].processes("train_clip_reproduction.py")
    slurm.nodes[1].run("kill", "-KILL", str(pid))


def kill_slurmd(slurm: SlurmCluster, job: int, number: int) -> None:
    """The node returns once SLURM has given it up; its rank is frozen, or the job might end before that."""
    slurm.kill_slurmd(number)
    slurm.nodes[number - 1].run("pkill", "-STOP", "--full", "train_clip_reproduction.py")
    try:
        slurm.wait_for_state(job, {"COMPLETING", "PENDING"}, 60)
    finally:
        slurm.start_slurmd(number)
        slurm.wait_for_nodes()


INTERRUPTIONS = {
    "requeued by scontrol": SlurmCluster.requeue,
    "told that its time is up": lambda slurm, job: slurm.signal_batch(job, "USR1"),
    "one rank killed": kill_rank_1,
    "its step cancelled": lambda slurm, job: slurm.cancel(job, step=0),
    "slurmd killed on the batch node": lambda slurm, job: kill_slurmd(slurm, job, 1),
    "slurmd killed on the other node": lambda slurm, job: kill_slurmd(slurm, job, 2),
}


@pytest.mark.parametrize("interruption", INTERRUPTIONS)
def test_an_interrupted_job_queues_itself_again_and_ends_as_the_uninterrupted_one(
    slurm, data, straight, tmp_path, interruption
):
    rendered = tmp_path / "rendered.job"
    rendered.write_text(render_job({"nodes": 2, "gpus-per-node": 1, "job-name": "tried"}, {}))
    job = submit(slurm, data, tmp_path, script=rendered)
    slurm.wait_for_log(job, "checkpoint .*step_00000010")

    INTERRUPTIONS[interruption](slurm, job)

    assert slurm.wait(job) == "COMPLETED", slurm.log(job)
    assert "resumed from" in slurm.log(job)
    assert (tmp_path / "tried").is_dir()
    assert losses(tmp_path) == losses(straight)


def test_the_evaluation_job_ends_its_log_with_the_result(slurm, data, straight, tmp_path):
    [run_dir] = straight.glob("clip_repro_*")
    options = ("--nodes=1", "--gpus-per-node=0", "--cpus-per-task=1", "--array=0", f"--output={tmp_path}/log")
    environment = {"MODEL": str(run_dir), "DATA_DIR": str(data)}
    job = slurm.submit(PROJECT / "scripts" / "evaluate.job", options=options, environment=environment)

    assert slurm.wait(job) == "COMPLETED", slurm.log(job)
    result = json.loads(slurm.log(job).splitlines()[-1])
    assert result["evaluation"]["train"]["num_samples"] == 40


def test_the_tasks_of_an_extraction_array_make_one_dataset_together(slurm, tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    for i in range(9):  # a part of the work is eight shards' worth, so each task has one
        skimage.io.imsave(images / f"{i}.png", np.full((64, 64, 3), 25 * i, np.uint8), check_contrast=False)
    encoders = {"CONDITION": "efficientnet-lite2-head", "TARGET": "efficientnet-lite0-last-block"}
    options = ("--nodes=1", "--gpus-per-node=0", "--cpus-per-task=1", "--array=0-1", f"--output={tmp_path}/log_%a")
    environment = {"IMAGES": str(images), "DST": str(tmp_path / "set"), **encoders}
    script = PROJECT / "scripts" / "extract_embeddings.job"
    job = slurm.submit(script, "--samples_per_shard=1", options=options, environment=environment)

    for task in (f"{job}_0", f"{job}_1"):
        assert slurm.wait(task) == "COMPLETED", slurm.log(task)
    assert verify(tmp_path / "set").problems == []
    assert len(EmbeddingDataset(tmp_path / "set")) == 9


def test_wrong_settings_end_the_job_at_once_and_are_not_tried_again(slurm, data, tmp_path):
    job = submit(slurm, data, tmp_path, settings={"model.eva_dim": 4096})

    assert slurm.wait(job) == "FAILED"
    assert "--set model.eva_dim=12" in slurm.log(job)
    assert "not requeued" in slurm.log(job)
    assert slurm.job(job)["ExitCode"] == "2:0"


def test_a_process_beside_the_tasks_of_a_job_is_told_to_use_srun(slurm, data, tmp_path):
    script = f"{PROJECT}/scripts/train_clip_reproduction.py --chunked_embeddings_dir {data} --output_dir {tmp_path}"
    job = submit_command(slurm, tmp_path / "job", f"python {script}")

    assert slurm.wait(job) == "FAILED"
    assert "put `srun` before the command" in slurm.log(job)


@pytest.mark.parametrize("names", ["node1", "gpu[03-05,9],login1", "a,b", "r[1-2]n[07-08]", "x[12]", "login1,gpu[3-4]"])
def test_the_first_host_of_a_list_is_the_one_that_scontrol_finds(slurm, names):
    hosts = slurm.command("scontrol", "show", "hostnames", names).stdout.split()

    assert first_host(names) == hosts[0]
