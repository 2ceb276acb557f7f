"""The baselines of a dataset against NumPy on the very tokens that were written, and the file that keeps them."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from blip3o_ds.baselines.baselines import Baselines
from blip3o_ds.baselines.fit import FOLDS, SHRINKAGE, fit_baselines
from blip3o_ds.baselines.ridge import FIRST_PENALTY
from blip3o_ds.data.format.manifest import folds_of
from blip3o_ds.data.format.schema import DatasetSpec
from blip3o_ds.data.format.writer import DatasetWriter
from blip3o_ds.data.normalization import Normalizer
from blip3o_ds.data.reading.dataset import EmbeddingDataset
from blip3o_ds.data.reading.loader import spread_indices
from blip3o_ds.data.tools.convert import convert
from blip3o_ds.errors import CheckpointError, DataError
from tests.evaluation.conftest import CLIP, EVA, TOKENS, linear_pairs
from tests.evaluation.test_ridge import PENALTIES, residuals, solve

RAW = Normalizer("minimal")


def tokens(embeddings: torch.Tensor) -> np.ndarray:
    return embeddings.double().flatten(0, 1).numpy()


def folds_by_image(count: int) -> list[int]:
    return folds_of([f"image_{number:03d}" for number in range(count)], FOLDS).tolist()


def best_penalty(x: np.ndarray, y: np.ndarray, folds: np.ndarray) -> tuple[float, float]:
    """On images left out, and the least error."""
    errors = [(residuals(x, y, folds, penalty) ** 2).sum() for penalty in PENALTIES]
    return PENALTIES[int(np.argmin(errors))], min(errors)


@pytest.mark.parametrize("noise", [0.1, 3.0, 30.0])
def test_the_ridge_is_the_closed_form_with_the_penalty_that_is_best_on_images_left_out(make_dataset, noise):
    eva, clip, _ = linear_pairs(40, noise)

    fitted = fit_baselines(make_dataset(eva, clip), RAW)

    x, y, folds = tokens(eva), tokens(clip), np.repeat(folds_by_image(40), TOKENS)
    penalty, error = best_penalty(x, y, folds)
    weight, bias = solve(x, y, penalty)
    np.testing.assert_allclose(fitted.ridge_weight, weight, rtol=1e-4, atol=1e-5)
    assert fitted.ridge_r2 == pytest.approx(1 - error / ((y - y.mean(0)) ** 2).sum(), abs=1e-5)
    new, _, _ = linear_pairs(3, noise=0.0, seed=5)
    np.testing.assert_allclose(fitted.predict_ridge(new), new.numpy() @ weight + bias, rtol=1e-3, atol=1e-3)


def test_the_ridges_noise_has_the_covariance_of_its_residuals_on_images_left_out(make_dataset):
    eva, clip, _ = linear_pairs(40, noise=2.0)
    shared = torch.randn(40, TOKENS, 1, generator=torch.Generator().manual_seed(1))
    clip = clip + torch.tensor([1.0, 1.0, 0.0, 0.0]) * shared  # correlated over channels

    fitted = fit_baselines(make_dataset(eva, clip), RAW)

    x, y, folds = tokens(eva), tokens(clip), np.repeat(folds_by_image(40), TOKENS)
    left = residuals(x, y, folds, best_penalty(x, y, folds)[0])
    expected = left.T @ left / len(left)
    np.testing.assert_allclose(fitted.ridge_noise.T @ fitted.ridge_noise, expected, rtol=1e-3, atol=1e-3)
    assert expected[0, 1] > 0.5


def right_neighbour_pairs(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A token's target is that of the token on its right (nothing beyond the edge), a little of its own, and noise."""
    generator = torch.Generator().manual_seed(0)
    of_right, own = (torch.randn(EVA, CLIP, generator=generator) for _ in range(2))
    eva = torch.randn(count, TOKENS, EVA, generator=generator)
    right = torch.cat([eva.unflatten(1, (3, 3))[:, :, 1:], torch.zeros(count, 3, 1, EVA)], dim=2).flatten(1, 2)
    clip = right @ of_right + 0.5 * eva @ own + 1 + 0.2 * torch.randn(count, TOKENS, CLIP, generator=generator)
    return eva, clip


