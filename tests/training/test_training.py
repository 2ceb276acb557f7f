"""Real training processes: ZeRO stages agree, a killed run goes on bitwise, faults end in clear errors."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from blip3o_ds.data.reading.dataset import EmbeddingDataset
from blip3o_ds.data.reading.loader import read_batches
from blip3o_ds.data.tools.convert import convert
from blip3o_ds.files import FileLock
from blip3o_ds.runs.folder import LOCK, LOG, create_run
from blip3o_ds.training import evaluation
from blip3o_ds.training.checkpoint import TrainState
from blip3o_ds.training.evaluation import is_best
from tests.conftest import PROJECT, train_command, write_embeddings
from tests.training.conftest import small_config

ZERO = [str(PROJECT / "ds_configs" / f"zero{stage}.json") for stage in range(4)]


def losses(run) -> list[float]:
    return [line["loss"] for line in run.metrics()]


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-5), ("bf16", 2e-2)])
def test_every_zero_stage_and_one_process_give_the_same_losses_and_averages(
    embeddings, tmp_path, launch, precision, tolerance
):
    settings = {"train.precision": precision}
    single = launch(embeddings, tmp_path / "one", None, {**settings, "train.micro_batch_size": 8})
    assert single.returncode == 0, single.output
    expected = torch.tensor(losses(single))
    expected_average = load_file(single.run_dir / "checkpoints/step_00000006/ema.safetensors")

    for stage in range(4):
        run = launch(embeddings, tmp_path / str(stage), 2, settings, "--deepspeed_config", ZERO[stage])

        assert run.returncode == 0, run.output
        torch.testing.assert_close(torch.tensor(losses(run)), expected, rtol=tolerance, atol=0)
        if precision == "fp32":  # in bf16 Adam's first steps turn rounding into steps of its full size
            average = load_file(run.run_dir / "checkpoints/step_00000006/ema.safetensors")
            torch.testing.assert_close(average, expected_average, rtol=0, atol=1e-6)


def test_a_run_begins_at_the_prior_whose_error_on_images_left_out_is_the_unit_of_the_loss(embeddings, tmp_path, launch):
    """It is 1 in an overfit test, where each image is new to the map that guesses it; else most images were seen."""
    settings = {"train.precision": "fp32", "train.learning_rate": 1e-9, "train.max_steps": 10}
    new = launch(embeddings, tmp_path / "new", None, settings, "--overfit_test_size", "40")
    seen = launch(embeddings, tmp_path / "seen", None, settings)

    assert new.returncode == 0, new.output
    assert sum(losses(new)) / 10 == pytest.approx(1, abs=0.1)
    assert 0.6 < sum(losses(seen)) / 10 < 0.9


def test_accumulated_micro_batches_give_the_losses_of_the_whole_batch(embeddings, tmp_path, launch):
    whole = launch(embeddings, tmp_path / "a", None, {"train.precision": "fp32", "train.micro_batch_size": 8})
    pieces = launch(
        embeddings,
        tmp_path / "b",
        None,
        {"train.precision": "fp32", "train.micro_batch_size": 2, "train.gradient_accumulation_steps": 4},
    )

    torch.testing.assert_close(torch.tensor(losses(pieces)), torch.tensor(losses(whole)), rtol=1e-5, atol=0)


@pytest.mark.slow
def test_a_run_killed_mid_epoch_and_resumed_is_bitwise_the_uninterrupted_one(embeddings, tmp_path, launch):
    settings = {"train.max_steps": 30, "train.save_every": 7}  # 5 steps an epoch: step 7 is in its midst
    straight = launch(embeddings, tmp_path / "straight", 2, settings)
    assert straight.returncode == 0, straight.output

    kill_after_first_checkpoint(embeddings, tmp_path / "killed", settings)
    resumed = launch(embeddings, tmp_path / "killed", 2, settings, "--resume")

    assert resumed.returncode == 0, resumed.output
    assert "resumed from" in resumed.output
    assert losses(resumed) == losses(straight)
    for name in ("model.safetensors", "ema.safetensors"):
        expected = load_file(straight.run_dir / "checkpoints/step_00000030" / name)
        found = load_file(resumed.run_dir / "checkpoints/step_00000030" / name)
        assert all(torch.equal(found[key], expected[key]) for key in expected)


def kill_after_first_checkpoint(data: Path, output: Path, settings: dict) -> None:
    """Start a run of two processes and SIGKILL all of them after its first checkpoint; no memory stays taken."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = train_command(data, output, 2, settings, [])
    port = command[command.index("--master_port") + 1]
    process = subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=environment,
        start_new_session=True,
    )
    deadline = time.monotonic() + 120
    while not list(output.glob("clip_repro_*/checkpoints/step_*")):
        assert process.poll() is None, "the run ended before its first checkpoint"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    for pid in _descendants(process.pid):
        os.kill(pid, signal.SIGKILL)
    process.wait()
    assert not list(Path("/dev/shm").glob(f"deepspeed_*_{port}_*"))


