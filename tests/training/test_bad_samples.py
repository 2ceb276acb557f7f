"""A run over a damaged training set: it stops, or finishes the same steps on all ranks and says what was bad."""

from __future__ import annotations

import json

import pytest

from blip3o_ds.data.format.index import ShardIndex, index_path


@pytest.fixture
def damaged(embeddings):
    """A NaN in sample_00009, and the shard of sample_00016 to sample_00023 gone."""
    path = embeddings / "shard_00001.tar"
    start = int(ShardIndex.load(index_path(path)).tensors["eva"][1])
    with open(path, "r+b") as file:
        file.seek(start)
        file.write(b"\x00\x00\xc0\x7f")
    (embeddings / "shard_00002.tar").unlink()
    return embeddings


def test_a_run_over_a_damaged_set_stops_and_names_what_is_bad(damaged, tmp_path, launch):
    run = launch(damaged, tmp_path / "out", None)

    assert run.returncode == 1
    assert "sample_00009: eva holds NaN" in run.output or "shard_00002.tar is missing" in run.output


def test_a_run_that_skips_finishes_on_two_ranks_and_reports_what_it_skipped(damaged, tmp_path, launch):
    skip = {"data.on_bad_sample": "skip", "data.on_bad_shard": "skip", "train.max_steps": 10}
    run = launch(damaged, tmp_path / "out", 2, skip)

    assert run.returncode == 0, run.output
    assert [line["step"] for line in run.metrics()] == list(range(1, 11))
    assert run.metrics()[-1]["bad_samples"] >= 2 * 9  # two epochs of one bad sample and a shard of eight
    lines = [json.loads(line) for line in (run.run_dir / "bad_samples.jsonl").read_text().splitlines()]
    assert {(line["shard"], line["key"]) for line in lines} == {
        ("shard_00001.tar", "sample_00009"),
        ("shard_00002.tar", None),
    }
    assert {line["rank"] for line in lines} <= {0, 1}
