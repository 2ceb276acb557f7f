"""Extraction: the numbers stored, resuming, broken pictures, and pairs that do not fit."""

from __future__ import annotations

import hashlib
import io
import json

import pytest
import torch
from PIL import Image

from blip3o_ds.data.reading.dataset import EmbeddingDataset
from blip3o_ds.encoders.extract import encode_images, extract
from blip3o_ds.encoders.registry import ENCODERS
from blip3o_ds.errors import DataError, EncoderError
from tests.encoders.conftest import all_records


@pytest.fixture
def pictures(make_png):
    return {f"{n:02d}.png": make_png(n) for n in range(10)}


def test_stored_embeddings_are_the_encoders_outputs(write_folder, pictures, condition, target, tmp_path):
    folder = write_folder(pictures | {"03.txt": b"a caption"})

    result = encode_images(
        all_records(folder), tmp_path / "set", condition, target, dtype="fp32", batch_size=4, samples_per_shard=4
    )

    dataset = EmbeddingDataset(tmp_path / "set")
    sample = dataset.read(0, 3)
    image = Image.open(io.BytesIO(pictures["03.png"])).convert("RGB")
    assert (result["written"], dataset.shard_sizes) == (10, [4, 4, 2])
    assert torch.allclose(sample["eva"], condition(condition.preprocess(image)[None])[0], atol=1e-5)
    assert torch.allclose(sample["clip"], target(target.preprocess(image)[None])[0], atol=1e-5)
    assert (sample.key, dataset.meta(0, 3)["caption"]) == ("03", "a caption")
    assert [tensor.encoder for tensor in dataset.spec.tensors.values()] == ["tiny-condition", "tiny-target"]


def test_cls_patch_stores_the_cls_token_first(write_folder, pictures, condition, target, tmp_path):
    folder = write_folder(pictures)
    for layout in ("cls_patch", "patch_only"):
        encode_images(all_records(folder), tmp_path / layout, condition, target, token_layout=layout)

    with_cls, patches = EmbeddingDataset(tmp_path / "cls_patch"), EmbeddingDataset(tmp_path / "patch_only")

    assert (with_cls.spec.num_tokens, patches.spec.num_tokens) == (17, 16)
    assert torch.equal(with_cls.read(0, 5)["clip"][1:], patches.read(0, 5)["clip"])


def test_tar_and_folder_give_the_same_embeddings(write_folder, write_tar, pictures, condition, target, tmp_path):
    sources = {"folder": write_folder(pictures), "tar": write_tar("shard.tar", pictures)}
    for name, source in sources.items():
        encode_images(all_records(source), tmp_path / name, condition, target)

    folder, tar = EmbeddingDataset(tmp_path / "folder"), EmbeddingDataset(tmp_path / "tar")

    assert len(folder) == len(tar) == 10
    for index in range(10):
        left, right = folder.read(0, index), tar.read(0, index)
        assert left.key == right.key
        assert torch.equal(left["eva"], right["eva"])
        assert torch.equal(left["clip"], right["clip"])


def test_resume_gives_the_identical_dataset(write_folder, pictures, condition, target, tmp_path):
    folder = write_folder(pictures)
    options = {"samples_per_shard": 2, "batch_size": 2}

    def interrupted():
        for number, record in enumerate(all_records(folder)):
            if number == 9:
                raise KeyboardInterrupt
            yield record

    whole = encode_images(all_records(folder), tmp_path / "whole", condition, target, **options)
    with pytest.raises(KeyboardInterrupt):
        encode_images(interrupted(), tmp_path / "parts", condition, target, **options)
    assert not (tmp_path / "parts" / "manifest.json").exists()
    resumed = encode_images(all_records(folder), tmp_path / "parts", condition, target, **options)

    assert whole["written"] == 10
    assert 0 < resumed["skipped_existing"] < 10
    assert resumed["written"] == 10 - resumed["skipped_existing"]
    assert _digests(tmp_path / "parts") == _digests(tmp_path / "whole")


def _digests(folder):
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.iterdir()
        if path.name != ".writer.lock"
    }


def test_broken_picture_is_skipped_counted_and_named(
    write_folder, pictures, make_png, condition, target, tmp_path, caplog
):
    broken = {
        "a_cut.png": pictures["00.png"][:200],
        "b_text.jpg": b"<html>404</html>",
        "c_strip.png": make_png(0, width=2000, height=1),
        "d_meta.png": pictures["00.png"],
        "d_meta.json": b"[1, 2]",
    }
    folder = write_folder(pictures | broken)

    first = encode_images(all_records(folder), tmp_path / "set", condition, target)
    again = encode_images(all_records(folder), tmp_path / "set", condition, target)

    lines = [json.loads(line) for line in (tmp_path / "set" / "broken_images.jsonl").read_text().splitlines()]
    assert (first["written"], first["broken"]) == (10, 4)
    assert (again["written"], again["skipped_existing"], again["broken"]) == (0, 10, 4)
    assert [line["key"] for line in lines] == ["a_cut", "b_text", "c_strip", "d_meta"]
    assert "b_text.jpg" in caplog.text
    assert len(EmbeddingDataset(tmp_path / "set")) == 10


def test_source_of_only_broken_pictures_is_an_error(write_folder, condition, target, tmp_path):
    folder = write_folder({"a.png": b"", "b.png": b"?"})

    with pytest.raises(DataError, match=r"no image could be used \(2 broken\)"):
        encode_images(all_records(folder), tmp_path / "set", condition, target)


def test_extract_finds_its_encoders_by_name(write_folder, pictures, make_spec, tmp_path, monkeypatch):
    monkeypatch.setitem(ENCODERS, "left", make_spec("left", seed=3))
    monkeypatch.setitem(ENCODERS, "right", make_spec("right", seed=4))

    names = {"condition": "left", "target": "right", "view_separator": "-"}
    result = extract(write_folder(pictures), tmp_path / "set", **names, device="cpu")

    assert {"written": 10, "skipped_existing": 0, "broken": 0}.items() <= result.items()
    assert result["seconds"] > 0
    assert EmbeddingDataset(tmp_path / "set").spec.view_separator == "-"


@pytest.mark.parametrize(
    ("changes", "layout", "message"),
    [
        ({"grid_size": 8}, "patch_only", "left gives 4x4, right 8x8"),
        ({"has_cls": False}, "cls_patch", "right has no CLS token"),
    ],
)
def test_pair_that_does_not_fit_is_refused_before_loading(
    write_folder, pictures, make_spec, tmp_path, monkeypatch, changes, layout, message
):
    def load(spec, options):
        raise AssertionError("weights were loaded")

    monkeypatch.setitem(ENCODERS, "left", make_spec("left", load=load))
    monkeypatch.setitem(ENCODERS, "right", make_spec("right", load=load, **changes))

    with pytest.raises(EncoderError, match=message):
        extract(write_folder(pictures), tmp_path / "set", condition="left", target="right", token_layout=layout)
