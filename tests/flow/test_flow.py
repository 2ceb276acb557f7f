"""The loss against NumPy, and against a Gaussian flow whose optimum is known."""

import math

import numpy as np
import pytest
import torch

from blip3o_ds.config import FlowConfig, build_run_config, load_run_config
from blip3o_ds.errors import ConfigError
from blip3o_ds.flow.flow import Flow, build_flow
from blip3o_ds.flow.timesteps import shift_timesteps
from blip3o_kernels import flow_matching_loss

SHAPE = (4, 3)


def draw(config=None, positions=range(8), seed=0):
    return Flow.from_config(config or FlowConfig()).draw(torch.tensor(list(positions)), SHAPE, seed, "cpu")


def timesteps(config: FlowConfig, count: int = 20000) -> np.ndarray:
    """As drawn for that many positions; the noise is one number each."""
    flow = Flow.from_config(config)
    return flow.draw(torch.arange(count), (1, 1), 3, "cpu")[1].double().numpy()


def largest_cdf_distance(samples: np.ndarray, cdf) -> float:
    """The Kolmogorov-Smirnov statistic; 1.95 / sqrt(n) is passed by chance once in a thousand times."""
    samples = np.sort(samples)
    exact = np.array([cdf(x) for x in samples])
    ranks = np.arange(len(samples))
    return max(np.abs(exact - ranks / len(samples)).max(), np.abs(exact - (ranks + 1) / len(samples)).max())


def test_what_a_sample_draws_does_not_depend_on_the_batch_it_is_in():
    whole = draw(positions=range(8))
    order = [5, 0, 7]
    for part, full in zip(draw(positions=order), whole, strict=True):
        assert torch.equal(part, full[order])


def test_samples_and_seeds_draw_independently():
    flow = Flow.from_config(FlowConfig(cond_dropout=0.5))
    a, t_a, drop_a = flow.draw(torch.arange(3000), SHAPE, 0, "cpu")
    b, t_b, _ = flow.draw(torch.arange(3000), SHAPE, 1, "cpu")
    limit = 4 / math.sqrt(3000)
    series = [a[:, 0, 0], a[:, 0, 1], b[:, 0, 0], t_a, t_b, drop_a.float(), t_a.roll(1), a[:, 0, 0].roll(1)]
    correlations = torch.corrcoef(torch.stack(series)) - torch.eye(len(series))
    assert correlations.abs().max() < limit
    assert len(set(t_a.tolist()) & set(t_b.tolist())) < 5


def test_noise_is_standard_normal_and_dropout_has_its_rate():
    flow = Flow.from_config(FlowConfig(cond_dropout=0.2))
    noise, _, drop = flow.draw(torch.arange(4000) + (1 << 40), SHAPE, 7, "cpu")
    assert noise.dtype == torch.float32
    assert noise.mean().abs() < 4 / math.sqrt(noise.numel())
    assert noise.var().item() == pytest.approx(1, abs=4 * math.sqrt(2 / noise.numel()))
    assert drop.float().mean().item() == pytest.approx(0.2, abs=4 * math.sqrt(0.16 / 4000))
    assert not draw(FlowConfig(cond_dropout=0.0))[2].any()


@pytest.mark.parametrize("shift", [1.0, 3.0, 0.5])
def test_uniform_timesteps_follow_the_shifted_cdf(shift):
    t = timesteps(FlowConfig(timestep_shift=shift))
    # sigma' = s u / (1 + (s-1) u) for uniform u, so P(t' <= x) = 1 - u(1-x) with u(y) = y / (s - (s-1) y)
    assert largest_cdf_distance(t, lambda x: 1 - (1 - x) / (shift - (shift - 1) * (1 - x))) < 1.95 / math.sqrt(len(t))


def test_logit_normal_timesteps_follow_their_cdf():
    t = timesteps(FlowConfig(timestep_law="logit_normal", logit_mean=-0.4, logit_std=1.3))

    def cdf(x):
        return 0.5 * (1 + math.erf((math.log(x / (1 - x)) + 0.4) / (1.3 * math.sqrt(2))))

    assert largest_cdf_distance(t, cdf) < 1.95 / math.sqrt(len(t))


def test_shift_keeps_the_ends_and_moves_towards_noise():
    t = torch.linspace(0, 1, 11, dtype=torch.float64)
    shifted = shift_timesteps(t, 3.0)
    assert shifted[0] == 0
    assert shifted[-1] == 1
    assert (shifted[1:-1] < t[1:-1]).all()
    assert shifted[5].item() == pytest.approx(1 - 1.5 / 2)
    torch.testing.assert_close(shift_timesteps(shifted, 1 / 3.0), t)


