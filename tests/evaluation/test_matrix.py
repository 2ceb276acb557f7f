"""A matrix of settings: what its file may say, which runs it makes, and what its report says of them."""

from __future__ import annotations

import base64
import json
import re
import statistics
from collections.abc import Sequence
from pathlib import Path

import pytest

from blip3o_ds.errors import ConfigError
from blip3o_ds.evaluation import matrix_report
from blip3o_ds.evaluation.matrix import check_unchanged, load_matrix, plan_runs
from blip3o_ds.evaluation.matrix_report import write_report
from blip3o_ds.evaluation.matrix_results import Bench, Stat, read_result
from tests.conftest import PROJECT
from tests.evaluation.fake_runs import READINGS, matrix, matrix_file, write_run

FACTS = {
    "command": "blip3o-ds compare",
    "processes": 2,
    "total_steps": 4,
    "machine": {"cpu": "a CPU", "cores": 2, "gpus": []},
    "versions": {"torch": "2"},
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quesiton": "why"}, "quesiton is not a field of a matrix; did you mean question"),
        ({"question": ...}, "question is missing"),
        ({"data": {"train": "a", "evals": []}}, "data.evals is not a field of a matrix; did you mean eval"),
        ({"data": {"train": "a"}}, "data.eval is not given; add --eval DIR"),
        ({"preset": "huge"}, "model size 'huge' is unknown"),
        ({"seeds": [0, 0]}, "seeds = [0, 0]: one of them stands there twice"),
        ({"seeds": [-1]}, "seeds.0 = -1"),
        ({"metrics": ["mse", "clip_similarty"]}, "'clip_similarty' is unknown; did you mean clip_similarity"),
        ({"variants": {"a/b": {}}}, "variants.a/b = 'a/b'"),
        ({"variants": {"a": None}}, "variants.a = None: input should be a valid dictionary"),
        ({"common": {"train.lr": 1}}, "common: train.lr is not a setting; did you mean train.learning_rate?"),
        ({"variants": {"a": {}, "b": {"flow.path": "curved"}}}, "variants.b: flow.path = 'curved' is unknown"),
        ({"common": {"train.seed": 4}}, "common: train.seed cannot be set here; it is each of `seeds`"),
        ({"variants": {"a": {}, "b": {"train.max_steps": 8}}}, "variants.b: train.max_steps is 8 here and 4 in 'a'"),
        ({"variants": {"a": {}, "b": {"train.micro_batch_size": 4}}}, "variants.b: the batch"),
    ],
)
def test_what_a_matrix_cannot_say_is_an_error_that_names_file_and_field(tmp_path, changes, message):
    path = matrix_file(tmp_path, **changes)

    with pytest.raises(ConfigError) as raised:
        load_matrix(path)

    assert str(raised.value).startswith(f"{path}: ")
    assert message in str(raised.value)


def test_every_variant_has_every_seed_and_differs_in_its_own_settings_only(tmp_path):
    runs = plan_runs(matrix(tmp_path), tmp_path / "out")

    assert [run.name for run in runs] == ["uniform/seed_0", "logit/seed_0", "uniform/seed_1", "logit/seed_1"]
    assert [run.config.train.seed for run in runs] == [0, 0, 1, 1]
    assert {run.config.eval.sampler.seed for run in runs} == {0}
    assert [run.config.flow.timestep_law for run in runs[:2]] == ["uniform", "logit_normal"]
    assert all(run.config.train.max_steps == 4 for run in runs)
    assert runs[0].config.model.hidden_size == 256  # the preset's


def test_data_of_the_command_line_replaces_the_files(tmp_path):
    found = load_matrix(matrix_file(tmp_path, data=...), "here", ["s3://bucket/held", "/held"]).data

    assert found.train == str(Path("here").absolute())
    assert found.eval == ("s3://bucket/held", "/held")


