"""Exports: what is written comes back, and what is damaged says so."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from blip3o_ds.config import ModelConfig
from blip3o_ds.errors import CheckpointError
from blip3o_ds.model.dit import DiT, read_pretrained_config

FIELDS = {
    "eva_dim": 10, "clip_dim": 6, "grid_size": 2, "hidden_size": 16, "num_layers": 1, "num_heads": 2,
    "num_kv_heads": 1, "ffn_dim": 20,
}  # fmt: skip


@pytest.fixture
def export(tmp_path):
    model = DiT(ModelConfig(**FIELDS))
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.normal_()
    model.save_pretrained(tmp_path, extra={"flow": {"prediction": "sample"}})
    return model, tmp_path


def test_a_saved_model_comes_back_bitwise(export):
    model, folder = export
    loaded = DiT.from_pretrained(folder)
    assert loaded.config == model.config
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())
    assert read_pretrained_config(folder)["flow"] == {"prediction": "sample"}
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]


def test_weights_are_written_in_the_dtype_asked_for(export):
    model, folder = export
    model.save_pretrained(folder, dtype=torch.bfloat16)
    assert {tensor.dtype for tensor in load_file(folder / "model.safetensors").values()} == {torch.bfloat16}
    assert DiT.from_pretrained(folder).dtype == torch.float32


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_missing_or_damaged_file_is_named(export, name):
    path = export[1] / name
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(CheckpointError, match=name):
        DiT.from_pretrained(export[1])
    path.unlink()
    with pytest.raises(CheckpointError, match=f"{name} is missing"):
        DiT.from_pretrained(export[1])


def test_other_keys_and_other_shapes_are_named(export):
    path = export[1] / "model.safetensors"
    weights = load_file(path)
    save_file({**weights, "stray": torch.zeros(1)}, path)
    with pytest.raises(CheckpointError, match=r'Unexpected key\(s\) in state_dict: "stray"'):
        DiT.from_pretrained(export[1])
    save_file({**weights, "clip_in.weight": torch.zeros(3, 3)}, path)
    with pytest.raises(CheckpointError, match=r"clip_in.weight: .*\[3, 3\]\) from checkpoint.*\[16, 6\]"):
        DiT.from_pretrained(export[1])


@pytest.mark.parametrize(
    ("content", "message"),
    [({"model_type": "llama"}, "expected model_type 'blip3o_dit', found 'llama'"),
     ({"model_type": "blip3o_dit", "model": {"hidden": 3}}, "hidden"), ([], "found 'list'")],
)  # fmt: skip
def test_a_configuration_of_something_else_is_refused(export, content, message):
    (export[1] / "config.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=message):
        DiT.from_pretrained(export[1])
