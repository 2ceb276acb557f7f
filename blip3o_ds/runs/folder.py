"""The folder of a run: the names of its files, starting a new one, finding an old one, reading its settings.

Training writes these files and evaluation reads them; neither spells a name for itself.
"""

from __future__ import annotations

import contextlib
import datetime
import itertools
from pathlib import Path
from typing import Any

from blip3o_ds.config import RunConfig, build_run_config
from blip3o_ds.errors import CheckpointError, ConfigError
from blip3o_ds.files import atomic_write_json, read_json

RUN_CONFIG = "experiment_config.json"  # the settings, and the machine that the run began on
CHECKPOINTS = "checkpoints"
NORMALIZER = "normalizer.json"
BASELINES = "baselines.safetensors"
LOCK = ".trainer.lock"  # held by the process that trains into the folder
LOG = "clip_reproduction_training.log"
METRICS = "metrics.jsonl"
TENSORBOARD = "tensorboard"
BAD_SAMPLES = "bad_samples.jsonl"
BAD_BATCHES = "bad_batches.jsonl"
TRAINING_SUMMARY = "training_summary.json"
FINAL_SUMMARY = "final_summary.json"


def create_run(output_dir: Path, config: RunConfig, environment: dict[str, Any]) -> Path:
    """Make `output_dir/clip_repro_YYYYMMDD_HHMMSS`, with the settings and `environment` in `experiment_config.json`.

    Of runs that begin in the same second, the later ones have `_002`, `_003`, ... behind that name.
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    first = output_dir / datetime.datetime.now().strftime("clip_repro_%Y%m%d_%H%M%S")
    for number in itertools.count(1):
        folder = first if number == 1 else first.with_name(f"{first.name}_{number:03d}")
        with contextlib.suppress(FileExistsError):
            folder.mkdir()
            break
    atomic_write_json(folder / RUN_CONFIG, {"config": config.model_dump(mode="json"), **environment})
    return folder


def find_runs(output_dir: Path) -> list[Path]:
    """The runs in `output_dir`, the one that was started last at the end."""
    return sorted(path for path in output_dir.glob("clip_repro_*") if (path / RUN_CONFIG).is_file())


def newest_run(output_dir: Path) -> Path:
    """The run in `output_dir` that was started last."""
    runs = find_runs(output_dir)
    if not runs:
        raise CheckpointError(f"{output_dir}: there is no run to resume; leave --resume out to start one")
    return runs[-1]


def read_run_config(folder: Path) -> tuple[RunConfig, dict[str, Any]]:
    """The settings with which a run began, and the whole content of the file that holds them."""
    path = folder / RUN_CONFIG
    content = read_json(path, CheckpointError, f"{folder} is not a run folder")
    return parse_run_config(path, content.get("config")), content


def parse_run_config(path: Path, settings: Any) -> RunConfig:
    """Validate the settings that the file `path` holds; a `CheckpointError` names it."""
    if not isinstance(settings, dict):
        raise CheckpointError(f"{path}: expected the run's settings under `config`, found {settings!r}")
    try:
        return build_run_config(settings)
    except ConfigError as error:
        raise CheckpointError(f"{path}: its settings are not valid here: {error}") from None
