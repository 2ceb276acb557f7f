"""The ridge from streamed sums against NumPy on the very samples, and what leaving images out protects from."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from blip3o_ds.baselines.ridge import FIRST_PENALTY, PENALTY_STEP, PENALTY_STEPS, RidgeFit, Sums, fit_ridge

FEATURES, TARGETS, FOLDS = 6, 3, 5
PENALTIES = [FIRST_PENALTY * PENALTY_STEP**step for step in range(PENALTY_STEPS[0], PENALTY_STEPS[1] + 1)]


def tokens(count: int, noise: float, seed: int = 0, features: int = FEATURES) -> tuple[np.ndarray, np.ndarray]:
    """Features [count, F] with correlated channels, and targets that are linear in them with noise."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((count, features)) @ rng.standard_normal((features, features)) + 0.5
    y = x @ rng.standard_normal((features, TARGETS)) - 1 + noise * rng.standard_normal((count, TARGETS))
    return x.astype(np.float32), y.astype(np.float32)


def sums_of(x: np.ndarray, y: np.ndarray, folds: np.ndarray, number: int = FOLDS) -> list[Sums]:
    parts = [Sums.zeros(x.shape[1], y.shape[1], "cpu") for _ in range(number)]
    for fold, part in enumerate(parts):
        for rows in np.array_split(np.flatnonzero(folds == fold), 3):  # as batches come
            part.add(torch.from_numpy(x[rows]), torch.from_numpy(y[rows]))
    return parts


def solve(x: np.ndarray, y: np.ndarray, penalty: float) -> tuple[np.ndarray, np.ndarray]:
    """Weight and bias by the normal equations, `penalty` relative to the mean eigenvalue of the covariance."""
    x, y = x.astype(np.float64), y.astype(np.float64)
    centred = x - x.mean(0)
    covariance = centred.T @ centred / len(x)
    penalised = covariance + penalty * np.linalg.eigvalsh(covariance).mean() * np.eye(x.shape[1])
    weight = np.linalg.solve(penalised, centred.T @ (y - y.mean(0)) / len(x))
    return weight, y.mean(0) - x.mean(0) @ weight


def residuals(x: np.ndarray, y: np.ndarray, folds: np.ndarray, penalty: float) -> np.ndarray:
    """Of every token, by the map that has not seen its fold."""
    out = np.empty(y.shape)
    for fold in np.unique(folds):
        weight, bias = solve(x[folds != fold], y[folds != fold], penalty)
        held = folds == fold
        out[held] = y[held] - (x[held].astype(np.float64) @ weight + bias)
    return out


def relative_penalty(fit: RidgeFit, x: np.ndarray) -> float:
    return fit.penalty / np.trace(np.cov(x.T.astype(np.float64), bias=True)) * x.shape[1]


