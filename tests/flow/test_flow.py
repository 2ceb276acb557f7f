"""What a sample draws, and the loss: against NumPy, and against a Gaussian flow whose optimum is known."""

import math

import numpy as np
import pytest
import torch

from blip3o_ds.config import FlowConfig, build_run_config, load_run_config
from blip3o_ds.errors import ConfigError
from blip3o_ds.flow.flow import Flow, check_flow
from blip3o_kernels import flow_matching_loss
from tests.flows import random_prior

SHAPE = (4, 3)
PRIOR = random_prior(4, 5, 3)


def build(**settings) -> Flow:
    return Flow.from_config(FlowConfig(**settings), PRIOR)


def draw(positions=range(8), seed=0, **settings):
    return build(**settings).draw(torch.tensor(list(positions)), SHAPE, seed, "cpu")


def test_what_a_sample_draws_does_not_depend_on_the_batch_it_is_in():
    whole = draw(positions=range(8))
    order = [5, 0, 7]
    for part, full in zip(draw(positions=order), whole, strict=True):
        assert torch.equal(part, full[order])


def test_samples_and_seeds_draw_independently():
    flow = build(cond_dropout=0.5)
    a, t_a, drop_a = flow.draw(torch.arange(3000), SHAPE, 0, "cpu")
    b, t_b, _ = flow.draw(torch.arange(3000), SHAPE, 1, "cpu")
    limit = 4 / math.sqrt(3000)
    series = [a[:, 0, 0], a[:, 0, 1], b[:, 0, 0], t_a, drop_a.float(), drop_a.float().roll(1), a[:, 0, 0].roll(1)]
    correlations = torch.corrcoef(torch.stack(series)) - torch.eye(len(series))
    assert correlations.abs().max() < limit
    assert len(set(t_a.tolist()) & set(t_b.tolist())) < 5  # the zeros are one of them


def test_noise_is_standard_normal_and_dropout_has_its_rate():
    noise, _, drop = build(cond_dropout=0.2).draw(torch.arange(4000) + (1 << 40), SHAPE, 7, "cpu")
    assert noise.dtype == torch.float32
    assert noise.mean().abs() < 4 / math.sqrt(noise.numel())
    assert noise.var().item() == pytest.approx(1, abs=4 * math.sqrt(2 / noise.numel()))
    assert drop.float().mean().item() == pytest.approx(0.2, abs=4 * math.sqrt(0.16 / 4000))
    assert not draw(cond_dropout=0.0)[2].any()


@pytest.mark.parametrize("loss_weight", ["velocity", "posterior"])
@pytest.mark.parametrize("prediction", ["velocity", "sample"])
def test_loss_is_numpy(prediction, loss_weight):
    flow = build(prediction=prediction, loss_weight=loss_weight)
    clip, output = torch.randn(4, *SHAPE), torch.randn(4, *SHAPE)
    noise, t = torch.randn(4, *SHAPE), torch.tensor([0.0, 0.3, 0.9, 0.99])
    seen = []

    def model(*inputs):
        seen.extend(inputs)
        return output

    eva, drop = torch.randn(4, 4, 5), torch.tensor([True, False, False, False])
    result = flow.loss(model, clip, eva, noise, t, drop)

    c, o, n, s = (x.double().numpy() for x in (clip, output, noise, t[:, None, None]))
    x_t = (1 - s) * n + s * c
    clean = o if prediction == "sample" else x_t + (1 - s) * o
    variance = PRIOR.variance.double().numpy()
    left_open = (variance * (1 - s) ** 2 / (s**2 * variance + (1 - s) ** 2)).mean((1, 2), keepdims=True)
    floor = 0.05 if prediction == "sample" else 0.0
    weight = 1 / left_open if loss_weight == "posterior" else 1 / np.maximum(1 - s, floor) ** 2
    expected = (weight * (clean - c) ** 2).mean((1, 2))
    np.testing.assert_allclose(result.mse, expected, rtol=2e-4)
    assert result.loss.item() == pytest.approx(expected.mean(), rel=2e-4)
    np.testing.assert_allclose(seen[0], x_t, atol=1e-6)
    for found, given in zip(seen[1:4], (t, eva, drop), strict=True):
        assert torch.equal(found, given)


