"""A checkpoint is whole or it is not one."""

import json

import pytest

from blip3o_ds.errors import CheckpointError
from blip3o_ds.files import atomic_write_json, sha256_file
from blip3o_ds.training.checkpoint import SEAL, find_checkpoint


def make(folder, step, content=b"weights"):
    path = folder / f"step_{step:08d}"
    path.mkdir()
    (path / "model.safetensors").write_bytes(content)
    files = {"model.safetensors": {"bytes": len(content), "sha256": sha256_file(path / "model.safetensors")}}
    atomic_write_json(path / SEAL, {"step": step, "world_size": 1, "zero_stage": 2, "state": {"a": 1}, "files": files})
    return path


def test_the_newest_one_is_found_with_its_state(tmp_path):
    make(tmp_path, 5)
    make(tmp_path, 10)

    found = find_checkpoint(tmp_path)

    assert (found.step, found.state) == (10, {"a": 1})


def test_a_file_cut_at_any_byte_is_noticed(tmp_path):
    make(tmp_path, 5)
    newest = make(tmp_path, 10)
    for length in range(len(b"weights")):
        (newest / "model.safetensors").write_bytes(b"weights"[:length])

        assert find_checkpoint(tmp_path).step == 5


@pytest.mark.parametrize("damage", ["seal_missing", "seal_cut", "file_missing", "bit_flipped"])
def test_damage_leads_to_the_one_before_it_with_a_warning(tmp_path, caplog, damage):
    make(tmp_path, 5)
    newest = make(tmp_path, 10)
    if damage == "seal_missing":
        (newest / SEAL).unlink()
    elif damage == "seal_cut":
        (newest / SEAL).write_text(json.dumps({"step": 10})[:-1])
    elif damage == "file_missing":
        (newest / "model.safetensors").unlink()
    else:
        (newest / "model.safetensors").write_bytes(b"weighty")

    assert find_checkpoint(tmp_path).step == 5
    assert "step_00000010" in caplog.text


def test_a_damaged_step_that_was_asked_for_is_an_error(tmp_path):
    make(tmp_path, 5)
    (make(tmp_path, 10) / SEAL).unlink()

    with pytest.raises(CheckpointError, match="not finished"):
        find_checkpoint(tmp_path, step=10)
    with pytest.raises(CheckpointError, match="no checkpoint of step 7"):
        find_checkpoint(tmp_path, step=7)


def test_no_checkpoint_is_none(tmp_path):
    assert find_checkpoint(tmp_path) is None