@pytest.mark.parametrize("prediction", ["velocity", "sample"])
def test_loss_is_numpy(prediction):
    flow = Flow.from_config(FlowConfig(prediction=prediction))
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
    if prediction == "velocity":
        expected = ((o - (c - n)) ** 2).mean((1, 2))
    else:
        expected = (((o - c) / np.maximum(1 - s, 0.05)) ** 2).mean((1, 2))
    np.testing.assert_allclose(result.mse, expected, rtol=1e-4)
    assert result.loss.item() == pytest.approx(expected.mean(), rel=1e-4)
    np.testing.assert_allclose(seen[0], x_t, atol=1e-6)
    assert seen[1] is t
    assert seen[2] is eva
    assert seen[3] is drop


def test_the_target_of_a_sample_prediction_is_clip_minus_noise_until_the_floor():
    flow = Flow.from_config(FlowConfig(prediction="sample"))
    clip, noise, t = torch.randn(3, *SHAPE), torch.randn(3, *SHAPE), torch.tensor([0.0, 0.5, 0.94])
    x_t = flow.path.point(clip, noise, t)
    target, _ = flow.loss_weight(flow.prediction, clip, clip, x_t, t)
    torch.testing.assert_close(target, clip - noise, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("prediction", ["velocity", "sample"])
def test_both_predictions_denoise_the_same_truth(prediction):
    flow = Flow.from_config(FlowConfig(prediction=prediction))
    clip, noise, t = torch.randn(3, *SHAPE), torch.randn(3, *SHAPE), torch.tensor([0.0, 0.5, 0.99])
    truth = clip if prediction == "sample" else clip - noise
    x_t = flow.path.point(clip, noise, t)
    torch.testing.assert_close(flow.prediction.clean(truth, x_t, t), clip, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("prediction", ["velocity", "sample"])
def test_the_known_optimum_of_a_gaussian_has_no_lower_neighbour_and_the_known_loss(prediction):
    """Data N(mu, s^2): E[clip | x_t] is linear in x_t, and the least loss is Var[clip | x_t] / (1-t)^2."""
    mu, s, count = 0.7, 0.5, 20000
    t = torch.full((count,), 0.6)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(count, 1, 1, generator=generator)
    clip = mu + s * torch.randn(count, 1, 1, generator=generator)
    variance = 0.4**2 + 0.6**2 * s**2
    flow = Flow.from_config(FlowConfig(prediction=prediction))

    def optimum(x_t, _t, _eva, _drop, offset=0.0):
        clean = mu + 0.6 * s**2 / variance * (x_t - 0.6 * mu) + offset
        return clean if prediction == "sample" else (clean - x_t) / 0.4

    def loss(offset):
        model = lambda *inputs: optimum(*inputs, offset=offset)  # noqa: E731
        return flow.loss(model, clip, noise, noise, t, t > 2).loss.item()

    least = s**2 * 0.4**2 / variance / 0.4**2
    assert loss(0.0) == pytest.approx(least, rel=0.04)
    assert loss(0.0) < min(loss(0.1), loss(-0.1))


@pytest.mark.parametrize("prediction", ["velocity", "sample"])
def test_the_loss_of_the_linear_path_is_its_plain_formula_to_the_last_bit(prediction):
    flow = Flow.from_config(FlowConfig(prediction=prediction))
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


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"flow": {"path": "liner"}}, "flow.path = 'liner' is unknown; did you mean linear?; valid: linear"),
        ({"flow": {"prediction": "simple"}}, "flow.prediction = 'simple' is unknown; did you mean sample?; valid: "),
        ({"flow": {"loss_weight": "speed"}}, "flow.loss_weight = 'speed' is unknown; valid: velocity"),
        ({"flow": {"timestep_law": "logitnormal"}}, "did you mean logit_normal?; valid: uniform, logit_normal"),
        (
            {"eval": {"sampler": {"solver": "magic"}}},
            "eval.sampler.solver = 'magic' is unknown; valid: euler, midpoint",
        ),
        ({"flow": {"prediction": "velocity"}, "model": {"linear_skip": "ridge"}}, "model.linear_skip = ridge maps EVA"),
    ],
)
def test_a_name_that_is_unknown_or_does_not_fit_is_an_error_that_lists_what_does(settings, named):
    with pytest.raises(ConfigError) as raised:
        build_flow(build_run_config(settings))
    assert named in str(raised.value)


def test_training_refuses_an_unknown_name_before_it_opens_anything():
    from blip3o_ds.training.loop import train  # imports DeepSpeed, which takes seconds

    with pytest.raises(ConfigError, match=r"flow\.path = 'liner'"):
        train(load_run_config("demo", overrides=["flow.path=liner", "data.train_dir=/nowhere"]))
