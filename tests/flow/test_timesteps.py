"""The laws of training timesteps against their distributions, and the solvers' schedule."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from blip3o_ds.config import FlowConfig
from blip3o_ds.flow.flow import Flow, spread_uniforms, uniforms
from blip3o_ds.flow.path import LinearPath, Path
from blip3o_ds.flow.prior import LinearGaussian
from blip3o_ds.flow.timesteps import PriorLaw, Timesteps, shift_timesteps, uniform
from tests.flows import CosinePath, random_prior

PRIOR = random_prior(4, 5, 3)
PATHS = pytest.mark.parametrize("path", [LinearPath(), CosinePath()], ids=["linear", "cosine"])
SCALES = pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0])  # of the embeddings


def scaled(scale: float) -> LinearGaussian:
    return replace(PRIOR, variance=PRIOR.variance * scale**2)


def timesteps(count: int = 20000, **settings) -> np.ndarray:
    """As drawn for that many positions; the noise is one number each."""
    flow = Flow.from_config(FlowConfig(**{"noise_share": 0.0, **settings}), PRIOR)
    return flow.draw(torch.arange(count), (1, 1), 3, "cpu")[1].double().numpy()


def largest_cdf_distance(samples: np.ndarray, cdf: Callable[[float], float]) -> float:
    """The Kolmogorov-Smirnov statistic; 1.95 / sqrt(n) is passed by chance once in a thousand times."""
    samples = np.sort(samples)
    exact = np.array([cdf(x) for x in samples])
    ranks = np.arange(len(samples))
    return max(np.abs(exact - ranks / len(samples)).max(), np.abs(exact - (ranks + 1) / len(samples)).max())


@pytest.mark.parametrize("shift", [1.0, 3.0, 0.5])
def test_uniform_timesteps_follow_the_shifted_cdf(shift):
    t = timesteps(timestep_law="uniform", timestep_shift=shift)
    # sigma' = s u / (1 + (s-1) u) for uniform u, so P(t' <= x) = 1 - u(1-x) with u(y) = y / (s - (s-1) y)
    assert largest_cdf_distance(t, lambda x: 1 - (1 - x) / (shift - (shift - 1) * (1 - x))) < 1.95 / math.sqrt(len(t))


def test_logit_normal_timesteps_follow_their_cdf():
    t = timesteps(timestep_law="logit_normal", logit_mean=-0.4, logit_std=1.3)

    def cdf(x):
        return 0.5 * (1 + math.erf((math.log(x / (1 - x)) + 0.4) / (1.3 * math.sqrt(2))))

    assert largest_cdf_distance(t, cdf) < 1.95 / math.sqrt(len(t))


def share_resolved(prior: LinearGaussian, path: Path, t: np.ndarray) -> np.ndarray:
    """Of the prior's variance, by x_t at these times: one minus the mean of `v sigma^2 / (alpha^2 v + sigma^2)`."""
    variance, times = prior.variance.double().numpy().ravel(), torch.from_numpy(t)
    signal, noise = (share(times).numpy()[:, None] ** 2 for share in (path.alpha, path.sigma))
    return 1 - (variance * noise / (signal * variance + noise)).sum(1) / variance.sum()


@PATHS
@SCALES
def test_under_the_law_of_the_prior_what_is_resolved_of_its_variance_is_uniform(path, scale):
    prior = scaled(scale)
    u = np.arange(0.5, 2000) / 2000

    t = PriorLaw(prior, path)(torch.from_numpy(u)).numpy()

    assert (np.diff(t) > 0).all()
    assert 0 < t[0] < t[-1] < 1
    np.testing.assert_allclose(share_resolved(prior, path, t), u, atol=5e-3)


@PATHS
@SCALES
def test_the_law_of_the_prior_comes_near_both_ends(path, scale):
    prior = scaled(scale)
    u = torch.tensor([1e-12, 1e-5, 1 - 1e-5, 1 - 1e-12], dtype=torch.float64)

    first, early, late, last = share_resolved(prior, path, PriorLaw(prior, path)(u).numpy())

    assert 0 < first < early == pytest.approx(1e-5, rel=0.1)
    assert 1 - late == pytest.approx(1e-5, rel=0.1)
    assert 1 - late > 1 - last > 0


def test_drawn_times_follow_the_law_of_the_prior():
    resolved = share_resolved(PRIOR, LinearPath(), timesteps(timestep_law="prior"))
    assert largest_cdf_distance(resolved, lambda x: x) < 5e-3


