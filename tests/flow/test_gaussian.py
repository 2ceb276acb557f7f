"""The prediction that corrects the linear-Gaussian prior, against dense matrices in NumPy: four tokens, three channels.

All that is compared with is the textbook: for x ~ N(m, C) and x_t = alpha x + sigma n the posterior mean is
`m + alpha C S^-1 (x_t - alpha m)` with `S = alpha^2 C + sigma^2 I`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from blip3o_ds.config import FlowConfig, SamplerConfig
from blip3o_ds.flow.flow import Flow
from blip3o_ds.flow.path import PATHS, LinearPath, Path
from blip3o_ds.flow.prediction import PREDICTIONS, GaussianPrediction, Point, RegressionPrediction
from blip3o_ds.flow.prior import LinearGaussian
from blip3o_ds.flow.solvers import posterior_mean, sample
from tests.flows import CosinePath, random_prior

N, EVA, CLIP = 4, 5, 3
PRIOR = random_prior(N, EVA, CLIP)
EXACT = random_prior(N, EVA, CLIP, dtype=torch.float64)
TIMES = (0.0, 0.1, 0.5, 0.9, 0.999)

paths = pytest.mark.parametrize("path", ["linear", "cosine"])
solvers = pytest.mark.parametrize("solver", ["euler", "midpoint", "heun"])


@pytest.fixture(autouse=True)
def tables(monkeypatch):
    monkeypatch.setitem(PATHS, "cosine", CosinePath)


def build(prior: LinearGaussian = PRIOR, **settings) -> Flow:
    return Flow.from_config(FlowConfig(**settings), prior)


def nothing(x, t, eva, drop):
    return torch.zeros_like(x)


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def dense_modes(prior: LinearGaussian) -> np.ndarray:
    """Columns are the modes: of a 2x2 grid the cosine transform is Hadamard's matrix, [[1, 1], [1, -1]] twice."""
    pair = np.array([[1, 1], [1, -1]]) / np.sqrt(2)
    return np.kron(np.kron(pair, pair).T, prior.channels.double().numpy())


def dense_covariance(prior: LinearGaussian) -> np.ndarray:
    modes = dense_modes(prior)
    return modes @ np.diag(prior.variance.double().numpy().ravel()) @ modes.T


def shares(path: Path, t: float) -> tuple[float, float]:
    time = torch.tensor(t, dtype=torch.float64)
    return path.alpha(time).item(), path.sigma(time).item()


def posterior(path: Path, mean: np.ndarray, covariance: np.ndarray, x_t: np.ndarray, t: float) -> np.ndarray:
    """E[x | x_t], rows are images."""
    alpha, sigma = shares(path, t)
    seen = alpha**2 * covariance + sigma**2 * np.eye(len(covariance))
    return mean + alpha * (x_t - alpha * mean) @ np.linalg.solve(seen, covariance)


def flat(x: torch.Tensor) -> np.ndarray:
    return x.double().flatten(1).numpy()


@paths
@pytest.mark.parametrize("t", TIMES)
def test_an_output_of_zero_is_the_posterior_mean_under_the_prior(path, t):
    flow = build(path=path)
    clip, noise, eva = (normal(6, N, dim, seed=seed) for seed, dim in enumerate((CLIP, CLIP, EVA)))
    guess, times = flow.prediction.guess(eva, None), torch.full((6,), t)
    point, _ = flow.prediction.training_pair(clip, noise, times, guess)

    found = flow.prediction.clean(torch.zeros(6, N, CLIP), point)

    alpha, sigma = shares(flow.path, times[0].item())
    x_t = alpha * flat(clip) + sigma * flat(noise)
    expected = posterior(flow.path, flat(PRIOR.mean(eva)), dense_covariance(PRIOR), x_t, times[0].item())
    np.testing.assert_allclose(flat(found), expected, atol=2e-5)
    np.testing.assert_allclose(flat(flow.prediction.embedding(point)), x_t, atol=1e-5)


def test_the_posterior_mean_of_a_network_of_zeros_is_the_priors_mean_whatever_the_noise():
    eva, noise = normal(6, N, EVA), normal(6, N, CLIP, seed=1)
    torch.testing.assert_close(posterior_mean(nothing, build(), eva, noise), PRIOR.mean(eva))


