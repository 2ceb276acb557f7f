"""What the runs of a matrix gave: each metric's mean and spread over the seeds, and how it moved over the steps.

It reads only what runs and launches wrote, and knows no metric and no baseline by name.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from blip3o_ds.errors import CheckpointError
from blip3o_ds.evaluation.compare import read_evaluation
from blip3o_ds.evaluation.matrix import Matrix, PlannedRun
from blip3o_ds.evaluation.metrics import METRICS
from blip3o_ds.evaluation.plots import read_metrics
from blip3o_ds.evaluation.report import MODEL_READINGS, EvalResult, format_value
from blip3o_ds.files import read_json
from blip3o_ds.runs.folder import METRICS as METRICS_FILE
from blip3o_ds.runs.folder import read_run_config

Readings = dict[str, dict[str, "Stat"]]  # reading -> metric -> its value over the seeds


@dataclass(frozen=True)
class Stat:
    """One number over several seeds."""

    mean: float
    std: float | None  # sample standard deviation; None of a single seed
    count: int

    @classmethod
    def over(cls, values: Sequence[float]) -> Stat:
        return cls(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None, len(values))

    def __str__(self) -> str:
        return format_value(self.mean) + ("" if self.std is None else f" ± {format_value(self.std)}")

    def distance(self, ideal: float) -> float:
        """How far the mean is from the value of perfect embeddings."""
        return abs(self.mean - ideal)

    def differs(self, other: Stat) -> bool | None:
        """Whether the means are further apart than the standard deviation of the difference of two runs.

        None if one of the two is of a single seed, which says nothing of the spread.
        """
        if self.std is None or other.std is None:
            return None
        return abs(self.mean - other.mean) > math.hypot(self.std, other.std)


@dataclass(frozen=True)
class RunResult:
    """One run of the matrix, finished or not."""

    run: PlannedRun
    error: str | None  # why it is not finished
    run_dir: Path | None = None
    evaluation: dict[str, EvalResult] = field(default_factory=dict)  # by split; nothing if it is not finished
    launches: list[dict[str, Any]] = field(default_factory=list)  # command, began, seconds, exit_status of each
    environment: dict[str, Any] = field(default_factory=dict)  # versions, git, machine and ranks of the run

    @property
    def seconds(self) -> float:
        """Wall time of all its launches."""
        return sum(launch["seconds"] for launch in self.launches)

    def to_dict(self, out: Path) -> dict[str, Any]:
        """As `results.json` holds it; folders are relative to `out`."""
        return {
            "variant": self.run.variant,
            "seed": self.run.seed,
            "status": "failed" if self.error else "finished",
            "error": self.error,
            "run_dir": self.run_dir and str(self.run_dir.relative_to(out)),
            "log": str(self.run.log.relative_to(out)),
            "seconds": self.seconds,
            "launches": self.launches,
            "environment": self.environment,
            "evaluation": {split: result.to_dict() for split, result in self.evaluation.items()},
        }


def read_result(run: PlannedRun, error: str | None) -> RunResult:
    """Read what a run left; `error` is None for a finished one."""
    run_dir, launches, environment = run.find(), [], {}
    if run.launches.exists():
        launches = read_json(run.launches, CheckpointError, "remove it; it only holds the times of launches")[
            "launches"
        ]
    if run_dir is not None:
        environment = {name: value for name, value in read_run_config(run_dir)[1].items() if name != "config"}
    evaluation = read_evaluation(run_dir) if run_dir is not None and error is None else {}
    return RunResult(run, error, run_dir, evaluation, launches, environment)


@dataclass(frozen=True)
class Bench:
    """A matrix and the results of its runs."""

    matrix: Matrix
    results: list[RunResult]

    def of(self, variant: str) -> list[RunResult]:
        """The finished runs of a variant."""
        return [result for result in self.results if result.run.variant == variant and result.evaluation]

    @cached_property
    def splits(self) -> list[str]:
        return list(dict.fromkeys(split for result in self.results for split in result.evaluation))

    def examples(self, split: str) -> dict[str, EvalResult]:
        """One result of each variant that has any, for what no seed changes."""
        found = {
            variant: [result.evaluation.get(split) for result in self.of(variant)] for variant in self.matrix.variants
        }
        return {variant: results[0] for variant, results in found.items() if results and results[0]}

    def readings(self, split: str, variant: str) -> Readings:
        """Mean and spread of every metric that all finished seeds of the variant have."""
        found = [result.evaluation[split].readings for result in self.of(variant) if split in result.evaluation]
        if not found:
            return {}
        return {
            reading: {
                name: Stat.over([of[reading][name] for of in found]) for name in _common(of[reading] for of in found)
            }
            for reading in _common(found)
        }

    def baselines(self, split: str) -> list[str]:
        """The readings that any variant has besides the model's."""
        found = [reading for variant in self.matrix.variants for reading in self.readings(split, variant)]
        return [reading for reading in dict.fromkeys(found) if reading not in MODEL_READINGS]

    def comparable(self, split: str, metric: str) -> list[str]:
        """The finished variants whose values of `metric` may be compared with those of the first of them.

        Raw embeddings and unit-norm ones have other lengths, on which most metrics depend.
        """
        spaces = {variant: result.space for variant, result in self.examples(split).items()}
        same = METRICS[metric].any_length
        return [name for name, space in spaces.items() if same or space == next(iter(spaces.values()))]

    def curve(self, split: str, variant: str, reading: str, metric: str) -> list[tuple[int, Stat]]:
        """A metric over the steps of the variant's runs."""
        points: dict[int, list[float]] = defaultdict(list)
        for run_dir in (result.run_dir for result in self.of(variant)):
            for line in self._lines[run_dir]:
                if (line["split"], line["reading"]) == (split, reading) and metric in line:
                    points[line["step"]].append(line[metric])
        return [(step, Stat.over(values)) for step, values in sorted(points.items())]

    @cached_property
    def _lines(self) -> dict[Path | None, list[dict[str, Any]]]:
        """The evaluations during each run."""
        return {
            result.run_dir: [line for line in read_metrics(result.run_dir / METRICS_FILE) if line["kind"] == "eval"]
            for result in self.results
            if result.evaluation and result.run_dir is not None
        }

    def summary(self) -> dict[str, Any]:
        """`[split][variant][reading][metric]` -> mean, std, count."""
        return {
            split: {
                variant: {
                    reading: {name: asdict(stat) for name, stat in stats.items()}
                    for reading, stats in self.readings(split, variant).items()
                }
                for variant in self.matrix.variants
            }
            for split in self.splits
        }


def _common(groups: Iterable[dict[str, Any]]) -> list[str]:
    """The keys that all have, in the order of the first."""
    first, *others = groups
    return [key for key in first if all(key in other for other in others)]
