"""The mean and the ridge against numpy.linalg on the very tokens that were written."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from blip3o_ds.baselines import DEFAULT_PENALTY, PENALTY_GRID, Baselines, fit_baselines
from blip3o_ds.data.normalization import Normalizer
from blip3o_ds.data.reading.loader import spread_indices
from blip3o_ds.errors import CheckpointError
from tests.evaluation.conftest import CLIP, EVA, TOKENS, linear_pairs

RAW = Normalizer("minimal")


def tokens(embeddings: torch.Tensor) -> np.ndarray:
    return embeddings.double().flatten(0, 1).numpy()


def mean_eigenvalue(x: np.ndarray) -> float:
    return float(np.trace(np.cov(x.T, bias=True))) / x.shape[1]


def solve_ridge(x: np.ndarray, y: np.ndarray, penalty: float) -> tuple[np.ndarray, float]:
    """The weight [clip_dim, eva_dim] on centred tokens, with `penalty` times the covariance's mean eigenvalue."""
    x, y = x - x.mean(0), y - y.mean(0)
    covariance = x.T @ x / len(x)
    ridge_lambda = penalty * np.linalg.eigvalsh(covariance).mean()
    return np.linalg.solve(covariance + ridge_lambda * np.eye(EVA), x.T @ y / len(x)).T, ridge_lambda


def heldout_error(x, y, held_x, held_y, penalty) -> float:
    weight, _ = solve_ridge(x, y, penalty)
    return float((((held_x - x.mean(0)) @ weight.T + y.mean(0) - held_y) ** 2).sum(1).mean())


@pytest.mark.parametrize("noise", [0.1, 3.0, 30.0])
def test_the_fit_is_the_solution_of_the_normal_equations_with_the_best_penalty_on_held_out_samples(make_dataset, noise):
    eva, clip, _ = linear_pairs(40, noise)

    fitted = fit_baselines(make_dataset(eva, clip), RAW)

    held = np.arange(40) % 10 == 9
    parts = [tokens(side[torch.from_numpy(rows)]) for rows in (~held, held) for side in (eva, clip)]
    errors = [heldout_error(*parts, penalty) for penalty in PENALTY_GRID]
    weight, ridge_lambda = solve_ridge(tokens(eva), tokens(clip), PENALTY_GRID[int(np.argmin(errors))])
    assert fitted.ridge_lambda == pytest.approx(ridge_lambda, rel=1e-9)
    np.testing.assert_allclose(fitted.ridge_weight, weight, rtol=1e-5, atol=1e-7)
    spread = ((parts[3] - parts[1].mean(0)) ** 2).sum(1).mean()
    assert fitted.heldout_r2 == pytest.approx(1 - min(errors) / spread, abs=1e-9)