def _descendants(pid: int) -> list[int]:
    """This process and all below it, whatever session they moved to."""
    children = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True, check=False)
    return [pid, *(found for child in children.stdout.split() for found in _descendants(int(child)))]


def test_a_run_folder_holds_what_the_readme_names(embeddings, tmp_path, launch):
    run = launch(embeddings, tmp_path / "out", None, {"train.max_steps": 4, "train.save_every": 2})

    assert run.returncode == 0, run.output
    names = {path.name for path in run.run_dir.iterdir()}
    assert names >= {
        "experiment_config.json",
        "clip_reproduction_training.log",
        "training_summary.json",
        "final_summary.json",
        "metrics.jsonl",
        "tensorboard",
        "checkpoints",
    }
    assert {p.name for p in (run.run_dir / "checkpoints").glob("step_*")} == {"step_00000002", "step_00000004"}
    line = run.metrics()[-1]
    assert line.keys() >= {"loss", "velocity_similarity", "grad_norm", "lr", "samples_per_second", "tokens_per_second"}
    assert line.keys() >= {"data_wait_fraction", "memory_gb", "prediction_norm", "target_norm", "clip_norm", "eva_norm"}
    summary = json.loads((run.run_dir / "final_summary.json").read_text())
    assert summary["evaluation"]["train"]


def test_training_reads_fp8_as_the_values_it_stands_for(embeddings, tmp_path, launch):
    convert(embeddings, tmp_path / "fp8", dtype="fp8-e4m3")
    run = launch(tmp_path / "fp8", tmp_path / "out", None, {"train.max_steps": 2})

    assert run.returncode == 0, run.output
    (batch,) = read_batches(EmbeddingDataset(embeddings), range(40), 40)
    for line in run.metrics():  # of four samples; the codes alone have norms in the hundreds
        assert line["eva_norm"] == pytest.approx(float(batch["eva"].norm(dim=-1).mean()), rel=0.15)
        assert line["clip_norm"] == pytest.approx(float(batch["clip"].norm(dim=-1).mean()), rel=0.15)


def test_debug_mode_adds_gradients_by_block_and_loss_by_timestep(embeddings, tmp_path, launch):
    run = launch(embeddings, tmp_path / "out", None, {"train.max_steps": 2}, "--debug_mode")

    assert run.returncode == 0, run.output
    line = run.metrics()[-1]
    blocks = [value for name, value in line.items() if name.startswith("grad_norm/")]
    assert {"grad_norm/blocks.0", "grad_norm/blocks.1"} <= line.keys()
    # The whole gradient's norm is that of its blocks together.
    assert sum(value**2 for value in blocks) ** 0.5 == pytest.approx(line["grad_norm"], rel=0.02)
    assert any(name.startswith("loss_by_t/") for name in line)


