"""The demo set: which crops are where, and that it is built whole."""

from __future__ import annotations

import numpy as np
import pytest

from blip3o_ds.data.reading.dataset import EmbeddingDataset
from blip3o_ds.encoders import demo
from blip3o_ds.errors import DataError

SEEN = {"a": (300, 400), "b": (512, 512)}
HELD_OUT = {"c": (600, 300)}
SIZES = {"train": 40, "heldout_crops": 10, "heldout_images": 6}


def test_splits_are_disjoint_and_keys_unique():
    plan = demo.plan_crops(SEEN, HELD_OUT, SIZES, seed=0)

    crops = [crop for split in plan.values() for crop in split]
    assert {split: len(chosen) for split, chosen in plan.items()} == SIZES
    assert len({crop.key for crop in crops}) == len({(crop.image, crop.box) for crop in crops}) == len(crops)
    assert {crop.image for crop in plan["train"]} == {crop.image for crop in plan["heldout_crops"]} == set(SEEN)
    assert {crop.image for crop in plan["heldout_images"]} == set(HELD_OUT)


def test_crops_lie_inside_their_photograph_at_many_scales():
    crops = demo.plan_crops(SEEN, HELD_OUT, SIZES, seed=0)["train"]

    scales = np.array([crop.side / min(SEEN[crop.image]) for crop in crops])
    for crop in crops:
        left, top, right, bottom = crop.box
        assert 0 <= left < right <= SEEN[crop.image][0]
        assert 0 <= top < bottom <= SEEN[crop.image][1]
    assert scales.min() >= 0.24
    assert scales.max() <= 1
    assert np.ptp(scales) > 0.5
    assert {crop.flip for crop in crops} == {True, False}


def test_crops_depend_on_the_seed_alone():
    first, again, other = (demo.plan_crops(SEEN, HELD_OUT, SIZES, seed) for seed in (0, 0, 1))

    assert first == again
    assert first["train"] != other["train"]
    # Frozen: a demo set made on another day or machine has the same crops.
    assert first["train"][0] == demo.Crop("a", 0, left=33, top=103, side=83, flip=True)


def test_both_motorcycles_are_on_the_same_side():
    pytest.importorskip("skimage")
    pytest.importorskip("sklearn")
    seen, held_out = demo.open_photographs(demo.SEEN), demo.open_photographs(demo.HELD_OUT)

    assert {"motorcycle_left", "motorcycle_right"} <= set(seen)
    assert len(held_out) == 5
    assert not set(seen) & set(held_out)


def test_demo_set_is_built_and_not_built_twice(tmp_path, make_encoder, monkeypatch):
    pytest.importorskip("skimage")
    pytest.importorskip("sklearn")
    monkeypatch.setattr(demo, "load_encoder", lambda name, device: make_encoder(name))
    sizes = {"train_crops": 15, "heldout_crops": 3, "heldout_image_crops": 5}

    first = demo.build_demo(tmp_path, **sizes)
    again = demo.build_demo(tmp_path, **sizes)

    train = EmbeddingDataset(tmp_path / "train")
    assert [first[split]["written"] for split in demo.SPLITS] == [15, 3, 5]
    assert [again[split]["written"] for split in demo.SPLITS] == [0, 0, 0]
    assert train.read(0, 0).key == "astronaut_0000"
    assert train.meta(0, 0)["caption"] == "astronaut"
    assert {"left", "top", "side", "flip"} <= train.meta(0, 0).keys()
    for split in demo.SPLITS:
        dataset = EmbeddingDataset(tmp_path / split)
        for index in range(len(dataset)):
            place = dataset.place(index)
            assert dataset.spec.image_of(dataset.key(*place)) == dataset.meta(*place)["image"]
    with pytest.raises(DataError, match="name another folder"):
        demo.build_demo(tmp_path, seed=1, **sizes)