def explained(prediction: torch.Tensor, clip: torch.Tensor) -> float:
    return 1 - float((prediction - clip).square().sum() / (clip - clip.mean((0, 1))).square().sum())


def test_a_target_that_depends_on_the_neighbour_is_explained_by_the_surroundings_alone(make_dataset):
    eva, clip = right_neighbour_pairs(160)

    fitted = fit_baselines(make_dataset(eva[:100], clip[:100]), RAW)

    assert 0 < fitted.ridge_r2 < 0.5
    assert 0.9 < fitted.prior_r2 < 1
    assert explained(fitted.predict_ridge(eva[100:]), clip[100:]) == pytest.approx(fitted.ridge_r2, abs=0.1)
    assert explained(fitted.prior.mean(eva[100:]), clip[100:]) == pytest.approx(fitted.prior_r2, abs=0.01)


def test_the_priors_mean_is_the_ridge_of_the_surroundings_and_that_of_a_fold_has_not_seen_its_images(make_dataset):
    eva, clip = right_neighbour_pairs(50)

    prior = fit_baselines(make_dataset(eva, clip), RAW).prior

    folds = np.array(folds_by_image(50))
    assert len(set(folds)) == FOLDS == prior.num_folds
    x, y, of_token = tokens(prior.surroundings(eva)), tokens(clip), np.repeat(folds, TOKENS)
    penalty, _ = best_penalty(x, y, of_token)
    for fold, found in [(None, prior.weight), *enumerate(prior.fold_weights)]:
        seen = of_token != fold if fold is not None else np.full(len(x), True)
        weight, bias = solve(x[seen], y[seen], penalty)
        np.testing.assert_allclose(found, np.vstack([weight, bias]), rtol=1e-3, atol=1e-3)


def test_the_variance_of_a_mode_is_that_of_images_left_out_drawn_towards_a_separable_one(make_dataset):
    eva, clip = right_neighbour_pairs(30)

    prior = fit_baselines(make_dataset(eva, clip), RAW).prior

    left = prior.to_modes(clip - prior.mean(eva, folds_by_image(30))).double()
    measured = left.square().mean(0).numpy()
    separable = measured.mean(1, keepdims=True) * measured.mean(0, keepdims=True) / measured.mean()
    expected = (30 * measured + SHRINKAGE * separable) / (30 + SHRINKAGE)
    np.testing.assert_allclose(prior.variance, expected, rtol=1e-4)
    residual = tokens(clip - prior.mean(eva, folds_by_image(30)))
    values = np.linalg.eigvalsh(residual.T @ residual / len(residual))
    channels = prior.channels.double().numpy()
    np.testing.assert_allclose(channels.T @ channels, np.eye(CLIP), atol=1e-6)
    np.testing.assert_allclose(
        channels.T @ (residual.T @ residual / len(residual)) @ channels, np.diag(values), atol=1e-4
    )


def test_the_prior_is_calibrated_on_new_images(make_dataset):
    eva, clip = right_neighbour_pairs(400)

    prior = fit_baselines(make_dataset(eva[:200], clip[:200]), RAW).prior

    standard = prior.to_modes(clip[200:] - prior.mean(eva[200:])) / prior.std
    assert standard.square().mean().item() == pytest.approx(1, abs=0.08)


def test_what_a_prior_leaves_is_never_nothing(make_dataset):
    eva, clip, _ = linear_pairs(30, noise=0.0)
    for target in (clip, torch.ones_like(clip)):
        prior = fit_baselines(make_dataset(eva, target, f"{target.std()}"), RAW).prior
        assert (prior.variance > 0).all()
        assert prior.variance.isfinite().all()