@paths
@pytest.mark.parametrize("t", [0.0, 0.05, 0.5, 0.95])
def test_a_network_of_zeros_has_a_loss_of_1_on_data_of_the_prior_at_every_time(path, t):
    flow, count = build(path=path), 20_000
    eva = normal(count, N, EVA)
    clip = PRIOR.sample(PRIOR.mean(eva), normal(count, N, CLIP, seed=1))
    times = torch.full((count,), t)

    result = flow.loss(nothing, clip, eva, normal(count, N, CLIP, seed=2), times, times > 2)

    error = result.mse.std().item() / count**0.5
    assert result.loss.item() == pytest.approx(1, abs=5 * error)
    assert error < 0.01


@pytest.mark.parametrize("law", ["prior", "uniform"])
@paths
@solvers
@pytest.mark.parametrize("steps", [1, 7])
def test_a_network_of_zeros_samples_the_prior_in_any_number_of_steps(solver, steps, path, law):
    eva, noise = normal(5, N, EVA), normal(5, N, CLIP, seed=1)
    flow = build(path=path, timestep_law=law)

    out = sample(nothing, flow, eva, noise, SamplerConfig(steps=steps, solver=solver))

    expected = PRIOR.sample(PRIOR.mean(eva), PRIOR.to_modes(noise))  # the noise is that of the embeddings
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)


@paths
@pytest.mark.parametrize("narrowing", [0.5, -0.25])
def test_a_network_that_takes_a_share_of_its_input_away_narrows_every_mode_alike(narrowing, path):
    """The closed form in the docstring of `Calibration`, which the solver reaches with many steps."""
    flow, noise, eva = build(path=path), normal(5, N, CLIP), normal(5, N, EVA)
    sampler = SamplerConfig(steps=400, solver="heun")

    found = sample(lambda x, t, eva, drop: -narrowing * x, flow, eva, noise, sampler)

    expected = PRIOR.sample(PRIOR.mean(eva), math.exp(-narrowing) * PRIOR.to_modes(noise))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("path", [LinearPath(), CosinePath()], ids=["linear", "cosine"])
def test_the_target_is_the_derivative_of_the_coordinates_by_the_angle_in_the_modes_own_size(path):
    prediction = GaussianPrediction(path, EXACT)
    clip, noise, guess = (normal(5, N, CLIP, seed=seed, dtype=torch.float64) for seed in range(3))
    t, step = torch.tensor([0.01, 0.2, 0.5, 0.8, 0.98], dtype=torch.float64), 1e-6

    def coordinates_and_angle(times):
        point, target = prediction.training_pair(clip, noise, times, guess)
        alpha, sigma = path.alpha(times)[:, None, None], path.sigma(times)[:, None, None]
        return point.x, torch.atan2(alpha * EXACT.variance.sqrt(), sigma), target

    (after, angle_after, _), (before, angle_before, _) = (coordinates_and_angle(t + h) for h in (step, -step))
    derivative = (after - before) / (angle_after - angle_before)

    _, _, target = coordinates_and_angle(t)
    scaled = derivative * EXACT.variance.sqrt() / EXACT.variance.mean().sqrt()
    torch.testing.assert_close(EXACT.tokens @ target, scaled, atol=1e-7, rtol=1e-7)


@paths
def test_the_target_stands_for_the_data_and_has_the_variances_of_the_modes(path):
    flow, count = build(path=path), 20_000
    eva, t = normal(count, N, EVA), torch.rand(count, generator=torch.Generator().manual_seed(3))
    guess = flow.prediction.guess(eva, None)
    clip = PRIOR.sample(guess, normal(count, N, CLIP, seed=1))

    point, target = flow.prediction.training_pair(clip, normal(count, N, CLIP, seed=2), t, guess)

    torch.testing.assert_close(flow.prediction.clean(target, point), clip, atol=1e-4, rtol=1e-4)
    share = PRIOR.variance / PRIOR.variance.mean()
    for coordinates, expected in ((point.x, torch.ones(N, CLIP)), (PRIOR.tokens @ target, share)):
        torch.testing.assert_close(coordinates.square().mean(dim=0), expected, atol=0, rtol=0.05)


