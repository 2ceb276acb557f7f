"""Plots of an evaluation and of a training run as PNG files; they need no display.

They are drawn from plain results: an `EvalResult` for each split, or the lines of a run's `metrics.jsonl`.
"""

from __future__ import annotations

import io
import logging
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from blip3o_ds.errors import DataError
from blip3o_ds.evaluation.report import MODEL_READINGS, EvalResult, row_label
from blip3o_ds.files import atomic_write_bytes, parse_json

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

logger = logging.getLogger(__name__)

_COLOURS = {
    "posterior_mean": "#1b6ca8",
    "sampled": "#7fb8dd",
    "linear_gaussian": "#b03a2e",
    "ridge_noise": "#d9534f",
    "context_ridge": "#a8761d",
    "ridge": "#e08e2b",
    "mean_embedding": "#9a9a9a",
}
_STYLES = {"posterior_mean": "-", "sampled": "--"}
_BARS = {
    "energy_score": "lower is better",
    "spread_skill": "1 is calibrated, 0 is a point",
    "clip_similarity": "mean token cosine",
}
_LOG_RATIO = 10.0  # a loss that spans less is easier to read on a linear axis


def plot_evaluation(results: dict[str, EvalResult], path: str | Path) -> None:
    """Bars of energy score, spread and similarity for each split and reading, as a PNG file."""
    readings = list(dict.fromkeys(reading for result in results.values() for reading in result.readings))
    width = max(4.0, 0.28 * len(readings) * len(results) + 1.2)
    figure, grid = _figure(1, len(_BARS), width=width * len(_BARS), height=4.8)
    for ax, (metric, meaning) in zip(grid[0], _BARS.items(), strict=True):
        _bars(ax, results, readings, metric)
        ax.set_title(f"{metric}\n({meaning})", fontsize=10)
    grid[0][1].axhline(1, color="black", linewidth=0.8, linestyle="--")
    columns = {"ncols": 4, "fontsize": 9, "frameon": False}
    figure.legend(*grid[0][0].get_legend_handles_labels(), loc="outside lower center", **columns)
    _save(figure, path)


def plot_training_curve(metrics_path: str | Path, path: str | Path) -> None:
    """Curves over the optimizer steps of a `metrics.jsonl`, as a PNG file.

    Training `loss` and `velocity_similarity`, with their moving means, and for each split `energy_score` of the samples
    and `clip_similarity` of both readings, with the baselines as flat lines. Raises DataError if the file is missing,
    holds a line that is not JSON, or has no training metrics yet.
    """
    lines = read_metrics(metrics_path)
    train, evaluations = ([line for line in lines if line["kind"] == kind] for kind in ("train", "eval"))
    if not train:
        raise DataError(f"{metrics_path} holds no training metrics yet, so there is no curve to draw")
    splits = list(dict.fromkeys(line["split"] for line in evaluations))
    figure, grid = _figure(2, 1 + len(splits), width=4.6 * (1 + len(splits)), height=7.6)
    for ax, name in zip(grid[:, 0], ("loss", "velocity_similarity"), strict=True):
        steps, values = zip(*((line["step"], line[name]) for line in train), strict=True)
        ax.plot(steps, values, color=_COLOURS["sampled"], marker="." if len(train) < 40 else "")
        ax.plot(steps, _moving_mean(values), color=_COLOURS["posterior_mean"], label="mean of a tenth of the steps")
        ax.legend(fontsize=7)
        ax.set_title(f"train {name}", fontsize=10)
    losses = [line["loss"] for line in train]
    if min(losses) > 0 and max(losses) > _LOG_RATIO * min(losses):
        grid[0][0].set_yscale("log")
    for column, split in zip(grid.T[1:], splits, strict=True):
        of_split = [line for line in evaluations if line["split"] == split]
        _evaluation_curves(column[0], of_split, "energy_score", ["sampled"])
        _evaluation_curves(column[1], of_split, "clip_similarity", MODEL_READINGS)
    for ax in grid.flat:
        ax.set_xlabel("step")
        ax.grid(alpha=0.3)
    _save(figure, path)


@dataclass(frozen=True)
class Panel:
    """One picture of `plot_panels`: metrics over the steps, and levels that no step changes."""

    title: str
    curves: dict[tuple[str, str], list[tuple[int, float, float]]]  # (variant, reading) -> (step, mean, spread) by step
    levels: dict[str, float]  # reading -> value