def test_the_scales_of_eva_are_those_of_its_channels_and_a_constant_one_has_1(make_dataset):
    eva, clip, _ = linear_pairs(20, noise=0.5)
    eva[..., 2] = 1 / 3

    prior = fit_baselines(make_dataset(eva, clip), RAW).prior

    expected = tokens(eva).std(0)
    expected[2] = 1
    np.testing.assert_allclose(prior.eva_std, expected, rtol=1e-4)
    np.testing.assert_allclose(prior.eva_mean, tokens(eva).mean(0), rtol=1e-4)
    covariance = np.cov(tokens(eva).T, bias=True)
    basis = prior.basis.double().numpy()
    np.testing.assert_allclose(basis.T @ covariance @ basis, np.diag(np.linalg.eigvalsh(covariance)[::-1]), atol=1e-4)


def test_the_directions_are_orthonormal_and_those_in_which_the_targets_vary_most(make_dataset):
    eva, clip, _ = linear_pairs(30, noise=0.5)

    directions = fit_baselines(make_dataset(eva, clip), RAW).directions.double().numpy()

    covariance = np.cov(tokens(clip).T, bias=True)
    expected = np.diag(np.linalg.eigvalsh(covariance)[::-1])
    np.testing.assert_allclose(directions.T @ directions, np.eye(CLIP), atol=1e-6)
    np.testing.assert_allclose(directions.T @ covariance @ directions, expected, rtol=1e-4, atol=1e-3)


def test_the_readings_are_an_estimate_or_a_draw_for_each_noise(make_dataset):
    eva, clip = right_neighbour_pairs(40)
    fitted = fit_baselines(make_dataset(eva, clip), RAW)
    noise = torch.randn(3, 2, TOKENS, CLIP, generator=torch.Generator().manual_seed(1))

    readings = fitted.readings(eva[:2], noise)

    assert {name: tuple(reading.shape) for name, reading in readings.items()} == {
        "linear_gaussian": (3, 2, TOKENS, CLIP),
        "ridge_noise": (3, 2, TOKENS, CLIP),
        "context_ridge": (1, 2, TOKENS, CLIP),
        "ridge": (1, 2, TOKENS, CLIP),
        "mean_embedding": (1, 2, TOKENS, CLIP),
    }
    assert all(reading.dtype == torch.float32 for reading in readings.values())
    still = fitted.readings(eva[:2], torch.zeros(1, 2, TOKENS, CLIP))
    for drawn, estimate in (("linear_gaussian", "context_ridge"), ("ridge_noise", "ridge")):
        torch.testing.assert_close(still[drawn], readings[estimate])
    torch.testing.assert_close(readings["ridge"][0], fitted.predict_ridge(eva[:2]))
    torch.testing.assert_close(readings["context_ridge"][0], fitted.prior.mean(eva[:2]))
    np.testing.assert_allclose(readings["mean_embedding"][0, 0, 0], tokens(clip).mean(0), rtol=1e-5)
    torch.testing.assert_close(
        readings["ridge_noise"] - readings["ridge"], torch.einsum("kbnc,cd->kbnd", noise, fitted.ridge_noise)
    )


def test_the_readings_are_one_estimate_each_and_need_no_noise(make_dataset):
    fitted = fit_baselines(make_dataset(*linear_pairs(20, noise=0.5)[:2]), RAW)
    new, _, _ = linear_pairs(2, noise=0.0, seed=5)

    readings = fitted.readings(new, torch.full((3, 2, TOKENS, CLIP), float("nan")))

    assert torch.equal(readings["ridge"], fitted.predict_ridge(new)[None])
    assert torch.equal(readings["mean_embedding"], fitted.predict_mean(new)[None])


def test_a_linear_dataset_is_recovered(make_dataset):
    eva, clip, linear = linear_pairs(30, noise=0.0)

    fitted = fit_baselines(make_dataset(eva, clip), RAW)

    torch.testing.assert_close(fitted.ridge_weight, linear, rtol=1e-3, atol=1e-4)
    assert fitted.ridge_r2 == pytest.approx(1, abs=1e-5)
    assert fitted.prior_r2 == pytest.approx(1, abs=1e-5)


