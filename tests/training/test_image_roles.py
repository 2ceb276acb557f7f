"""What a training sample's image is used for: which map guesses it, and whether it is held out for the calibration."""

from __future__ import annotations

from dataclasses import replace
from hashlib import blake2b
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from blip3o_ds.baselines.fit import FOLDS
from blip3o_ds.config import FlowConfig
from blip3o_ds.data.format.schema import DatasetSpec
from blip3o_ds.data.format.writer import DatasetWriter
from blip3o_ds.data.reading.dataset import EmbeddingDataset
from blip3o_ds.training.datasets import ImageRoles
from tests.flows import random_prior
from tests.training.conftest import small_config

CPU = torch.device("cpu")
IMAGES = [f"photo{number:04d}" for number in range(4000)]


def roles_of(folder: Path, share: float = 0.2, separator: str | None = None, **settings: object) -> ImageRoles:
    """Those of a run; they follow from keys alone, so the dataset has a single sample."""
    spec = replace(DatasetSpec.pair(1, "patch_only", 2, 2, "fp32", "eva", "clip"), view_separator=separator)
    with DatasetWriter(folder, spec) as writer:
        writer.write("a", {"eva": torch.zeros(1, 2), "clip": torch.zeros(1, 2)}, {})
    config = small_config(2, **{"flow.calibration_share": share}, **settings)
    return ImageRoles.of_run(config, EmbeddingDataset(folder), random_prior(4, 2, 2, folds=5), CPU)


def digest(image: str) -> int:
    return int.from_bytes(blake2b(image.encode(), digest_size=8, person=b"fold").digest(), "little")


@pytest.mark.parametrize("share", [0.0, 0.01, 0.2])
def test_the_share_of_images_is_held_out_by_their_names(tmp_path, share):
    held = roles_of(tmp_path, share)(IMAGES)[1]

    assert held.dtype == torch.bool
    assert held.tolist() == [
        digest(image) % 5 == 0 and digest(image) // 5 % 10_000 < 50_000 * share for image in IMAGES
    ]
    assert held.float().mean().item() == pytest.approx(share, abs=0.02)
    assert held.any() == (share > 0)


@pytest.mark.parametrize("share", [0.01, 0.1, 0.2])
def test_images_held_out_are_new_to_the_map_that_guesses_them_and_the_others_are_not(tmp_path, share):
    roles = roles_of(tmp_path, share)
    folds, held = roles(IMAGES)

    own = roles.dataset.folds(IMAGES, 5).tolist()
    assert [fold == of_map for fold, of_map in zip(own, folds, strict=True)] == held.tolist()
    assert held.any()


def test_a_share_above_a_fold_is_refused_before_anything_is_fitted():
    FlowConfig(calibration_share=1 / FOLDS)
    with pytest.raises(ValidationError, match=r"calibration_share\n.*less than or equal to 0.2"):
        FlowConfig(calibration_share=1 / FOLDS + 0.01)


def test_where_all_images_are_of_one_fold_none_is_held_out_with_a_warning(tmp_path, caplog):
    roles = roles_of(tmp_path)
    prior = random_prior(4, 2, 2, folds=5)
    alike = replace(prior, fold_weights=prior.weight.expand_as(prior.fold_weights))
    found = ImageRoles.of_run(small_config(2, **{"flow.calibration_share": 0.2}), roles.dataset, alike, CPU)

    assert "no image is held out" in caplog.text
    assert not found(IMAGES)[1].any()


def test_the_views_of_an_image_have_one_role(tmp_path):
    images, views = IMAGES[:200], range(3)
    keys = [f"{image}_{view:04d}" for image in images for view in views]

    held = roles_of(tmp_path / "together", separator="_")(keys)[1]
    apart = roles_of(tmp_path / "apart")(keys)[1]

    assert held.tolist() == [digest(image) % 5 == 0 for image in images for _ in views]
    assert (apart.unflatten(0, (-1, 3)).float().mean(1) % 1 > 0).any()  # without a separator each is its own image


def test_a_samples_role_does_not_depend_on_the_batch(tmp_path):
    roles = roles_of(tmp_path)
    folds, held = roles(IMAGES[:50])

    order = torch.randperm(50, generator=torch.Generator().manual_seed(0)).tolist()
    other_folds, other_held = roles([IMAGES[i] for i in order])

    assert other_folds == [folds[i] for i in order]
    assert torch.equal(other_held, held[order])


def test_in_an_overfit_test_all_images_teach_everything_and_are_guessed_as_new(tmp_path):
    folds, held = roles_of(tmp_path, **{"train.overfit_test_size": 20})(IMAGES)
    assert held is None
    assert folds == [digest(image) % 5 for image in IMAGES]
