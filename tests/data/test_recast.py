"""A dataset in another dtype: the same samples, keys and captions, rounded once, and what that costs."""

from __future__ import annotations

from itertools import permutations

import pytest
import torch

from blip3o_ds.data.format.codec import decode, encode
from blip3o_ds.data.format.writer import DatasetWriter
from blip3o_ds.data.reading.dataset import EmbeddingDataset
from blip3o_ds.data.tools.convert import convert
from blip3o_ds.data.tools.verify import verify
from blip3o_ds.errors import DataError

READ_AS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp8-e4m3": torch.bfloat16}


def read_all(folder):
    dataset = EmbeddingDataset(folder)
    places = [(shard, i) for shard, size in enumerate(dataset.shard_sizes) for i in range(size)]
    return [(dataset.read(*place), dataset.meta(*place)) for place in places]


@pytest.mark.parametrize(("source", "target"), permutations(READ_AS, 2))
def test_every_dtype_converts_to_every_other(dataset_dir, spec, tmp_path, source, target):
    src = dataset_dir(6, 4, spec.stored_as(source))

    result = convert(src, tmp_path / "dst", dtype=target, samples_per_shard=3)

    assert verify(tmp_path / "dst").ok
    assert (result["samples"], result["shards"], result["spec"]["dtype"]) == (6, 2, target)
    for (before, meta), (after, meta_after) in zip(read_all(src), read_all(tmp_path / "dst"), strict=True):
        assert (before.key, meta) == (after.key, meta_after)
        assert after["eva"].dtype == READ_AS[target]
        assert torch.equal(after["eva"], decode(*encode(before["eva"], target)))
        assert torch.equal(after["clip"], decode(*encode(before["clip"], target)))


def test_the_cost_of_fp8_is_told_by_side(dataset_dir, spec, tmp_path):
    src = dataset_dir(6, 4, spec.stored_as("fp32"))
    cost = convert(src, tmp_path / "dst", dtype="fp8-e4m3")["cost"]
    for side in ("eva", "clip"):
        pairs = zip(read_all(src), read_all(tmp_path / "dst"), strict=True)
        given, stored = zip(*((a[side].double(), b[side].double()) for (a, _), (b, _) in pairs), strict=True)
        x, y = torch.cat(given), torch.cat(stored)
        assert cost[side]["tokens"] == len(x)
        assert cost[side]["relative_error"] == pytest.approx(
            float(((x - y).norm(dim=1) / x.norm(dim=1)).mean()), rel=1e-5
        )
        assert cost[side]["cosine"] == pytest.approx(float(torch.cosine_similarity(x, y).mean()), abs=1e-6)
        assert 0.01 < cost[side]["relative_error"] < cost[side]["relative_error_max"] < 2**-4


def test_the_cls_token_can_be_dropped_on_the_way(dataset_dir, tmp_path):
    src = dataset_dir(3)
    convert(src, tmp_path / "dst", token_layout="patch_only")
    for (before, _), (after, _) in zip(read_all(src), read_all(tmp_path / "dst"), strict=True):
        assert torch.equal(after["eva"], before["eva"][1:])


def test_an_interrupted_conversion_goes_on_to_the_same_bytes(dataset_dir, tmp_path, monkeypatch):
    src = dataset_dir(8)
    convert(src, tmp_path / "whole", dtype="fp16", samples_per_shard=2)
    write, calls = DatasetWriter.write, []

    def failing(self, *arguments):
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        write(self, *arguments)

    monkeypatch.setattr(DatasetWriter, "write", failing)
    with pytest.raises(KeyboardInterrupt):
        convert(src, tmp_path / "dst", dtype="fp16", samples_per_shard=2)
    assert not (tmp_path / "dst" / "manifest.json").exists()

    result = convert(src, tmp_path / "dst", dtype="fp16", samples_per_shard=2)

    assert result["samples_found_done"] == 4
    contents = [{path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("whole", "dst")]
    assert contents[0] == contents[1]


def test_a_dataset_is_not_converted_onto_itself_or_into_another(dataset_dir, tmp_path, spec, samples):
    src = dataset_dir(3)
    with pytest.raises(DataError, match="source and destination are the same folder"):
        convert(src, src)
    with DatasetWriter(tmp_path / "other", spec) as writer:
        key, eva, clip, meta = samples(1)[0]
        writer.write(f"foreign-{key}", {"eva": eva, "clip": clip}, meta)
    with pytest.raises(DataError, match="foreign-image000"):
        convert(src, tmp_path / "other")
