"""The run that a resume finds, with its own settings and those that may change."""

from __future__ import annotations

import datetime
import json
import subprocess

import pytest

from blip3o_ds.config import SETTINGS, load_run_config
from blip3o_ds.errors import CheckpointError, ConfigError
from blip3o_ds.runs.folder import create_run, find_runs
from blip3o_ds.training.resume import describe_environment, prepare_run_dir, resumed_config
from tests.training.conftest import small_config


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ('{"config": {', "is not JSON"),
        ("[]", "expected a JSON object, found 'list'"),
        ('{"world_size": 1}', "expected the run's settings under `config`, found None"),
        ('{"config": {"train": 3}, "world_size": 1}', "its settings are not valid here: train"),
        ('{"config": {}}', "expected the number of ranks under `world_size`, found None"),
    ],
)
def test_settings_that_are_not_as_they_were_written_are_a_clear_error(tmp_path, content, problem):
    (tmp_path / "experiment_config.json").write_text(content)
    config = small_config(2, **{"train.output_dir": str(tmp_path)})

    with pytest.raises(CheckpointError, match=f"experiment_config.json.*{problem}"):
        resumed_config(config, str(tmp_path))


def test_runs_that_begin_in_the_same_second_have_their_own_folders(tmp_path, monkeypatch):
    class Clock(datetime.datetime):
        @classmethod
        def now(cls) -> datetime.datetime:
            return cls(2026, 1, 2, 3, 4, 5)

    monkeypatch.setattr("blip3o_ds.runs.folder.datetime.datetime", Clock)
    made = [create_run(tmp_path / "new" / "runs", small_config(2), {"number": number}) for number in range(3)]

    assert [path.name for path in made] == [f"clip_repro_20260102_030405{end}" for end in ("", "_002", "_003")]
    assert find_runs(tmp_path / "new" / "runs") == made
    assert [json.loads((path / "experiment_config.json").read_text())["number"] for path in made] == [0, 1, 2]


@pytest.mark.parametrize("name", ["runs[1]", "a*b", "what?", "lr[1]/runs"])
def test_an_output_folder_that_is_a_pattern_is_refused(one_rank, tmp_path, name):
    config = small_config(2, **{"train.output_dir": str(tmp_path / name)})
    with pytest.raises(ConfigError, match=r"train.output_dir = .*for a pattern, and could not resume the run"):
        prepare_run_dir(config, None, "digest")
    assert not any(tmp_path.iterdir())


def test_an_output_folder_that_is_a_file_is_an_error_and_no_endless_search(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for name in ("file", "file/x", "dangling"):
        with pytest.raises(OSError, match=name):
            create_run(tmp_path / name, small_config(2), {})


def test_a_machine_without_git_trains_all_the_same(one_rank, monkeypatch):
    def none(*_: object, **__: object) -> None:
        raise FileNotFoundError(2, "No such file or directory", "git")

    monkeypatch.setattr(subprocess, "run", none)
    assert describe_environment()["git"] is None


def test_a_run_is_found_again_by_latest(one_rank, tmp_path):
    config = small_config(2, **{"train.output_dir": str(tmp_path)})
    run_dir = prepare_run_dir(config, None, "digest")

    assert resumed_config(config, "latest") == (config, run_dir)
    assert json.loads((run_dir / "experiment_config.json").read_text())["world_size"] == 1


@pytest.fixture
def run_dir(one_rank, tmp_path):
    """A run that began with settings of its own."""
    given = {"train.output_dir": str(tmp_path), "train.seed": 7, "train.log_every": 3, "data.train_dir": "somewhere"}
    return prepare_run_dir(small_config(2, **given), None, "digest")


def test_a_run_is_resumed_with_its_own_settings_and_what_is_given_on_top(run_dir):
    config, found = resumed_config(load_run_config(None, overrides=["train.save_every=9"]), str(run_dir))

    assert found == run_dir
    assert (config.train.seed, config.train.log_every, config.data.train_dir) == (7, 3, "somewhere")
    assert config.train.save_every == 9


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("train.seed=8", "train.seed was 7"),
        ("model.ffn_dim=32", "model.ffn_dim was 64"),
        ("flow.timestep_shift=2", "flow.timestep_shift was 1.0"),
        ("train.num_epochs=2", "train.num_epochs was None"),
    ],
)
def test_a_setting_that_decides_the_remaining_steps_may_not_change(run_dir, override, named):
    with pytest.raises(ConfigError, match=named):
        resumed_config(load_run_config(None, overrides=[override]), str(run_dir))


def test_a_dataset_may_lie_elsewhere_and_must_be_the_same(run_dir):
    elsewhere = load_run_config(None, overrides=["data.train_dir=elsewhere"])
    config, found = resumed_config(elsewhere, str(run_dir))

    assert config.data.train_dir == "elsewhere"
    assert prepare_run_dir(config, found, "digest") == run_dir
    with pytest.raises(
        ConfigError, match=rf"data.train_dir = elsewhere does not hold .* {run_dir} began \(somewhere\)"
    ):
        prepare_run_dir(config, found, "another")


def test_a_run_from_before_digests_knows_its_dataset_by_the_path(run_dir):
    file = run_dir / "experiment_config.json"
    content = json.loads(file.read_text())
    del content["train_data"]
    file.write_text(json.dumps(content))

    config, found = resumed_config(load_run_config(None, overrides=[]), str(run_dir))
    assert prepare_run_dir(config, found, "any") == run_dir
    config, found = resumed_config(load_run_config(None, overrides=["data.train_dir=elsewhere"]), str(run_dir))
    with pytest.raises(ConfigError, match="does not hold the samples"):
        prepare_run_dir(config, found, "any")


def test_the_newest_run_is_looked_for_in_the_output_folder_that_is_given():
    with pytest.raises(ConfigError, match="give --output_dir"):
        resumed_config(load_run_config(None), "latest")


def test_exactly_these_settings_are_fixed_when_a_run_is_resumed():
    fixed = {name for name, setting in SETTINGS.items() if not setting.may_change}

    assert {name for name in fixed if not name.startswith(("model.", "flow."))} == {
        *("data.normalization", "data.max_shards", "data.window_shards"),
        *("train.optimizer", "train.schedule"),
        *("train.learning_rate", "train.min_lr_ratio", "train.warmup_steps", "train.weight_decay", "train.adam_beta1"),
        *("train.adam_beta2", "train.adam_eps", "train.max_grad_norm", "train.precision", "train.ema_decay"),
        *("train.seed", "train.overfit_test_size", "train.num_epochs", "train.max_steps"),
    }
    assert fixed >= {name for name in SETTINGS if name.startswith(("model.", "flow."))}