def test_the_network_sees_what_the_prior_expects_by_token_standard_eva_and_the_folds_guess():
    flow = build()
    clip, noise, eva = (normal(4, N, dim, seed=seed) for seed, dim in enumerate((CLIP, CLIP, EVA)))
    t, drop, folds, seen = (
        torch.tensor([0.0, 0.3, 0.6, 0.9]),
        torch.tensor([True, False, True, False]),
        [0, 2, 1, 0],
        [],
    )

    flow.loss(lambda *inputs: seen.extend(inputs) or nothing(*inputs), clip, eva, noise, t, drop, folds)

    s, channels = t[:, None, None], PRIOR.channels
    variance = (s**2 * PRIOR.variance + (1 - s) ** 2).double()  # of x_t in modes
    x_t = ((1 - s) * noise + s * (clip - PRIOR.mean(eva, folds))).double()
    modes = PRIOR.tokens.double() @ (x_t @ channels.double()) / variance.sqrt()
    modes = modes * (s * PRIOR.variance).double() / variance.sqrt()  # the prior's posterior mean of the residual
    modes = modes / PRIOR.variance.mean().sqrt()
    torch.testing.assert_close(seen[0].double(), PRIOR.tokens.double().T @ modes, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(seen[2], (eva - PRIOR.eva_mean) / PRIOR.eva_std)
    assert torch.equal(seen[1], t)
    assert torch.equal(seen[3], drop)


@dataclass
class Perfect:
    """The network that is right for data N(mean, covariance), which is not the prior: in NumPy, from x_t.

    It finds x_t in its input, and the output in the posterior mean, by the definition of both.
    """

    path: Path
    guess: np.ndarray  # [N Dc], the prior's mean
    mean: np.ndarray
    covariance: np.ndarray

    def __call__(self, x, t, eva, drop):
        time = t[0].double().item()
        alpha, sigma = shares(self.path, time)
        modes, std = dense_modes(EXACT), EXACT.variance.sqrt().numpy().ravel()
        seen = np.sqrt(alpha**2 * std**2 + sigma**2)
        sin, rms = alpha * std / seen, np.sqrt(np.mean(std**2))
        w = flat(x) @ np.kron(hadamard().T, np.eye(CLIP)) * rms / std
        w = w / sin if alpha else 0 * w  # at t = 0 the input is nothing, and the posterior mean depends on nothing
        x_t = alpha * self.guess + (w * seen) @ modes.T
        clean = posterior(self.path, self.mean, self.covariance, x_t, time)
        y = (clean - self.guess) @ modes / std
        out = std / rms * (y - sin * w) / (sigma / seen)  # clean is at std sin w + rms cos out
        return torch.from_numpy(out @ np.kron(hadamard(), np.eye(CLIP))).reshape(x.shape).float()


def hadamard() -> np.ndarray:
    pair = np.array([[1, 1], [1, -1]]) / np.sqrt(2)
    return np.kron(pair, pair)


@pytest.mark.parametrize(
    ("law", "solver", "limit"), [("prior", "euler", 0.08), ("prior", "midpoint", 4e-3), ("uniform", "heun", 1e-3)]
)
@paths
def test_sampling_with_the_right_network_for_another_gaussian_reaches_that_gaussian(path, law, solver, limit):
    """The end is an affine map of the noise, so its value at zero and at the units is its mean and its covariance."""
    dims, rng = N * CLIP, np.random.default_rng(0)
    root = rng.standard_normal((dims, dims)) / 2
    mean, covariance = rng.standard_normal(dims), root @ root.T + 0.1 * np.eye(dims)
    flow = build(path=path, timestep_law=law)
    eva = normal(1, N, EVA).expand(dims + 1, -1, -1)
    right = Perfect(flow.path, flat(PRIOR.mean(eva[:1]))[0], mean, covariance)

    noise = torch.cat([torch.zeros(1, dims), torch.eye(dims)]).reshape(-1, N, CLIP)
    ends = flat(sample(right, flow, eva, noise, SamplerConfig(steps=200, solver=solver)))

    linear = ends[1:] - ends[0]
    np.testing.assert_allclose(ends[0], mean, atol=limit)
    np.testing.assert_allclose(linear.T @ linear, covariance, atol=limit * np.abs(covariance).max())
    assert np.abs(flat(PRIOR.mean(eva[:1]))[0] - mean).max() > 1  # it had a way to go
    assert np.abs(dense_covariance(PRIOR) - covariance).max() > 0.5 * np.abs(covariance).max()


@paths
def test_the_right_network_for_another_gaussian_has_the_least_loss(path):
    """Its error is the trace of the posterior covariance; what is added to it adds to the loss."""
    dims, count, rng, t = N * CLIP, 20_000, np.random.default_rng(0), 0.6
    root = rng.standard_normal((dims, dims)) / 2
    mean, covariance = rng.standard_normal(dims), root @ root.T
    flow = build(path=path)
    eva = normal(1, N, EVA).expand(count, -1, -1)
    clip = torch.from_numpy(mean + rng.standard_normal((count, dims)) @ root.T).reshape(-1, N, CLIP)
    right = Perfect(flow.path, flat(PRIOR.mean(eva[:1]))[0], mean, covariance)
    times, noise = torch.full((count,), t), normal(count, N, CLIP, seed=5)

    def loss(offset):
        model = lambda *inputs: right(*inputs) + offset  # noqa: E731
        return flow.loss(model, clip, eva, noise, times, times > 2).loss.item()

    alpha, sigma = shares(flow.path, times[0].item())

    def left_open(of):
        return np.trace(of - alpha**2 * of @ np.linalg.solve(alpha**2 * of + sigma**2 * np.eye(dims), of))

    assert loss(0.0) == pytest.approx(left_open(covariance) / left_open(dense_covariance(PRIOR)), rel=0.03)
    assert loss(0.0) < min(loss(0.1), loss(-0.1))


@pytest.mark.parametrize("prediction", list(PREDICTIONS))
@paths
def test_displacements_differ_as_much_as_the_clean_embeddings_do(path, prediction):
    chosen = build(path=path, prediction=prediction).prediction
    clip, noise, eva = (normal(5, N, dim, seed=seed) for seed, dim in enumerate((CLIP, CLIP, EVA)))
    t = torch.tensor([0.0, 0.2, 0.5, 0.8, 0.95])
    point, target = chosen.training_pair(clip, noise, t, chosen.guess(eva, None))
    output = target + normal(5, N, CLIP, seed=9)

    moved = (chosen.displacement(output, point) - chosen.displacement(target, point)).square().sum(-1)
    expected = (chosen.clean(output, point) - chosen.clean(target, point)).square().sum(-1)

    assert (expected.sum(-1) > 1e-3).all()
    torch.testing.assert_close(moved, expected, atol=1e-4, rtol=1e-3)


@paths
def test_a_displacement_leads_from_the_point_to_the_clean_embedding_less_the_guess(path):
    """Up to the rotation of the channels: at the target it is `clip - x_t - (1 - alpha) guess`."""
    flow = build(path=path)
    clip, noise, eva = (normal(5, N, dim, seed=seed) for seed, dim in enumerate((CLIP, CLIP, EVA)))
    t, guess = torch.tensor([0.0, 0.2, 0.5, 0.8, 0.95]), flow.prediction.guess(eva, None)
    point, target = flow.prediction.training_pair(clip, noise, t, guess)

    found = flow.prediction.displacement(target, point) @ PRIOR.channels.T

    x_t, alpha = flow.path.point(clip, noise, t), flow.path.alpha(t)[:, None, None]
    torch.testing.assert_close(found, clip - x_t - (1 - alpha) * guess, atol=1e-4, rtol=0)


@pytest.mark.parametrize("prediction", ["gaussian", "regression"])
@paths
def test_the_velocity_weight_compares_the_velocities_of_the_clean_embeddings(path, prediction):
    flow = build(path=path, prediction=prediction, loss_weight="velocity", min_time_to_data=0.1)
    clip, noise, eva = (normal(5, N, dim, seed=seed) for seed, dim in enumerate((CLIP, CLIP, EVA)))
    output, t = normal(5, N, CLIP, seed=9), torch.tensor([0.0, 0.2, 0.5, 0.8, 0.97])

    result = flow.loss(lambda *_: output, clip, eva, noise, t, t > 2)

    expected, std = [], PRIOR.variance.double().sqrt().numpy()
    for i, time in enumerate(t.double().tolist() if prediction == "gaussian" else [0.0] * 5):
        alpha, sigma = shares(flow.path, time)
        seen, n = np.sqrt(alpha**2 * std**2 + sigma**2), noise[i].double().numpy()
        error = clip[i].double().numpy() - PRIOR.mean(eva)[i].double().numpy()
        modes, token_modes = PRIOR.channels.double().numpy(), hadamard()
        y = token_modes @ error @ modes / std
        w = (alpha * std * y + sigma * (token_modes @ n @ modes if prediction == "gaussian" else 0 * n)) / seen
        rms = np.sqrt(np.mean(std**2))
        clean = std * alpha * std / seen * w + sigma / seen * rms * (token_modes @ output[i].double().numpy())
        d_alpha, d_sigma = (
            f(torch.tensor(time, dtype=torch.float64)).item() for f in (flow.path.d_alpha, flow.path.d_sigma)
        )
        weight = (d_alpha * sigma - alpha * d_sigma) / max(sigma, 0.1)
        expected.append((weight**2 * (clean - std * y) ** 2).mean())
    np.testing.assert_allclose(result.mse, expected, rtol=2e-3)


def test_guidance_scales_what_the_condition_adds_to_the_output():
    eva, noise = normal(3, N, EVA), normal(3, N, CLIP, seed=1)
    told, untold = normal(N, CLIP, seed=2), normal(N, CLIP, seed=3)
    one = SamplerConfig(steps=3, guidance_scale=1.0)

    def constant(output):
        return lambda x, t, eva, drop: output.expand_as(x)

    guided = sample(
        lambda x, t, eva, drop: (untold if drop.all() else told).expand_as(x),
        *(build(), eva, noise, SamplerConfig(steps=3, guidance_scale=2.5)),
    )
    expected = sample(constant(untold + 2.5 * (told - untold)), build(), eva, noise, one)

    torch.testing.assert_close(guided, expected)


@solvers
@pytest.mark.parametrize("steps", [1, 4])
def test_regression_is_the_same_point_for_every_noise_time_solver_and_number_of_steps(solver, steps):
    flow = build(prediction="regression")
    eva, seen = normal(3, N, EVA), []

    def network(x, t, condition, drop):
        seen.append((x, t))
        return condition[..., :CLIP] + x + t[:, None, None]

    point = posterior_mean(network, flow, eva, normal(3, N, CLIP, seed=1))
    drawn = sample(network, flow, eva, normal(3, N, CLIP, seed=2), SamplerConfig(steps=steps, solver=solver))

    output = PRIOR.standard_eva(eva)[..., :CLIP]
    expected = PRIOR.mean(eva) + PRIOR.variance.mean().sqrt() * output @ PRIOR.channels.T
    torch.testing.assert_close(point, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(drawn, expected, atol=1e-5, rtol=1e-5)
    assert not any(x.any() or t.any() for x, t in seen)


def test_the_loss_of_a_regression_is_its_squared_error_and_knows_no_time():
    flow = build(prediction="regression")
    clip, eva, output = normal(4, N, CLIP), normal(4, N, EVA, seed=1), normal(4, N, CLIP, seed=2)

    losses = [
        flow.loss(lambda *_: output, clip, eva, normal(4, N, CLIP, seed=seed), torch.full((4,), t), torch.ones(4) > 2)
        for seed, t in ((3, 0.0), (4, 0.9))
    ]

    point = Point(torch.zeros(4, N, CLIP), torch.zeros(4), PRIOR.mean(eva))
    clean = RegressionPrediction(LinearPath(), PRIOR).clean(output, point)
    expected = (clean - clip).square().mean(dim=(1, 2)) / PRIOR.variance.mean()
    for found in losses:
        torch.testing.assert_close(found.mse, expected)