def test_dims_that_are_not_the_datas_are_refused_with_the_remedy(embeddings, tmp_path, launch):
    run = launch(embeddings, tmp_path / "out", None, {"model.eva_dim": 4096})

    assert run.returncode == 2
    assert "--set model.eva_dim=12" in run.output
    assert run.run_dir is None
    assert "Traceback" not in run.output


def test_dims_that_are_not_given_are_those_of_the_data_and_a_resume_needs_only_the_run(tmp_path, launch):
    data = write_embeddings(tmp_path / "data", 16, grid=3, eva_dim=10, clip_dim=6)
    without = {f"model.{name}": ... for name in ("eva_dim", "clip_dim", "grid_size")}
    settings = {"train.max_steps": 4, "train.save_every": 2}
    first = launch(data, tmp_path / "out", None, {**settings, **without})
    assert first.returncode == 0, first.output
    model = json.loads((first.run_dir / "experiment_config.json").read_text())["config"]["model"]
    assert [model[name] for name in ("eva_dim", "clip_dim", "grid_size")] == [10, 6, 3]

    shutil.rmtree(first.run_dir / "checkpoints/step_00000004")
    command = [sys.executable, "scripts/train_clip_reproduction.py", "--resume", str(first.run_dir)]
    resumed = subprocess.run(command, capture_output=True, text=True, cwd=PROJECT, timeout=300)

    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert "resumed from" in resumed.stdout + resumed.stderr
    assert (first.run_dir / "checkpoints/step_00000004").is_dir()
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [first.run_dir.name]


@pytest.mark.parametrize("stage", [0, 2])
def test_a_gradient_that_is_not_finite_stops_the_run_and_names_the_checkpoint(tmp_path, launch, stage):
    data = write_embeddings(tmp_path / "data", 16)
    settings = {"train.max_steps": 4, "train.save_every": 4, "train.precision": "fp32"}
    first = launch(data, tmp_path / "out", None, settings, "--deepspeed_config", ZERO[stage])
    assert first.returncode == 0, first.output

    # fp32 overflows when squared: the loss of the next steps is infinite while the data is finite.
    run = launch(
        data, tmp_path / "hot", None, {**settings, "train.learning_rate": 1e30}, "--deepspeed_config", ZERO[stage]
    )

    assert run.returncode == 1
    assert "not finite" in run.output
    assert "no checkpoint was written yet" in run.output
    assert "Traceback" not in run.output


def test_resuming_with_another_setting_is_refused(embeddings, tmp_path, launch):
    first = launch(embeddings, tmp_path / "out", None, {"train.max_steps": 2})
    assert first.returncode == 0, first.output

    run = launch(embeddings, tmp_path / "out", None, {"train.max_steps": 2, "train.seed": 5}, "--resume")

    assert run.returncode == 2, run.output
    assert "train.seed was 0" in run.output


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before_it(embeddings, tmp_path, launch):
    settings = {"train.max_steps": 4, "train.save_every": 2}
    first = launch(embeddings, tmp_path / "out", None, settings)
    weights = first.run_dir / "checkpoints/step_00000004/model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)

    run = launch(embeddings, tmp_path / "out", None, settings, "--resume")

    assert run.returncode == 0, run.output
    assert "step_00000004 is damaged" in run.output
    assert "resumed from" in run.output
    assert losses(run) == losses(first)
    assert (run.run_dir / "checkpoints/damaged_step_00000004/model.safetensors").read_bytes() == bytes(content)


