"""A split: two views that together are the dataset, with their own statistics, stable when shards are appended."""

from __future__ import annotations

import shutil
from hashlib import blake2b
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from blip3o_ds.cli import main
from blip3o_ds.data.format.manifest import Manifest, Selection
from blip3o_ds.data.format.schema import DatasetSpec
from blip3o_ds.data.format.writer import DatasetWriter
from blip3o_ds.data.reading.dataset import EmbeddingDataset
from blip3o_ds.data.reading.loader import EmbeddingLoader
from blip3o_ds.data.reading.order import GlobalOrder
from blip3o_ds.data.tools.append import append
from blip3o_ds.data.tools.split import split
from blip3o_ds.data.tools.stats import inspect, stats
from blip3o_ds.data.tools.verify import verify
from blip3o_ds.errors import DataError

SPEC = DatasetSpec.pair(4, "patch_only", 8, 4, "bf16", "eva", "clip")


def write(folder: Path, keys: range) -> Path:
    with DatasetWriter(folder, SPEC, samples_per_shard=5) as writer:
        for i in keys:
            generator = torch.Generator().manual_seed(i)
            eva = 3 + torch.randn(4, 8, generator=generator)
            writer.write(f"key{i}", {"eva": eva, "clip": torch.randn(4, 4, generator=generator)}, {"n": i})
    return folder


def samples(folder: Path) -> dict[str, torch.Tensor]:
    dataset = EmbeddingDataset(folder)
    read = (dataset.read(*dataset.place(index)) for index in range(len(dataset)))
    return {sample.key: sample["eva"] for sample in read}


@pytest.mark.parametrize("fraction", [0.2, 0.7])
def test_the_parts_are_the_dataset_and_share_nothing(tmp_path, fraction):
    whole = write(tmp_path / "whole", range(60))
    files = sorted(whole.iterdir())

    split(whole, tmp_path / "split", fraction)

    train, held_out, everything = (samples(p) for p in (tmp_path / "split/train", tmp_path / "split/eval", whole))
    expected = {
        key
        for key in everything
        if int.from_bytes(blake2b(key.encode(), digest_size=8).digest(), "little") < fraction * 2**64
    }
    assert set(held_out) == expected
    assert set(train) == set(everything) - expected
    assert all(torch.equal(values, everything[key]) for part in (train, held_out) for key, values in part.items())
    assert sorted(whole.iterdir()) == files
    assert sorted(path.name for path in (tmp_path / "split").rglob("*")) == [
        "eval",
        "manifest.json",
        "manifest.json",
        "train",
    ]


@pytest.mark.parametrize("fraction", [0.2, 0.7])
@pytest.mark.parametrize("part", ["train", "eval"])
def test_statistics_are_those_of_the_part_alone(tmp_path, fraction, part):
    split(write(tmp_path / "whole", range(60)), tmp_path / "split", fraction)
    folder = tmp_path / "split" / part

    tokens = torch.cat(list(samples(folder).values())).double().numpy()

    found = Manifest.load(folder).stats["eva"]
    assert found.count == len(tokens)
    assert np.allclose(found.mean, tokens.mean(axis=0), rtol=1e-12)
    assert np.allclose(found.var, tokens.var(axis=0), rtol=1e-10)
    assert verify(folder).problems == []
    assert stats(folder)["selection"]["part"] == part


def test_samples_stay_on_their_side_when_shards_are_appended(tmp_path):
    whole = write(tmp_path / "whole", range(40))
    split(whole, tmp_path / "split", 0.3)
    before = {part: set(samples(tmp_path / "split" / part)) for part in ("train", "eval")}

    append(whole, [write(tmp_path / "more", range(40, 80))])
    unchanged = {part: set(samples(tmp_path / "split" / part)) for part in before}
    split(whole, tmp_path / "split", 0.3)
    after = {part: set(samples(tmp_path / "split" / part)) for part in before}

    assert unchanged == before
    assert all(before[part] < after[part] for part in before)
    assert len(after["train"] | after["eval"]) == 80


