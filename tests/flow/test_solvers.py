"""The solvers on the one flow whose answer is known: from N(0, 1) to N(mu, s^2) every path ends at mu + s * noise."""

import math

import pytest
import torch

from blip3o_ds.config import FlowConfig, SamplerConfig
from blip3o_ds.errors import ConfigError
from blip3o_ds.flow.flow import Flow
from blip3o_ds.flow.solvers import posterior_mean, sample
from tests.flows import random_prior

MU, S = 0.7, 0.5
PRIOR = random_prior(2, 5, 3)  # these predictions do not use it


def build(timestep_law="uniform", **settings) -> Flow:
    return Flow.from_config(FlowConfig(timestep_law=timestep_law, **settings), PRIOR)


def gaussian_model(prediction, mu=MU):
    """The perfect network for data N(mu, S^2): E[clip | x_t], or the velocity it implies."""

    def model(x_t, t, _eva, drop):
        assert x_t.dtype == torch.float32
        x_t, t = x_t.double(), t.double()[:, None, None]
        clean = mu + t * S**2 / ((1 - t) ** 2 + t**2 * S**2) * (x_t - t * mu)
        return clean if prediction == "sample" else (clean - x_t) / (1 - t)

    return model


def noise_and_eva(count=64):
    noise = torch.randn(count, 2, 3, generator=torch.Generator().manual_seed(0))
    return noise, torch.zeros(count, 2, 5)


def error(solver, steps, prediction="velocity", shift=1.0):
    noise, eva = noise_and_eva()
    flow = build(prediction=prediction, timestep_shift=shift)
    out = sample(gaussian_model(prediction), flow, eva, noise, SamplerConfig(steps=steps, solver=solver))
    assert out.dtype == torch.float32
    return (out.double() - (MU + S * noise.double())).abs().mean().item()


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("midpoint", 2), ("heun", 2)])
def test_errors_fall_with_the_order_of_the_solver(solver, order):
    """On dx/dt = (1 + 2t) x, which ends at e^2 x; the Gaussian flow cancels midpoint's leading error."""
    noise, eva = noise_and_eva()
    flow = build(prediction="velocity")
    errors = []
    for steps in (20, 40):
        sampler = SamplerConfig(steps=steps, solver=solver)
        out = sample(lambda x, t, *_: (1 + 2 * t[:, None, None]) * x, flow, eva, noise, sampler)
        errors.append((out.double() - math.e**2 * noise.double()).abs().mean().item())
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.25)


@pytest.mark.parametrize("prediction", ["velocity", "sample"])
@pytest.mark.parametrize(("solver", "limit"), [("euler", 1.5e-2), ("midpoint", 1e-3), ("heun", 1e-3)])
def test_every_solver_follows_the_gaussian_flow_to_its_end(solver, limit, prediction):
    assert error(solver, 50, prediction) < limit


@pytest.mark.parametrize("shift", [0.5, 3.0])
def test_a_shifted_schedule_reaches_the_same_data(shift):
    assert error("heun", 40, shift=shift) < 5e-3


def test_a_sample_prediction_lands_on_the_data_with_no_noise_left():
    """Data that is one point: every solver must end on it, whatever the floor that the loss has."""
    flow = build(prediction="sample", min_time_to_data=0.5)
    noise, eva = noise_and_eva()
    for solver in ("euler", "midpoint", "heun"):
        for steps in (1, 25):
            out = sample(
                lambda x, *_: torch.full_like(x, 2.0), flow, eva, noise, SamplerConfig(steps=steps, solver=solver)
            )
            torch.testing.assert_close(out, torch.full_like(out, 2.0), atol=1e-5, rtol=0)


def test_sampling_carries_the_standard_normal_to_the_data_distribution():
    noise = torch.randn(20000, 1, 1, generator=torch.Generator().manual_seed(1))
    flow = build(prediction="sample")
    out = sample(gaussian_model("sample"), flow, noise, noise, SamplerConfig(steps=50, solver="heun"))
    assert out.mean().item() == pytest.approx(MU, abs=0.015)
    assert out.std().item() == pytest.approx(S, rel=0.02)


@pytest.mark.parametrize("prediction", ["velocity", "sample"])
def test_posterior_mean_is_the_mean_of_the_data(prediction):
    noise, eva = noise_and_eva()
    flow = build(prediction=prediction)
    out = posterior_mean(gaussian_model(prediction), flow, eva, noise)
    torch.testing.assert_close(out.double(), torch.full_like(out, MU, dtype=torch.float64), atol=1e-6, rtol=0)


class Recorder:
    """Predicts the constant 1 with its condition and 3 without, and counts both."""

    def __init__(self):
        self.conditional = self.unconditional = 0

    def __call__(self, x_t, t, _eva, drop):
        assert drop.dtype == torch.bool
        assert not torch.is_grad_enabled()
        self.conditional += int(not drop.any())
        self.unconditional += int(drop.all())
        return torch.full_like(x_t, 3.0 if drop.all() else 1.0)


@pytest.mark.parametrize(("scale", "clean"), [(0.0, 3.0), (1.0, 1.0), (2.5, -2.0)])
def test_guidance_extrapolates_from_unconditional_to_conditional(scale, clean):
    model, (noise, eva) = Recorder(), noise_and_eva()
    sampler = SamplerConfig(steps=4, guidance_scale=scale)
    out = sample(model, build(prediction="sample"), eva, noise, sampler)
    torch.testing.assert_close(out, torch.full_like(out, clean), atol=1e-5, rtol=0)
    assert model.conditional == 4
    assert model.unconditional == (0 if scale == 1.0 else 4)


def test_guidance_of_a_model_that_always_saw_its_condition_is_an_error():
    noise, eva = noise_and_eva()
    with pytest.raises(ConfigError, match=r"guidance_scale = 1.5 needs a model trained with flow.cond_dropout above 0"):
        sample(Recorder(), build(cond_dropout=0), eva, noise, SamplerConfig(guidance_scale=1.5))


def test_the_schedule_is_shifted_as_training_was():
    times = []

    def model(x_t, t, *_):
        times.append(t[0].item())
        return x_t

    flow = build(prediction="sample", timestep_shift=3.0)
    noise, eva = noise_and_eva()
    sample(model, flow, eva, noise, SamplerConfig(steps=4))
    sigmas = [1.0, 0.75, 0.5, 0.25]
    assert times == pytest.approx([1 - 3 * sigma / (1 + 2 * sigma) for sigma in sigmas], abs=1e-6)
