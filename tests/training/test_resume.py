"""The run that a resume finds, or why it is none."""

from __future__ import annotations

import json

import pytest

from blip3o_ds.errors import CheckpointError
from blip3o_ds.training.resume import prepare_run_dir
from tests.training.conftest import small_config


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ('{"config": {', "is not JSON"),
        ("[]", "expected a JSON object, found list"),
        ('{"world_size": 1}', "expected the run's settings under `config`, found None"),
        ('{"config": {"train": 3}, "world_size": 1}', "its settings are not valid here: train"),
        ('{"config": {}}', "expected the number of ranks under `world_size`, found None"),
    ],
)
def test_settings_that_are_not_as_they_were_written_are_a_clear_error(one_rank, tmp_path, content, problem):
    (tmp_path / "experiment_config.json").write_text(content)
    config = small_config(2, **{"train.output_dir": str(tmp_path)})

    with pytest.raises(CheckpointError, match=f"experiment_config.json.*{problem}"):
        prepare_run_dir(config, str(tmp_path), rank=0)


def test_a_run_is_found_again_by_latest(one_rank, tmp_path):
    config = small_config(2, **{"train.output_dir": str(tmp_path)})
    run_dir = prepare_run_dir(config, None, rank=0)

    assert prepare_run_dir(config, "latest", rank=0) == run_dir
    assert json.loads((run_dir / "experiment_config.json").read_text())["world_size"] == 1
