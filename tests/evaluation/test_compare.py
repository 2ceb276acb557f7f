"""Runs side by side: what differs, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from blip3o_ds.config import SamplerConfig, load_run_config
from blip3o_ds.errors import CheckpointError
from blip3o_ds.evaluation.compare import compare, format_comparison
from blip3o_ds.evaluation.metrics import METRIC_NAMES
from blip3o_ds.evaluation.report import EvalResult
from blip3o_ds.files import atomic_write_json

READINGS = ("posterior_mean", "sampled", "ridge", "mean_embedding")


def finished_run(folder: Path, similarity: float, *overrides: str, split: str = "held") -> Path:
    """A run folder as training leaves it; every metric of every reading is `similarity`."""
    folder.mkdir()
    config = load_run_config("demo", overrides=[*overrides, f"train.output_dir={folder.parent}/{folder.name}_out"])
    atomic_write_json(folder / "experiment_config.json", {"config": config.model_dump(mode="json")})
    readings = {reading: dict.fromkeys(METRIC_NAMES, similarity) for reading in READINGS}
    result = EvalResult(readings, 4, 4, "raw", SamplerConfig())
    atomic_write_json(folder / "final_summary.json", {"evaluation": {split: result.to_dict()}})
    return folder


def test_only_the_settings_that_differ_are_listed_and_no_places(tmp_path):
    first = finished_run(tmp_path / "a", 0.5)
    second = finished_run(tmp_path / "b", 0.6, "flow.timestep_law=logit_normal")

    found = compare([first, second])

    assert found.settings == {"flow.timestep_law": {"a": "prior", "b": "logit_normal"}}
    assert found.results["held"]["b"].readings["sampled"]["clip_similarity"] == 0.6


def test_the_table_has_each_run_twice_and_the_baselines_once(tmp_path):
    runs = [finished_run(tmp_path / name, value) for name, value in (("a", 0.25), ("b", 0.75))]

    lines = format_comparison(compare(runs)).splitlines()

    assert [line.split()[-1] for line in lines if line.startswith("a: DiT")] == ["0.250", "0.250"]
    assert [line.split()[-1] for line in lines if line.startswith("b: DiT")] == ["0.750", "0.750"]
    assert sum(line.startswith("ridge from EVA") for line in lines) == 1


def test_a_baseline_that_only_a_newer_run_has_is_shown(tmp_path):
    old, new = finished_run(tmp_path / "old", 0.25), finished_run(tmp_path / "new", 0.75)
    summary = json.loads((new / "final_summary.json").read_text())
    readings = summary["evaluation"]["held"]["readings"]
    readings["context_ridge"] = readings["ridge"]
    atomic_write_json(new / "final_summary.json", summary)

    lines = format_comparison(compare([old, new])).splitlines()

    shown = {line[:30].strip(): line.split()[-1] for line in lines if "ridge" in line}
    assert shown == {"ridge from EVA": "0.250", "ridge of 3x3 tokens": "0.750"}


def test_runs_without_a_common_split_are_refused(tmp_path):
    runs = [finished_run(tmp_path / "a", 0.1, split="x"), finished_run(tmp_path / "b", 0.1, split="y")]

    with pytest.raises(CheckpointError, match="no common split"):
        compare(runs)


def test_an_unfinished_run_is_named(tmp_path):
    run = finished_run(tmp_path / "a", 0.1)
    (tmp_path / "b").mkdir()

    with pytest.raises(CheckpointError, match=r"b/experiment_config\.json is missing"):
        compare([run, tmp_path / "b"])


def test_a_metric_that_an_older_run_does_not_have_is_a_dash(tmp_path):
    old, new = finished_run(tmp_path / "old", 0.25), finished_run(tmp_path / "new", 0.75)
    summary = json.loads((old / "final_summary.json").read_text())
    for metrics in summary["evaluation"]["held"]["readings"].values():
        del metrics["variance_ratio"]
    atomic_write_json(old / "final_summary.json", summary)

    lines = format_comparison(compare([old, new])).splitlines()

    assert [line.split()[-2:] for line in lines if line.startswith("old: DiT")] == [["0.250", "-"]] * 2
    assert [line.split()[-2:] for line in lines if line.startswith("new: DiT")] == [["0.750", "0.750"]] * 2


def test_a_setting_that_an_older_run_does_not_have_had_its_default(tmp_path):
    old, new = finished_run(tmp_path / "old", 0.25), finished_run(tmp_path / "new", 0.75)
    content = json.loads((old / "experiment_config.json").read_text())
    del content["config"]["train"]["ema_decay"]
    atomic_write_json(old / "experiment_config.json", content)

    assert compare([old, new]).settings == {}


def test_a_single_run_is_a_table_of_its_own(tmp_path):
    lines = format_comparison(compare([finished_run(tmp_path / "a", 0.25)])).splitlines()

    assert lines[:2] == ["settings that differ", "  none"]
    assert sum(line.startswith("a: DiT") for line in lines) == 2


def test_a_summary_without_evaluation_is_named(tmp_path):
    run = finished_run(tmp_path / "a", 0.1)
    atomic_write_json(run / "final_summary.json", {"steps": 3})

    with pytest.raises(CheckpointError, match=r"final_summary\.json: expected .* `evaluation`"):
        compare([run])
