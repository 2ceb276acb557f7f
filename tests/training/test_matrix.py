"""The runs of a matrix: which are made, which go on, what a failure does; and a small bench from end to end."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from blip3o_ds.cli import main
from blip3o_ds.evaluation.matrix import Matrix, PlannedRun
from blip3o_ds.training import matrix as bench
from tests.conftest import SMALL, write_embeddings
from tests.evaluation.fake_runs import matrix_file, write_run

Compare = Callable[..., tuple[int, dict]]


@pytest.fixture
def compare(tmp_path, embeddings, capsys) -> Compare:
    """`compare --matrix` on small data in this process: its exit status, and the last line it printed as JSON."""
    write_embeddings(tmp_path / "held", 4, seed=1)
    data = {"train": str(embeddings), "eval": [str(tmp_path / "held")]}

    def run(*flags: str, **changes) -> tuple[int, dict]:
        path = matrix_file(tmp_path, **{"data": data, "metrics": ["mse"], **changes})
        arguments = ["compare", "--matrix", path, "--out", tmp_path / "out", "--num_processes", 2, "--json", *flags]
        status = main([str(argument) for argument in arguments])
        return status, json.loads(capsys.readouterr().out.splitlines()[-1])

    return run


@pytest.fixture
def launched(monkeypatch, tmp_path) -> list[str]:
    """The names of the runs that are launched; instead of training, the launch writes what a run leaves."""
    names: list[str] = []

    def command(matrix: Matrix, run: PlannedRun, processes: int) -> list[str]:
        names.append(f"{run.name}{' resumed' if run.find() else ''}")
        staged = tmp_path / f"staged_{len([*tmp_path.glob('staged_*')])}"
        made, begun = write_run(staged, run, 0.1 * len(names)), run.find()
        what, where = (made / "final_summary.json", begun) if begun else (f"{staged}/.", run.folder)
        return ["cp", "-r", str(what), str(where)]

    monkeypatch.setattr(bench, "training_command", command)
    return names


def test_runs_that_are_finished_are_kept_and_unfinished_ones_go_on(compare, launched, tmp_path):
    assert compare()[0] == 0
    assert launched == ["uniform/seed_0", "logit/seed_0", "uniform/seed_1", "logit/seed_1"]
    launched.clear()
    (tmp_path / "out/logit/seed_0/clip_repro_20260101_000000/final_summary.json").unlink()
    shutil.rmtree(tmp_path / "out/uniform/seed_1")

    status, results = compare()

    assert (status, launched) == (0, ["logit/seed_0 resumed", "uniform/seed_1"])
    assert [len(run["launches"]) for run in results["runs"]] == [1, 2, 1, 1]
    assert {path.name for path in (tmp_path / "out").iterdir()} >= {
        *("report.md", "report.html", "results.json", "curves.png", "uniform", "logit")
    }
    assert results["machine"]["cores"] >= 1
    assert results["versions"].keys() == {"blip3o_ds", "torch", "deepspeed", "python"}


def test_a_dry_run_names_runs_and_steps_and_writes_nothing(compare, launched, tmp_path):
    status, planned = compare("--dry_run")

    assert (status, planned["steps"], launched) == (0, 16, [])
    assert not (tmp_path / "out").exists()
    compare()
    run_dir = tmp_path / "out/logit/seed_0/clip_repro_20260101_000000"
    (run_dir / "final_summary.json").unlink()
    (run_dir / "checkpoints/step_00000004").rename(run_dir / "checkpoints/step_00000003")

    status, planned = compare("--dry_run")

    assert (planned["runs"]["logit/seed_0"], planned["runs"]["logit/seed_1"]) == ("4 steps, from 3", "finished")
    assert planned["steps"] == 1


def test_variants_that_differ_in_their_evaluation_alone_share_a_training(compare, launched, tmp_path):
    changes = {"variants": {"a": {}, "b": {"eval.sampler.steps": 7}, "c": {"flow.noise_share": 0.25}}, "seeds": [0]}
    planned = compare("--dry_run", **changes)[1]
    assert planned["runs"] == {"a/seed_0": "4 steps", "b/seed_0": "an evaluation of a/seed_0", "c/seed_0": "4 steps"}
    assert planned["steps"] == 8

    status, result = compare(**changes)
    assert status == 0, result

    assert launched == ["a/seed_0", "b/seed_0 resumed", "c/seed_0"]
    [of_b] = (tmp_path / "out/b/seed_0").glob("clip_repro_*")
    config = json.loads((of_b / "experiment_config.json").read_text())["config"]
    assert config["eval"]["sampler"]["steps"] == 7
    assert config["train"]["output_dir"] == str(of_b.parent)
    assert compare(**changes)[0] == 0  # what is saved is what is planned
    assert len(launched) == 3


SHARED = {"variants": {"a": {}, "b": {"eval.sampler.steps": 7}}, "seeds": [0]}


def test_a_shared_training_that_was_copied_in_part_is_copied_again(compare, launched, tmp_path):
    left = tmp_path / "out/b/seed_0/.clip_repro_20260101_000000/half"
    left.mkdir(parents=True)

    assert compare(**SHARED)[0] == 0

    assert launched == ["a/seed_0", "b/seed_0 resumed"]
    assert not left.parent.exists()


@pytest.mark.parametrize("links", [True, False])
def test_checkpoints_of_a_shared_training_are_linked_or_where_that_cannot_be_copied(
    compare, launched, tmp_path, monkeypatch, links
):
    def refuse(*_: object) -> None:
        raise OSError(1, "Operation not permitted")

    if not links:
        monkeypatch.setattr(bench.os, "link", refuse)

    assert compare(**SHARED)[0] == 0

    assert launched == ["a/seed_0", "b/seed_0 resumed"]
    weights = [
        tmp_path / "out" / name / "seed_0/clip_repro_20260101_000000/checkpoints/step_00000004/model.safetensors"
        for name in "ab"
    ]
    assert weights[1].read_bytes() == b"weights"
    assert weights[0].samefile(weights[1]) == links


def remove_checkpoints(run_dir: Path) -> None:
    shutil.rmtree(run_dir / "checkpoints")


def damage_checkpoint(run_dir: Path) -> None:
    (run_dir / "checkpoints/step_00000004/model.safetensors").write_bytes(b"weightz")


@pytest.mark.parametrize("spoil", [remove_checkpoints, damage_checkpoint])
def test_where_a_training_can_no_longer_be_shared_a_variant_has_its_own(compare, launched, tmp_path, caplog, spoil):
    assert compare(variants={"a": {}}, seeds=[0])[0] == 0
    spoil(tmp_path / "out/a/seed_0/clip_repro_20260101_000000")

    assert compare(**SHARED)[0] == 0

    assert launched == ["a/seed_0", "b/seed_0"]
    assert "b/seed_0 trains for itself" in caplog.text or spoil is remove_checkpoints
    assert not list((tmp_path / "out/b/seed_0").glob(".clip*"))


def test_without_a_finished_training_to_share_a_variant_has_its_own(compare, launched, monkeypatch):
    command = bench.training_command
    monkeypatch.setattr(bench, "training_command", lambda *a: ["false"] if a[1].variant == "a" else command(*a))

    status, _ = compare(variants={"a": {}, "b": {"eval.sampler.steps": 7}}, seeds=[0])

    assert (status, launched) == (1, ["b/seed_0"])


def test_epochs_are_counted_in_steps_of_the_data(compare):
    assert compare("--dry_run", common={"train.num_epochs": 2})[1]["steps"] == 4 * 5  # 80 samples in batches of 16


def test_a_changed_entry_ends_before_any_run(compare, launched):
    compare()
    launched.clear()

    status, result = compare(seeds=[0, 1, 2], common={"train.max_steps": 5})

    assert (status, launched) == (2, [])
    assert "train.max_steps was 4 and is 5 now" in result["error"]


def test_a_failed_run_does_not_stop_the_others_and_is_named_with_its_log(compare, launched, monkeypatch, tmp_path):
    command = bench.training_command

    def sometimes(matrix: Matrix, run: PlannedRun, processes: int) -> list[str]:
        made = command(matrix, run, processes)
        return ["sh", "-c", "echo 'blip3o-ds: error: no luck'; echo after; exit 3"] if run.seed == 0 else made

    monkeypatch.setattr(bench, "training_command", sometimes)

    status, result = compare()

    log = tmp_path / "out/uniform/seed_0/launcher.log"
    assert (status, len(launched)) == (1, 4)
    assert f"uniform/seed_0: exit status 3: blip3o-ds: error: no luck (log: {log})" in result["error"]
    assert "2 of 4 runs failed" in result["error"]
    assert log.read_text().splitlines()[1:] == ["blip3o-ds: error: no luck", "after"]
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert [run["status"] for run in results["runs"]] == ["failed", "failed", "finished", "finished"]


def test_a_run_that_ends_well_without_a_result_has_failed(compare, monkeypatch):
    monkeypatch.setattr(bench, "training_command", lambda *_: ["true"])

    status, result = compare()

    assert status == 1
    assert "it ended before its last step" in result["error"]


def test_data_that_cannot_be_opened_ends_before_any_run(compare, launched, tmp_path):
    status, result = compare("--train", tmp_path / "nowhere")

    assert (status, result["kind"], launched) == (1, "DataError", [])


def test_two_processes_do_not_make_the_same_runs(compare, launched, tmp_path):
    (tmp_path / "out").mkdir()
    with bench.FileLock(tmp_path / "out" / ".lock"):
        status, result = compare()

    assert (status, launched) == (2, [])
    assert "another process makes the runs there" in result["error"]


def test_whatever_ends_the_bench_ends_all_processes_of_the_run_first(tmp_path):
    """Its launcher passes no signal on, and a rank that is told to stop saves before it does."""
    rank = "trap 'echo saved; exit' TERM; echo $$; while :; do sleep 0.05; done"
    program = f"""