def test_predictions_are_the_affine_map_and_the_mean(make_dataset):
    eva, clip, _ = linear_pairs(20, noise=0.5)
    fitted = fit_baselines(make_dataset(eva, clip), RAW)
    new, _, _ = linear_pairs(3, noise=0.0, seed=5)

    ridge, mean = fitted.predict_ridge(new), fitted.predict_mean(new)

    weight, _ = solve_ridge(tokens(eva), tokens(clip), fitted.ridge_lambda / mean_eigenvalue(tokens(eva)))
    expected = (new.numpy() - tokens(eva).mean(0)) @ weight.T + tokens(clip).mean(0)
    np.testing.assert_allclose(ridge, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(mean, np.broadcast_to(tokens(clip).mean(0), (3, TOKENS, CLIP)), rtol=1e-6)
    assert ridge.dtype == mean.dtype == torch.float32


def test_the_readings_are_one_estimate_each_and_need_no_noise(make_dataset):
    fitted = fit_baselines(make_dataset(*linear_pairs(20, noise=0.5)[:2]), RAW)
    new, _, _ = linear_pairs(2, noise=0.0, seed=5)

    readings = fitted.readings(new, torch.full((3, 2, TOKENS, CLIP), float("nan")))

    assert torch.equal(readings["ridge"], fitted.predict_ridge(new)[None])
    assert torch.equal(readings["mean_embedding"], fitted.predict_mean(new)[None])


def test_the_directions_are_orthonormal_and_lead_with_the_one_along_which_the_ridge_varies_most(make_dataset):
    fitted = fit_baselines(make_dataset(*linear_pairs(20, noise=0.5)[:2]), RAW)

    directions = fitted.directions.numpy()

    left, sizes, _ = np.linalg.svd(fitted.ridge_weight.double().numpy())
    np.testing.assert_allclose(np.abs(left.T @ directions), np.eye(CLIP), atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(fitted.ridge_weight.double().numpy().T @ directions, axis=0), sizes)


def test_a_linear_dataset_is_recovered(make_dataset):
    eva, clip, linear = linear_pairs(30, noise=0.0)

    fitted = fit_baselines(make_dataset(eva, clip), RAW)

    torch.testing.assert_close(fitted.ridge_weight, linear.T, rtol=1e-4, atol=1e-5)
    assert fitted.heldout_r2 == pytest.approx(1)


def test_the_fit_lives_in_the_normalisers_space(make_dataset):
    eva, clip, _ = linear_pairs(30, noise=0.3)
    dataset = make_dataset(eva, clip)
    normalizer = Normalizer.from_stats("standardize", dataset.manifest.stats)

    fitted = fit_baselines(dataset, normalizer)

    standard = [(side - side.mean((0, 1))) / side.std((0, 1), correction=0) for side in (eva.double(), clip.double())]
    penalty = fitted.ridge_lambda / mean_eigenvalue(tokens(standard[0]))
    weight, _ = solve_ridge(tokens(standard[0]), tokens(standard[1]), penalty)
    np.testing.assert_allclose(fitted.ridge_weight, weight, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(fitted.clip_mean, np.zeros(CLIP), atol=1e-6)


def test_a_limited_fit_is_that_of_samples_spread_over_the_set(make_dataset):
    eva, clip, _ = linear_pairs(31, noise=0.5)
    part = spread_indices(31, 12)

    limited = fit_baselines(make_dataset(eva, clip), RAW, max_samples=12)
    whole = fit_baselines(make_dataset(eva[part], clip[part], "part"), RAW)

    assert torch.equal(limited.ridge_weight, whole.ridge_weight)
    assert torch.equal(limited.clip_mean, whole.clip_mean)
    assert (limited.num_samples, limited.dataset_samples) == (12, 31)


def test_a_mean_far_from_zero_costs_no_digits(make_dataset):
    eva, clip, _ = linear_pairs(30, noise=0.5)
    eva, clip = eva.double() + 300, clip.double() - 500
    eva, clip = eva.float(), clip.float()  # as they are stored

    fitted = fit_baselines(make_dataset(eva, clip), RAW)

    penalty = fitted.ridge_lambda / mean_eigenvalue(tokens(eva))
    weight, _ = solve_ridge(tokens(eva), tokens(clip), penalty)
    np.testing.assert_allclose(fitted.ridge_weight, weight, rtol=1e-5, atol=1e-7)


def test_too_few_samples_to_hold_any_out_take_the_default_penalty(make_dataset):
    eva, clip, _ = linear_pairs(9, noise=0.5)

    fitted = fit_baselines(make_dataset(eva, clip), RAW)

    weight, ridge_lambda = solve_ridge(tokens(eva), tokens(clip), DEFAULT_PENALTY)
    assert fitted.heldout_r2 is None
    assert fitted.ridge_lambda == pytest.approx(ridge_lambda, rel=1e-9)
    np.testing.assert_allclose(fitted.ridge_weight, weight, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("count", [1, 20])
def test_a_constant_condition_leaves_the_mean(make_dataset, count):
    _, clip, _ = linear_pairs(count, noise=0.5)

    fitted = fit_baselines(make_dataset(torch.ones(count, TOKENS, EVA), clip), RAW)

    assert torch.equal(
        fitted.predict_ridge(torch.randn(2, TOKENS, EVA)), fitted.predict_mean(torch.zeros(2, TOKENS, 1))
    )


def test_saved_baselines_come_back(make_dataset, tmp_path):
    fitted = fit_baselines(make_dataset(*linear_pairs(20, noise=0.5)[:2]), RAW)
    fitted.save(tmp_path / "baselines.safetensors")

    loaded = Baselines.load(tmp_path / "baselines.safetensors")

    for name in ("eva_mean", "clip_mean", "ridge_weight"):
        assert torch.equal(getattr(loaded, name), getattr(fitted, name))
    for name in ("ridge_lambda", "num_samples", "dataset_samples", "heldout_r2"):
        assert getattr(loaded, name) == getattr(fitted, name)


def test_a_missing_or_damaged_file_is_named(tmp_path):
    path = tmp_path / "baselines.safetensors"
    with pytest.raises(CheckpointError, match=r"baselines\.safetensors is missing"):
        Baselines.load(path)
    path.write_bytes(b"not safetensors")
    with pytest.raises(CheckpointError, match="does not hold the baselines"):
        Baselines.load(path)
