"""Runs that are told to stop: they save, end well, and go on as if nothing had been."""

from __future__ import annotations

import json
import signal

import pytest

from blip3o_ds.training.preemption import requeue_or_explain

SETTINGS = {"train.max_steps": 100}


def losses(run) -> list[float]:
    return [line["loss"] for line in run.metrics()]


@pytest.fixture
def scontrol(tmp_path, monkeypatch):
    """A stand-in for SLURM's command that writes down what it was told; returns the file."""
    folder = tmp_path / "bin"
    folder.mkdir()
    script = folder / "scontrol"
    script.write_text(
        f'#!/bin/sh\necho "$@" >> {tmp_path}/told\n[ "$2" != 13 ] || {{ echo "Job is unlucky" >&2; exit 1; }}'
    )
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    return tmp_path / "told"


@pytest.mark.slow
def test_a_signal_to_one_rank_stops_all_at_one_step_and_the_resumed_run_is_bitwise_the_straight_one(start_ranks):
    straight = start_ranks("straight", 2, SETTINGS).run()
    assert straight.returncode == 0, straight.output

    ranks = start_ranks("stopped", 2, SETTINGS)
    ranks.wait_for_step(10)
    ranks.processes[1].send_signal(signal.SIGUSR1)
    stopped = ranks.run()
    assert stopped.returncode == 0, stopped.output
    assert 10 <= stopped_at(stopped, "SIGUSR1") < 100

    resumed = start_ranks("stopped", 2, SETTINGS, "--resume").run()
    assert resumed.returncode == 0, resumed.output
    assert losses(resumed) == losses(straight)


def test_sigterm_ends_a_run_with_status_0_and_a_checkpoint_to_go_on_from(start_ranks):
    ranks = start_ranks("stopped", 1, {"train.max_steps": 1000})
    ranks.wait_for_step(5)
    ranks.processes[0].send_signal(signal.SIGTERM)
    stopped = ranks.run()

    assert stopped.returncode == 0, stopped.output
    assert 5 <= stopped_at(stopped, "SIGTERM") < 1000
    assert f"--resume {stopped.run_dir}" in stopped.output
    assert not (stopped.run_dir / "final_summary.json").exists()


def stopped_at(run, name: str) -> int:
    """The step that the run says it stopped at, of which it must have a checkpoint and no others."""
    summary = json.loads((run.run_dir / "training_summary.json").read_text())
    assert summary["status"] == f"stopped by {name}"
    [checkpoint] = (run.run_dir / "checkpoints").glob("step_*")
    assert checkpoint.name == f"step_{summary['steps']:08d}"
    return summary["steps"]


def test_usr1_under_slurm_queues_the_job_again(scontrol, tmp_path):
    requeue_or_explain(tmp_path, signal.SIGUSR1, {"SLURM_JOB_ID": "7"})

    assert scontrol.read_text() == "requeue 7\n"


def test_sigterm_leaves_the_queue_to_who_sent_it(scontrol, tmp_path, caplog):
    caplog.set_level("INFO", "blip3o_ds")
    requeue_or_explain(tmp_path, signal.SIGTERM, {"SLURM_JOB_ID": "7"})

    assert not scontrol.exists()
    assert f"--resume {tmp_path}" in caplog.text


def test_a_job_that_cannot_be_queued_again_says_why_and_how_to_resume(scontrol, tmp_path, caplog):
    caplog.set_level("INFO", "blip3o_ds")
    requeue_or_explain(tmp_path, signal.SIGUSR1, {"SLURM_JOB_ID": "13"})

    assert "Job is unlucky" in caplog.text
    assert f"--resume {tmp_path}" in caplog.text


def test_a_node_without_scontrol_says_so_and_how_to_resume(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("PATH", "")
    caplog.set_level("INFO", "blip3o_ds")
    requeue_or_explain(tmp_path, signal.SIGUSR1, {"SLURM_JOB_ID": "7"})

    assert "No such file or directory: 'scontrol'" in caplog.text
    assert f"--resume {tmp_path}" in caplog.text
