"""`deepspeed --hostfile` over pdsh and ssh between two machines: it trains, and faults of the network end it."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from tests.cluster.machines import wait_until
from tests.cluster.ssh import Hosts
from tests.conftest import PROJECT, train_command, write_embeddings

pytestmark = pytest.mark.slow

TRAINING = "train_clip_reproduction.py"
SETTINGS = {"train.max_steps": 40, "train.save_every": 10, "train.timeout_seconds": 20}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_embeddings(tmp_path_factory.mktemp("data") / "train", 40)


def start(
    hosts: Hosts, data: Path, output: Path, *extra: str, settings: dict = SETTINGS, names=("node1", "node2")
) -> subprocess.Popen:
    """The launcher on node1; its output goes to `output/log`."""
    output.mkdir(exist_ok=True)
    hostfile = output / "hostfile"
    hostfile.write_text("".join(f"{name} slots=1\n" for name in names))
    command = train_command(data, output, None, settings, [*extra])[1:]  # without the interpreter
    launcher = ["deepspeed", "--hostfile", str(hostfile)]
    with open(output / "log", "ab") as log:
        return hosts.nodes[0].start(*launcher, *command, stdout=log, stderr=log, cwd=PROJECT)


def log(output: Path) -> str:
    return (output / "log").read_text()


def losses(output: Path) -> list[float]:
    [metrics] = output.glob("*/metrics.jsonl")
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    return [line["loss"] for line in lines if line["kind"] == "train"]


def test_a_run_over_ssh_trains_as_one_on_a_single_machine(hosts, data, tmp_path, launch):
    launcher = start(hosts, data, tmp_path / "two")
    assert launcher.wait(90) == 0, log(tmp_path / "two")

    single = launch(data, tmp_path / "one", 2, SETTINGS)

    assert single.returncode == 0, single.output
    assert losses(tmp_path / "two") == losses(tmp_path / "one")


def test_a_host_that_cannot_be_reached_is_named_and_ends_the_launch(hosts, data, tmp_path):
    launcher = start(hosts, data, tmp_path, names=["node1", "node3"])

    assert launcher.wait(60) != 0
    assert "Could not resolve hostname node3" in log(tmp_path)  # says ssh, at once
    assert "the ranks did not find each other (RANK=0, WORLD_SIZE=2" in log(tmp_path)  # say those who waited for it


def test_both_ends_stop_when_the_cable_is_cut_and_the_run_goes_on_when_it_is_mended(hosts, data, tmp_path):
    settings = {**SETTINGS, "train.max_steps": 5000, "train.save_every": 50, "train.timeout_seconds": 8}
    launcher = start(hosts, data, tmp_path, settings=settings)
    wait_until(lambda: "checkpoint " in log(tmp_path) or launcher.poll() is not None, 60, "no checkpoint")

    hosts.cut()
    wait_until(lambda: not any(node.processes(TRAINING) for node in hosts.nodes), 30, "one end goes on")
    assert launcher.wait(10) != 0
    hosts.mend()

    resumed = start(hosts, data, tmp_path, "--resume", settings=settings)
    wait_until(lambda: "resumed from" in log(tmp_path), 60, "no resume")
    wait_until(lambda: log(tmp_path).rpartition("resumed from")[2].count("checkpoint ") > 1, 60, "no progress")
    resumed.terminate()  # the launcher passes it on
    assert resumed.wait(20) != 0
