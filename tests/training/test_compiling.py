"""The lock under which DeepSpeed's operations are compiled: it ends with its process, and whoever waits says so."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from blip3o_ds import files
from blip3o_ds.errors import TrainingError
from blip3o_ds.training.compiling import CompileLock, extensions_folder

HOLD = """
import sys, time
from blip3o_ds.training.compiling import CompileLock
lock = CompileLock(sys.argv[1], 60)
lock.try_acquire()
print("held", flush=True)
time.sleep(600)
"""


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "lock"


@pytest.fixture
def holder(path):
    """Another process that holds the lock."""
    with subprocess.Popen([sys.executable, "-c", HOLD, path], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_what_a_killed_process_left_is_no_lock(path):
    path.touch()
    lock = CompileLock(str(path), 60)

    assert lock.try_acquire()

    lock.release()
    assert not path.exists()  # or a program that knows only PyTorch's lock would wait for ever


def test_whoever_waits_says_so_and_goes_on_when_the_other_is_killed(path, holder, monkeypatch, caplog):
    monkeypatch.setattr(files, "QUIET_SECONDS", 0.1)
    caplog.set_level(logging.INFO)
    threading.Timer(1.0, holder.kill).start()
    lock, started = CompileLock(str(path), 60), time.monotonic()

    assert lock.try_acquire()

    assert 0.9 < time.monotonic() - started < 30
    assert caplog.messages == [f"waiting for another process that compiles in {path.parent}"]
    lock.release()


def test_a_wait_has_an_end(path, holder):
    with pytest.raises(TrainingError, match=r"has been compiling there for 0.3 s; end it, or"):
        CompileLock(str(path), 0.3).try_acquire()


def test_without_locks_it_compiles_all_the_same(path, monkeypatch, caplog):
    def none(*_: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(files.fcntl, "flock", none)
    lock = CompileLock(str(path), 60)

    assert lock.try_acquire()

    lock.release()
    assert f"{path.parent}: no lock, so two processes may compile there at a time" in caplog.text


def test_those_who_wait_hold_it_in_turn(path):
    inside, most, count = 0, 0, 0
    guard = threading.Lock()

    def work() -> None:
        nonlocal inside, most, count
        for _ in range(20):
            lock = CompileLock(str(path), 60)
            lock.try_acquire()
            with guard:
                inside += 1
                most = max(most, inside)
            time.sleep(0.001)
            with guard:
                inside -= 1
                count += 1
            lock.release()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (most, count) == (1, 80)


@pytest.mark.slow
def test_a_run_starts_where_a_compiler_was_killed(tmp_path):
    """Its first operation is compiled into a folder in which another began to and left PyTorch's lock."""
    left = tmp_path / "deepspeed_shm_comm" / "lock"
    if (built := extensions_folder() / left.parent.name).is_dir():
        shutil.copytree(built, left.parent)  # so that there is less to do
    left.parent.mkdir(exist_ok=True)
    left.touch()
    program = "from blip3o_ds.training.launch import init_distributed; print(init_distributed(300))"
    environment = {**os.environ, "TORCH_EXTENSIONS_DIR": str(tmp_path), "DS_ACCELERATOR": "cpu"}

    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=300, check=False
    )

    assert done.returncode == 0, done.stdout + done.stderr
    assert "(0, 1, device(type='cpu'))" in done.stdout
    assert sorted(left.parent.glob("*.so"))
    assert not left.exists()