def test_a_changed_entry_is_refused_with_the_difference_and_the_folder(tmp_path):
    for run in plan_runs(matrix(tmp_path), tmp_path / "out"):
        write_run(run.folder, run, 0.5)
    check_unchanged(plan_runs(matrix(tmp_path), tmp_path / "out"), 2)  # the data's dims are no difference

    changed = plan_runs(matrix(tmp_path, variants={"uniform": {}, "logit": {}}), tmp_path / "out")
    with pytest.raises(ConfigError, match=r"flow\.timestep_law was 'logit_normal' and is 'uniform' now") as raised:
        check_unchanged(changed, 2)
    assert str(tmp_path / "out/logit/seed_0") in str(raised.value)
    assert "and so for 1 more" in str(raised.value)

    with pytest.raises(ConfigError, match="number of processes was 2 and is 4 now"):
        check_unchanged(plan_runs(matrix(tmp_path), tmp_path / "out"), 4)


def bench(
    tmp_path: Path, values: dict[str, list[float | None]], readings: Sequence[str] = READINGS, **changes
) -> tuple[Path, dict]:
    """The report's folder and results, of runs whose metrics all have one value; None is a run that failed."""
    made = matrix(tmp_path, **changes)
    results = []
    for run in plan_runs(made, tmp_path / "out"):
        value = values[run.variant][made.seeds.index(run.seed)]
        run.folder.mkdir(parents=True)
        if value is not None:
            space = "unit_norm" if run.config.data.normalization == "full" else "raw"
            write_run(run.folder, run, value, space=space, readings=readings)
        results.append(read_result(run, "exit status 1" if value is None else None))
    return tmp_path / "out", write_report(Bench(made, results), tmp_path / "out", FACTS)


def rows(out: Path, variant: str) -> list[list[str]]:
    """The cells of the variant's rows in tables of metrics."""
    lines = [line for line in (out / "report.md").read_text().splitlines() if re.search(rf"\| {variant}\b", line)]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| DiT")]


def test_a_table_shows_mean_and_spread_the_best_and_whether_it_differs(tmp_path):
    values = {"uniform": [0.5, 0.52], "logit": [0.8, 0.84]}
    out, results = bench(tmp_path, values, metrics=["clip_similarity", "mse", "variance_ratio"])

    assert rows(out, "uniform")[0][2:] == ["0.510 ± 0.014", "**0.510 ± 0.014**", "0.510 ± 0.014"]
    assert rows(out, "logit")[0][2:] == ["**0.820 ± 0.028 +**", "0.820 ± 0.028 -", "**0.820 ± 0.028 +**"]
    found = results["summary"]["held"]["logit"]["sampled"]["mse"]
    assert found == {"mean": pytest.approx(0.82), "std": pytest.approx(statistics.stdev([0.8, 0.84])), "count": 2}
    assert json.loads((out / "results.json").read_text()) == json.loads(json.dumps(results))


def test_a_difference_within_the_spread_is_none(tmp_path):
    out, _ = bench(tmp_path, {"uniform": [0.5, 0.6], "logit": [0.55, 0.65]}, metrics=["mse"])

    assert rows(out, "logit")[0][2].endswith(" =")


def test_one_seed_says_nothing_of_the_spread(tmp_path):
    out, _ = bench(tmp_path, {"uniform": [0.5], "logit": [0.6]}, seeds=[3], metrics=["mse"])

    assert [rows(out, name)[0][2] for name in ("uniform", "logit")] == ["**0.500**", "0.600"]
    assert Stat.over([1.0]).differs(Stat.over([2.0, 3.0])) is None


def test_a_failed_run_is_counted_and_named_and_the_others_are_shown(tmp_path):
    out, results = bench(tmp_path, {"uniform": [0.5, None], "logit": [None, None]}, metrics=["mse"])

    assert rows(out, "uniform")[0][1:] == ["uniform (1 of 2 FAILED)", "0.500"]
    assert rows(out, "logit")[0][1:] == ["logit (2 of 2 FAILED)", "failed"]
    assert [run["status"] for run in results["runs"]] == ["finished", "failed", "failed", "failed"]
    assert "FAILED: uniform/seed_1: exit status 1" in (out / "report.md").read_text()