@pytest.mark.parametrize("law", ["prior", "uniform", "logit_normal"])
@pytest.mark.parametrize("shift", [1.0, 4.0])
@pytest.mark.parametrize("steps", [1, 2, 25, 300])
def test_a_schedule_rises_from_0_to_1(law, shift, steps):
    flow = Flow.from_config(FlowConfig(timestep_law=law, timestep_shift=shift), PRIOR)

    times = flow.timesteps.schedule(steps)

    assert len(times) == steps + 1
    assert (times[0], times[-1]) == (0.0, 1.0)
    assert (np.diff(times) > 0).all()


def test_what_the_priors_schedule_has_resolved_rises_as_the_square_of_a_sine():
    flow = Flow.from_config(FlowConfig(timestep_law="prior"), PRIOR)
    resolved = share_resolved(PRIOR, LinearPath(), np.array(flow.timesteps.schedule(25)))
    np.testing.assert_allclose(resolved, np.sin(np.linspace(0, math.pi / 2, 26)) ** 2, atol=5e-3)
    assert resolved[1] < 0.01 < 0.99 < resolved[-2]  # steps are short at both ends


@SCALES
def test_where_all_modes_have_one_variance_every_step_of_the_priors_schedule_turns_by_the_same_angle(scale):
    prior = replace(PRIOR, variance=torch.full_like(PRIOR.variance, scale**2))

    times = np.array(Flow.from_config(FlowConfig(timestep_law="prior"), prior).timesteps.schedule(9))

    angles = np.arctan2(times * scale, 1 - times)  # from noise to data
    np.testing.assert_allclose(np.diff(angles), math.pi / 2 / 9, rtol=2e-2)


@pytest.mark.parametrize("law", ["prior", "uniform"])
def test_a_share_of_the_samples_is_pure_noise_and_the_others_follow_the_law(law):
    t = timesteps(timestep_law=law, noise_share=0.25)

    assert (t == 0).mean() == pytest.approx(0.25, abs=1e-3)
    rest = np.sort(t[t > 0])
    whole = np.sort(timesteps(timestep_law=law))
    np.testing.assert_allclose(np.quantile(rest, [0.1, 0.5, 0.9]), np.quantile(whole, [0.1, 0.5, 0.9]), atol=2e-3)
    assert (timesteps(timestep_law=law) > 0).all()


def test_a_time_is_below_1_in_fp32_whatever_the_number_it_is_made_of():
    late = Timesteps(lambda u: torch.full_like(u, 1 - 2.0**-53), uniform, shift=1.0, noise_share=0.0)
    flow = replace(Flow.from_config(FlowConfig(), PRIOR), timesteps=late)

    t = flow.draw(torch.arange(1), (4, 3), 0, "cpu")[1]

    assert t.dtype == torch.float32
    assert 0.9999 < t.item() < 1
    assert PRIOR.left_open(flow.path, t).item() > 0


def test_shift_keeps_the_ends_and_moves_towards_noise():
    t = torch.linspace(0, 1, 11, dtype=torch.float64)
    shifted = shift_timesteps(t, 3.0)
    assert shifted[0] == 0
    assert shifted[-1] == 1
    assert (shifted[1:-1] < t[1:-1]).all()
    assert shifted[5].item() == pytest.approx(1 - 1.5 / 2)
    torch.testing.assert_close(shift_timesteps(shifted, 1 / 3.0), t)


def test_spread_numbers_are_a_function_of_seed_stream_and_position():
    whole = spread_uniforms(5, torch.arange(40), 0)

    order = [30, 2, 17]
    assert spread_uniforms(5, torch.tensor(order), 0).tolist() == whole[order].tolist()
    golden = (math.sqrt(5) - 1) / 2
    np.testing.assert_allclose((whole - whole[0]) % 1, (np.arange(40) * golden) % 1, atol=1e-12)
    others = [spread_uniforms(5, torch.arange(40), 1), *(spread_uniforms(seed, torch.arange(40), 0) for seed in (4, 6))]
    for other in others:
        offset = (other[0] - whole[0]) % 1
        assert 1e-3 < offset < 1 - 1e-3
    assert len({round(other[0], 6) for other in others}) == 3


@pytest.mark.parametrize("start", [0, 12_345, 1 << 40])
@pytest.mark.parametrize("window", [8, 64, 500])
def test_any_stretch_of_spread_numbers_fills_the_interval_more_evenly_than_chance(start, window):
    positions = torch.arange(start, start + window)

    spread = largest_cdf_distance(spread_uniforms(1, positions, 0), lambda x: x)

    assert spread < (1 + math.log(window)) / window
    chance = np.mean([largest_cdf_distance(uniforms(seed, positions, 0), lambda x: x) for seed in range(5)])
    assert spread < 0.6 * chance