def test_the_target_of_a_sample_prediction_is_clip_minus_noise_until_the_floor():
    flow = build(prediction="sample", loss_weight="velocity")
    clip, noise, t = torch.randn(3, *SHAPE), torch.randn(3, *SHAPE), torch.tensor([0.0, 0.5, 0.94])
    point, output = flow.prediction.training_pair(clip, noise, t, torch.empty(0))

    _, target = flow.loss_weight(flow.prediction, output, output, point)

    torch.testing.assert_close(target, clip - noise, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("prediction", ["velocity", "sample"])
@pytest.mark.parametrize("loss_weight", ["velocity", "posterior"])
def test_the_known_optimum_of_a_gaussian_has_no_lower_neighbour_and_the_known_loss(prediction, loss_weight):
    """Data N(mu, s^2): E[clip | x_t] is linear in x_t, and its error is Var[clip | x_t]."""
    mu, s, count = 0.7, 0.5, 20000
    t = torch.full((count,), 0.6)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(count, 1, 1, generator=generator)
    clip = mu + s * torch.randn(count, 1, 1, generator=generator)
    variance = 0.4**2 + 0.6**2 * s**2
    flow = build(prediction=prediction, loss_weight=loss_weight)

    def optimum(x_t, _t, _eva, _drop, offset=0.0):
        clean = mu + 0.6 * s**2 / variance * (x_t - 0.6 * mu) + offset
        return clean if prediction == "sample" else (clean - x_t) / 0.4

    def loss(offset):
        model = lambda *inputs: optimum(*inputs, offset=offset)  # noqa: E731
        return flow.loss(model, clip, noise, noise, t, t > 2).loss.item()

    least = s**2 * 0.4**2 / variance
    if loss_weight == "velocity":
        least /= 0.4**2
    else:
        modes = PRIOR.variance.double()
        least /= (modes * 0.4**2 / (0.6**2 * modes + 0.4**2)).mean().item()
    assert loss(0.0) == pytest.approx(least, rel=0.04)
    assert loss(0.0) < min(loss(0.1), loss(-0.1))


@pytest.mark.parametrize("prediction", ["velocity", "sample"])
def test_the_velocity_loss_of_the_linear_path_is_its_plain_formula_to_the_last_bit(prediction):
    flow = build(prediction=prediction, loss_weight="velocity")
    clip, noise, t = torch.randn(64, *SHAPE), torch.randn(64, *SHAPE), torch.rand(64)
    output = torch.randn(64, *SHAPE, requires_grad=True)

    def plain():
        s = t[:, None, None]
        x_t = (1 - s) * noise + s * clip
        if prediction == "velocity":
            return flow_matching_loss(output, clip - noise)
        time_to_data = (1 - s).clamp_min(0.05)
        return flow_matching_loss((output - x_t) / time_to_data, (clip - x_t) / time_to_data)

    results = [flow.loss(lambda *_: output, clip, noise, noise, t, t > 2), plain()]
    for ours, expected in zip(*results, strict=True):
        assert torch.equal(ours, expected)
    gradients = [torch.autograd.grad(result.loss, output)[0] for result in results]
    assert torch.equal(*gradients)


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_the_share_of_pure_noise_is_a_setting(share):
    _, t, _ = draw(range(1000), noise_share=share)
    assert (t == 0).float().mean().item() == pytest.approx(share, abs=0.01)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"flow": {"path": "liner"}}, "flow.path = 'liner' is unknown; did you mean linear?; valid: linear"),
        ({"flow": {"prediction": "simple"}}, "flow.prediction = 'simple' is unknown; did you mean sample?; valid: "),
        ({"flow": {"loss_weight": "speed"}}, "flow.loss_weight = 'speed' is unknown; valid: posterior, velocity"),
        ({"flow": {"timestep_law": "logitnormal"}}, "did you mean logit_normal?; valid: prior, uniform, logit_normal"),
        (
            {"eval": {"sampler": {"solver": "magic"}}},
            "eval.sampler.solver = 'magic' is unknown; valid: euler, midpoint",
        ),
    ],
)
def test_a_name_that_is_unknown_is_an_error_that_lists_what_is_valid(settings, named):
    config = build_run_config(settings)
    with pytest.raises(ConfigError) as raised:
        check_flow(config)
    assert named in str(raised.value)
    if "flow" in settings:
        with pytest.raises(ConfigError) as raised:
            Flow.from_config(config.flow, PRIOR)
        assert named in str(raised.value)


def test_guidance_without_dropout_is_refused_before_training():
    config = {"flow": {"cond_dropout": 0}, "eval": {"sampler": {"guidance_scale": 2}}}
    with pytest.raises(ConfigError, match=r"guidance_scale = 2 needs a model trained with flow.cond_dropout above 0"):
        check_flow(build_run_config(config))
    check_flow(build_run_config({**config, "flow": {"cond_dropout": 0.1}}))


def test_training_refuses_an_unknown_name_before_it_opens_anything():
    from blip3o_ds.training.loop import train  # imports DeepSpeed, which takes seconds

    with pytest.raises(ConfigError, match=r"flow\.path = 'liner'"):
        train(load_run_config("demo", overrides=["flow.path=liner", "data.train_dir=/nowhere"]))
