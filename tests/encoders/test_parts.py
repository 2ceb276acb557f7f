"""An extraction shared by processes: the same dataset for any number of them, nothing done twice."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import blip3o_ds.encoders.extract as extract_module
from blip3o_ds.data.format.manifest import Manifest
from blip3o_ds.data.format.writer import sole_writer
from blip3o_ds.data.reading.dataset import EmbeddingDataset
from blip3o_ds.data.tools.verify import verify
from blip3o_ds.encoders.extract import extract
from blip3o_ds.encoders.registry import ENCODERS
from blip3o_ds.errors import DataError
from tests.conftest import free_port

OPTIONS = {"condition": "left", "target": "right", "device": "cpu", "samples_per_shard": 2, "batch_size": 2}

# Registers two small encoders, then runs the command line; SLOW seconds are spent on each batch.
PROGRAM = """
import importlib.util, os, sys, time
spec = importlib.util.spec_from_file_location("small", {conftest!r})
small = importlib.util.module_from_spec(spec)
spec.loader.exec_module(small)
from blip3o_ds.cli import main
from blip3o_ds.encoders.registry import ENCODERS

def load(spec, options):
    projection = small.PatchProjection(spec, len(spec.name))
    forward = projection.forward
    projection.forward = lambda images: (time.sleep(float(os.environ.get("SLOW", 0))), forward(images))[1]
    return projection

for name in ("left", "right"):
    ENCODERS[name] = small.tiny_spec(name, load=load)
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(autouse=True)
def _encoders(make_spec, monkeypatch) -> None:
    monkeypatch.setitem(ENCODERS, "left", make_spec("left", seed=4))
    monkeypatch.setitem(ENCODERS, "right", make_spec("right", seed=5))


@pytest.fixture
def tars(write_tar, make_png, tmp_path) -> Path:
    """Five tars of five pictures each; names repeat from tar to tar."""
    for tar in range(5):
        write_tar(f"tars/{tar:05d}.tar", {f"{n}.png": make_png(10 * tar + n) for n in range(5)})
    return tmp_path / "tars"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("world_size", [2, 3, 8])
def test_any_number_of_processes_makes_the_same_dataset(tars, tmp_path, world_size):
    extract(tars, tmp_path / "one", **OPTIONS)
    results = [extract(tars, tmp_path / "many", **OPTIONS, rank=r, world_size=world_size) for r in range(world_size)]

    assert contents(tmp_path / "many") == contents(tmp_path / "one")
    assert verify(tmp_path / "many").problems == []
    assert sum(result["written"] for result in results) == 25
    assert [result["parts_left"] == 0 for result in results].index(True) == min(world_size, 5) - 1
    assert EmbeddingDataset(tmp_path / "many").keys(0) == ["00000_0", "00000_1"]


def test_a_folder_of_files_is_divided_too(write_folder, make_png, tmp_path, monkeypatch):
    monkeypatch.setattr(extract_module, "_SHARDS_PER_PART", 1)
    folder = write_folder({f"{n:02d}.png": make_png(n) for n in range(7)})
    results = [extract(folder, tmp_path / "set", **OPTIONS, rank=rank, world_size=2) for rank in range(2)]
    assert [result["written"] for result in results] == [4, 3]
    assert [shard.num_samples for shard in Manifest.load(tmp_path / "set").shards] == [2, 2, 2, 1]


def test_a_restart_on_another_number_of_processes_does_what_is_missing_alone(tars, tmp_path):
    extract(tars, tmp_path / "whole", **OPTIONS)
    first = extract(tars, tmp_path / "set", **OPTIONS, rank=1, world_size=3)
    second = extract(tars, tmp_path / "set", **OPTIONS)
    third = extract(tars, tmp_path / "set", **OPTIONS)

    assert (first["written"], first["parts_left"]) == (10, 3)
    assert (second["written"], second["parts_left"], second["samples"]) == (15, 0, 25)
    assert (third["written"], third["samples"]) == (0, 25)
    assert contents(tmp_path / "set") == contents(tmp_path / "whole")


def test_a_part_that_another_process_is_at_is_left_to_it(tars, tmp_path):
    extract(tars, tmp_path / "whole", **OPTIONS)
    part = tmp_path / "set" / ".parts" / "part_0000001"
    part.mkdir(parents=True)
    with sole_writer(part):
        first = extract(tars, tmp_path / "set", **OPTIONS)
    second = extract(tars, tmp_path / "set", **OPTIONS)

    assert (first["written"], first["parts_left"]) == (20, 1)
    assert (second["written"], second["parts_left"]) == (5, 0)
    assert contents(tmp_path / "set") == contents(tmp_path / "whole")


def test_a_damaged_tar_does_not_keep_the_others_from_being_done(tars, tmp_path, make_png, write_tar):
    good = (tars / "00001.tar").read_bytes()
    (tars / "00001.tar").write_bytes(good[:3000] + bytes([255]) * (len(good) - 3000))
    with pytest.raises(DataError, match=r"1 of 5 parts could not be written, the others are done.*00001\.tar"):
        extract(tars, tmp_path / "set", **OPTIONS)
    assert not (tmp_path / "set" / "manifest.json").exists()

    (tars / "00001.tar").write_bytes(good)
    result = extract(tars, tmp_path / "set", **OPTIONS)
    assert (result["written"] + result["skipped_existing"], result["samples"]) == (5, 25)