from pathlib import Path
from blip3o_ds.training import matrix
with matrix._stopping():
    matrix._launch(["sh", "-c", {f"sh -c {shlex.quote(rank)} & wait"!r}], Path({str(tmp_path / "log")!r}), 1)
"""
    process = subprocess.Popen([sys.executable, "-c", program], env={**os.environ, "PYTHONPATH": ":".join(sys.path)})
    deadline = time.monotonic() + 60
    while not (log := tmp_path / "log").exists() or len(log.read_text().splitlines()) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    pid = int(log.read_text().splitlines()[1])

    process.send_signal(signal.SIGTERM)

    assert process.wait(30) == 128 + signal.SIGTERM
    assert log.read_text().splitlines()[-1] == "saved"
    assert not Path(f"/proc/{pid}").exists() or "Z" in Path(f"/proc/{pid}/stat").read_text().split()[2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["compare"], "one of the arguments RUN --matrix is required"),
        (["compare", "run", "--matrix", "m.yaml"], "not allowed with argument"),
        (["compare", "--matrix", "m.yaml", "--num_processes", "0"], "expected a positive number"),
    ],
)
def test_wrong_usage_ends_with_status_2(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)

    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_flags_of_a_matrix_are_refused_beside_run_folders(capsys):
    assert main(["compare", "run", "--out", "somewhere"]) == 2
    assert "--out goes with --matrix" in capsys.readouterr().err


@pytest.mark.slow
def test_a_bench_trains_evaluates_and_reports_every_variant_and_seed(tmp_path, embeddings, capfd):
    write_embeddings(tmp_path / "held", 4, seed=1)
    common = {**SMALL, "train.max_steps": 2, "train.eval_every": 1, "train.precision": "fp32"}
    variants = {"velocity": {"flow.prediction": "velocity"}, "sample": {"flow.prediction": "sample"}}
    again = {"velocity_in_9": {"flow.prediction": "velocity", "eval.sampler.steps": 9}}  # which is not trained
    path = matrix_file(tmp_path, data=..., common=common, variants=variants | again, metrics=["mse", "clip_similarity"])
    arguments = ["--train", embeddings, "--eval", tmp_path / "held", "--out", tmp_path / "out", "--num_processes", 1]

    status = main(["compare", "--matrix", str(path), *map(str, arguments), "--json"])

    out = capfd.readouterr().out
    assert status == 0, out
    results = json.loads(out.splitlines()[-1])
    assert [run["status"] for run in results["runs"]] == ["finished"] * 6
    assert all(run["environment"]["world_size"] == 1 and run["seconds"] > 0 for run in results["runs"])
    for variant in variants:
        runs = [run for run in results["runs"] if run["variant"] == variant]
        values = [run["evaluation"]["held"]["readings"]["sampled"]["mse"] for run in runs]
        assert results["summary"]["held"][variant]["sampled"]["mse"]["mean"] == pytest.approx(sum(values) / 2)
        assert values[0] != values[1]  # the seeds are two
        [config] = (tmp_path / f"out/{variant}/seed_1").glob("clip_repro_*/experiment_config.json")
        saved = json.loads(config.read_text())["config"]
        assert (saved["flow"]["prediction"], saved["train"]["seed"]) == (variant, 1)
    [own], [shared] = (
        [run for run in results["runs"] if (run["variant"], run["seed"]) == (variant, 1)]
        for variant in ("velocity", "velocity_in_9")
    )
    lines = [json.loads(line) for line in (tmp_path / "out" / shared["run_dir"] / "metrics.jsonl").open()]
    assert [line["step"] for line in lines if line["kind"] == "train"] == [1, 2]
    evaluated = [line["step"] for line in lines if line["kind"] == "eval"]
    assert evaluated == [2] * len(shared["evaluation"]["held"]["readings"])  # not on the way, and once at the end
    of = [run["evaluation"]["held"]["readings"] for run in (own, shared)]
    assert of[0]["posterior_mean"] == of[1]["posterior_mean"]
    assert of[0]["sampled"]["mse"] != of[1]["sampled"]["mse"]
    assert yaml.safe_load(path.read_text())["question"] in out  # the report is printed
    assert (tmp_path / "out/curves.png").read_bytes().startswith(b"\x89PNG")