def everything_in(folder: Path) -> dict[Path, bytes]:
    """The content of all files but the log and the lock."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name not in (LOG, LOCK))
    return {path: path.read_bytes() for path in files}


def test_a_run_whose_checkpoints_are_all_damaged_is_left_as_it_is(embeddings, tmp_path, launch):
    settings = {"train.max_steps": 4, "train.save_every": 2}
    first = launch(embeddings, tmp_path / "out", None, settings)
    for random_state in first.run_dir.glob("checkpoints/step_*/rng_rank_00000.pt"):
        content = bytearray(random_state.read_bytes())
        content[100] ^= 1
        random_state.write_bytes(content)
    (first.run_dir / "final_summary.json").unlink()
    before = everything_in(first.run_dir)

    run = launch(embeddings, tmp_path / "out", None, settings, "--resume")

    assert run.returncode == 1
    assert "no checkpoint is whole" in run.output
    for step in (2, 4):
        assert f"step_0000000{step} is damaged: rng_rank_00000.pt has another checksum" in run.output
    assert everything_in(first.run_dir) == before


def test_a_finished_run_says_so_and_is_left_as_it_is(embeddings, tmp_path, launch):
    first = launch(embeddings, tmp_path / "out", None, {"train.max_steps": 2})
    before = everything_in(first.run_dir)

    run = launch(embeddings, tmp_path / "out", None, {"train.max_steps": 2}, "--resume")

    assert run.returncode == 0, run.output
    assert f"{first.run_dir} is finished; `blip3o-ds eval {first.run_dir}`" in run.output
    after = everything_in(first.run_dir)
    events = [path for path in after.keys() - before.keys() if path.parent.name == "tensorboard"]
    assert {path: content for path, content in after.items() if path not in events} == before

    again = launch(embeddings, tmp_path / "out", None, {"train.max_steps": 2, "eval.num_samples": 2}, "--resume")

    assert again.returncode == 0, again.output
    assert "is finished" not in again.output
    [result] = json.loads((first.run_dir / "final_summary.json").read_text())["evaluation"].values()
    assert result["samples_per_image"] == 2


def test_a_result_stays_until_another_takes_its_place_unless_its_weights_are_lost(one_rank, tmp_path):
    from blip3o_ds.training.loop import finished_summary

    config, other = small_config(2), small_config(2, **{"eval.num_samples": 7})
    folder = create_run(tmp_path, config, {})
    summary = folder / "final_summary.json"

    def found(step: int, config) -> dict | None:
        run = SimpleNamespace(folder=folder, config=config, state=TrainState(total_steps=6, step=step))
        return finished_summary(run)

    assert found(6, config) is None
    summary.write_text('{"steps": 6}')
    assert found(6, config) == {"steps": 6}
    assert found(6, other) is None  # to be evaluated in another way, and not yet done
    assert summary.exists()
    assert found(5, config) is None
    assert not summary.exists()


def test_a_run_that_another_process_trains_is_not_resumed(embeddings, tmp_path, launch):
    first = launch(embeddings, tmp_path / "out", None, {"train.max_steps": 2})
    (first.run_dir / "final_summary.json").unlink()
    before = everything_in(first.run_dir)

    assert re.fullmatch(rf"process \d+ on {socket.gethostname()}", (first.run_dir / LOCK).read_text())
    with FileLock(first.run_dir / LOCK):
        settings = {"train.max_steps": 2, "train.timeout_seconds": 10}
        run = launch(embeddings, tmp_path / "out", 2, settings, "--resume")

    assert run.returncode == 1
    assert f"{first.run_dir}: process" in run.output
    assert "trains into it; wait for its end, or end it" in run.output
    assert everything_in(first.run_dir) == before


def test_overfitting_reports_its_verdict_and_the_cause(embeddings, tmp_path, launch):
    run = launch(embeddings, tmp_path / "out", None, {}, "--overfit_test_size", "3")

    assert run.returncode == 0, run.output
    summary = json.loads((run.run_dir / "final_summary.json").read_text())
    readings = summary["evaluation"]["overfit"]["readings"]
    verdict = summary["overfit_test"]
    for reading in ("posterior_mean", "sampled"):
        assert verdict[reading] == readings[reading]["clip_similarity"]
    # Six steps are too few, which is seen from what the learning rates add up to.
    assert (verdict["threshold"], verdict["passed"], verdict["cause"]) == (0.9, False, "time")
    assert verdict["evidence"]["lr_travel"] == pytest.approx(sum(line["lr"] for line in run.metrics()))
    assert (verdict["evidence"]["lines"], verdict["evidence"]["samples"]) == (6, 3)
    assert f"overfit test: time: {verdict['finding']}" in run.output
    assert f"overfit test: to do: {verdict['advice']}" in run.output


def evaluated(*energies: float) -> dict[str, SimpleNamespace]:
    """Results whose splits have these energy scores of `sampled`; everything else would choose otherwise."""
    return {
        f"split_{i}": SimpleNamespace(
            readings={
                "posterior_mean": {"energy_score": -energy, "clip_similarity_centered": energy},
                "sampled": {"energy_score": energy, "clip_similarity_centered": energy},
            }
        )
        for i, energy in enumerate(energies)
    }


def test_the_best_evaluation_has_the_least_energy_on_the_first_split():
    state = TrainState(total_steps=9)
    run = SimpleNamespace(state=state)
    judged = []
    for state.step, energies in enumerate([(3.0, 1.0), (3.5, 0.1), (2.0, 9.0), (2.0, 0.0)], start=1):
        judged.append(is_best(run, evaluated(*energies)))

    assert judged == [True, False, True, False]
    assert state.best == {"step": 3, "metric": "energy_score", "score": 2.0}


def test_a_best_by_the_similarity_of_an_older_version_gives_way_to_the_next_evaluation():
    state = TrainState(total_steps=9, step=5, best={"step": 2, "score": 0.4})

    assert is_best(SimpleNamespace(state=state), evaluated(30.0))
    assert state.best == {"step": 5, "metric": "energy_score", "score": 30.0}


def test_resuming_on_other_data_is_refused(tmp_path, launch):
    """By the manifest; a run of before manifests were kept with it, by the lengths."""
    settings = {"train.max_steps": None, "train.num_epochs": 1}  # 16 samples are 4 steps of 4
    first = launch(write_embeddings(tmp_path / "data", 16), tmp_path / "out", None, settings)
    assert first.returncode == 0, first.output
    shutil.rmtree(tmp_path / "data")
    write_embeddings(tmp_path / "data", 24)

    run = launch(tmp_path / "data", tmp_path / "out", None, settings, "--resume")

    assert run.returncode == 2, run.output
    assert (
        f"data.train_dir = {tmp_path / 'data'} does not hold the samples with which {first.run_dir} began" in run.output
    )

    content = json.loads((first.run_dir / "experiment_config.json").read_text())
    del content["train_data"]
    (first.run_dir / "experiment_config.json").write_text(json.dumps(content))
    run = launch(tmp_path / "data", tmp_path / "out", None, settings, "--resume")

    assert run.returncode == 2, run.output
    assert "a run of 4 steps, which would now take 6" in run.output


@pytest.mark.parametrize("stage", [0, 2])
def test_an_evaluation_before_any_step_was_applied_takes_the_weights_as_they_are(trainee, monkeypatch, stage):
    config, learner = small_config(stage), trainee(stage)
    seen, folds = [], []

    def evaluate(pretrained, dataset, *_, num_folds):
        seen.append(pretrained.model.state_dict())
        folds.append((dataset, num_folds))

    monkeypatch.setattr(evaluation, "evaluate", evaluate)

    parts = {"flow": None, "normalizer": None, "baselines": SimpleNamespace(prior=SimpleNamespace(num_folds=5))}
    parts |= {"state": TrainState(total_steps=1), "loader": SimpleNamespace(dataset="seen")}
    splits = {"train": "seen", "held": "unseen"}
    run = SimpleNamespace(config=config, engine=learner.engine, splits=splits, **parts)
    evaluation.evaluate_splits(run, None)

    assert folds == [("seen", 5), ("unseen", 0)]  # the prior has not seen what it guesses
    expected = learner.weights()
    assert all(torch.equal(weight.float(), expected[name].to(weight.dtype).float()) for name, weight in seen[0].items())