def test_broken_pictures_of_all_parts_are_listed_and_a_part_may_be_empty(tars, write_tar, tmp_path):
    write_tar("tars/00005.tar", {"a.png": b"not a picture", "b.png": b""})
    write_tar("tars/00006.tar", {"c.png": b"?"})
    for rank in range(3):
        extract(tars, tmp_path / "set", **OPTIONS, rank=rank, world_size=3)
    lines = (tmp_path / "set" / "broken_images.jsonl").read_text().splitlines()
    assert [json.loads(line)["key"] for line in lines] == ["00005_a", "00005_b", "00006_c"]
    assert Manifest.load(tmp_path / "set").num_samples == 25


def test_other_settings_or_images_are_refused(tars, tmp_path, write_tar, make_png):
    extract(tars, tmp_path / "begun", **OPTIONS, world_size=2)
    extract(tars, tmp_path / "finished", **OPTIONS)
    for dst in (tmp_path / "begun", tmp_path / "finished"):
        before = contents(dst)
        with pytest.raises(DataError, match="was started with another spec"):
            extract(tars, dst, **OPTIONS, dtype="fp32")
        assert contents(dst) == before
    write_tar("tars/00009.tar", {"0.png": make_png(0)})
    with pytest.raises(DataError, match=r"another parts_sha256 .*, num_parts \(5, now 6\).*data append"):
        extract(tars, tmp_path / "finished", **OPTIONS)


@pytest.mark.parametrize("moved", range(7))
def test_a_join_that_was_killed_is_finished_by_the_next_run(tars, tmp_path, monkeypatch, moved):
    extract(tars, tmp_path / "whole", **OPTIONS)
    replace, left = os.replace, [moved]

    def killed(source, target):
        if Path(target).parent.name == "set" and not left[0]:
            raise KeyboardInterrupt
        left[0] -= Path(target).parent.name == "set"
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            extract(tars, tmp_path / "set", **OPTIONS)
    assert not (tmp_path / "set" / "manifest.json").exists()

    assert extract(tars, tmp_path / "set", **OPTIONS)["written"] == 0
    assert contents(tmp_path / "set") == contents(tmp_path / "whole")


@pytest.fixture
def start(tmp_path) -> Callable[..., subprocess.Popen]:
    """Start `data extract` in a process of its own, with these variables in its environment."""
    program = tmp_path / "program.py"
    program.write_text(PROGRAM.format(conftest=str(Path(__file__).with_name("conftest.py"))))

    def run(images: Path, dst: Path, *launcher: str, **environment: str) -> subprocess.Popen:
        command = [*(launcher or (sys.executable,)), str(program), "data", "extract", str(images), str(dst)]
        command += ["--condition", "left", "--target", "right", "--samples_per_shard", "2", "--batch_size", "2"]
        command.append("--json")
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **environment}
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)

    return run


@pytest.mark.slow
def test_two_processes_of_a_job_array_share_the_work_and_survive_a_kill(tars, tmp_path, start):
    array = {"SLURM_ARRAY_TASK_COUNT": "2", "SLURM_ARRAY_TASK_MIN": "1", "SLURM_ARRAY_TASK_MAX": "2"}
    assert start(tars, tmp_path / "whole").wait(100) == 0

    processes = [start(tars, tmp_path / "set", **array, SLURM_ARRAY_TASK_ID=task, SLOW="0.2") for task in ("1", "2")]
    deadline = time.monotonic() + 60
    while not list((tmp_path / "set").glob(".parts/part_0000000.json")):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    processes[0].send_signal(signal.SIGKILL)
    outputs = [process.communicate(timeout=100)[0] for process in processes]
    assert not (tmp_path / "set" / "manifest.json").exists()
    last = json.loads(outputs[1].splitlines()[-1])
    again = start(tars, tmp_path / "set", **array, SLURM_ARRAY_TASK_ID="1")
    result = json.loads(again.communicate(timeout=100)[0].splitlines()[-1])

    assert last["written"] == 10
    assert (result["parts_left"], result["samples"]) == (0, 25)
    assert result["written"] <= 10  # of its 15, a part was done
    assert contents(tmp_path / "set") == contents(tmp_path / "whole")


@pytest.mark.slow
def test_the_deepspeed_launcher_divides_the_work(tars, tmp_path, start):
    launcher = Path(sys.executable).with_name("deepspeed")
    port = str(free_port())
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"

    process = start(
        tars, tmp_path / "set", str(launcher), "--num_gpus", "2", "--master_port", port, PATH=path, DS_ACCELERATOR="cpu"
    )
    output = process.communicate(timeout=200)[0]

    assert process.returncode == 0, output
    assert "process 0 of 2 has 3 of 5 parts" in output
    assert "process 1 of 2 has 2 of 5 parts" in output
    assert verify(tmp_path / "set").problems == []
    assert Manifest.load(tmp_path / "set").num_samples == 25
    assert torch.isfinite(EmbeddingDataset(tmp_path / "set").read(0, 0)["eva"]).all()
