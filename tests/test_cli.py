"""`eval`, `generate` and `export` on a run that was really trained: exit status, last line, and what is written."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from blip3o_ds import cli
from blip3o_ds.cli import build_parser, main
from blip3o_ds.config import SETTINGS, load_run_config
from blip3o_ds.data.reading.dataset import EmbeddingDataset
from blip3o_ds.model.dit import DiT
from tests.conftest import PROJECT, train_command, write_embeddings

FIXED_NAMES = {
    *("clip_similarity", "clip_similarity_centered", "high_quality", "very_high_quality", "excellent_quality"),
    *("mse", "norm_ratio", "retrieval_r1", "retrieval_r5", "energy_score", "spread_skill", "frechet"),
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A folder with `train`, `held` (10 samples), `wide` (other dims) and a run of 4 steps, checkpoints at 2 and 4."""
    folder = tmp_path_factory.mktemp("trained")
    write_embeddings(folder / "train", 24)
    write_embeddings(folder / "held", 10, seed=1)
    write_embeddings(folder / "wide", 2, eva_dim=16)
    settings = {"train.max_steps": 4, "train.save_every": 2, "train.precision": "fp32"}
    extra = ["--set", f"data.eval_dirs=[{folder / 'held'}]", "--set", "train.learning_rate=0.01"]
    extra += ["--set", "flow.cond_dropout=0.1"]  # for guidance
    command = train_command(folder / "train", folder / "runs", None, settings, extra)
    done = subprocess.run(command, capture_output=True, text=True, cwd=PROJECT, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture
def run_dir(trained) -> Path:
    return next((trained / "runs").glob("clip_repro_*"))


@pytest.fixture
def command(capsys):
    """Run a command in this process: its exit status, and the last line it printed as JSON."""

    def run(*arguments) -> tuple[int, dict]:
        status = main([str(argument) for argument in (*arguments, "--json")])
        return status, json.loads(capsys.readouterr().out.splitlines()[-1])

    return run


def test_eval_prints_the_metrics_of_the_model_and_of_the_baselines(command, run_dir, trained, tmp_path):
    status, result = command(
        "eval", run_dir, "--data", trained / "held", "--data", trained / "train", "--plot", tmp_path / "a.png"
    )

    assert status == 0
    assert (result["model"], result["step"], result["weights"]) == (str(run_dir), 4, "ema")
    assert list(result["evaluation"]) == ["held", "train"]
    for split, count in (("held", 10), ("train", 24)):
        evaluation = result["evaluation"][split]
        assert (evaluation["num_samples"], evaluation["space"]) == (count, "raw")
        assert evaluation["readings"].keys() >= {"posterior_mean", "sampled", "ridge", "mean_embedding"}
        for metrics in evaluation["readings"].values():
            assert metrics.keys() >= FIXED_NAMES
            assert all(isinstance(value, float) for value in metrics.values())
    assert (tmp_path / "a.png").stat().st_size > 0


def test_eval_repeats_the_evaluation_at_the_end_of_the_run(command, run_dir, trained):
    _, result = command("eval", run_dir, "--data", trained / "held")

    final = json.loads((run_dir / "final_summary.json").read_text())["evaluation"]["held"]
    for reading, metrics in result["evaluation"]["held"]["readings"].items():
        assert metrics == pytest.approx(final["readings"][reading], rel=1e-4, abs=1e-6)


def test_eval_takes_its_sampler_from_the_flags(command, run_dir, trained):
    flags = {"steps": 5, "solver": "midpoint", "guidance_scale": 2.0, "seed": 7}
    arguments = [text for name, value in flags.items() for text in (f"--{name}", value)]

    arguments += ["--max_samples", 4, "--batch_size", 3, "--num_samples", 2]
    _, given = command("eval", run_dir, "--data", trained / "held", *arguments)
    _, default = command("eval", run_dir, "--data", trained / "held")

    assert given["evaluation"]["held"]["sampler"] == flags
    assert (given["evaluation"]["held"]["num_samples"], given["evaluation"]["held"]["dataset_samples"]) == (4, 10)
    assert (given["evaluation"]["held"]["samples_per_image"], default["evaluation"]["held"]["samples_per_image"]) == (
        2,
        3,
    )
    of_the_run = {"steps": 2, "solver": "heun", "guidance_scale": 1.0, "seed": 0}
    assert default["evaluation"]["held"]["sampler"] == of_the_run


def test_generate_writes_a_dataset_that_verifies(command, run_dir, trained, tmp_path):
    status, result = command("generate", run_dir, "--data", trained / "held", "--out", tmp_path / "out", "--steps", 3)

    assert (status, result["num_samples"], result["generated"]["steps"]) == (0, 10, 3)
    assert result["generated"]["source"] == f"{run_dir.name}, step 4, ema weights"
    assert command("data", "verify", tmp_path / "out")[0] == 0
    source, generated = EmbeddingDataset(trained / "held"), EmbeddingDataset(tmp_path / "out")
    assert generated.key(0, 3) == source.key(0, 3)
    assert generated.meta(0, 3)["caption"] == source.meta(0, 3)["caption"]
    assert torch.equal(generated.read(0, 3)["eva"], source.read(0, 3)["eva"])
    assert not torch.equal(generated.read(0, 3)["clip"], source.read(0, 3)["clip"])


def test_processes_share_generate_and_each_takes_whole_shards(command, run_dir, trained, tmp_path, monkeypatch):
    arguments = ["generate", run_dir, "--data", trained / "held", "--out", tmp_path / "out", "--num_samples", 2]
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert main([str(argument) for argument in arguments]) == 0
    monkeypatch.setenv("RANK", "0")

    status, result = command(*arguments)

    assert (status, result["num_samples"], result["written"], result["shards_left"]) == (0, 20, 16, 0)
    assert EmbeddingDataset(tmp_path / "out").keys(1) == [f"sample_0000{i}_000{k}" for i in (8, 9) for k in (0, 1)]


@pytest.mark.parametrize("step", [2, 4])
def test_an_exported_model_gives_the_output_of_the_checkpoint(command, run_dir, trained, tmp_path, step):
    status, result = command("export", run_dir, tmp_path / "export", *([] if step == 4 else ["--step", step]))

    assert (status, result) == (0, {"export": str(tmp_path / "export")})
    exported = DiT.from_pretrained(tmp_path / "export")
    original = DiT(exported.config)
    original.load_state_dict(load_file(run_dir / f"checkpoints/step_{step:08d}/ema.safetensors"))
    inputs = torch.randn(2, 16, 8), torch.tensor([0.1, 0.7]), torch.randn(2, 16, 12)
    output = exported(*inputs)
    assert torch.equal(output, original(*inputs))
    assert output.abs().max() > 0  # the zero output of an untrained model would be equal to anything of its kind


def test_an_export_evaluates_like_its_run(command, run_dir, trained, tmp_path):
    command("export", run_dir, tmp_path / "export")

    results = [command("eval", model, "--data", trained / "held")[1] for model in (run_dir, tmp_path / "export")]

    assert results[0]["evaluation"] == results[1]["evaluation"]


def test_the_run_folder_may_move(command, run_dir, trained, tmp_path):
    shutil.copytree(run_dir, tmp_path / "moved")
    assert command("eval", tmp_path / "moved", "--data", trained / "held")[0] == 0


def failing_commands(run_dir: Path, trained: Path, tmp_path: Path) -> dict[str, tuple[int, str, list]]:
    """name: exit status, part of the message, arguments."""
    held = ["--data", trained / "held"]
    return {
        "no model": (1, "neither a run", ["eval", tmp_path, *held]),
        "no dataset": (1, "manifest.json is missing", ["eval", run_dir, "--data", tmp_path]),
        "other dims": (1, "eva_dim is 16, but the model", ["eval", run_dir, "--data", trained / "wide"]),
        "no step": (1, "there is no checkpoint of step 3", ["export", run_dir, tmp_path / "out", "--step", "3"]),
        "full folder": (1, "remove it or give another folder", ["export", run_dir, trained]),
        "same dataset": (1, "another command wrote", ["generate", run_dir, *held, "--out", trained / "held"]),
        "zero samples": (2, "num_samples = 0", ["generate", run_dir, *held, "--out", tmp_path, "--num_samples", "0"]),
        "picture nowhere": (1, "nowhere", ["eval", run_dir, *held, "--plot", tmp_path / "nowhere" / "a.png"]),
        "zero steps": (2, "eval.sampler.steps = 0", ["eval", run_dir, *held, "--steps", "0"]),
        "zero batch": (2, "eval.batch_size = 0", ["eval", run_dir, *held, "--batch_size", "0"]),
        "one sample": (2, "eval.num_samples = 1", ["eval", run_dir, *held, "--num_samples", "1"]),
        "no samples": (2, "eval.max_samples = 0", ["eval", run_dir, *held, "--max_samples", "0"]),
        "one name twice": (2, "two folders have the same name", ["eval", run_dir, *held, *held]),
    }  # fmt: skip


@pytest.mark.parametrize("name", list(failing_commands(Path(), Path(), Path())))
def test_a_failure_has_its_exit_status_one_clear_line_and_writes_nothing(name, run_dir, trained, tmp_path, capsys):
    status, message, arguments = failing_commands(run_dir, trained, tmp_path)[name]

    found = main([*map(str, arguments), "--json"])

    out, err = capsys.readouterr()
    assert found == status
    assert message in json.loads(out.splitlines()[-1])["error"]
    assert message in next(line for line in err.splitlines() if line.startswith("blip3o-ds: error: "))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments",
    [["eval"], ["eval", "run"], ["generate", "run", "--data", "d"], ["export", "run"],
     ["export", "run", "d", "--step", "x"], ["eval", "run", "--data", "d", "--solver", "magic"], ["evaluate"], []],
)  # fmt: skip
def test_wrong_usage_ends_with_status_2(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert "usage: blip3o-ds" in capsys.readouterr().err


def test_the_process_prints_json_last_and_ends_with_the_status(run_dir, trained):
    base = [sys.executable, "-m", "blip3o_ds.cli", "eval", str(run_dir), "--json", "--data"]

    good, bad = (
        subprocess.run([*base, str(trained / name)], capture_output=True, text=True) for name in ("held", "no")
    )

    assert (good.returncode, bad.returncode) == (0, 1)
    assert json.loads(good.stdout.splitlines()[-1])["evaluation"].keys() == {"held"}
    assert json.loads(bad.stdout.splitlines()[-1])["kind"] == "DataError"
    assert "Traceback" not in good.stderr + bad.stderr


def test_train_has_the_documented_flags(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help"])

    flags = {word.strip("[],") for word in capsys.readouterr().out.split() if word.strip("[]").startswith("--")}
    assert flags == {
        *("--chunked_embeddings_dir", "--output_dir", "--model_size", "--training_mode", "--batch_size"),
        *("--num_epochs", "--learning_rate", "--max_shards", "--overfit_test_size", "--debug_mode", "--config"),
        *("--set", "--deepspeed_config", "--resume", "--json", "--help"),
    }


def test_a_flag_sets_its_setting():
    given = {"data.train_dir": "d", "train.output_dir": "o", "model.token_layout": "cls_patch", "data.max_shards": 2,
             "train.micro_batch_size": 4, "train.num_epochs": 3, "train.learning_rate": 0.1,
             "train.overfit_test_size": 5, "train.deepspeed_config": "f", "train.debug_mode": True}  # fmt: skip
    flags = {name: setting.flag.split()[0] for name, setting in SETTINGS.items() if setting.flag}
    arguments = [text for name, flag in flags.items() for text in (flag, str(given[name]))[: 2 - (given[name] is True)]]

    args = build_parser().parse_args(["train", *arguments])

    assert flags.keys() == given.keys()
    assert {name: getattr(args, name) for name in given} == given
    nothing = build_parser().parse_args(["train"])
    assert all(getattr(nothing, name) is None for name in given)


def test_config_prints_every_setting_of_a_preset(command, capsys):
    status, settings = command("config", "--model_size", "tiny", "--set", "train.seed=9")

    assert (status, settings.keys()) == (0, SETTINGS.keys())
    assert (settings["model.hidden_size"]["value"], settings["train.seed"]["value"]) == (384, 9)
    assert settings["train.learning_rate"]["flag"] == "--learning_rate"
    assert settings["eval.sampler.solver"]["choices"] == ["euler", "midpoint", "heun"]
    assert all(setting["meaning"] for setting in settings.values())


def test_plan_takes_the_dims_from_settings(command):
    _, default = command("plan", "--model_size", "tiny")
    _, wide = command("plan", "--model_size", "tiny", "--set", "model.eva_dim=5120")

    assert wide["parameters"] - default["parameters"] == 1024 * load_run_config("tiny").model.hidden_size


@pytest.mark.parametrize(("content", "found"), [("{}", "1 problem found"), (None, "1 problem found")])
def test_one_problem_is_one_problem(capsys, tmp_path, content, found):
    if content:
        (tmp_path / "manifest.json").write_text(content)

    assert main(["data", "verify", str(tmp_path)]) == 1
    assert found in capsys.readouterr().err


@pytest.mark.parametrize(("joined", "status"), [(True, 2), (True, 1), (True, 0), (False, 2), (False, 0)])
def test_a_rank_that_fails_leaves_nothing_to_the_interpreters_end(monkeypatch, joined, status):
    """There the threads of its process group may abort the process, with another status."""
    ended = []

    def end(found: int) -> None:
        ended.append(found)
        raise KeyboardInterrupt  # the process is gone

    monkeypatch.setattr(cli, "main", lambda arguments: status)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: joined)
    monkeypatch.setattr(cli.logging, "shutdown", lambda: None)  # which would close the tests' own handlers
    monkeypatch.setattr(cli.os, "_exit", end)

    with pytest.raises((KeyboardInterrupt, SystemExit)) as stopped:
        cli.command([])

    if joined and status:
        assert ended == [status]
    else:
        assert (ended, stopped.value.code) == ([], status)


@pytest.mark.slow
def test_a_wrong_output_folder_is_found_when_the_ranks_have_met_and_ends_with_its_status(trained):
    (trained / "file").touch()
    for _ in range(3):
        command = train_command(trained / "train", trained / "file" / "x", None, {}, [])
        done = subprocess.run(command, capture_output=True, text=True, cwd=PROJECT, timeout=300, check=False)

        assert done.returncode == 1, done.stdout + done.stderr
        assert "terminate called" not in done.stdout + done.stderr
        assert f"Not a directory: '{trained / 'file' / 'x'}'" in done.stderr
