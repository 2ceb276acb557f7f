"""The calibration of the output: who teaches it, what it learns, and in which dtype it works."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from blip3o_ds.config import FlowConfig, ModelConfig
from blip3o_ds.flow.flow import Flow
from blip3o_ds.flow.prediction import PREDICTIONS
from blip3o_ds.model.dit import DiT
from blip3o_ds.model.layers import Calibration
from tests.flows import random_prior

TIMES = torch.tensor([0.0, 0.06, 0.125, 0.5, 0.77, 0.999, 1.0])
B = len(TIMES)
HELD = torch.arange(B) % 2 == 1


def calibration(*gain: float, narrowing: float = 0.0) -> Calibration:
    """With this gain at its knots, the last one repeated."""
    made = Calibration()
    with torch.no_grad():
        made.gain.copy_(torch.tensor([*gain, *[gain[-1]] * (Calibration.KNOTS - len(gain))]))
        made.narrowing.fill_(narrowing)
    return made


def tokens(seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """[B, 4, 3] as a network's output, with a gradient, or input."""
    values = torch.randn(B, 4, 3, generator=torch.Generator().manual_seed(seed))
    return values.to(dtype).requires_grad_()


OUT, NOISY, TARGET = 0, 1, 2  # seeds


def test_at_initialisation_it_changes_nothing():
    out = tokens(OUT)
    assert torch.equal(Calibration()(out, tokens(NOISY), TIMES, None), out)
    assert torch.equal(Calibration()(out, tokens(NOISY), TIMES, HELD), out)


def test_between_knots_the_gain_is_linear():
    values = np.linspace(0.9, 0.1, Calibration.KNOTS) ** 2
    factors = calibration(*values)(torch.ones(B, 4, 3), tokens(NOISY), TIMES, None)

    expected = np.interp(TIMES.numpy(), np.linspace(0, 1, Calibration.KNOTS), values)
    np.testing.assert_allclose(factors.detach(), np.broadcast_to(expected[:, None, None], (B, 4, 3)), rtol=1e-5)


def test_in_training_only_samples_held_out_see_it():
    out, noisy = tokens(OUT), tokens(NOISY)
    found = calibration(0.5, narrowing=0.25)(out, noisy, TIMES, HELD)
    assert torch.equal(found[~HELD], out[~HELD])
    torch.testing.assert_close(found[HELD], (0.5 * out - 0.25 * noisy)[HELD])


def gradients(held: Tensor | None, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of the gain, the narrowing and the output."""
    made, out = calibration(0.5, narrowing=0.25), tokens(OUT)
    (made(out, tokens(NOISY), TIMES, held) - target).square().sum().backward()
    return made.gain.grad, made.narrowing.grad, out.grad


def test_samples_held_out_teach_the_calibration_alone_and_the_others_the_network_alone():
    target = tokens(TARGET).detach()
    gain, narrowing, out = gradients(HELD, target)

    assert not out[HELD].any()
    torch.testing.assert_close(out[~HELD], 2 * (tokens(OUT) - target)[~HELD].detach())
    assert gain.any()
    assert narrowing.any()
    other = gradients(HELD, target + 5 * (~HELD)[:, None, None])
    assert torch.equal(other[0], gain)
    assert torch.equal(other[1], narrowing)
    none_held, all_held = gradients(torch.zeros_like(HELD), target), gradients(torch.ones_like(HELD), target)
    assert not none_held[0].any()
    assert not none_held[1].any()
    assert not all_held[2].any()


def test_where_nothing_is_said_of_who_is_held_out_all_teach_both():
    target = tokens(TARGET).detach()
    gain, narrowing, out = gradients(None, target)

    everywhere = gradients(torch.ones_like(HELD), target)
    assert torch.equal(gain, everywhere[0])
    assert torch.equal(narrowing, everywhere[1])
    error = 0.5 * tokens(OUT) - 0.25 * tokens(NOISY) - target
    torch.testing.assert_close(out, error.detach())  # 2 x 0.5


@pytest.mark.parametrize("start", [0.0, 0.9, 1.0])
def test_it_learns_what_is_best_on_samples_held_out(start):
    """At t = 0 the network says four times what is so, at t = 1 a fifth too much; of the sample learnt it is right.

    Everywhere a third of the noise that it is given stays in what it says.
    """
    made, held = calibration(start), torch.tensor([True, True, False])
    out, noisy = torch.randn(2, 3, 50, 8, generator=torch.Generator().manual_seed(2))
    target = out * torch.tensor([0.25, 1 / 1.2, 1.0])[:, None, None] - noisy / 3
    optimizer = torch.optim.Adam(made.parameters(), lr=0.02)
    for _ in range(300):
        optimizer.zero_grad()
        (made(out, noisy, torch.tensor([0.0, 1.0, 0.5]), held) - target).square().mean().backward()
        optimizer.step()

    assert made.gain[0].item() == pytest.approx(0.25, abs=0.01)
    assert made.gain[-1].item() == pytest.approx(1 / 1.2, abs=0.01)
    assert made.gain[3].item() == pytest.approx(start)  # no sample held out was near
    assert made.narrowing.item() == pytest.approx(1 / 3, abs=0.01)


@pytest.mark.parametrize("held", [None, HELD], ids=["all", "training"])
@pytest.mark.parametrize("of_value", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("of_out", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
def test_output_and_parameters_may_differ_in_dtype(of_out, of_value, autocast, held):
    made, out, noisy = calibration(0.5, 0.75, narrowing=0.25).to(of_value), tokens(OUT, of_out), tokens(NOISY)

    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = made(out, noisy, TIMES, held)
    found.float().sum().backward()

    assert found.dtype == of_out
    for parameter in made.parameters():
        assert parameter.grad.dtype == of_value
        assert parameter.grad.any()
    exact = calibration(0.5, 0.75, narrowing=0.25)(out.detach().float(), noisy, TIMES, held)
    torch.testing.assert_close(found.float(), exact, rtol=1e-2, atol=2e-2)


@pytest.mark.parametrize("prediction", list(PREDICTIONS))
@pytest.mark.parametrize("all_held", [True, False])
def test_a_flows_loss_of_samples_held_out_reaches_the_calibration_alone(prediction, all_held):
    torch.manual_seed(0)
    model = DiT(
        ModelConfig(
            eva_dim=5, clip_dim=3, grid_size=2, hidden_size=8, num_layers=1, num_heads=2, num_kv_heads=1, ffn_dim=8
        )
    )
    torch.nn.init.normal_(model.clip_out.weight)
    flow = Flow.from_config(FlowConfig(prediction=prediction), random_prior(4, 5, 3))
    clip, eva = torch.randn(6, 4, 3), torch.randn(6, 4, 5)
    noise, t, drop = flow.draw(torch.arange(6), (4, 3), 0, "cpu")

    flow.loss(model, clip, eva, noise, t, drop, held=torch.full((6,), all_held)).loss.backward()

    taught = {
        name for name, parameter in model.named_parameters() if parameter.grad is not None and parameter.grad.any()
    }
    calibration = {"calibration.gain", "calibration.narrowing"}
    if prediction == "regression":  # it sees no noise, of which some could be taken away
        calibration.remove("calibration.narrowing")
    assert (taught == calibration) == all_held
    assert bool(taught & calibration) == all_held
