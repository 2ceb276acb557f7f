"""Checkpoints written behind the training: whole or absent, and what is loaded is what was saved."""

from __future__ import annotations

import random
import shutil
import subprocess
import sys
import threading

import pytest
import torch
from safetensors.torch import load_file

from blip3o_ds.errors import CheckpointError
from blip3o_ds.runs.checkpoint import SEAL, find_checkpoint
from blip3o_ds.training.checkpoint import CheckpointWriter, load_checkpoint, newest_checkpoint
from tests.conftest import PROJECT


def writer_of(learner, folder, **policy) -> CheckpointWriter:
    return CheckpointWriter(learner.engine, folder, with_ema=True, **{"keep_last": 3, **policy})


def steps_in(folder) -> list[int]:
    return sorted(int(path.name[5:]) for path in folder.glob("step_*"))


@pytest.mark.parametrize("stage", range(4))
def test_going_back_in_a_living_engine_takes_the_same_steps_again(trainee, tmp_path, stage):
    learner = trainee(stage)
    for number in range(3):
        learner.step(number)
    writer = writer_of(learner, tmp_path)
    writer.save(3, {"a": [1]})
    saved = writer.finish()
    first = [learner.step(number) for number in range(3, 8)]

    load_checkpoint(learner.engine, saved)

    assert find_checkpoint(tmp_path) == saved
    assert saved.state == {"a": [1]}
    assert [learner.step(number) for number in range(3, 8)] == first


@pytest.mark.parametrize("stage", range(4))
def test_a_checkpoint_holds_the_state_of_its_step_though_training_goes_on_while_it_is_written(
    trainee, tmp_path, monkeypatch, stage
):
    from blip3o_ds.training import snapshot

    may_write = threading.Event()
    write = snapshot.write_verified
    monkeypatch.setattr(snapshot, "write_verified", lambda *args: may_write.wait(30) and write(*args))
    learner = trainee(stage)
    learner.step(0)
    expected = learner.weights(), learner.weights(ema=True)
    writer = writer_of(learner, tmp_path)

    writer.save(1, {})
    later = [learner.step(number) for number in range(1, 4)]  # the disk is still waiting
    assert steps_in(tmp_path) == []
    may_write.set()
    saved = writer.finish()

    for name, weights in zip(("model", "ema"), expected, strict=True):
        found = load_file(saved.path / f"{name}.safetensors")
        assert all(torch.equal(found[key], value) for key, value in weights.items())
    load_checkpoint(learner.engine, saved)
    assert [learner.step(number) for number in range(1, 4)] == later


def test_all_transfers_from_a_gpu_are_complete_before_the_thread_writes(trainee, tmp_path, monkeypatch):
    from blip3o_ds.training import snapshot

    learner = trainee(2)
    learner.step(0)
    writer = writer_of(learner, tmp_path)
    events = []
    for name in ("copy_to_host", "write_verified"):
        original = getattr(snapshot, name)
        monkeypatch.setattr(snapshot, name, lambda *args, n=name, f=original: events.append(n) or f(*args))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: events.append("synchronize"))
    monkeypatch.setattr(torch.cuda, "get_rng_state", torch.get_rng_state)

    writer.save(1, {})
    writer.finish()

    last_copy = len(events) - 1 - events[::-1].index("copy_to_host")
    assert "synchronize" in events[last_copy : events.index("write_verified")]


def test_the_newest_are_kept_and_every_nth_and_the_best(trainee, tmp_path):
    learner = trainee(2)
    learner.step(0)
    writer = writer_of(learner, tmp_path, keep_last=2, keep_every=4)

    for step in range(1, 11):
        writer.save(step, {}, pinned_step=3 if step >= 3 else None)
    writer.finish()

    assert steps_in(tmp_path) == [3, 4, 8, 9, 10]
    assert (tmp_path / "best").read_text() == "step_00000003"
    assert (tmp_path / "latest").read_text() == "step_00000010"


def test_a_save_removes_no_checkpoint_of_a_later_step(trainee, tmp_path):
    learner = trainee(2)
    learner.step(0)
    writer = writer_of(learner, tmp_path, keep_last=1)
    for step in (3, 7, 9):
        (tmp_path / f"step_{step:08d}").mkdir(parents=True)

    writer.save(5, {})
    saved = writer.finish()

    assert steps_in(tmp_path) == [5, 7, 9]
    assert saved.step == 5


def test_damaged_checkpoints_after_the_newest_whole_one_are_set_aside_and_never_removed(trainee, tmp_path, caplog):
    learner = trainee(2)
    learner.step(0)
    writer = writer_of(learner, tmp_path, keep_last=1)

    def damaged(step: int, content: bytes) -> None:
        (tmp_path / f"step_{step:08d}").mkdir()
        (tmp_path / f"step_{step:08d}" / "model.safetensors").write_bytes(content)

    for content in (b"first", b"second"):  # the run comes to step 7 again, and is damaged there again
        writer.save(2, {})
        writer.finish()
        damaged(7, content)
        damaged(8, content)

        assert newest_checkpoint(tmp_path).step == 2

    aside = sorted(path.name for path in tmp_path.glob("damaged_*"))
    assert aside == [f"damaged_step_0000000{name}" for name in ("7", "7_2", "8", "8_2")]
    assert [(tmp_path / name / "model.safetensors").read_bytes() for name in aside] == 2 * [b"first", b"second"]
    assert f"{tmp_path / 'step_00000007'} was renamed to damaged_step_00000007" in caplog.text
    writer.save(9, {})
    writer.finish()
    assert sorted(path.name for path in tmp_path.glob("*step_*")) == [*aside, "step_00000009"]


