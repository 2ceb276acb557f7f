"""The bench: every way of reading delivers the same samples, and the rows are what was timed."""

from __future__ import annotations

import json

import pytest
import torch

from blip3o_ds.data.format.schema import DatasetSpec
from blip3o_ds.errors import DataError
from tests.data.conftest import script

bench_module = script("bench_loader")
bench = bench_module.bench

WAYS = {"sequential read", "tarfile", "webdataset", "pickled shards", "loader"}


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(bench_module, "_SPEC", DatasetSpec.pair(5, "cls_patch", 512, 256, "bf16", "eva", "clip"))
    monkeypatch.setattr(bench_module, "_SAMPLES", 21)
    monkeypatch.setattr(bench_module, "_SAMPLES_PER_SHARD", 8)


def test_the_command_times_every_way_and_compares_it_with_a_memory_copy(small, capsys):
    assert bench_module.main(["--json"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])

    rates = {(row["name"], row["state"]): row for row in result["rows"]}
    assert {name for name, state in rates if state == "warm"} == WAYS | {"memory copy", "memory copy, reused buffer"}
    assert {name for name, state in rates if state == "cold"} <= WAYS
    assert result["sample_bytes"] == 5 * (512 + 256) * 2
    copy = rates["memory copy", "warm"]["gib_per_second"]
    for row in rates.values():
        assert row["ratio_to_memory_copy"] == pytest.approx(row["gib_per_second"] / copy)
        assert row["samples_per_second"] * result["sample_bytes"] == pytest.approx(row["gib_per_second"] * 2**30)
    factor = rates["loader", "warm"]["samples_per_second"] / rates["webdataset", "warm"]["samples_per_second"]
    assert result["factors"]["loader_over_webdataset"] == pytest.approx(factor)


def test_webdataset_and_the_pickles_deliver_the_samples_of_the_dataset(small, tmp_path):
    bench_module._write_dataset(tmp_path / "set")
    dataset = bench_module.EmbeddingDataset(tmp_path / "set")
    expected = sorted(
        float(dataset.read(s, i)["eva"].double().sum()) for s, n in enumerate(dataset.shard_sizes) for i in range(n)
    )
    tars = sorted((tmp_path / "set").glob("*.tar"))
    pickles = bench_module._write_pickles(tmp_path / "set", tmp_path)
    for batches in (
        [batch["eva"] for batch in bench_module._webdataset_batches(tars)],
        [eva for eva, _ in bench_module._pickled_batches(pickles)],
    ):
        assert sorted(torch.cat(batches).double().sum(dim=(1, 2)).tolist()) == pytest.approx(expected)


def test_a_dataset_that_is_given_is_read_in_place(dataset_dir):
    folder = dataset_dir(9)
    before = sorted(folder.iterdir())
    result = bench(folder)
    assert {row["name"] for row in result["rows"]} >= WAYS - {"pickled shards"}
    assert result["samples"] == 9
    assert sorted(folder.iterdir()) == before


def test_a_url_is_refused():
    with pytest.raises(DataError, match="not a URL"):
        bench("https://example.org/set")
