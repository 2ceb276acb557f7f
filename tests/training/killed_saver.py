"""Trains and saves in a child that is killed at a random moment, again and again, and checks what each kill left.

A child resumes from the newest checkpoint, proves that what it loaded is what was saved, and then saves after every
step. It reports each save that is complete; none of these may be lost. Run as `killed_saver.py FOLDER KILLS`.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import random
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
os.environ.setdefault("DS_ACCELERATOR", "cpu")

import torch

import blip3o_ds.training.snapshot  # noqa: F401
from blip3o_ds.runs.checkpoint import find_checkpoint
from blip3o_ds.training.checkpoint import CheckpointWriter, load_checkpoint
from blip3o_ds.training.launch import init_distributed
from tests.training.conftest import Trainee


def fingerprint(trainee: Trainee) -> str:
    digest = hashlib.sha256()
    for ema in (False, True):
        for name, weight in sorted(trainee.weights(ema).items()):
            digest.update(name.encode() + weight.numpy().tobytes())
    return digest.hexdigest()


def save_forever(folder: Path, report: int) -> None:
    torch.set_num_threads(1)
    init_distributed(timeout_seconds=60)
    trainee = Trainee(2)
    writer = CheckpointWriter(trainee.engine, folder, with_ema=True, keep_last=2)
    newest = find_checkpoint(folder)
    step = 0
    if newest is not None:
        load_checkpoint(trainee.engine, newest)
        step = newest.step
        assert fingerprint(trainee) == newest.state["fingerprint"], f"{newest.path} is not what was saved"
        assert trainee.engine.global_steps == step
    os.write(report, b"ready\n")
    while True:
        step += 1
        trainee.step(step)
        writer.save(step, {"fingerprint": fingerprint(trainee)})
        if step % 3 == 0:  # or go on while it is being written
            writer.finish()
        if writer.last is not None:
            os.write(report, f"{writer.last.step}\n".encode())


def kill_one(folder: Path, delay: float) -> list[str]:
    """Start a child, kill it `delay` seconds after it is ready, and return what it reported."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reading)
        try:
            save_forever(folder, writing)
        except BaseException as error:
            os.write(writing, f"failed: {error!r}\n".encode())
            raise
        finally:
            os._exit(3)
    os.close(writing)
    reports = b""
    while b"\n" not in reports:
        chunk = os.read(reading, 1 << 16)
        if not chunk:
            break
        reports += chunk
    time.sleep(delay)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    while chunk := os.read(reading, 1 << 16):
        reports += chunk
    os.close(reading)
    return reports.decode().splitlines()


def main() -> None:
    folder, kills = Path(sys.argv[1]), int(sys.argv[2])
    # What an engine imports late, imported here once and not in every child.
    for module in ("blip3o_ds.model.dit", "torch._dynamo", "deepspeed.runtime.zero.muon.muon_optimizer"):
        importlib.import_module(module)

    moments = random.Random(0)
    completed, partial = 0, 0
    for _ in range(kills):
        reports = kill_one(folder, moments.uniform(0, 0.25))
        assert reports[:1] == ["ready"], reports
        assert not any(line.startswith("failed") for line in reports), reports
        completed = max([completed, *map(int, reports[1:])])
        partial += any(folder.glob(".step_*.partial"))
        newest = find_checkpoint(folder)
        found = newest.step if newest else 0
        assert found >= completed, f"the checkpoint of step {completed} was complete, and {found} is the newest now"
        completed = found
    assert partial, "no kill fell into a save: the moments prove nothing"
    sys.stdout.write(f"{kills} kills, {partial} of them during a save; {completed} steps completed\n")


if __name__ == "__main__":
    main()
