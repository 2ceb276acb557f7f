"""The pickled shards that people have, at their real sizes: converted, verified, read elsewhere, and trained on."""

from __future__ import annotations

import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset

from blip3o_ds.cli import main

SAMPLES = 4


def write_pickled_shard(path: Path) -> dict:
    generator = torch.Generator().manual_seed(0)
    shard = {
        "eva_blip3o_embeddings": torch.randn(SAMPLES, 256, 4096, generator=generator),
        "clip_blip3o_embeddings": torch.randn(SAMPLES, 256, 1024, generator=generator),
        "captions": [f"picture {i}" for i in range(SAMPLES)],
        "keys": [f"{i:09d}" for i in range(1, 1 + SAMPLES)],  # of two folds: each costs the ridge half a minute
    }
    path.write_bytes(pickle.dumps(shard))
    return shard


@pytest.mark.slow
def test_a_pickled_shard_converts_verifies_opens_elsewhere_and_trains(tmp_path, launch):
    (tmp_path / "pickled").mkdir()
    shard = write_pickled_shard(tmp_path / "pickled" / "embeddings_shard_00000_patch_only.pkl")
    data = tmp_path / "data"

    assert main(["data", "convert", str(tmp_path / "pickled"), str(data), "--training_mode", "patch_only"]) == 0
    assert main(["data", "verify", str(data)]) == 0

    (tar,) = data.glob("*.tar")
    with tarfile.open(tar) as opened:
        assert [name for name in opened.getnames() if name.endswith(".json")] == [f"{k}.json" for k in shard["keys"]]
    first = next(iter(webdataset.WebDataset(str(tar), shardshuffle=False)))
    stored = np.frombuffer(first["safetensors"][-256 * 5120 * 2 :], np.uint16)  # bf16, the upper half of an fp32
    assert first["__key__"] == shard["keys"][0]
    assert len(stored) == 256 * 5120

    settings = {"model.eva_dim": 4096, "model.clip_dim": 1024, "model.grid_size": 16, "train.max_steps": 2}
    run = launch(data, tmp_path / "out", None, settings, "--training_mode", "patch_only", "--batch_size", "2")

    assert run.returncode == 0, run.output
    assert len(run.metrics()) == 2
