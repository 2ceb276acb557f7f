"""Compares finished runs: the settings in which they differ, and their metrics on each split.

It reads only what the runs wrote (`experiment_config.json`, `final_summary.json`) and generates nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blip3o_ds.config import SETTINGS
from blip3o_ds.errors import CheckpointError
from blip3o_ds.evaluation.report import MODEL_READINGS, EvalResult, legend, row_label, table
from blip3o_ds.files import read_json
from blip3o_ds.runs.folder import FINAL_SUMMARY, RUN_CONFIG
from blip3o_ds.settings import flatten

# Paths, which do not change what a run learns.
_PATHS = ("data.train_dir", "data.eval_dirs", "train.output_dir", "train.deepspeed_config")


@dataclass(frozen=True)
class Comparison:
    """Runs, by the names of their folders."""

    settings: dict[str, dict[str, Any]]  # dotted name -> run -> value; only settings in which runs differ
    results: dict[str, dict[str, EvalResult]]  # split -> run -> result; only splits that all runs have

    def to_dict(self) -> dict[str, Any]:
        results = {split: {run: found.to_dict() for run, found in of.items()} for split, of in self.results.items()}
        return {"settings": self.settings, "evaluation": results}


def compare(runs: Sequence[str | Path]) -> Comparison:
    """Read finished runs; a single one is its own table.

    Raises CheckpointError for a folder that is not a finished run, for equal names, and for no split in common.
    """
    folders = {Path(run).resolve().name: Path(run) for run in runs}
    if len(folders) < len(runs):
        raise CheckpointError("two of the runs have the same folder name; rename one")
    settings = {name: flatten(_read(run, RUN_CONFIG, "config")) for name, run in folders.items()}
    results = {name: read_evaluation(run) for name, run in folders.items()}
    common = [split for split in next(iter(results.values())) if all(split in found for found in results.values())]
    if not common:
        stated = "; ".join(f"{name}: {', '.join(found)}" for name, found in results.items())
        raise CheckpointError(f"the runs have no common split ({stated}); evaluate them with `blip3o-ds eval`")
    evaluated = {split: {run: of[split] for run, of in results.items()} for split in common}
    return Comparison(_differences(settings), evaluated)


def read_evaluation(run: Path) -> dict[str, EvalResult]:
    """The last evaluation of a finished run, by split; CheckpointError if the folder is not one."""
    content = _read(run, FINAL_SUMMARY, "evaluation")
    return {split: EvalResult.from_dict(result) for split, result in content.items()}


def format_comparison(comparison: Comparison) -> str:
    """The comparison as plain text: settings, then a table for each split, with the baselines at its end."""
    runs = list(next(iter(comparison.results.values())))
    lines = ["settings that differ", *_settings_table(comparison.settings, runs)]
    for split, results in comparison.results.items():
        first = next(iter(results.values()))
        rows = {
            f"{name}: {row_label(reading, result.sampler)}": result.readings.get(reading, {})
            for name, result in results.items()
            for reading in MODEL_READINGS
        }
        rows |= {
            row_label(reading, first.sampler): metrics for reading, metrics in _baselines(results.values()).items()
        }
        lines += ["", *table(f"{split} ({first.num_samples} images)", rows)]
    return "\n".join([*lines, "", legend()])


def _baselines(results: Iterable[EvalResult]) -> dict[str, dict[str, float]]:
    """Each baseline once, of the first run that has it: they depend on the data, not on the run."""
    found: dict[str, dict[str, float]] = {}
    for result in results:
        found = {name: metrics for name, metrics in result.readings.items() if name not in MODEL_READINGS} | found
    return found


def _settings_table(settings: dict[str, dict[str, Any]], runs: list[str]) -> list[str]:
    if not settings:
        return ["  none"]
    width = max(map(len, settings))
    rows = {"": runs} | {name: [str(values[run]) for run in runs] for name, values in settings.items()}
    columns = [max(map(len, cells)) for cells in zip(*rows.values(), strict=True)]
    return [
        f"  {name:<{width}}" + "".join(f"  {cell:>{column}}" for cell, column in zip(row, columns, strict=True))
        for name, row in rows.items()
    ]


def _differences(settings: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    first = next(iter(settings))
    names = sorted({name for found in settings.values() for name in found} - set(_PATHS))
    defaults = {name: SETTINGS[name].default for name in names if name in SETTINGS}  # of settings newer than a run
    rows = {name: {run: found.get(name, defaults.get(name)) for run, found in settings.items()} for name in names}
    return {name: row for name, row in rows.items() if any(value != row[first] for value in row.values())}


def _read(run: Path, name: str, field: str) -> dict[str, Any]:
    content = read_json(run / name, CheckpointError, f"{run} is not a finished run")
    if not isinstance(content.get(field), dict):
        raise CheckpointError(f"{run / name}: expected an object with the field `{field}`; the run is not finished")
    return content[field]