@pytest.mark.parametrize("noise", [0.1, 3.0, 30.0])
def test_the_fit_is_the_closed_form_with_the_penalty_that_is_best_on_what_is_left_out(noise):
    x, y = tokens(60, noise)
    folds = np.random.default_rng(1).integers(0, FOLDS, 60)

    fit = fit_ridge(sums_of(x, y, folds))

    errors = [(residuals(x, y, folds, penalty) ** 2).sum() for penalty in PENALTIES]
    best = PENALTIES[int(np.argmin(errors))]
    assert relative_penalty(fit, x) == pytest.approx(best, rel=1e-5)
    weight, bias = solve(x, y, best)
    np.testing.assert_allclose(fit.whole.weight, weight, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(fit.whole.bias, bias, rtol=1e-4, atol=1e-6)
    assert fit.r2 == pytest.approx(1 - min(errors) / ((y - y.mean(0)) ** 2).sum(), abs=1e-5)
    for fold in range(FOLDS):
        weight, bias = solve(x[folds != fold], y[folds != fold], best)
        np.testing.assert_allclose(fit.folds[fold].weight, weight, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(fit.folds[fold].bias, bias, rtol=1e-4, atol=1e-6)


def test_the_covariance_is_that_of_the_residuals_of_what_is_left_out():
    x, y = tokens(50, noise=1.0)
    folds = np.arange(50) % 3

    fit = fit_ridge(sums_of(x, y, folds))

    left = residuals(x, y, folds, relative_penalty(fit, x))
    np.testing.assert_allclose(fit.covariance, left.T @ left / 50, rtol=1e-4, atol=1e-5)
    within = y - (x @ fit.whole.weight.numpy() + fit.whole.bias.numpy())
    assert fit.covariance.trace() > 1.05 * (within**2).sum() / 50


def test_a_map_knows_its_error_on_other_tokens_from_their_sums_alone():
    (x, y), (other_x, other_y) = tokens(40, noise=1.0), tokens(30, noise=2.0, seed=3)
    found = fit_ridge(sums_of(x, y, np.arange(40) % 2)).whole

    [sums] = sums_of(other_x, other_y, np.zeros(30, int), 1)

    left = other_y - (other_x @ found.weight.numpy() + found.bias.numpy())
    np.testing.assert_allclose(found.residual(sums), left.T @ left, rtol=1e-4)
    assert found.error(sums) == pytest.approx((left**2).sum(), rel=1e-5)


def views(images: int, per_image: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """x, y and the image of each view: views of one image are all but equal, and so is the noise of their targets."""
    rng = np.random.default_rng(0)
    weight = 0.3 * rng.standard_normal((20, TARGETS))
    x, noise = rng.standard_normal((images, 20)), rng.standard_normal((images, TARGETS))
    y = np.repeat(x @ weight + 3 * noise, per_image, axis=0)
    x = np.repeat(x, per_image, axis=0)
    x += 0.02 * rng.standard_normal(x.shape)
    return x.astype(np.float32), y.astype(np.float32), np.repeat(np.arange(images), per_image)


def test_leaving_out_images_finds_the_penalty_and_the_error_that_leaving_out_their_views_hides():
    x, y, image = views(images=230, per_image=20)
    seen = image < 30

    by_image = fit_ridge(sums_of(x[seen], y[seen], image[seen] % FOLDS))
    by_view = fit_ridge(sums_of(x[seen], y[seen], np.arange(seen.sum()) % FOLDS))

    [new] = sums_of(x[~seen], y[~seen], np.zeros((~seen).sum(), int), 1)
    assert by_image.penalty > 30 * by_view.penalty
    assert by_image.whole.error(new) < 0.7 * by_view.whole.error(new)
    assert by_view.covariance.trace() < 0.6 * by_view.whole.error(new) / new.count
    assert by_image.covariance.trace() == pytest.approx(by_image.whole.error(new) / new.count, rel=0.25)


@pytest.mark.parametrize("used", [0, 3])
def test_samples_of_a_single_fold_take_the_first_penalty_and_the_error_within(used):
    x, y = tokens(40, noise=1.0)

    fit = fit_ridge(sums_of(x, y, np.full(40, used)))

    assert fit.r2 is None
    assert relative_penalty(fit, x) == pytest.approx(FIRST_PENALTY, rel=1e-5)
    weight, bias = solve(x, y, FIRST_PENALTY)
    np.testing.assert_allclose(fit.whole.weight, weight, rtol=1e-4, atol=1e-6)
    left = y - (x @ weight + bias)
    np.testing.assert_allclose(fit.covariance, left.T @ left / 40, rtol=1e-4, atol=1e-5)
    assert [torch.equal(fold.weight, fit.whole.weight) for fold in fit.folds] == [True] * FOLDS


def test_a_fold_that_no_sample_is_in_has_the_map_of_all():
    x, y = tokens(40, noise=1.0)

    fit = fit_ridge(sums_of(x, y, np.array([0, 1, 3, 4] * 10)))

    same = [torch.equal(fold.weight, fit.whole.weight) for fold in fit.folds]
    assert same == [False, False, True, False, False]


@pytest.mark.parametrize("value", [0.0, 1.0, 1 / 3, 1e-8, -250.7])
@pytest.mark.parametrize("one_fold", [True, False])
def test_constant_features_predict_the_mean(value, one_fold):
    _, y = tokens(39, noise=1.0)
    x = np.full((39, FEATURES), value, dtype=np.float32)

    fit = fit_ridge(sums_of(x, y, np.zeros(39, int) if one_fold else np.arange(39) % FOLDS))

    np.testing.assert_allclose(
        x @ fit.whole.weight.numpy() + fit.whole.bias.numpy(), np.tile(y.mean(0), (39, 1)), rtol=1e-3
    )
    assert fit.covariance.isfinite().all()


@pytest.mark.parametrize("batch", [50, 500])
def test_features_that_repeat_each_other_and_explain_all_are_no_obstacle(batch):
    """The covariance has no inverse, so the best penalty is as small as rounding allows."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2000, 20)) @ rng.standard_normal((20, 300))
    x, y = x.astype(np.float32), (x @ rng.standard_normal((300, TARGETS))).astype(np.float32)
    parts = [Sums.zeros(300, TARGETS, "cpu") for _ in range(2)]
    for start in range(0, 2000, batch):
        rows = slice(start, start + batch)
        parts[start // batch % 2].add(torch.from_numpy(x[rows]), torch.from_numpy(y[rows]))

    fit = fit_ridge(parts)

    assert fit.r2 == pytest.approx(1, abs=1e-5)
    found = x @ fit.whole.weight.numpy() + fit.whole.bias.numpy()
    assert np.square(found - y).mean() < 1e-5 * y.var()


def test_a_target_without_variance_is_no_share_of_anything():
    x, _ = tokens(40, noise=1.0)
    fit = fit_ridge(sums_of(x, np.zeros((40, TARGETS), np.float32), np.arange(40) % FOLDS))
    assert (fit.r2, fit.whole.weight.abs().max().item()) == (0.0, 0.0)


def test_the_first_features_sums_are_those_of_a_fit_that_knows_no_others():
    x, y = tokens(40, noise=1.0)
    folds = np.arange(40) % FOLDS

    part, alone = fit_ridge([s.first(2) for s in sums_of(x, y, folds)]), fit_ridge(sums_of(x[:, :2], y, folds))

    torch.testing.assert_close(part.whole.weight, alone.whole.weight)
    assert part.r2 == pytest.approx(alone.r2)