def test_the_fit_lives_in_the_normalisers_space(make_dataset):
    eva, clip, _ = linear_pairs(30, noise=0.3)
    dataset = make_dataset(eva, clip)
    normalizer = Normalizer.from_stats("standardize", dataset.manifest.stats)

    fitted = fit_baselines(dataset, normalizer)

    standard = [(side - side.mean((0, 1))) / side.std((0, 1), correction=0) for side in (eva.double(), clip.double())]
    same = fit_baselines(make_dataset(*(side.float() for side in standard), "standard"), RAW)
    torch.testing.assert_close(fitted.ridge_weight, same.ridge_weight, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(fitted.prior.variance, same.prior.variance, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(fitted.clip_mean, np.zeros(CLIP), atol=1e-6)
    np.testing.assert_allclose(fitted.prior.eva_std, np.ones(EVA), rtol=1e-4)


def test_a_limited_fit_is_that_of_samples_spread_over_the_set(make_dataset):
    eva, clip, _ = linear_pairs(31, noise=0.5)
    part = spread_indices(31, 12)

    limited = fit_baselines(make_dataset(eva, clip), RAW, max_samples=12)
    whole = fit_baselines(make_dataset(eva[part], clip[part], "part", [f"image_{i:03d}" for i in part]), RAW)

    assert torch.equal(limited.ridge_weight, whole.ridge_weight)
    assert torch.equal(limited.prior.variance, whole.prior.variance)
    assert (limited.num_samples, limited.dataset_samples) == (12, 31)


def test_a_mean_far_from_zero_costs_no_digits(make_dataset):
    eva, clip, _ = linear_pairs(30, noise=0.5)
    near = fit_baselines(make_dataset(eva, clip), RAW)

    far = fit_baselines(make_dataset(eva + 300, clip - 500, "far"), RAW)

    torch.testing.assert_close(far.ridge_weight, near.ridge_weight, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(far.prior.mean(eva + 300), near.prior.mean(eva) - 500, rtol=0, atol=5e-3)
    assert far.prior_r2 == pytest.approx(near.prior_r2, abs=1e-4)


def test_views_of_one_image_leave_nothing_to_leave_out(make_dataset, tmp_path, caplog):
    eva, clip, _ = linear_pairs(12, noise=0.5)
    convert(make_dataset(eva, clip).location, tmp_path / "views", dtype="fp32", view_separator="_")
    dataset = EmbeddingDataset(tmp_path / "views")  # all of them `image`

    with caplog.at_level(logging.WARNING):
        fitted = fit_baselines(dataset, RAW)

    assert len(set(dataset.folds([f"image_{number:03d}" for number in range(12)], FOLDS))) == 1
    assert (fitted.ridge_r2, fitted.prior_r2) == (None, None)
    assert "all samples are of one image or fold" in caplog.text
    weight, _ = solve(tokens(eva), tokens(clip), FIRST_PENALTY)
    np.testing.assert_allclose(fitted.ridge_weight, weight, rtol=1e-4, atol=1e-5)
    assert all(torch.equal(fold, fitted.prior.weight) for fold in fitted.prior.fold_weights)


@pytest.mark.parametrize("count", [1, 20])
def test_a_constant_condition_leaves_the_mean(make_dataset, count):
    _, clip, _ = linear_pairs(count, noise=0.5)

    fitted = fit_baselines(make_dataset(torch.full((count, TOKENS, EVA), 1 / 3), clip), RAW)

    new = torch.randn(2, TOKENS, EVA)
    mean = torch.from_numpy(tokens(clip).mean(0)).float().expand(2, TOKENS, CLIP)
    for found in (fitted.predict_mean(new), fitted.predict_ridge(new), fitted.prior.mean(new)):
        torch.testing.assert_close(found, mean, rtol=1e-4, atol=1e-4)


def test_cls_is_predicted_from_itself_and_the_image(make_dataset, tmp_path):
    generator = torch.Generator().manual_seed(0)
    eva = torch.randn(60, 5, EVA, generator=generator)
    weight = torch.randn(EVA, CLIP, generator=generator)
    clip = eva[:, 1:].mean(dim=1, keepdim=True) @ weight + 0.01 * torch.randn(60, 5, CLIP, generator=generator)
    spec = DatasetSpec.pair(5, "cls_patch", EVA, CLIP, "fp32", "made-up", "made-up")
    with DatasetWriter(tmp_path / "cls", spec, samples_per_shard=16) as writer:
        for number in range(60):
            writer.write(f"image_{number}", {"eva": eva[number], "clip": clip[number]}, {})

    fitted = fit_baselines(EmbeddingDataset(tmp_path / "cls"), RAW)

    assert fitted.prior.has_cls
    assert fitted.prior.variance.shape == (5, CLIP)
    assert fitted.ridge_r2 < 0.5
    assert fitted.prior_r2 > 0.98


def test_a_dataset_without_samples_is_an_error(make_dataset):
    eva, clip, _ = linear_pairs(6, noise=0.5)
    with pytest.raises(DataError, match="at least one training sample"):
        fit_baselines(make_dataset(eva, clip), RAW, max_samples=0)


@pytest.mark.parametrize("value", [float("nan"), float("-inf"), 3e38, -1e16])
@pytest.mark.parametrize("side", ["eva", "clip"])
def test_a_sample_that_would_spoil_every_sum_is_named(make_dataset, side, value):
    eva, clip, _ = linear_pairs(6, noise=0.5)
    dataset = make_dataset(eva, clip)

    class Damaged(Normalizer):
        """The writer refuses NaN, so it comes in here."""

        def __call__(self, pair):
            broken = {name: value.clone() for name, value in pair.items()}
            broken[side][2, 0, 0] = value
            return broken

    with pytest.raises(DataError, match=r"^image_002: NaN, infinity or a number above 1e\+15 in the embeddings; "):
        fit_baselines(dataset, Damaged("minimal"))


def test_saved_baselines_come_back(make_dataset, tmp_path):
    eva, clip, _ = linear_pairs(20, noise=0.5)
    fitted = fit_baselines(make_dataset(eva, clip), RAW)
    fitted.save(tmp_path / "baselines.safetensors")

    loaded = Baselines.load(tmp_path / "baselines.safetensors")

    for name in ("clip_mean", "directions", "ridge_weight", "ridge_bias", "ridge_noise"):
        assert torch.equal(getattr(loaded, name), getattr(fitted, name))
    for name, value in fitted.prior.tensors().items():
        assert torch.equal(getattr(loaded.prior, name), value)
    for name in ("num_samples", "dataset_samples", "ridge_r2", "prior_r2"):
        assert getattr(loaded, name) == getattr(fitted, name)


def test_without_folds_all_but_the_maps_of_training_is_kept(make_dataset, tmp_path):
    eva, clip, _ = linear_pairs(20, noise=0.5)
    fitted = fit_baselines(make_dataset(eva, clip), RAW)
    fitted.save(tmp_path / "whole")
    fitted.without_folds().save(tmp_path / "part")

    loaded = Baselines.load(tmp_path / "part")

    assert loaded.prior.num_folds == 0
    assert torch.equal(loaded.prior.mean(eva), fitted.prior.mean(eva))
    assert (tmp_path / "part").stat().st_size < 0.5 * (tmp_path / "whole").stat().st_size


def test_a_missing_or_damaged_file_is_named(make_dataset, tmp_path):
    path = tmp_path / "baselines.safetensors"
    with pytest.raises(CheckpointError, match=r"baselines\.safetensors is missing"):
        Baselines.load(path)
    path.write_bytes(b"not safetensors")
    with pytest.raises(CheckpointError, match="does not hold the baselines"):
        Baselines.load(path)
    save_file({"ridge_weight": torch.ones(2, 2)}, path)  # as older versions wrote it
    with pytest.raises(CheckpointError, match="does not hold the baselines"):
        Baselines.load(path)
