"""The pictures show the figures they were given."""

from __future__ import annotations

import json

import pytest

from blip3o_ds.config import SamplerConfig
from blip3o_ds.errors import DataError
from blip3o_ds.evaluation import plots
from blip3o_ds.evaluation.metrics import METRIC_NAMES
from blip3o_ds.evaluation.plots import Panel, plot_evaluation, plot_panels, plot_training_curve, read_metrics
from blip3o_ds.evaluation.report import EvalResult

READINGS = ("posterior_mean", "sampled", "linear_gaussian", "ridge", "unheard_of")
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
    for ax, metric in zip(drawn[0].axes, ("energy_score", "spread_skill", "clip_similarity"), strict=True):
        assert metric in ax.get_title()
        for bars, reading in zip(ax.containers, READINGS, strict=True):
            expected = [r.readings[reading][metric] for r in results.values()]
            assert [bar.get_height() for bar in bars] == pytest.approx(expected)
        assert [tick.get_text() for tick in ax.get_xticklabels()] == ["crops", "images"]
    labels = [text.get_text() for text in drawn[0].legends[0].get_texts()]
    assert labels[1:] == ["DiT sampled (25 steps euler)", "linear-Gaussian sampled", "ridge from EVA", "unheard of"]
    assert len({bars[0].get_facecolor() for bars in drawn[0].axes[0].containers}) == len(READINGS)


def test_a_result_that_lacks_a_metric_or_a_reading_leaves_the_place_empty(drawn, tmp_path):
    results = {"old": result(0.2), "new": result(0.3)}
    del results["old"].readings["unheard_of"], results["old"].readings["sampled"]["energy_score"]

    plot_evaluation(results, tmp_path / "evaluation.png")

    energy = drawn[0].axes[0]
    texts = [text.get_text() for text in energy.texts]
    assert texts.count("") == 2
    assert len(texts) == 2 * len(READINGS)


@pytest.fixture
def metrics_file(tmp_path):
    lines = [{"step": s, "kind": "train", "loss": 1 / s, "velocity_similarity": s / 10} for s in range(1, 6)]
    for step in (4, 2):
        for split in ("crops", "images"):
            for reading in READINGS:
                offset = 0.0 if reading in ("linear_gaussian", "ridge", "unheard_of") else step / 10
                value = offset + len(split + reading) / 1000
                line = {"step": step, "kind": "eval", "split": split, "reading": reading}
                lines.append({**line, "clip_similarity": value, "energy_score": value + 5})
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_the_curves_go_through_the_lines_of_the_metrics(drawn, metrics_file, tmp_path):
    plot_training_curve(metrics_file, tmp_path / "training.png")

    assert (tmp_path / "training.png").read_bytes().startswith(PNG)
    loss, *energy, similarity = drawn[0].axes[:4]
    assert loss.lines[0].get_xydata().tolist() == [[s, 1 / s] for s in range(1, 6)]
    assert similarity.lines[0].get_xydata().tolist() == [[s, s / 10] for s in range(1, 6)]
    for axes, metric, extra in ((energy, "energy_score", 5), (drawn[0].axes[4:], "clip_similarity", 0)):
        assert [ax.get_title() for ax in axes] == [f"{split}: {metric}" for split in ("crops", "images")]
        for ax, split in zip(axes, ("crops", "images"), strict=True):
            curves = {line.get_label(): line.get_xydata().tolist() for line in ax.lines}
            assert set(curves) == set(READINGS) - ({"posterior_mean"} if metric == "energy_score" else set())
            offset = extra + len(split + "sampled") / 1000
            assert curves["sampled"] == [[2, pytest.approx(0.2 + offset)], [4, pytest.approx(0.4 + offset)]]
            level = extra + len(split + "ridge") / 1000  # a flat line from the beginning
            assert curves["ridge"] == [[step, pytest.approx(level)] for step in (0, 2, 4)]


def test_beside_a_noisy_curve_is_its_mean_over_a_tenth_of_the_steps(drawn, tmp_path):
    losses = [5 - step / 20 + (-1) ** step for step in range(60)]
    lines = [{"step": s, "kind": "train", "loss": x, "velocity_similarity": 0.1} for s, x in enumerate(losses)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    plot_training_curve(tmp_path / "metrics.jsonl", tmp_path / "training.png")

    mean = drawn[0].axes[0].lines[1].get_ydata()
    assert [mean[0], mean[1], mean[30], mean[59]] == pytest.approx(
        [losses[0], sum(losses[:3]) / 3, sum(losses[27:34]) / 7, losses[59]]
    )


@pytest.mark.parametrize(("losses", "scale"), [((1.0, 0.5), "linear"), ((1.0, 0.01), "log"), ((1.0, 0.0), "linear")])
def test_the_loss_has_a_log_axis_only_if_it_spans_much(drawn, tmp_path, losses, scale):
    lines = [{"step": s, "kind": "train", "loss": x, "velocity_similarity": 0.1} for s, x in enumerate(losses)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    plot_training_curve(tmp_path / "metrics.jsonl", tmp_path / "training.png")

    assert drawn[0].axes[0].get_yscale() == scale
    assert len(drawn[0].axes) == 2  # nothing was evaluated yet


def test_evaluations_of_an_older_version_without_the_energy_are_drawn_by_what_they_have(drawn, metrics_file, tmp_path):
    lines = [json.loads(line) for line in metrics_file.read_text().splitlines()]
    old = [{name: value for name, value in line.items() if name != "energy_score"} for line in lines]
    metrics_file.write_text("".join(json.dumps(line) + "\n" for line in old))

    plot_training_curve(metrics_file, tmp_path / "training.png")

    assert [len(ax.lines) for ax in drawn[0].axes] == [2, 0, 0, 2, len(READINGS), len(READINGS)]


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
