"""Numbers that go wrong: what is written down, what is gone back to, and when a run stops."""

from __future__ import annotations

import json
import statistics

import pytest
import torch

from blip3o_ds.baselines.fit import MAX_FIT_SAMPLES
from blip3o_ds.data.format.schema import DatasetSpec
from blip3o_ds.data.format.writer import DatasetWriter
from blip3o_ds.data.reading.loader import spread_indices
from blip3o_ds.data.reading.order import GlobalOrder
from blip3o_ds.training.anomalies import SpikeDetector
from tests.conftest import PROJECT, write_embeddings

SHARDS = [100] * 30  # more samples than the baselines are fitted to, since the fit refuses a bad one
FITTED = set(spread_indices(sum(SHARDS), MAX_FIT_SAMPLES))


def first_not_fitted(batches: range) -> str:
    """The key of the first sample in these batches of four that the fit does not read."""
    places = (GlobalOrder(SHARDS, seed=0).locate(at) for at in range(4 * batches.start, 4 * batches.stop))
    return key_of(next(i for i in (100 * shard + index for shard, index in places) if i not in FITTED))


def key_of(index: int) -> str:
    return f"sample_{index:05d}"


BAD, LATER = first_not_fitted(range(5, 8)), first_not_fitted(range(11, 15))


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory):
    """3000 samples, of which BAD and LATER have a condition so large that the network's first sum overflows fp32."""
    folder, generator = tmp_path_factory.mktemp("data") / "poisoned", torch.Generator().manual_seed(0)
    spec = DatasetSpec.pair(16, "patch_only", 12, 8, "fp32", "made-up-eva", "made-up-clip")
    with DatasetWriter(folder, spec, samples_per_shard=100) as writer:
        for i in range(sum(SHARDS)):
            eva, clip = torch.randn(16, 12, generator=generator), torch.randn(16, 8, generator=generator)
            bad = key_of(i) in (BAD, LATER)
            writer.write(key_of(i), {"eva": eva.sign() * 3e38 if bad else eva, "clip": clip}, {})
    return folder


def settings_of(tmp_path, **settings) -> dict:
    clean = write_embeddings(tmp_path / "clean", 8)
    return {
        **{"train.precision": "fp32", "train.save_every": 1, "train.max_steps": 9, "flow.cond_dropout": 0},
        **{"data.eval_dirs": [str(clean)], **settings},
    }


def bad_batches(run) -> list[dict]:
    return [json.loads(line) for line in (run.run_dir / "bad_batches.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(("stage", "precision"), [(2, "fp32"), (1, "bf16")])
def test_a_bad_sample_is_named_and_the_run_goes_on_behind_it_from_the_last_checkpoint(
    poisoned, tmp_path, launch, stage, precision
):
    zero = ["--deepspeed_config", str(PROJECT / f"ds_configs/zero{stage}.json")]
    run = launch(poisoned, tmp_path / "out", None, settings_of(tmp_path, **{"train.precision": precision}), *zero)

    assert run.returncode == 0, run.output
    [bad] = bad_batches(run)
    assert bad["not_finite"] == [BAD]
    assert len(bad["keys"]) == 4
    assert BAD in bad["keys"]
    summary = json.loads((run.run_dir / "training_summary.json").read_text())
    assert summary["rollbacks"] == 1
    assert summary["samples_seen"] == (9 + 1) * 4  # nine good steps and the batch that was passed over
    assert [line["step"] for line in run.metrics()] == list(range(1, 10))
    assert all(torch.tensor(line["loss"]).isfinite() for line in run.metrics())


def test_skips_that_are_allowed_are_counted_and_change_nothing(poisoned, tmp_path, launch):
    run = launch(poisoned, tmp_path / "out", None, settings_of(tmp_path, **{"train.max_skipped_steps": 1}))

    assert run.returncode == 0, run.output
    summary = json.loads((run.run_dir / "training_summary.json").read_text())
    assert (summary["skipped_steps"], summary["rollbacks"], len(bad_batches(run))) == (1, 0, 1)


def test_the_run_stops_when_going_back_was_in_vain(poisoned, tmp_path, launch):
    run = launch(poisoned, tmp_path / "out", None, settings_of(tmp_path, **{"train.max_steps": 19}))

    assert run.returncode == 1
    assert "Traceback" not in run.output
    assert "after 1 of train.max_rollbacks = 1 returns to a checkpoint; the last good checkpoint is" in run.output
    assert [bad["not_finite"] for bad in bad_batches(run)] == [[BAD], [LATER]]


def test_the_z_score_is_that_of_its_definition():
    detector = SpikeDetector(window=8)
    losses = [1.0, 1.2, 0.9, 1.1, 1.05, 0.95, 5.0]
    scores = [detector.score(loss) for loss in losses]

    median = statistics.median(losses[:6])
    deviation = 1.4826 * statistics.median(abs(loss - median) for loss in losses[:6])
    assert scores[:4] == [0, 0, 0, 0]  # too few to judge by
    assert scores[-1] == pytest.approx((5.0 - median) / deviation)
    assert [detector.is_spike(score) for score in scores] == [False] * 6 + [True]


def test_losses_that_never_vary_give_no_infinite_score():
    detector = SpikeDetector(window=4)

    assert [detector.score(1.0) for _ in range(5)] == [0.0] * 5