@given(st.sets(st.text(min_size=1), min_size=1, max_size=40), st.floats(0.01, 0.99), st.floats(0.01, 0.99))
def test_a_smaller_fraction_holds_out_a_part_of_a_larger_one(keys, one, other):
    keys = sorted(keys)
    small, large = (set(Selection("x", f, "eval").rows(keys).tolist()) for f in sorted((one, other)))
    rest = set(Selection("x", max(one, other), "train").rows(keys).tolist())
    assert small <= large
    assert large | rest == set(range(len(keys)))
    assert not large & rest


def test_the_share_held_out_is_the_fraction():
    keys = [f"{i:09d}" for i in range(200_000)]
    share = len(Selection("x", 0.05, "eval").rows(keys)) / len(keys)
    assert abs(share - 0.05) < 4 * (0.05 * 0.95 / len(keys)) ** 0.5


def test_the_loader_visits_each_sample_of_a_part_once_an_epoch(tmp_path):
    split(write(tmp_path / "whole", range(60)), tmp_path / "split", 0.25)
    dataset = EmbeddingDataset(tmp_path / "split/train")
    order = GlobalOrder(dataset.shard_sizes, seed=1, window_shards=3)
    sizes = {"micro_batch_size": 1, "gradient_accumulation_steps": 1, "rank": 0, "world_size": 1}
    with EmbeddingLoader(dataset, order, **sizes) as loader:
        keys = [key for _ in range(len(dataset)) for batch in loader.next_step() for key in batch.keys]
    assert sorted(keys) == sorted(samples(tmp_path / "split/train"))


def test_set_and_split_may_be_moved_together(tmp_path):
    split(write(tmp_path / "a/whole", range(30)), tmp_path / "a/split", 0.3)
    expected = samples(tmp_path / "a/split/eval").keys()
    shutil.move(tmp_path / "a", tmp_path / "b")
    assert samples(tmp_path / "b/split/eval").keys() == expected


def test_inspect_finds_a_sample_of_the_part_and_no_other(tmp_path):
    split(write(tmp_path / "whole", range(30)), tmp_path / "split", 0.3)
    key = next(iter(samples(tmp_path / "split/eval")))
    assert inspect(tmp_path / "split/eval", key)["meta"] == {"n": int(key[3:])}
    with pytest.raises(DataError, match=f"no sample has the key '{key}'"):
        inspect(tmp_path / "split/train", key)


def test_a_shard_that_was_replaced_since_is_named(tmp_path):
    whole = write(tmp_path / "whole", range(30))
    split(whole, tmp_path / "split", 0.3)
    shutil.rmtree(whole)
    write(whole, range(100, 130))
    with pytest.raises(DataError, match=r"shard_00000\.tar: its index does not belong .*split the dataset again"):
        samples(tmp_path / "split/train")
    assert not verify(tmp_path / "split/train").ok


@pytest.mark.parametrize(
    ("fraction", "message"),
    [(0.0, "between 0 and 1"), (1.0, "between 0 and 1"), (1e-9, "leaves no sample of 30 in eval")],
)
def test_impossible_fractions_are_refused_and_leave_nothing(tmp_path, fraction, message):
    with pytest.raises(DataError, match=message):
        split(write(tmp_path / "whole", range(30)), tmp_path / "split", fraction)
    assert not (tmp_path / "split").exists()


def test_a_folder_that_holds_something_else_is_not_overwritten(tmp_path):
    whole = write(tmp_path / "whole", range(30))
    write(tmp_path / "split/eval", range(5))
    with pytest.raises(DataError, match="eval: holds another dataset"):
        split(whole, tmp_path / "split", 0.3)
    split(whole, tmp_path / "other", 0.3)
    with pytest.raises(DataError, match="a split already"):
        split(tmp_path / "other/train", tmp_path / "again", 0.3)


def test_the_commands_do_the_same(tmp_path, capsys):
    whole, more = write(tmp_path / "whole", range(30)), write(tmp_path / "more", range(30, 40))
    assert main(["data", "append", str(whole), str(more), "--json"]) == 0
    assert main(["data", "split", str(whole), str(tmp_path / "split"), "--fraction", "0.3", "--json"]) == 0
    assert main(["data", "verify", str(tmp_path / "split/eval")]) == 0
    assert '"samples": 40' in capsys.readouterr().out
