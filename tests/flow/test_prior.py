"""The linear-Gaussian prior against loops over tokens, dense matrices and many draws."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from blip3o_ds.flow.path import LinearPath
from blip3o_ds.flow.prior import token_modes
from tests.flows import BASIS, CosinePath, random_prior

EVA, CLIP = 5, 3
GRIDS = [(9, False), (10, True), (16, False), (1, False), (2, True)]  # tokens, of which the first is CLS


def eva_of(num_tokens: int, batch: int = 4) -> torch.Tensor:
    return torch.randn(batch, num_tokens, EVA, generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize(("num_tokens", "has_cls"), GRIDS)
def test_modes_are_another_orthonormal_basis_and_back_is_the_inverse(num_tokens, has_cls):
    prior = random_prior(num_tokens, EVA, CLIP)
    x = torch.randn(2, num_tokens, CLIP, generator=torch.Generator().manual_seed(1))

    modes = prior.to_modes(x)

    assert prior.has_cls == has_cls
    torch.testing.assert_close(prior.from_modes(modes), x)
    torch.testing.assert_close(prior.to_modes(prior.from_modes(x)), x)
    units = torch.eye(num_tokens * CLIP).reshape(-1, num_tokens, CLIP)
    matrix = prior.to_modes(units).flatten(1)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(num_tokens * CLIP))


@pytest.mark.parametrize(("num_tokens", "has_cls"), GRIDS)
def test_token_modes_are_the_cosines_of_the_grid_and_cls_is_its_own(num_tokens, has_cls):
    side = math.isqrt(num_tokens - has_cls)

    found = token_modes(num_tokens, has_cls)

    for mode in range(side * side):
        u, v = divmod(mode, side)
        for token in range(side * side):
            row, column = divmod(token, side)
            scale = math.sqrt((1 + (u > 0)) * (1 + (v > 0))) / side
            wave = math.cos(math.pi * (2 * row + 1) * u / (2 * side)) * math.cos(
                math.pi * (2 * column + 1) * v / (2 * side)
            )
            assert found[mode + has_cls, token + has_cls].item() == pytest.approx(scale * wave, abs=1e-12)
    if has_cls:
        assert found[0].tolist() == found[:, 0].tolist() == [1.0] + [0.0] * side**2


def slow_surroundings(eva: np.ndarray, mean: np.ndarray, basis: np.ndarray, has_cls: bool) -> np.ndarray:
    """Of one image [N, De], token by token."""
    side = math.isqrt(len(eva) - has_cls)
    reduced = [(token - mean) @ basis for token in eva[int(has_cls) :]]
    image = sum(reduced) / len(reduced)
    rows = []
    for token in range(len(eva)):
        around = []
        for down, right in ((-1, -1), (-1, 0), (-1, 1), (0, -1), (0, 1), (1, -1), (1, 0), (1, 1)):
            row, column = divmod(token - has_cls, side)
            row, column = row + down, column + right
            inside = 0 <= row < side and 0 <= column < side and not (has_cls and token == 0)
            around.append(reduced[row * side + column] if inside else np.zeros(basis.shape[1]))
        rows.append(np.concatenate([eva[token] - mean, *around, image]))
    return np.stack(rows)


@pytest.mark.parametrize(("num_tokens", "has_cls"), GRIDS)
def test_the_surroundings_are_those_of_a_loop_over_tokens(num_tokens, has_cls):
    prior, eva = random_prior(num_tokens, EVA, CLIP), eva_of(num_tokens)

    found = prior.surroundings(eva)

    assert found.dtype == torch.float32
    for image, expected in zip(found, eva.double().numpy(), strict=True):
        slow = slow_surroundings(expected, prior.eva_mean.double().numpy(), prior.basis.double().numpy(), has_cls)
        np.testing.assert_allclose(image, slow, atol=1e-5)


def test_surroundings_take_embeddings_of_any_precision():
    prior, eva = random_prior(9, EVA, CLIP), eva_of(9).bfloat16()
    assert torch.equal(prior.mean(eva), prior.mean(eva.float()))


def test_each_image_is_predicted_by_the_map_of_its_fold_and_without_folds_by_the_one_of_all():
    prior, eva = random_prior(9, EVA, CLIP), eva_of(9)
    features = torch.cat([prior.surroundings(eva), torch.ones(4, 9, 1)], dim=-1)

    whole, of_folds = prior.mean(eva), prior.mean(eva, [2, 0, 2, 1])

    assert features.shape[-1] == EVA + 9 * BASIS + 1
    torch.testing.assert_close(whole, features @ prior.weight)
    expected = torch.stack([x @ prior.fold_weights[fold] for x, fold in zip(features, (2, 0, 2, 1), strict=True)])
    torch.testing.assert_close(of_folds, expected)


def test_standard_eva_has_the_stated_mean_and_deviation_taken_out():
    prior, eva = random_prior(9, EVA, CLIP), eva_of(9)
    torch.testing.assert_close(prior.standard_eva(eva) * prior.eva_std + prior.eva_mean, eva)


def dense_covariance(prior) -> np.ndarray:
    """[N Dc, N Dc], from the formula `sum over modes of variance times outer product of the mode`."""
    tokens, channels = prior.tokens.double().numpy(), prior.channels.double().numpy()
    covariance = 0
    for k, row in enumerate(prior.variance.double().numpy()):
        for c, variance in enumerate(row):
            mode = np.outer(tokens[k], channels[:, c]).ravel()
            covariance = covariance + variance * np.outer(mode, mode)
    return covariance


@pytest.mark.parametrize("num_tokens", [4, 5])
def test_samples_have_the_stated_mean_and_covariance(num_tokens):
    prior, count = random_prior(num_tokens, EVA, CLIP), 100_000
    noise = torch.randn(count, num_tokens, CLIP, generator=torch.Generator().manual_seed(0))
    mean = torch.arange(num_tokens * CLIP, dtype=torch.float32).reshape(num_tokens, CLIP)

    draws = prior.sample(mean, noise).flatten(1).double().numpy()

    expected = dense_covariance(prior)
    scale = np.sqrt(np.outer(expected.diagonal(), expected.diagonal()))
    assert np.abs((np.cov(draws.T) - expected) / scale).max() < 5 * math.sqrt(2 / count)
    deviations = (draws.mean(0) - mean.flatten().numpy()) / np.sqrt(expected.diagonal() / count)
    assert np.abs(deviations).max() < 5


@pytest.mark.parametrize("path", [LinearPath(), CosinePath()], ids=["linear", "cosine"])
def test_what_is_left_open_is_the_trace_of_the_posterior_covariance(path):
    prior, t = random_prior(4, EVA, CLIP), torch.tensor([0.0, 0.2, 0.7, 0.99])

    found = prior.left_open(path, t)

    covariance, identity = dense_covariance(prior), np.eye(12)
    for time, value in zip(t.double(), found, strict=True):
        alpha, sigma = path.alpha(time).item(), path.sigma(time).item()
        seen = alpha**2 * covariance + sigma**2 * identity
        left = covariance - alpha**2 * covariance @ np.linalg.solve(seen, covariance)
        assert value.item() == pytest.approx(np.trace(left) / 12, rel=2e-3 if time > 0.9 else 1e-5)


def test_a_copy_on_another_device_is_the_same():
    prior = random_prior(4, EVA, CLIP)
    moved = prior.to("cpu")
    assert all(torch.equal(value, prior.tensors()[name]) for name, value in moved.tensors().items())
    assert random_prior(4, EVA, CLIP).to("meta").tokens.device.type == "meta"
