"""Samples that are views of one image: a split and folds keep them together, and every tool keeps what says so."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from dataclasses import replace
from hashlib import blake2b
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from blip3o_ds.cli import main
from blip3o_ds.data.format.index import ShardIndex, index_path
from blip3o_ds.data.format.manifest import Manifest, Selection, folds_of
from blip3o_ds.data.format.schema import DatasetSpec
from blip3o_ds.data.format.writer import DatasetWriter
from blip3o_ds.data.reading.dataset import EmbeddingDataset
from blip3o_ds.data.tools.append import append
from blip3o_ds.data.tools.convert import convert
from blip3o_ds.data.tools.repair import repair
from blip3o_ds.data.tools.split import split
from blip3o_ds.data.tools.stats import inspect, stats
from blip3o_ds.data.tools.verify import verify
from blip3o_ds.errors import DataError

PAIR = DatasetSpec.pair(4, "patch_only", 8, 4, "bf16", "eva", "clip")
VIEWS = replace(PAIR, view_separator="_")
IMAGES = [f"photo{number:02d}" for number in range(20)]


def write(folder: Path, spec: DatasetSpec = VIEWS, images: list[str] = IMAGES, views: range = range(4)) -> Path:
    """These views of every image, in turns, so that those of one are in several shards."""
    generator = torch.Generator().manual_seed(0)
    with DatasetWriter(folder, spec, samples_per_shard=7) as writer:
        for key in (f"{image}_{view:04d}" for view in views for image in images):
            tensors = {name: torch.randn(spec.shape(name), generator=generator) for name in ("eva", "clip")}
            writer.write(key, tensors, {})
    return folder


def keys_of(folder: Path) -> list[str]:
    dataset = EmbeddingDataset(folder)
    return [key for shard in range(len(dataset.shard_sizes)) for key in dataset.keys(shard)]


def sides(folder: Path) -> list[set[str]]:
    """The keys of both parts of a split, after a check that each part is sound."""
    for part in ("train", "eval"):
        assert verify(folder / part).problems == []
    return [set(keys_of(folder / part)) for part in ("train", "eval")]


def images_of(keys: set[str]) -> set[str]:
    return {key[: len("photo00")] for key in keys}


@pytest.mark.parametrize(
    ("separator", "key", "image"),
    [
        ("_", "astronaut_0012", "astronaut"),
        ("_", "motorcycle_left_3", "motorcycle_left"),
        ("_", "astronaut", "astronaut"),
        ("_", "astronaut_", "astronaut_"),
        ("_", "astronaut_left", "astronaut_left"),
        ("_", "astronaut_-1", "astronaut_-1"),
        ("_", "astronaut_1 ", "astronaut_1 "),
        ("_", "astronaut_\u0661\u0662", "astronaut_\u0661\u0662"),  # digits, but not ASCII ones
        ("_", "0012", "0012"),
        ("_", "_0012", "_0012"),
        ("-crop-", "a-crop-1-crop-22", "a-crop-1"),
        ("-crop-", "a-crop-", "a-crop-"),
        (None, "astronaut_0012", "astronaut_0012"),
    ],
)
def test_the_image_of_a_key_is_what_stands_before_separator_and_number(separator, key, image):
    assert replace(PAIR, view_separator=separator).image_of(key) == image


@pytest.mark.parametrize("fraction", [0.3, 0.7])
def test_no_image_is_on_both_sides_of_a_split(tmp_path, fraction):
    split(write(tmp_path / "whole"), tmp_path / "split", fraction)

    train, held_out = sides(tmp_path / "split")

    digests = {image: blake2b(image.encode(), digest_size=8).digest() for image in IMAGES}
    expected = {image for image, digest in digests.items() if int.from_bytes(digest, "little") < fraction * 2**64}
    assert images_of(held_out) == expected
    assert images_of(train) == set(IMAGES) - expected
    assert len(train | held_out) == 80


def test_without_a_separator_samples_are_split_one_by_one_and_files_are_as_before(tmp_path):
    split(write(tmp_path / "whole", PAIR), tmp_path / "split", 0.3)

    train, held_out = sides(tmp_path / "split")

    digests = {key: blake2b(key.encode(), digest_size=8).digest() for key in keys_of(tmp_path / "whole")}
    assert held_out == {key for key, x in digests.items() if int.from_bytes(x, "little") < 0.3 * 2**64}
    assert images_of(train) & images_of(held_out)
    for folder in (tmp_path / "whole", tmp_path / "split/train", tmp_path / "split/eval"):
        content = json.loads((folder / "manifest.json").read_text())
        assert (content["format_version"], content["spec"]) == (1, PAIR.to_dict())
        assert "view_separator" not in content["spec"]


def test_a_split_may_state_the_separator_for_a_dataset_that_does_not(tmp_path):
    whole = write(tmp_path / "whole", PAIR)
    split(whole, tmp_path / "by_sample", 0.3)
    before = sides(tmp_path / "by_sample")

    split(whole, tmp_path / "by_image", 0.3, "_")

    train, held_out = sides(tmp_path / "by_image")
    assert not images_of(train) & images_of(held_out)
    assert Manifest.load(tmp_path / "by_image/eval").spec == VIEWS
    assert Manifest.load(whole).spec == PAIR
    assert sides(tmp_path / "by_sample") == before


def test_a_split_is_not_brought_up_to_date_by_another_rule(tmp_path):
    whole = write(tmp_path / "whole", PAIR)
    split(whole, tmp_path / "split", 0.3)
    before = sides(tmp_path / "split")
    with pytest.raises(DataError, match=r"train: was split with view_separator None, not '_'.*another folder"):
        split(whole, tmp_path / "split", 0.3, "_")
    assert sides(tmp_path / "split") == before


def test_views_that_are_appended_join_the_side_of_their_image(tmp_path):
    whole = write(tmp_path / "whole")
    split(whole, tmp_path / "split", 0.3)
    train, held_out = sides(tmp_path / "split")

    append(whole, [write(tmp_path / "more", views=range(4, 6))])
    split(whole, tmp_path / "split", 0.3)

    assert Manifest.load(whole).spec == VIEWS
    for before, after in zip((train, held_out), sides(tmp_path / "split"), strict=True):
        assert before < after
        assert images_of(after) == images_of(before)


@pytest.mark.parametrize(("own", "other"), [(VIEWS, PAIR), (PAIR, VIEWS), (VIEWS, replace(PAIR, view_separator="-"))])
def test_datasets_with_another_separator_are_not_appended(tmp_path, own, other):
    folder, source = write(tmp_path / "own", own), write(tmp_path / "other", other, ["another"])
    with pytest.raises(DataError, match=r"other: its spec is not that of .*view_separator: .* != .*convert it first"):
        append(folder, [source])


def converted(folder: Path, work: Path) -> Path:
    convert(folder, work / "recast", dtype="fp32", samples_per_shard=9)
    return work / "recast"


def repaired(folder: Path, work: Path) -> Path:
    index_path(folder / "shard_00001.tar").unlink()
    content = json.loads((folder / "manifest.json").read_text())
    content["stats"]["eva"]["mean"][0] += 1
    (folder / "manifest.json").write_text(json.dumps(content))
    report = repair(folder)
    assert (report.indexes_rebuilt, report.manifest_rewritten) == (1, True)
    return folder


def held_out_made_independent(folder: Path, work: Path) -> Path:
    split(folder, work / "split", 0.5)
    return converted(work / "split/eval", work)


@pytest.mark.parametrize("tool", [converted, repaired, held_out_made_independent])
def test_every_tool_keeps_the_separator(tmp_path, tool: Callable[[Path, Path], Path]):
    result = tool(write(tmp_path / "whole"), tmp_path)
    assert Manifest.load(result).spec.view_separator == "_"
    assert verify(result).problems == []


def test_manifests_say_version_2_and_shards_are_those_of_a_set_without_separator(tmp_path):
    views, plain = write(tmp_path / "views"), write(tmp_path / "plain", PAIR)

    content = json.loads((views / "manifest.json").read_text())
    assert (content["format_version"], content["spec"]["view_separator"]) == (2, "_")
    assert ShardIndex.load(views / "shard_00000.tar.idx").spec == PAIR
    for path in plain.glob("shard_*"):
        assert (views / path.name).read_bytes() == path.read_bytes()
    assert stats(views)["view_separator"] == inspect(views)["spec"]["view_separator"] == "_"
    assert "view_separator" not in stats(plain)


@pytest.mark.parametrize("form", ["version 1", "version 2"])
def test_the_separator_is_read_with_either_form_of_the_specification(tmp_path, form):
    path = write(tmp_path / "whole", PAIR) / "manifest.json"
    content = json.loads(path.read_text())
    content["spec"] = {**PAIR.to_dict(), "view_separator": "_"} if form == "version 1" else VIEWS.to_dict()
    path.write_text(json.dumps(content))
    assert Manifest.load(path.parent).spec == VIEWS


@pytest.mark.parametrize(
    "value",
    ["", "\n", "_\n", "\0", "\ud800", "/", ".", "0", "_1", "_" * 9, "_" * 10_000_000, 5, None, ["_"], {"a": 1}, True],
    ids=lambda value: repr(value)[:12],
)
def test_a_hostile_separator_is_refused_by_file_and_field(tmp_path, value):
    path = write(tmp_path / "whole", images=["a"]) / "manifest.json"
    content = json.loads(path.read_text())
    content["spec"]["view_separator"] = value
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"manifest\.json: .*view_separator must be") as refused:
        Manifest.load(path.parent)
    assert len(str(refused.value)) < 1000
    assert str(refused.value).isprintable()


def test_a_finished_dataset_may_gain_a_separator_but_not_lose_it(tmp_path):
    """As when the demo set of an older release is made again."""
    write(tmp_path / "whole", PAIR)
    with DatasetWriter(tmp_path / "whole", VIEWS, resume=True):
        pass
    assert Manifest.load(tmp_path / "whole").spec == VIEWS
    for spec in (PAIR, replace(PAIR, view_separator="-")):
        with pytest.raises(DataError, match=r"manifest\.json: view_separator is '_', found .*give the same"):
            DatasetWriter(tmp_path / "whole", spec, resume=True)
    (tmp_path / "whole" / "manifest.json").write_text("{")  # damaged: what is written now counts
    with DatasetWriter(tmp_path / "whole", PAIR, resume=True):
        pass
    assert Manifest.load(tmp_path / "whole").spec == PAIR


def test_pickles_convert_with_a_separator_and_the_commands_take_it(tmp_path, capsys):
    keys = [f"photo{number % 10:02d}_{number // 10}" for number in range(30)]
    content = {"eva_blip3o_embeddings": torch.randn(30, 4, 8), "clip_blip3o_embeddings": torch.randn(30, 4, 4)}
    (tmp_path / "src").mkdir()
    (tmp_path / "src/embeddings_shard_00000_patch_only.pkl").write_bytes(pickle.dumps({**content, "keys": keys}))
    src, whole, plain, parts = (str(tmp_path / name) for name in ("src", "whole", "plain", "parts"))
    views = ["--view_separator", "_"]

    assert main(["data", "convert", src, whole, *views]) == 0
    assert main(["data", "convert", src, plain]) == 0
    assert main(["data", "split", plain, parts, "--fraction", "0.5", *views]) == 0
    capsys.readouterr()
    assert main(["data", "split", whole, str(tmp_path / "other"), "--view_separator", "-"]) == 1
    assert main(["data", "split", plain, str(tmp_path / "other"), "--view_separator", ""]) == 1

    assert Manifest.load(whole).spec.view_separator == "_"
    train, held_out = sides(Path(parts))
    assert not images_of(train) & images_of(held_out)
    errors = capsys.readouterr().err
    assert f"{whole}: its view_separator is '_', not '-'" in errors
    assert "view_separator must be 1 to 8 printable characters" in errors


def test_folds_depend_on_the_image_alone_and_are_frozen():
    assert folds_of(IMAGES[:8], 5).tolist() == [2, 0, 3, 4, 4, 1, 4, 3]
    assert folds_of(IMAGES[7::-1], 5).tolist() == [3, 4, 1, 4, 4, 3, 0, 2]
    assert folds_of([], 5).tolist() == []
    assert folds_of(IMAGES, 1).tolist() == [0] * 20
    with pytest.raises(DataError, match="folds must be at least 1, found 0"):
        folds_of(IMAGES, 0)


@pytest.mark.parametrize("fraction", [0.05, 0.8])
@pytest.mark.parametrize("part", ["train", "eval"])
def test_folds_of_either_part_of_a_split_are_of_equal_size(fraction, part):
    images = [f"image{number}" for number in range(100_000)]
    inside = [images[row] for row in Selection("x", fraction, part).rows(images)]
    counts = np.bincount(folds_of(inside, 10), minlength=10)
    assert np.abs(counts - len(inside) / 10).max() < 5 * (len(inside) * 0.09) ** 0.5


@given(st.lists(st.text(st.characters(codec="utf-8"), min_size=1), max_size=20), st.integers(1, 12))
def test_every_image_has_one_fold(images, folds):
    found = folds_of(images, folds)
    assert found.dtype == np.int64
    assert all(0 <= fold < folds for fold in found.tolist())
    assert found.tolist() == [int(folds_of([image], folds)[0]) for image in images]