def plot_panels(panels: Sequence[Panel], variants: Sequence[str], columns: int, path: str | Path) -> None:
    """Panels row by row as a PNG file; a variant has one colour in all of them, a reading one line style."""
    rows = -(-len(panels) // columns)
    figure, grid = _figure(rows, columns, width=5.5 * columns + 2.5, height=3.0 * rows + 0.4)
    handles: dict[str, Any] = {}
    for ax, panel in zip(grid.flat, panels, strict=False):
        for (variant, reading), points in panel.curves.items():
            colour, label = f"C{variants.index(variant)}", f"{variant}: {reading}"
            steps, means, spreads = (np.array(column) for column in zip(*points, strict=True))
            (handles[label],) = ax.plot(steps, means, color=colour, ls=_STYLES.get(reading, "-."), marker="o", ms=3)
            ax.fill_between(steps, means - spreads, means + spreads, color=colour, alpha=0.15, lw=0)
        for number, (reading, value) in enumerate(panel.levels.items()):
            handles[reading] = ax.axhline(value, color="black", alpha=0.7, lw=1, ls=(0, (1 + 2 * number, 2)))
        ax.set_title(panel.title, fontsize=10)
        ax.set_xlabel("step", fontsize=8)
        ax.grid(alpha=0.3)
    figure.legend([*handles.values()], [*handles], loc="outside right upper", fontsize=8, frameon=False)
    _save(figure, path)


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The lines of a `metrics.jsonl`; an incomplete last line, which is still being written, is ignored."""
    try:
        texts = Path(path).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise DataError(f"{path} is missing; a training run writes it into its folder") from None
    lines = []
    for number, text in enumerate(texts, start=1):
        try:
            lines.append(parse_json(text.encode(), f"{path}: line {number}", DataError, "remove it"))
        except DataError:
            if number < len(texts):
                raise
            logger.warning("%s: line %d is incomplete and ignored", path, number)
    return lines


def _bars(ax: Axes, results: dict[str, EvalResult], readings: list[str], metric: str) -> None:
    """A group of bars for each split; a metric that a reading does not have leaves its place empty."""
    width = 0.86 / len(readings)
    sampler = next(iter(results.values())).sampler
    for offset, reading in enumerate(readings):
        values = [result.readings.get(reading, {}).get(metric, math.nan) for result in results.values()]
        places = [place + (offset - (len(readings) - 1) / 2) * width for place in range(len(results))]
        colour = _COLOURS.get(reading, f"C{offset}")
        bars = ax.bar(places, values, width * 0.95, label=row_label(reading, sampler), color=colour)
        texts = ["" if math.isnan(value) else f"{value:.3g}" for value in values]
        ax.bar_label(bars, texts, fontsize=7, padding=2, rotation=90)
    ax.set_xticks(range(len(results)), list(results))
    ax.axhline(0, color="black", linewidth=0.6)
    ax.margins(y=0.15)
    ax.grid(axis="y", alpha=0.3)
    ax.set_axisbelow(True)


def _evaluation_curves(ax: Axes, lines: list[dict[str, Any]], metric: str, curves: Sequence[str]) -> None:
    """Curves of the readings `curves`, and steps that keep flat between evaluations for the baselines.

    A baseline changes only where an evaluation is over other images, as the one at the end of a run usually is.
    """
    points: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for line in lines:
        if metric in line:
            points[line["reading"]].append((line["step"], line[metric]))
    for number, (reading, found) in enumerate(points.items()):
        style: dict[str, Any] = {"color": _COLOURS.get(reading, f"C{number}"), "label": reading}
        found.sort()
        if reading in curves:
            ax.plot(*zip(*found, strict=True), marker="o" if len(found) < 20 else "", ms=3, **style)
        elif reading not in MODEL_READINGS:
            flat = [(0, found[0][1]), *found]
            ax.plot(*zip(*flat, strict=True), drawstyle="steps-pre", ls=":", **style)
    ax.set_title(f"{lines[0]['split']}: {metric}", fontsize=10)
    if points:
        ax.legend(fontsize=7)


def _moving_mean(values: Sequence[float]) -> list[float]:
    """The mean of each value and those around it, a tenth of all in the middle and fewer towards the ends."""
    places = np.arange(len(values))
    reach = np.minimum(len(values) // 20, np.minimum(places, places[::-1]))
    sums = np.concatenate([[0.0], np.cumsum(values)])
    return ((sums[places + reach + 1] - sums[places - reach]) / (2 * reach + 1)).tolist()


def _figure(rows: int, columns: int, width: float, height: float) -> tuple[Figure, Any]:
    """A figure, in inches, and its axes [rows, columns]."""
    from matplotlib.figure import Figure  # without pyplot it draws with Agg

    figure = Figure(figsize=(width, height), dpi=130, layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def _save(figure: Figure, path: str | Path) -> None:
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    atomic_write_bytes(path, picture.getvalue())
