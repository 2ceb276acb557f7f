"""The photo set: made of packages of synthetic pictures, each picture once, whole or continued, and said where from."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from blip3o_ds.data.reading.dataset import EmbeddingDataset
from blip3o_ds.encoders import demo, photo_set
from blip3o_ds.errors import DataError

SIZES = {"train_crops": 24, "heldout_crops": 6, "heldout_image_crops": 4}


def photograph(seed: int, width: int = 200, height: int = 150) -> bytes:
    random = np.random.default_rng(seed)
    coarse = Image.fromarray(random.integers(30, 225, (6, 8, 3), dtype=np.uint8)).resize(
        (800, 600), Image.Resampling.BICUBIC
    )
    noisy = np.asarray(coarse.resize((width, height))) + random.integers(0, 12, (height, width, 3))
    buffer = io.BytesIO()
    Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(buffer, "png")
    return buffer.getvalue()


@pytest.fixture
def packages(tmp_path, monkeypatch, make_encoder) -> list[str]:
    """Two packages with 14 photographs, one of them twice, and what is none; returns the names that were fetched."""
    files = {
        "one": {f"usr/pictures/p{seed}.png": photograph(seed) for seed in range(12)}
        | {"usr/pictures/damaged.png": b"\x89PNG", "usr/pictures/plain.png": photograph(0, 100, 90)},
        "two": {"usr/pictures/sub.d/p1.png": photograph(1, 400, 300), "usr/icons/p90.png": photograph(90)}
        | {f"usr/pictures/v{seed}.png": photograph(seed) for seed in (20, 21)},
    }
    fetched = []

    def fetch(package: str, folder: Path) -> tuple[str, Path]:
        fetched.append(package)
        for name, content in files[package].items():
            path = folder / package / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        return "1.0", folder / package

    monkeypatch.setattr(photo_set, "fetch_package", fetch)
    monkeypatch.setattr(photo_set, "find_photographs", lambda sources: [])
    monkeypatch.setattr(photo_set, "PACKAGES", {name: r"usr/pictures/(.*)" for name in files})
    monkeypatch.setattr(photo_set, "is_held_out", lambda name: name in ("one_p3", "one_p4"))
    monkeypatch.setattr(demo, "load_encoder", lambda name, device: make_encoder(name))
    return fetched


def test_every_picture_is_once_in_the_set_and_known_by_its_origin(tmp_path, packages):
    result = photo_set.build_photo_set(tmp_path / "set", **SIZES)

    found = json.loads((tmp_path / "set" / "photographs.json").read_text())
    names = [entry["name"] for entry in found["photographs"]]
    assert result["photographs"] == len(names) == 14
    assert "one_p1" not in names
    assert {
        "name": "two_sub_d_p1",
        "package": "two",
        "version": "1.0",
        "file": "usr/pictures/sub.d/p1.png",
    }.items() <= (found["photographs"][names.index("two_sub_d_p1")].items())
    assert {(entry["name"], entry["reason"].split(":")[0]) for entry in found["refused"]} == {
        ("one_p1", "the same picture as two_sub_d_p1"),
        ("one_damaged", "cannot be decoded"),
        ("one_plain", "smaller than 128 pixels"),
    }
    assert sorted(path.stem for path in (tmp_path / "set" / "photographs").iterdir()) == names


def test_held_out_photographs_are_in_no_other_split_and_crops_are_unique(tmp_path, packages):
    photo_set.build_photo_set(tmp_path / "set", **SIZES)

    keys = {}
    for split in demo.SPLITS:
        dataset = EmbeddingDataset(tmp_path / "set" / split)
        keys[split] = [dataset.read(0, row).key for row in range(len(dataset))]
    images = {split: {key.rpartition("_")[0] for key in found} for split, found in keys.items()}
    assert [len(found) for found in keys.values()] == list(SIZES.values())
    assert len({key for found in keys.values() for key in found}) == sum(SIZES.values())
    assert images["heldout_images"] == {"one_p3", "one_p4"}
    assert images["heldout_crops"] <= images["train"]
    assert not images["train"] & images["heldout_images"]
    assert not any("." in key or "/" in key for found in keys.values() for key in found)


def test_a_finished_set_is_not_made_again_and_other_arguments_are_refused(tmp_path, packages):
    photo_set.build_photo_set(tmp_path / "set", **SIZES)
    again = photo_set.build_photo_set(tmp_path / "set", **SIZES)

    assert [again[split]["written"] for split in demo.SPLITS] == [0, 0, 0]
    assert packages == ["one", "two"]
    with pytest.raises(DataError, match="name another folder"):
        photo_set.build_photo_set(tmp_path / "set", seed=1, **SIZES)


def test_an_interrupted_selection_starts_again(tmp_path, packages, monkeypatch):
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(photo_set, "same_pictures", interrupt)
        with pytest.raises(KeyboardInterrupt):
            photo_set.build_photo_set(tmp_path / "set", **SIZES)

    assert photo_set.build_photo_set(tmp_path / "set", **SIZES)["photographs"] == 14


def test_a_package_without_the_expected_pictures_is_an_error(tmp_path, packages, monkeypatch):
    monkeypatch.setattr(photo_set, "PACKAGES", {"two": r"opt/(.*)"})

    with pytest.raises(DataError, match=r"two 1\.0: no picture"):
        photo_set.build_photo_set(tmp_path / "set", **SIZES)


@pytest.mark.parametrize(
    ("names", "scene"),
    [
        (["opencv-doc_data_left", "opencv-doc_data_right"], "opencv-doc_data_"),
        (["opencv-doc_data_box", "opencv-doc_data_box_in_scene"], "opencv-doc_data_box"),
        (["scikit-image_motorcycle_left", "scikit-image_motorcycle_right"], "scikit-image_motorcycle_"),
        (["kphotoalbum_donna", "kphotoalbum_donna_2"], "kphotoalbum_donna"),
        (["endless-sky-data_hills1"], "endless-sky-data_hills1"),
    ],
)
def test_views_of_a_scene_are_on_one_side(names, scene):
    assert {photo_set.scene_of(name) for name in names} == {scene}


@pytest.mark.parametrize(
    ("package", "taken", "left_out"),
    [
        (
            "gcompris-qt-data",
            "gcompris/src/activities/erase/resource/crab.webp",
            "gcompris/src/activities/details/resource/image/Gogh4_background.webp",
        ),
        (
            "opencv-doc",
            "usr/share/doc/opencv-doc/examples/data/aloeL.jpg",
            "usr/share/doc/opencv-doc/examples/data/left01.jpg",
        ),
        (
            "tuxpaint-stamps-default",
            "usr/share/tuxpaint/stamps/food/fruit/kiwi.png",
            "usr/share/tuxpaint/stamps/town/houses/cartoon/fishery.png",
        ),
    ],
)
def test_what_measurement_cannot_tell_is_left_out_by_its_path(package, taken, left_out):
    assert re.fullmatch(photo_set.PACKAGES[package], taken)
    assert not re.fullmatch(photo_set.PACKAGES[package], left_out)
