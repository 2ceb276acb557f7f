"""A checkpoint loaded at another ZeRO stage, or on another number of ranks, than it was written."""

from __future__ import annotations

import itertools
import json
import shutil

import pytest
import torch

from blip3o_ds.errors import CheckpointError
from blip3o_ds.training.checkpoint import CheckpointWriter, load_checkpoint
from tests.conftest import PROJECT


def written_by(learner, folder):
    writer = CheckpointWriter(learner.engine, folder, with_ema=True, keep_last=1)
    writer.save(3, {})
    return writer.finish()


@pytest.mark.parametrize(
    ("precision", "before", "after"),
    [
        *(("fp32", *stages) for stages in itertools.permutations(range(4), 2)),
        *(("bf16", *stages) for stages in ((0, 1), (1, 3), (3, 2), (2, 0))),
    ],
)
def test_every_stage_goes_on_where_every_other_stopped(trainee, tmp_path, before, after, precision):
    first = trainee(before, **{"train.precision": precision})
    for number in range(3):
        first.step(number)
    checkpoint = written_by(first, tmp_path)

    second = trainee(after, seed=1, **{"train.precision": precision})
    CheckpointWriter(second.engine, tmp_path, with_ema=True, keep_last=1)
    load_checkpoint(second.engine, checkpoint)

    for ema in (False, True):
        expected = first.weights(ema)
        assert all(torch.equal(value, expected[name]) for name, value in second.weights(ema).items())
    assert second.engine.learning_rate == first.engine.learning_rate
    assert second.engine.global_steps == 3
    # Moments show in the steps that follow; at stage 0 bf16 is autocast, which rounds elsewhere.
    tolerance = 1e-5 if precision == "fp32" else 2e-2
    for number in range(3, 8):
        assert second.step(number) == pytest.approx(first.step(number), rel=tolerance)
    assert [path.name for path in tmp_path.iterdir() if "universal" in path.name] == []


def test_a_conversion_that_fails_is_a_clear_error_and_leaves_nothing_behind(trainee, tmp_path):
    checkpoint = written_by_after_a_step(trainee(1), tmp_path)
    torch.save({"not": "a checkpoint"}, next(checkpoint.path.glob("*optim_states.pt")))

    other = trainee(2)
    CheckpointWriter(other.engine, tmp_path, with_ema=True, keep_last=1)

    with pytest.raises(CheckpointError, match="could not convert it to a universal checkpoint"):
        load_checkpoint(other.engine, checkpoint)
    assert not (tmp_path / ".universal").exists()


def written_by_after_a_step(learner, folder):
    learner.step(0)
    return written_by(learner, folder)


class Code:
    """A pickle of it makes the file `canary` where it is read freely."""

    canary = ""

    def __reduce__(self):
        return open, (self.canary, "w")


@pytest.mark.parametrize("stage", [1, 2])  # the one that wrote the checkpoint, and one to convert for
@pytest.mark.parametrize("pattern", ["*optim_states.pt", "*model_states.pt", "rng_rank_*.pt"])
def test_code_in_a_file_of_a_checkpoint_is_not_run(trainee, tmp_path, monkeypatch, pattern, stage):
    checkpoint = written_by_after_a_step(trainee(1), tmp_path / "run")
    monkeypatch.setattr(Code, "canary", str(tmp_path / "canary"))
    file = next(checkpoint.path.glob(pattern))
    content = torch.load(file, weights_only=False)
    torch.save({**content, "code": Code()}, file)

    other = trainee(stage)

    with pytest.raises(CheckpointError, match=rf"{file.name}: holds more than tensors .*open\) and is not read"):
        load_checkpoint(other.engine, checkpoint)
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\3\4 cut short"])
def test_a_file_that_torch_did_not_save_is_an_error_of_the_checkpoint(tmp_path, content):
    from blip3o_ds.training.snapshot import read_file

    (tmp_path / "states.pt").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"states\.pt: "):
        read_file(tmp_path / "states.pt")


@pytest.mark.slow
def test_a_run_moves_from_two_ranks_to_one_and_back_and_between_stages(embeddings, tmp_path, launch):
    settings = {"train.max_steps": 30, "train.save_every": 10, "train.keep_last": 9}
    zero = [["--deepspeed_config", str(PROJECT / f"ds_configs/zero{stage}.json")] for stage in range(4)]
    straight = launch(embeddings, tmp_path / "straight", 2, settings, *zero[1])
    assert straight.returncode == 0, straight.output
    moved = tmp_path / "moved" / straight.run_dir.name
    shutil.copytree(straight.run_dir, moved)

    for newest, ranks, stage in ((10, None, 3), (20, 2, 2)):
        for path in (moved / "checkpoints").glob("step_*"):
            if int(path.name[5:]) > newest:
                shutil.rmtree(path)
        run = launch(embeddings, tmp_path / "moved", ranks, settings, *zero[stage], "--resume")

        assert run.returncode == 0, run.output
        assert f"resumed from {moved}/checkpoints/step_000000{newest}" in run.output
    losses = [[line["loss"] for line in result.metrics()] for result in (straight, run)]
    torch.testing.assert_close(*map(torch.tensor, losses), rtol=1e-3, atol=0)
    samples = [json.loads((r.run_dir / "training_summary.json").read_text())["samples_seen"] for r in (straight, run)]
    assert samples == [240, 240]


def test_ranks_that_cannot_share_the_global_batch_are_told_how_many_can(embeddings, tmp_path, launch):
    settings = {"train.max_steps": 2, "train.micro_batch_size": 3}
    assert launch(embeddings, tmp_path / "out", None, settings).returncode == 0

    run = launch(embeddings, tmp_path / "out", 2, settings, "--resume")

    assert run.returncode != 0
    assert "global batch of 3 samples, which 2 ranks cannot share equally; resume it on 1, 3 ranks" in run.output