def test_an_old_checkpoint_that_cannot_be_removed_is_a_warning_and_goes_at_the_next_save(
    trainee, tmp_path, monkeypatch, caplog
):
    learner = trainee(2)
    learner.step(0)
    writer = writer_of(learner, tmp_path, keep_last=1)
    writer.save(1, {})
    writer.finish()

    def busy(path):
        raise OSError(16, "Device or resource busy", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", busy)
        writer.save(2, {})
        assert writer.finish().step == 2
    assert "step_00000001 could not be removed" in caplog.text
    assert steps_in(tmp_path) == [1, 2]
    writer.save(3, {})
    writer.finish()

    assert steps_in(tmp_path) == [3]


def test_a_seal_that_cannot_be_made_is_an_error_whatever_its_type(trainee, tmp_path):
    learner = trainee(2)
    learner.step(0)
    writer = writer_of(learner, tmp_path)

    writer.save(1, {"loss": float("nan")})  # JSON has no word for it: a ValueError

    with pytest.raises(CheckpointError, match="step_00000001 was not written"):
        writer.finish()
    assert list(tmp_path.glob("*step*")) == []


def test_a_write_that_fails_is_an_error_at_the_next_save_and_leaves_the_former_checkpoint(
    trainee, tmp_path, monkeypatch
):
    from blip3o_ds.training import snapshot

    learner = trainee(2)
    learner.step(0)
    writer = writer_of(learner, tmp_path)
    writer.save(1, {})
    writer.finish()

    def full(path, write):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(snapshot, "write_verified", full)
    writer.save(2, {})
    with pytest.raises(CheckpointError, match=r"step_00000002 was not written: rank 0: .*No space left"):
        writer.save(3, {})

    assert [path.name for path in tmp_path.glob("*step*")] == ["step_00000001"]
    assert find_checkpoint(tmp_path).step == 1


def test_a_disk_that_gives_back_something_else_is_noticed(tmp_path, monkeypatch):
    from blip3o_ds.training import snapshot

    monkeypatch.setattr(snapshot.os, "fsync", lambda _: (tmp_path / "file").write_bytes(b"contenT"))

    with pytest.raises(OSError, match="not what was written"):
        snapshot.write_verified(tmp_path / "file", lambda file: file.write(b"content"))


class Code:
    def __reduce__(self):
        return print, ("code from a file ran",)


def test_no_code_is_run_from_a_file(tmp_path, capsys):
    from blip3o_ds.training.snapshot import SnapshotEngine

    torch.save({"module": Code()}, tmp_path / "states.pt")

    with pytest.raises(CheckpointError, match=r"states.pt: holds more than tensors and plain values \(print\)"):
        SnapshotEngine().load(str(tmp_path / "states.pt"))
    assert "code from a file ran" not in capsys.readouterr().out


@pytest.fixture(scope="module")
def two_checkpoints(one_rank, tmp_path_factory):
    """A folder with real checkpoints of steps 1 and 2."""
    from tests.training.conftest import Trainee

    folder = tmp_path_factory.mktemp("checkpoints")
    learner = Trainee(2)
    writer = writer_of(learner, folder)
    for step in (1, 2):
        learner.step(step)
        writer.save(step, {})
    writer.finish()
    return folder


@pytest.mark.parametrize("damage", ["cut", "flip"])
def test_damage_at_any_byte_of_any_file_leads_to_the_checkpoint_before(two_checkpoints, tmp_path, damage):
    generator = random.Random(0)
    newest = two_checkpoints / "step_00000002"
    files = sorted(newest.iterdir())
    assert {"ema.safetensors", "model.safetensors", SEAL} < {path.name for path in files}
    for path in files:
        content = path.read_bytes()
        places = {0, 1, len(content) // 2, len(content) - 1, *(generator.randrange(len(content)) for _ in range(12))}
        for place in places:
            if damage == "flip":
                damaged = bytearray(content)
                damaged[place] ^= 1 << generator.randrange(8)
            else:
                damaged = content[:place]
            path.write_bytes(damaged)
            try:
                found = find_checkpoint(two_checkpoints)
            finally:
                path.write_bytes(content)

            # In the seal, blanks and the last line's end carry nothing: with them changed it says the same.
            assert found.step == 1 or (path.name == SEAL and not content[place : place + 1].strip()), (path, place)
    assert find_checkpoint(two_checkpoints).step == 2


@pytest.mark.slow
def test_killed_at_fifty_moments_nothing_complete_is_lost_and_nothing_torn_is_loaded(tmp_path):
    script = PROJECT / "tests" / "training" / "killed_saver.py"
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path), "50"], capture_output=True, text=True, cwd=PROJECT, timeout=600
    )

    assert done.returncode == 0, done.stdout + done.stderr
    assert "50 kills" in done.stdout
    shutil.rmtree(tmp_path)
