"""Run folders and exports: a checkpoint is whole or it is not one, and what is loaded is what was saved."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from blip3o_ds.config import SamplerConfig, build_run_config
from blip3o_ds.errors import CheckpointError, DataError
from blip3o_ds.flow.solvers import sample
from blip3o_ds.model.dit import DiT
from blip3o_ds.runs.checkpoint import SEAL, find_checkpoint
from blip3o_ds.runs.folder import RUN_CONFIG
from blip3o_ds.runs.pretrained import export, load_pretrained
from tests.evaluation.conftest import CLIP, EVA, MODEL, TOKENS, linear_pairs, seal


def make(folder, step, content=b"weights"):
    path = folder / f"step_{step:08d}"
    path.mkdir()
    (path / "model.safetensors").write_bytes(content)
    seal(path, step)
    return path


def same_weights(model, file) -> bool:
    expected = load_file(file)
    return all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())


def rewrite(path, **fields):
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def test_the_newest_checkpoint_is_found_with_its_state(tmp_path):
    make(tmp_path, 5)
    make(tmp_path, 10)

    found = find_checkpoint(tmp_path)

    assert (found.step, found.world_size, found.zero_stage, found.state) == (10, 1, 2, {"a": 1})
    assert find_checkpoint(tmp_path, step=5).path == tmp_path / "step_00000005"


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


def test_a_damaged_or_missing_step_that_was_asked_for_is_an_error(tmp_path):
    make(tmp_path, 5)
    (make(tmp_path, 10) / SEAL).unlink()

    with pytest.raises(CheckpointError, match="not finished"):
        find_checkpoint(tmp_path, step=10)
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 7; found: step_00000010, step_00000005"):
        find_checkpoint(tmp_path, step=7)


def test_no_checkpoint_is_none(tmp_path):
    assert find_checkpoint(tmp_path) is None


def test_only_the_files_that_will_be_read_need_be_whole(tmp_path):
    path = make(tmp_path, 5)
    (path / "optimizer.pt").write_bytes(b"moments")
    seal(path, 5)
    (path / "optimizer.pt").write_bytes(b"momentz")

    with pytest.raises(CheckpointError, match=r"no checkpoint is whole: .*optimizer.pt has another checksum"):
        find_checkpoint(tmp_path)
    assert find_checkpoint(tmp_path, files=["model.safetensors"]).step == 5
    with pytest.raises(CheckpointError, match=r"no checkpoint is whole: .*ema.safetensors is missing"):
        find_checkpoint(tmp_path, files=["ema.safetensors"])


def test_where_none_is_whole_the_error_says_what_is_wrong_with_each(tmp_path):
    make(tmp_path, 5)
    (make(tmp_path, 10) / SEAL).unlink()
    (tmp_path / "step_00000005" / "model.safetensors").unlink()
    (tmp_path / "step_00000015" / SEAL).mkdir(parents=True)

    with pytest.raises(CheckpointError) as raised:
        find_checkpoint(tmp_path)

    message = str(raised.value)
    assert re.search(r"step_00000015 is damaged: .*step_00000010 is damaged: .*step_00000005 is damaged: ", message)
    assert "model.safetensors is missing. Nothing was changed" in message


def test_a_run_is_loaded_with_its_newest_moving_average(run_dir, config):
    loaded = load_pretrained(run_dir, "cpu")

    assert same_weights(loaded.model, run_dir / "checkpoints/step_00000010/ema.safetensors")
    assert (loaded.step, loaded.weights, loaded.config) == (10, "ema", config)
    assert not loaded.model.training
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())


def test_a_run_without_moving_average_gives_its_last_weights(run_dir, config):
    settings = {**config.model_dump(mode="json"), "train": {"ema_decay": 0}}
    rewrite(run_dir / RUN_CONFIG, config=settings)

    loaded = load_pretrained(run_dir, "cpu")

    assert loaded.weights == "model"
    assert same_weights(loaded.model, run_dir / "checkpoints/step_00000010/model.safetensors")


@pytest.mark.parametrize("step", [None, 5])
def test_an_export_is_the_checkpoint_it_was_made_from(run_dir, tmp_path, config, step):
    export(run_dir, tmp_path / "exports" / "mine", step)

    folder = tmp_path / "exports" / "mine"
    checkpoint = run_dir / f"checkpoints/step_{step or 10:08d}"
    loaded = load_pretrained(folder, "cpu")
    assert (loaded.step, loaded.weights) == (step or 10, "ema")
    for model in (loaded.model, DiT.from_pretrained(folder)):
        assert same_weights(model, checkpoint / "ema.safetensors")
    assert (loaded.config.model, loaded.config.flow, loaded.config.eval) == (config.model, config.flow, config.eval)
    assert (loaded.config.train.precision, loaded.normalizer.mode) == ("bf16", "minimal")
    assert torch.equal(loaded.baselines.ridge_weight, load_pretrained(run_dir, "cpu").baselines.ridge_weight)
    assert [path.name for path in folder.parent.iterdir()] == ["mine"]


def test_an_export_generates_what_its_run_does_and_has_no_maps_of_folds(run_dir, tmp_path):
    export(run_dir, tmp_path / "export")
    run, exported = load_pretrained(run_dir, "cpu"), load_pretrained(tmp_path / "export", "cpu")
    eva, noise = torch.randn(2, TOKENS, EVA), torch.randn(2, TOKENS, CLIP)

    found = [sample(p.model, p.flow, eva, noise, SamplerConfig(steps=3)) for p in (run, exported)]

    assert torch.equal(*found)
    assert run.weights_sha256() == exported.weights_sha256()
    exported.flow.prediction.prior.variance[0, 0] *= 2
    assert run.weights_sha256() != exported.weights_sha256()  # another prior generates something else
    assert run.config.flow.prediction == "gaussian"  # which needs the prior
    assert (run.baselines.prior.num_folds, exported.baselines.prior.num_folds) == (5, 0)
    assert not torch.equal(found[0], sample(run.model, run.flow, eva, -noise, SamplerConfig(steps=3)))


def test_an_export_carries_what_standardisation_needs(run_dir, tmp_path, config):
    state = {"mode": "standardize"} | {
        f"{side}_{name}": [float(i + 1) for i in range(dim)]
        for side, dim in (("eva", EVA), ("clip", CLIP))
        for name in ("mean", "std")
    }
    (run_dir / "normalizer.json").write_text(json.dumps(state))

    export(run_dir, tmp_path / "export")

    assert load_pretrained(tmp_path / "export", "cpu").normalizer.state_dict() == state


def test_an_export_over_something_else_is_refused(run_dir, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")

    with pytest.raises(FileExistsError, match="full already exists"):
        export(run_dir, tmp_path / "full")

    assert (tmp_path / "full" / "thesis.txt").read_text() == "mine"


@pytest.mark.parametrize("missing", ["normalizer.json", "baselines.safetensors", "checkpoints"])
def test_an_export_of_an_incomplete_run_names_what_is_missing_and_leaves_nothing(run_dir, tmp_path, missing):
    path = run_dir / missing
    shutil.rmtree(path) if path.is_dir() else path.unlink()

    with pytest.raises(CheckpointError, match=missing):
        export(run_dir, tmp_path / "exports" / "mine")

    assert not list((tmp_path / "exports").iterdir())


def test_a_folder_that_is_neither_run_nor_export_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="neither a run"):
        load_pretrained(tmp_path, "cpu")
    with pytest.raises(CheckpointError, match="is not a run folder"):
        export(tmp_path, tmp_path / "dst")


def test_damaged_weights_are_passed_over_for_the_checkpoint_before(run_dir, caplog):
    weights = run_dir / "checkpoints/step_00000010/ema.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)

    assert load_pretrained(run_dir, "cpu").step == 5
    assert "step_00000010 is damaged" in caplog.text


def test_weights_of_another_model_are_refused(run_dir, config):
    folder = run_dir / "checkpoints/step_00000010"
    save_file(DiT(build_run_config({"model": {**MODEL, "ffn_dim": 25}}).model).state_dict(), folder / "ema.safetensors")
    seal(folder, 10)
    with pytest.raises(CheckpointError, match=r"another model than experiment_config\.json says: .*size mismatch"):
        load_pretrained(run_dir, "cpu")


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "is not JSON"), ("[]", "expected a JSON object"), ("{}", "expected the run's settings"),
     ('{"config": {"modle": {}}}', "did you mean model")],
)  # fmt: skip
def test_settings_that_cannot_be_read_name_the_file(run_dir, content, message):
    (run_dir / RUN_CONFIG).write_text(content)
    with pytest.raises(CheckpointError, match=rf"experiment_config\.json.*{message}"):
        load_pretrained(run_dir, "cpu")


def test_a_bare_model_folder_is_no_export(run_dir, tmp_path):
    load_pretrained(run_dir, "cpu").model.save_pretrained(tmp_path / "bare")
    with pytest.raises(CheckpointError, match="eval, flow, normalization, precision, step, weights missing"):
        load_pretrained(tmp_path / "bare", "cpu")


def test_a_dataset_of_other_dims_is_refused(run_dir, make_dataset):
    loaded = load_pretrained(run_dir, "cpu")
    right, _, _ = linear_pairs(2, 0.1)
    dataset = make_dataset(right, torch.zeros(2, TOKENS, CLIP + 1), "wide")
    with pytest.raises(DataError, match="clip_dim is 5, but the model was trained with 4"):
        loaded.open_dataset(dataset.location)
    assert len(loaded.open_dataset(make_dataset(right, torch.ones(2, TOKENS, CLIP), "right").location)) == 2
