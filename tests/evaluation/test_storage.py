"""The ridge on two datasets of the same samples."""

from __future__ import annotations

import json

import pytest

from blip3o_ds.baselines.fit import fit_baselines, ridge_cost
from blip3o_ds.cli import main
from blip3o_ds.data.normalization import Normalizer
from blip3o_ds.data.reading.dataset import EmbeddingDataset
from blip3o_ds.data.tools.convert import convert


def test_each_side_is_the_ridge_of_that_dataset_on_samples_spread_over_it(embeddings, tmp_path):
    convert(embeddings, tmp_path / "fp8", dtype="fp8-e4m3")
    cost = ridge_cost(embeddings, tmp_path / "fp8", max_samples=20)
    for name, folder in (("r2_source", embeddings), ("r2_stored", tmp_path / "fp8")):
        fit = fit_baselines(EmbeddingDataset(folder), Normalizer("minimal"), 20)
        assert cost[name] == pytest.approx(fit.ridge_r2)
    assert cost["samples"] == 20
    assert 0.5 < cost["r2_stored"] < cost["r2_source"] < 1  # the target is linear with noise


def test_the_command_tells_what_the_conversion_of_a_dataset_costs(embeddings, tmp_path, capsys):
    assert main(["data", "convert", str(embeddings), str(tmp_path / "dst"), "--dtype", "fp8-e4m3", "--json"]) == 0
    cost = json.loads(capsys.readouterr().out.splitlines()[-1])["cost"]
    assert cost["eva"]["relative_error"] < 2**-4
    assert cost["ridge"]["r2_stored"] == pytest.approx(cost["ridge"]["r2_source"], abs=0.05)
