"""Runs of a matrix as training leaves them, without training."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from blip3o_ds.config import SamplerConfig
from blip3o_ds.evaluation.matrix import Matrix, PlannedRun, load_matrix
from blip3o_ds.evaluation.metrics import METRIC_NAMES
from blip3o_ds.evaluation.report import EvalResult
from blip3o_ds.files import atomic_write_json
from tests.evaluation.conftest import seal

READINGS = ("posterior_mean", "sampled", "ridge", "mean_embedding")
MATRIX: dict[str, Any] = {
    "name": "laws",
    "question": "Which law of t is better?",
    "preset": "demo",
    "data": {"train": "train", "eval": ["held"]},
    "seeds": [0, 1],
    "common": {"train.max_steps": 4, "flow.timestep_law": "uniform"},
    "variants": {"uniform": {}, "logit": {"flow": {"timestep_law": "logit_normal"}}},
}


def matrix_file(folder: Path, **changes: Any) -> Path:
    """A matrix file; fields that are `...` are left out."""
    content = {name: value for name, value in {**MATRIX, **changes}.items() if value is not ...}
    path = folder / "matrix.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def matrix(folder: Path, **changes: Any) -> Matrix:
    return load_matrix(matrix_file(folder, **changes))


def write_run(
    folder: Path,
    run: PlannedRun,
    value: float,
    *,
    finished: bool = True,
    space: str = "raw",
    readings: Sequence[str] = READINGS,
) -> Path:
    """The folder of a run on two processes; every metric of every reading is `value`, and half of it at step 2."""
    run_dir = folder / "clip_repro_20260101_000000"
    (run_dir / "checkpoints/step_00000004").mkdir(parents=True)
    (run_dir / "checkpoints/step_00000004/model.safetensors").write_bytes(b"weights")
    seal(run_dir / "checkpoints/step_00000004", 4)
    config = run.config.model_dump(mode="json")
    config["model"]["eva_dim"] = 12  # as the data has it
    atomic_write_json(run_dir / "experiment_config.json", {"config": config, "world_size": 2, "git": "abc"})
    splits = [Path(name).name for name in run.config.data.eval_dirs]
    lines = [
        {"step": step, "kind": "eval", "split": split, "reading": reading, **dict.fromkeys(METRIC_NAMES, at)}
        for step, at in ((2, value / 2), (4, value))
        for split in splits
        for reading in readings
    ]
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if finished:
        metrics = {reading: dict.fromkeys(METRIC_NAMES, value) for reading in readings}
        result = EvalResult(metrics, 4, 4, space, SamplerConfig()).to_dict()
        atomic_write_json(run_dir / "final_summary.json", {"evaluation": dict.fromkeys(splits, result)})
    return run_dir
