"""Pickled shards become datasets with the same values, keys and captions; faults end in one error that names them."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from blip3o_ds.data.format.manifest import Manifest
from blip3o_ds.data.reading.dataset import EmbeddingDataset
from blip3o_ds.data.reading.loader import Batch, read_batches
from blip3o_ds.data.tools import convert as convert_module
from blip3o_ds.data.tools.convert import convert
from blip3o_ds.errors import DataError

SAMPLES, EVA_DIM, CLIP_DIM = 5, 12, 6
# The largest relative distance of a rounded value: half a unit in the last place.
ROUNDING = {"fp32": 0.0, "fp16": 2.0**-11, "bf16": 2.0**-8, "fp8-e4m3": 2.0**-4 + 2.0**-8}


def pickled(number: int, num_tokens: int, as_numpy: bool = False) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(number)
    eva = torch.randn(SAMPLES, num_tokens, EVA_DIM, generator=generator)
    clip = torch.randn(SAMPLES, num_tokens, CLIP_DIM, generator=generator) + 3
    return {
        "eva_blip3o_embeddings": eva.numpy() if as_numpy else eva,
        "clip_blip3o_embeddings": clip.numpy() if as_numpy else clip,
        "captions": [f"caption {number} {i}" for i in range(SAMPLES)],
        "keys": [f"{number:05d}_{i}" for i in range(SAMPLES)],
        "shard_idx": number,
        "config": {"tokens": num_tokens, "nested": [1, None]},
    }


def write_pickle(folder: Path, number: int, content: dict, layout: str = "patch_only") -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / f"embeddings_shard_{number:05d}_{layout}.pkl"
    path.write_bytes(pickle.dumps(content))
    return path


def read_whole(folder: Path) -> Batch:
    dataset = EmbeddingDataset(folder)
    (batch,) = read_batches(dataset, range(len(dataset)), 100)
    return batch


def folder_bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".writer.lock"}


@pytest.mark.parametrize("as_numpy", [True, False])
@pytest.mark.parametrize(("layout", "num_tokens"), [("patch_only", 16), ("cls_patch", 17)])
def test_converted_values_keys_and_captions_are_the_source_s(
    tmp_path: Path, layout: str, num_tokens: int, as_numpy: bool
) -> None:
    sources = [pickled(number, num_tokens, as_numpy) for number in range(3)]
    for number, content in enumerate(sources):
        write_pickle(tmp_path / "src", number, content, layout)

    summary = convert(tmp_path / "src", tmp_path / "dst", dtype="fp32", samples_per_shard=4)

    dataset = EmbeddingDataset(tmp_path / "dst")
    batch = read_whole(tmp_path / "dst")
    metas = [dataset.meta(shard, i) for shard, size in enumerate(dataset.shard_sizes) for i in range(size)]
    assert summary["samples"] == 3 * SAMPLES
    assert dataset.spec.token_layout == layout
    assert dataset.spec.num_tokens == num_tokens
    assert dataset.shard_sizes == [4, 4, 4, 3]
    assert batch.keys == [key for content in sources for key in content["keys"]]
    assert [meta["caption"] for meta in metas] == [text for content in sources for text in content["captions"]]
    for side in ("eva", "clip"):
        expected = np.concatenate([np.asarray(content[f"{side}_blip3o_embeddings"]) for content in sources])
        np.testing.assert_array_equal(batch[side].numpy(), expected)


@pytest.mark.parametrize("dtype", list(ROUNDING))
def test_converted_values_are_the_source_s_within_rounding(tmp_path: Path, dtype: Any) -> None:
    content = pickled(0, 16)
    path = write_pickle(tmp_path, 0, content)

    convert(path, tmp_path / "dst", dtype=dtype)

    batch = read_whole(tmp_path / "dst")
    for side in ("eva", "clip"):
        source = content[f"{side}_blip3o_embeddings"].double().numpy()
        error = np.abs(batch[side].double().numpy() - source)
        # fp8 steps are relative down to the subnormals, 2^-9 of a scale of amax / 448.
        floor = np.abs(source).max(-1, keepdims=True) / 448 * 2.0**-9 if dtype == "fp8-e4m3" else 0.0
        assert (error <= ROUNDING[dtype] * np.abs(source) + floor).all()


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp8-e4m3"])
def test_statistics_are_those_of_the_stored_values_in_float64(tmp_path: Path, dtype: Any) -> None:
    for number in range(3):
        write_pickle(tmp_path / "src", number, pickled(number, 16))

    convert(tmp_path / "src", tmp_path / "dst", dtype=dtype, samples_per_shard=4)

    batch = read_whole(tmp_path / "dst")
    manifest = Manifest.load(tmp_path / "dst")
    for values, stats in ((batch["eva"], manifest.stats["eva"]), (batch["clip"], manifest.stats["clip"])):
        tokens = values.double().numpy().reshape(-1, values.shape[-1])
        assert stats.count == len(tokens)
        np.testing.assert_allclose(stats.mean, tokens.mean(0), rtol=1e-12, atol=1e-14)
        np.testing.assert_allclose(stats.var, tokens.var(0), rtol=1e-12)


def test_patch_only_of_data_with_a_cls_token_drops_token_0(tmp_path: Path) -> None:
    content = pickled(0, 17)
    path = write_pickle(tmp_path, 0, content, "cls_patch")

    convert(path, tmp_path / "dst", token_layout="patch_only", dtype="fp32")

    batch = read_whole(tmp_path / "dst")
    torch.testing.assert_close(batch["eva"], content["eva_blip3o_embeddings"][:, 1:], rtol=0, atol=0)
    torch.testing.assert_close(batch["clip"], content["clip_blip3o_embeddings"][:, 1:], rtol=0, atol=0)


def test_of_a_folder_with_both_layouts_the_one_asked_is_converted(tmp_path: Path) -> None:
    write_pickle(tmp_path / "src", 0, pickled(0, 16), "patch_only")
    write_pickle(tmp_path / "src", 0, pickled(0, 17), "cls_patch")

    summary = convert(tmp_path / "src", tmp_path / "dst", token_layout="cls_patch")

    assert (summary["samples"], summary["spec"]["num_tokens"]) == (SAMPLES, 17)
    with pytest.raises(DataError, match="several layouts"):
        convert(tmp_path / "src", tmp_path / "other")


def test_keys_that_a_tar_cannot_hold_are_made_safe_and_kept_in_the_metadata(tmp_path: Path) -> None:
    content = pickled(0, 16)
    content["keys"] = ["a/b.jpg", "a_b_jpg", "a.b/jpg", "näher", "x\ny"]
    path = write_pickle(tmp_path, 0, content)

    convert(path, tmp_path / "one")
    convert(path, tmp_path / "two")

    dataset = EmbeddingDataset(tmp_path / "one")
    keys = [dataset.key(0, i) for i in range(SAMPLES)]
    originals = [dataset.meta(0, i).get("original_key", key) for i, key in enumerate(keys)]
    assert len(set(keys)) == SAMPLES
    assert not any(sign in key for key in keys for sign in "./\n")
    assert originals == content["keys"]
    assert folder_bytes(tmp_path / "one") == folder_bytes(tmp_path / "two")


def test_missing_keys_are_made_of_file_name_and_number(tmp_path: Path) -> None:
    for number in range(2):
        content = pickled(number, 16)
        del content["keys"]
        write_pickle(tmp_path / "src", number, content)

    convert(tmp_path / "src", tmp_path / "dst")

    batch = read_whole(tmp_path / "dst")
    assert batch.keys[0] == "embeddings_shard_00000_patch_only_000000"
    assert batch.keys[-1] == "embeddings_shard_00001_patch_only_000004"


def test_an_interrupted_conversion_goes_on_to_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(3):
        write_pickle(tmp_path / "src", number, pickled(number, 16))
    convert(tmp_path / "src", tmp_path / "whole", samples_per_shard=4)
    loaded = 0

    def load_two(path: Path) -> Any:
        nonlocal loaded
        loaded += 1
        if loaded == 3:
            raise KeyboardInterrupt
        return pickle.loads(path.read_bytes())

    with monkeypatch.context() as patch:
        patch.setattr(convert_module, "load_pickle", load_two)
        with pytest.raises(KeyboardInterrupt):
            convert(tmp_path / "src", tmp_path / "dst", samples_per_shard=4)
    interrupted = set(folder_bytes(tmp_path / "dst"))
    summary = convert(tmp_path / "src", tmp_path / "dst", samples_per_shard=4)

    assert interrupted == {f"shard_{i:05d}.tar{suffix}" for i in range(2) for suffix in ("", ".idx")}
    assert summary["samples_found_done"] == 8
    assert folder_bytes(tmp_path / "dst") == folder_bytes(tmp_path / "whole")


def test_another_source_into_a_used_folder_is_refused(tmp_path: Path) -> None:
    first, second = (write_pickle(tmp_path / "src", number, pickled(number, 16)) for number in range(2))
    convert(first, tmp_path / "dst")
    before = folder_bytes(tmp_path / "dst")

    with pytest.raises(DataError, match="another conversion"):
        convert(second, tmp_path / "dst")

    assert folder_bytes(tmp_path / "dst") == before


def broken(change: str) -> dict[str, Any]:
    content = pickled(1, 16)
    eva, clip = content["eva_blip3o_embeddings"], content["clip_blip3o_embeddings"]
    changes: dict[str, dict[str, Any]] = {
        "other width": {"eva_blip3o_embeddings": eva[:, :, :-1]},
        "other token count": {"eva_blip3o_embeddings": eva[:, :9], "clip_blip3o_embeddings": clip[:, :9]},
        "sides disagree": {"clip_blip3o_embeddings": clip[:, :9]},
        "no grid": {"eva_blip3o_embeddings": eva[:, :7], "clip_blip3o_embeddings": clip[:, :7]},
        "missing field": {"clip_blip3o_embeddings": None},
        "two dimensions": {"clip_blip3o_embeddings": clip[0]},
        "integers": {"clip_blip3o_embeddings": clip.int()},
        "short keys": {"keys": content["keys"][:-1]},
        "short captions": {"captions": content["captions"][:-1]},
        "duplicate": {"keys": [content["keys"][0]] * SAMPLES},
        "key of another shard": {"keys": pickled(0, 16)["keys"]},
        "NaN": {"eva_blip3o_embeddings": eva.index_fill(0, torch.tensor([2]), float("nan"))},
        "infinity": {"clip_blip3o_embeddings": clip.index_fill(0, torch.tensor([2]), float("inf"))},
    }
    content |= changes[change]
    return {name: value for name, value in content.items() if value is not None}


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ("other width", "tensors.eva.dim: 11 != 12"),
        ("other token count", "tokens"),
        ("sides disagree", "clip_blip3o_embeddings"),
        ("no grid", "eva_blip3o_embeddings"),
        ("missing field", "clip_blip3o_embeddings"),
        ("two dimensions", "clip_blip3o_embeddings"),
        ("integers", "clip_blip3o_embeddings"),
        ("short keys", "keys"),
        ("short captions", "captions"),
        ("duplicate", "keys"),
        ("key of another shard", "keys"),
        ("NaN", "eva_blip3o_embeddings"),
        ("infinity", "clip_blip3o_embeddings"),
    ],
)
def test_a_faulty_shard_is_an_error_that_names_file_and_field(tmp_path: Path, change: str, field: str) -> None:
    write_pickle(tmp_path / "src", 0, pickled(0, 16))
    faulty = write_pickle(tmp_path / "src", 1, broken(change))

    with pytest.raises(DataError) as caught:
        convert(tmp_path / "src", tmp_path / "dst", samples_per_shard=4)

    assert str(faulty) in str(caught.value)
    assert field in str(caught.value)
    assert set(folder_bytes(tmp_path / "dst")) <= {"shard_00000.tar", "shard_00000.tar.idx"} | {
        "shard_00001.tar",
        "shard_00001.tar.idx",
    }


def test_cls_patch_of_data_without_a_cls_token_is_refused(tmp_path: Path) -> None:
    path = write_pickle(tmp_path, 0, pickled(0, 16))

    with pytest.raises(DataError, match="no CLS token"):
        convert(path, tmp_path / "dst", token_layout="cls_patch")


def test_values_too_large_for_the_dtype_are_refused(tmp_path: Path) -> None:
    content = pickled(0, 16)
    content["clip_blip3o_embeddings"][3, 2, 1] = 1e5
    path = write_pickle(tmp_path, 0, content)

    with pytest.raises(DataError, match=r"00000_3.*fp16"):
        convert(path, tmp_path / "dst", dtype="fp16")


@pytest.mark.parametrize("make", [lambda path: None, lambda path: path.mkdir()])
def test_a_source_without_shards_is_an_error(tmp_path: Path, make: Any) -> None:
    make(tmp_path / "src")

    with pytest.raises(DataError, match="src"):
        convert(tmp_path / "src", tmp_path / "dst")
