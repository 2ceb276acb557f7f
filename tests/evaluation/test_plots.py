"""The pictures show the figures they were given."""

from __future__ import annotations

import json

import pytest

from blip3o_ds.config import SamplerConfig
from blip3o_ds.errors import DataError
from blip3o_ds.evaluation import plots
from blip3o_ds.evaluation.metrics import METRIC_NAMES
from blip3o_ds.evaluation.plots import Panel, plot_evaluation, plot_panels, plot_training_curve, read_metrics
from blip3o_ds.evaluation.report import READINGS, EvalResult

PNG = b"\x89PNG\r\n\x1a\n"


def result(base: float) -> EvalResult:
    readings = {
        reading: {name: base + 0.1 * i + 0.001 * j for j, name in enumerate(METRIC_NAMES)}
        for i, reading in enumerate(READINGS)
    }
    return EvalResult(readings, 10, 10, "raw", SamplerConfig())


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are saved, as matplotlib has them."""
    figures, save = [], plots._save
    monkeypatch.setattr(plots, "_save", lambda figure, path: (figures.append(figure), save(figure, path)))
    return figures


def test_the_bars_are_as_high_as_the_metrics(drawn, tmp_path):
    results = {"crops": result(0.2), "images": result(-0.1)}

    plot_evaluation(results, tmp_path / "evaluation.png")

    assert (tmp_path / "evaluation.png").read_bytes().startswith(PNG)
    for ax, metric in zip(drawn[0].axes, ("clip_similarity", "clip_similarity_centered"), strict=True):
        assert metric in ax.get_title()
        for bars, reading in zip(ax.containers, READINGS, strict=True):
            expected = [r.readings[reading][metric] for r in results.values()]
            assert [bar.get_height() for bar in bars] == pytest.approx(expected)
        assert [tick.get_text() for tick in ax.get_xticklabels()] == ["crops", "images"]


@pytest.fixture
def metrics_file(tmp_path):
    lines = [{"step": s, "kind": "train", "loss": 1 / s, "velocity_similarity": s / 10} for s in range(1, 6)]
    for step in (4, 2):
        for split in ("crops", "images"):
            for reading in READINGS:
                line = {"step": step, "kind": "eval", "split": split, "reading": reading}
                lines.append({**line, "clip_similarity": step / 10 + len(split + reading) / 1000})
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_the_curves_go_through_the_lines_of_the_metrics(drawn, metrics_file, tmp_path):
    plot_training_curve(metrics_file, tmp_path / "training.png")

    assert (tmp_path / "training.png").read_bytes().startswith(PNG)
    loss, similarity, evaluation = drawn[0].axes
    assert loss.lines[0].get_xydata().tolist() == [[s, 1 / s] for s in range(1, 6)]
    assert similarity.lines[0].get_xydata().tolist() == [[s, s / 10] for s in range(1, 6)]
    assert len(evaluation.lines) == 2 * len(READINGS)
    for line in evaluation.lines:
        split, reading = line.get_label().split(": ")
        offset = len(split + reading) / 1000
        assert line.get_xydata().tolist() == [[2, 0.2 + offset], [4, 0.4 + offset]]


def test_panels_show_the_means_the_bands_and_the_levels(drawn, tmp_path):
    points = [(1, 0.5, 0.1), (2, 0.25, 0.2)]
    panels = [
        Panel("first", {("a", "sampled"): points, ("b", "sampled"): points}, {"ridge": 0.75}),
        Panel("second", {("b", "sampled"): points}, {}),
    ]

    plot_panels(panels, ["a", "b"], 1, tmp_path / "curves.png")

    assert (tmp_path / "curves.png").read_bytes().startswith(PNG)
    first, second = drawn[0].axes
    assert (first.get_title(), second.get_title()) == ("first", "second")
    assert first.lines[0].get_xydata().tolist() == [[1, 0.5], [2, 0.25]]
    assert set(first.lines[2].get_ydata()) == {0.75}
    band = first.collections[0].get_paths()[0].get_extents()
    assert (band.ymin, band.ymax) == pytest.approx((0.05, 0.6))
    assert first.lines[1].get_color() == second.lines[0].get_color() != first.lines[0].get_color()
    labels = [text.get_text() for text in drawn[0].legends[0].get_texts()]
    assert labels == ["a: sampled", "b: sampled", "ridge"]


def test_a_last_line_still_being_written_is_left_out_and_a_damaged_one_is_an_error(metrics_file):
    whole = read_metrics(metrics_file)
    text = metrics_file.read_text()

    metrics_file.write_text(text + '{"step": 6, "ki')
    assert read_metrics(metrics_file) == whole

    metrics_file.write_text('{"step": 6, "ki\n' + text)
    with pytest.raises(DataError, match=r"metrics\.jsonl: line 1 is not JSON"):
        read_metrics(metrics_file)


def test_a_missing_file_and_one_without_training_are_errors(metrics_file, tmp_path):
    with pytest.raises(DataError, match="is missing"):
        plot_training_curve(tmp_path / "none.jsonl", tmp_path / "a.png")
    metrics_file.write_text(metrics_file.read_text().replace('"train"', '"other"'))
    with pytest.raises(DataError, match="no training metrics"):
        plot_training_curve(metrics_file, tmp_path / "a.png")
    assert not (tmp_path / "a.png").exists()
