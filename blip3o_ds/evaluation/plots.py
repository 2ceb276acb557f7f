"""Plots of an evaluation and of a training run as PNG files; they need no display.

They are drawn from plain results: an `EvalResult` for each split, or the lines of a run's `metrics.jsonl`.
"""

from __future__ import annotations

import io
import logging
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from blip3o_ds.errors import DataError
from blip3o_ds.evaluation.report import READINGS, EvalResult, row_label
from blip3o_ds.files import atomic_write_bytes, parse_json

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

logger = logging.getLogger(__name__)

_COLOURS = {"posterior_mean": "#1b6ca8", "sampled": "#7fb8dd", "ridge": "#e08e2b", "mean_embedding": "#9a9a9a"}
_STYLES = {"posterior_mean": "-", "sampled": "--", "ridge": ":", "mean_embedding": ":"}


def plot_evaluation(results: dict[str, EvalResult], path: str | Path) -> None:
    """Bars of `clip_similarity`, not centred and centred, for each split and reading, as a PNG file."""
    figure, axes = _figure(2, width=max(9.0, 3.0 * len(results) + 4.0), height=4.6, sharey=True)
    panels = {"clip_similarity": "not centred", "clip_similarity_centered": "training mean subtracted"}
    for ax, (metric, title) in zip(axes, panels.items(), strict=True):
        _bars(ax, results, metric)
        ax.set_title(f"{metric}\n({title})", fontsize=10)
    axes[0].set_ylabel("mean token cosine")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=9, frameon=False)
    _save(figure, path)


def plot_training_curve(metrics_path: str | Path, path: str | Path) -> None:
    """Curves over the optimizer steps of a `metrics.jsonl`, as a PNG file.

    Three panels: training `loss`, training `velocity_similarity`, and `clip_similarity` of each evaluation. Raises
    DataError if the file is missing, holds a line that is not JSON, or has no training metrics yet.
    """
    lines = read_metrics(metrics_path)
    train, evaluations = ([line for line in lines if line["kind"] == kind] for kind in ("train", "eval"))
    if not train:
        raise DataError(f"{metrics_path} holds no training metrics yet, so there is no curve to draw")
    figure, axes = _figure(3, width=13.0, height=4.2)
    for ax, name in zip(axes, ("loss", "velocity_similarity"), strict=False):
        steps, values = zip(*((line["step"], line[name]) for line in train), strict=True)
        ax.plot(steps, values, color=_COLOURS["posterior_mean"], marker="." if len(train) < 40 else "")
        ax.set_title(f"train {name}", fontsize=10)
    if min(line["loss"] for line in train) > 0:
        axes[0].set_yscale("log")
    _evaluation_curves(axes[2], evaluations)
    for ax in axes:
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
    figure, axes = _figure(columns, width=5.5 * columns + 2.5, height=3.0 * rows + 0.4, rows=rows)
    handles: dict[str, Any] = {}
    for ax, panel in zip(np.atleast_1d(axes).flat, panels, strict=False):
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


def _bars(ax: Axes, results: dict[str, EvalResult], metric: str) -> None:
    width = 0.8 / len(READINGS)
    for offset, reading in enumerate(READINGS):
        values = [result.readings[reading][metric] for result in results.values()]
        places = [place + (offset - (len(READINGS) - 1) / 2) * width for place in range(len(results))]
        label = row_label(reading, next(iter(results.values())).sampler)
        bars = ax.bar(places, values, width * 0.95, label=label, color=_COLOURS[reading])
        ax.bar_label(bars, fmt="%.2f", fontsize=7, padding=1)
    ax.set_xticks(range(len(results)), list(results))
    ax.axhline(0, color="black", linewidth=0.6)
    ax.margins(y=0.12)
    ax.grid(axis="y", alpha=0.3)
    ax.set_axisbelow(True)


def _evaluation_curves(ax: Axes, lines: list[dict[str, Any]]) -> None:
    curves: dict[tuple[str, str], list[tuple[int, float]]] = defaultdict(list)
    for line in lines:
        curves[line["split"], line["reading"]].append((line["step"], line["clip_similarity"]))
    splits = list(dict.fromkeys(split for split, _ in curves))
    for (split, reading), points in curves.items():
        steps, values = zip(*sorted(points), strict=True)
        colour = f"C{splits.index(split)}"
        alpha = 0.5 if reading == "mean_embedding" else 1.0
        style: dict[str, Any] = {"ls": _STYLES[reading], "marker": "o" if len(points) < 20 else "", "ms": 3}
        ax.plot(steps, values, color=colour, alpha=alpha, label=f"{split}: {reading}", **style)
    ax.set_title("eval clip_similarity", fontsize=10)
    if curves:
        ax.legend(fontsize=7)


def _figure(columns: int, width: float, height: float, sharey: bool = False, rows: int = 1) -> tuple[Figure, Any]:
    from matplotlib.figure import Figure  # without pyplot it draws with Agg

    figure = Figure(figsize=(width, height), dpi=130, layout="constrained")
    return figure, figure.subplots(rows, columns, sharey=sharey)


def _save(figure: Figure, path: str | Path) -> None:
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    atomic_write_bytes(path, picture.getvalue())