def test_a_report_of_failures_alone_is_written_too(tmp_path):
    out, _ = bench(tmp_path, {"uniform": [None, None], "logit": [None, None]})

    assert (out / "report.html").read_text().count("FAILED") == 4
    assert not (out / "curves.png").exists()


def test_raw_and_unit_norm_embeddings_are_compared_by_their_cosine_alone(tmp_path):
    variants = {"raw": {}, "unit": {"data.normalization": "full"}}
    values = {"raw": [0.5, 0.51], "unit": [0.2, 0.21]}
    out, _ = bench(tmp_path, values, variants=variants, metrics=["clip_similarity", "mse"])

    assert rows(out, "unit")[0][2:] == ["0.205 ± 0.007 -", "0.205 ± 0.007"]
    assert rows(out, "raw")[0][2:] == ["**0.505 ± 0.007**", "0.505 ± 0.007"]
    text = (out / "report.md").read_text()
    assert "Measured on raw embeddings: raw; unit-norm embeddings: unit." in text
    # Their baselines differ with the embeddings, and are told apart.
    assert [bool(re.search(rf"\| ridge from EVA +\| {name} ", text)) for name in ("raw", "unit")] == [True, True]


def test_baselines_that_all_variants_share_stand_there_once(tmp_path):
    out, _ = bench(tmp_path, {"uniform": [0.5, 0.5], "logit": [0.5, 0.5]}, metrics=["mse"])

    lines = [line for line in (out / "report.md").read_text().splitlines() if line.startswith("| ridge from EVA")]
    assert [line.replace("|", "").split() for line in lines] == [["ridge", "from", "EVA", "0.500"]]


def test_baselines_that_nobody_has_heard_of_stand_in_the_table_and_in_the_curves(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(matrix_report, "plot_panels", lambda panels, *_: drawn.extend(panels))
    readings = ("posterior_mean", "sampled", "linear_gaussian", "brand_new")
    monkeypatch.setattr(matrix_report, "to_html", lambda blocks, out: "")  # which holds the picture

    out, results = bench(tmp_path, {"uniform": [0.5, 0.5], "logit": [0.5, 0.5]}, readings, metrics=["energy_score"])

    text = (out / "report.md").read_text()
    assert [label in text for label in ("| linear-Gaussian sampled", "| brand new", "ridge")] == [True, True, False]
    assert [panel.levels for panel in drawn] == [{"linear_gaussian": 0.5, "brand_new": 0.5}]
    assert tuple(results["summary"]["held"]["logit"]) == readings


def test_the_scores_of_the_distribution_lead_the_table_unless_the_file_names_others(tmp_path):
    leading = ("energy_score", "spread_skill", "mean_error", "frechet", "clip_similarity")
    assert matrix(tmp_path).metrics[: len(leading)] == leading


def test_the_curves_are_the_means_over_the_seeds(tmp_path):
    made = matrix(tmp_path)
    results = []
    for run in plan_runs(made, tmp_path / "out"):
        write_run(run.folder, run, 0.4 + 0.2 * run.seed)
        results.append(read_result(run, None))

    curve = Bench(made, results).curve("held", "uniform", "sampled", "mse")

    assert [(step, stat.mean) for step, stat in curve] == [(2, pytest.approx(0.25)), (4, pytest.approx(0.5))]
    assert curve[1][1].std == pytest.approx(statistics.stdev([0.4, 0.6]))


def test_the_page_needs_no_other_file_and_no_script(tmp_path):
    out, _ = bench(tmp_path, {"uniform": [0.5, 0.6], "logit": [0.7, 0.8]}, question="Is a < b & c?")
    page = (out / "report.html").read_text()

    assert "Is a &lt; b &amp; c?" in page
    [picture] = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    assert base64.b64decode(picture) == (out / "curves.png").read_bytes()
    assert not re.search(r"<script|href=|src=\"(?!data:)", page)


@pytest.mark.parametrize("path", sorted((PROJECT / "scripts/matrices").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_matrices_that_come_with_the_project_are_valid(path):
    found = load_matrix(path, "train", ["held"])

    assert (found.name, len(found.seeds) >= 3) == (path.stem, True)
