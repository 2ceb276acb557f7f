"""A path and a prediction from outside the package: one class and one table line each, and nothing else changes."""

import pytest
import torch

from blip3o_ds.config import SamplerConfig, load_run_config
from blip3o_ds.flow.flow import Flow
from blip3o_ds.flow.path import PATHS, LinearPath, Path, per_sample
from blip3o_ds.flow.prediction import PREDICTIONS, Point, Prediction, SamplePrediction
from blip3o_ds.flow.solvers import posterior_mean, sample
from tests.flows import CosinePath, random_prior

SHAPE = (6, 4, 3)
PRIOR = random_prior(4, 5, 3)


class NoisePrediction(Prediction):
    """The network outputs the noise (Ho et al. 2020), which says nothing of the data at t = 0."""

    def training_pair(self, data, noise, t, guess):
        return Point(self.path.point(data, noise, t), t, guess), noise

    def clean(self, output, point):
        t = per_sample(point.t)
        return (point.x - self.path.sigma(t) * output.float()) / self.path.alpha(t).clamp_min(1e-3)


@pytest.fixture(autouse=True)
def tables(monkeypatch):
    monkeypatch.setitem(PATHS, "cosine", CosinePath)
    monkeypatch.setitem(PREDICTIONS, "noise", NoisePrediction)


def flow_of(path: str, prediction: str, loss_weight: str = "velocity") -> Flow:
    overrides = [f"flow.path={path}", f"flow.prediction={prediction}", f"flow.loss_weight={loss_weight}"]
    return Flow.from_config(load_run_config("demo", overrides=[*overrides, "flow.timestep_law=uniform"]).flow, PRIOR)


every_flow = pytest.mark.parametrize(
    ("path", "prediction"), [(p, q) for p in ("linear", "cosine") for q in ("sample", "velocity", "noise")]
)
every_weight = pytest.mark.parametrize("loss_weight", ["velocity", "posterior"])


def pair(flow: Flow, clip, noise, t):
    """The point between both ends, and the output there of a network that knows them."""
    return flow.prediction.training_pair(clip, noise, t, flow.prediction.guess(eva_like(clip), None))


def eva_like(clip):
    return torch.zeros(*clip.shape[:2], 5)


def oracle(flow: Flow, data):
    """The network that knows the data: its output at x_t is right for the noise that x_t then holds."""

    def model(x_t, t, _eva, _drop):
        s = t[:, None, None]
        return pair(flow, data, (x_t - flow.path.alpha(s) * data) / flow.path.sigma(s), t)[1]

    return model


def clip_noise_and_time():
    generator = torch.Generator().manual_seed(0)
    clip, noise = (torch.randn(*SHAPE, generator=generator) for _ in range(2))
    return clip, noise, torch.tensor([0.02, 0.1, 0.3, 0.5, 0.8, 0.98])


def test_a_run_that_names_them_is_built_of_them():
    flow = flow_of("cosine", "noise")
    assert isinstance(flow.path, CosinePath)
    assert isinstance(flow.prediction, NoisePrediction)
    assert flow.prediction.path is flow.path


@every_weight
@every_flow
def test_the_loss_of_a_network_that_knows_the_data_is_zero(path, prediction, loss_weight):
    flow = flow_of(path, prediction, loss_weight)
    clip, noise, t = clip_noise_and_time()
    _, target = pair(flow, clip, noise, t)

    def loss(output):
        return flow.loss(lambda *_: output, clip, eva_like(clip), noise, t, t > 2).loss.item()

    assert loss(target) == 0
    assert loss(target + 0.1) > 1e-3


@every_flow
@pytest.mark.parametrize("solver", ["euler", "midpoint", "heun"])
def test_sampling_with_a_network_that_knows_the_data_reaches_it(path, prediction, solver):
    flow = flow_of(path, prediction)
    clip, noise, _ = clip_noise_and_time()
    limit = {"linear": 1e-5, "cosine": 2e-3}[path]
    out = sample(oracle(flow, clip), flow, eva_like(clip), noise, SamplerConfig(steps=40, solver=solver))
    torch.testing.assert_close(out, clip, atol=limit, rtol=0)


@pytest.mark.parametrize("path", [LinearPath(), CosinePath()], ids=["linear", "cosine"])
def test_velocities_are_the_derivatives_of_the_path(path):
    clip, noise, t = (x.double() for x in clip_noise_and_time())
    _, slope = torch.autograd.functional.jvp(lambda s: path.point(clip, noise, s), t, torch.ones_like(t))
    step = 1e-6
    difference = (path.point(clip, noise, t + step) - path.point(clip, noise, t - step)) / (2 * step)

    x_t, velocity = path.point(clip, noise, t), path.velocity(clip, noise, t)

    torch.testing.assert_close(velocity, slope)
    torch.testing.assert_close(velocity, difference, atol=1e-8, rtol=1e-8)
    torch.testing.assert_close(path.velocity_from_clean(clip, x_t, t), slope)
    torch.testing.assert_close(path.clean_from_velocity(slope, x_t, t), clip)


def test_the_linear_paths_own_wronskian_is_the_general_one():
    t = torch.linspace(0, 1, 11, dtype=torch.float64)
    torch.testing.assert_close(LinearPath().wronskian(t), Path.wronskian(LinearPath(), t))


@every_flow
def test_every_prediction_stands_for_the_same_clean_embedding_and_velocity(path, prediction):
    flow = flow_of(path, prediction)
    clip, noise, t = clip_noise_and_time()
    point, output = pair(flow, clip, noise, t)
    velocity = flow.path.velocity(clip, noise, t)

    assert torch.equal(flow.prediction.embedding(point), flow.path.point(clip, noise, t))
    torch.testing.assert_close(flow.prediction.clean(output, point), clip, atol=1e-4, rtol=0)
    torch.testing.assert_close(flow.prediction.loss_velocity(output, point, 1e-6), velocity, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(flow.prediction.slope(output, point), velocity, atol=1e-3, rtol=1e-3)
    displacement = flow.prediction.displacement(output, point)
    torch.testing.assert_close(displacement, clip - flow.path.point(clip, noise, t), atol=1e-4, rtol=0)


def test_a_preconditioned_prediction_is_one_class_too(monkeypatch):
    """The network sees a scaled input and adds to a guess of its own; both stand in its methods."""

    class Preconditioned(SamplePrediction):
        def guess(self, eva, folds):
            return 2 * eva

        def output(self, model, point, eva, drop, held=None):
            sigma = self.path.sigma(per_sample(point.t))
            return point.guess + sigma * model(point.x / 2, point.t.expand(len(eva)), eva, drop)

    monkeypatch.setitem(PREDICTIONS, "preconditioned", Preconditioned)
    flow = flow_of("linear", "preconditioned")
    clip, noise, t = clip_noise_and_time()
    nothing = lambda x_t, *_: torch.zeros_like(x_t)  # noqa: E731

    assert flow.loss(nothing, clip, clip / 2, noise, t, t > 2).loss == 0
    assert torch.equal(posterior_mean(nothing, flow, clip / 2, noise), clip)
