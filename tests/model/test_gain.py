"""The gain: who teaches it, what it learns, and in which dtype it works."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from blip3o_ds.config import FlowConfig, ModelConfig
from blip3o_ds.flow.flow import Flow
from blip3o_ds.flow.prediction import PREDICTIONS
from blip3o_ds.model.dit import DiT
from blip3o_ds.model.layers import Gain
from tests.flows import random_prior

TIMES = torch.tensor([0.0, 0.06, 0.125, 0.5, 0.77, 0.999, 1.0])
B = len(TIMES)
HELD = torch.arange(B) % 2 == 1


def gain_of(*values: float) -> Gain:
    """With these values at its knots, the last one repeated."""
    gain = Gain()
    with torch.no_grad():
        gain.value.copy_(torch.tensor([*values, *[values[-1]] * (Gain.KNOTS - len(values))]))
    return gain


def outputs(dtype: torch.dtype = torch.float32) -> Tensor:
    """[B, 4, 3] as a network's, with a gradient."""
    values = torch.randn(B, 4, 3, generator=torch.Generator().manual_seed(0))
    return values.to(dtype).requires_grad_()


def test_at_initialisation_it_changes_nothing():
    out = outputs()
    assert torch.equal(Gain()(out, TIMES, None), out)
    assert torch.equal(Gain()(out, TIMES, HELD), out)


def test_between_knots_it_is_linear():
    values = np.linspace(0.9, 0.1, Gain.KNOTS) ** 2
    factors = gain_of(*values)(torch.ones(B, 4, 3), TIMES, None)

    expected = np.interp(TIMES.numpy(), np.linspace(0, 1, Gain.KNOTS), values)
    np.testing.assert_allclose(factors.detach(), np.broadcast_to(expected[:, None, None], (B, 4, 3)), rtol=1e-5)


def test_in_training_only_samples_held_out_are_scaled():
    out = outputs()
    trained = gain_of(0.5)(out, TIMES, HELD)
    assert torch.equal(trained[~HELD], out[~HELD])
    torch.testing.assert_close(trained[HELD], 0.5 * out[HELD])


def test_samples_held_out_teach_the_gain_alone_and_the_others_the_network_alone():
    target = torch.randn(B, 4, 3, generator=torch.Generator().manual_seed(1))

    def gradients(held: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        gain, out = gain_of(0.5), outputs()
        (gain(out, TIMES, held) - target).square().sum().backward()
        return gain.value.grad, out.grad

    of_gain, of_out = gradients(HELD, target)

    assert not of_out[HELD].any()
    torch.testing.assert_close(of_out[~HELD], 2 * (outputs() - target)[~HELD].detach())
    assert of_gain.any()
    other = target + 5 * (~HELD)[:, None, None]
    assert torch.equal(gradients(HELD, other)[0], of_gain)
    assert not gradients(torch.zeros(B, dtype=torch.bool), target)[0].any()
    assert not gradients(torch.ones(B, dtype=torch.bool), target)[1].any()


@pytest.mark.parametrize("start", [0.0, 0.9, 1.0])
def test_it_learns_the_factor_that_is_best_on_samples_held_out(start):
    """At t = 0 the network says four times what is so, at t = 1 a fifth too much; of the sample learnt it is right."""
    gain, held = gain_of(start), torch.tensor([True, True, False])
    out = torch.randn(3, 50, 8, generator=torch.Generator().manual_seed(2))
    target = out * torch.tensor([0.25, 1 / 1.2, 1.0])[:, None, None]
    optimizer = torch.optim.Adam(gain.parameters(), lr=0.02)
    for _ in range(300):
        optimizer.zero_grad()
        (gain(out, torch.tensor([0.0, 1.0, 0.5]), held) - target).square().mean().backward()
        optimizer.step()

    assert gain.value[0].item() == pytest.approx(0.25, abs=0.01)
    assert gain.value[-1].item() == pytest.approx(1 / 1.2, abs=0.01)
    assert gain.value[3].item() == pytest.approx(start)  # no sample held out was near


@pytest.mark.parametrize("held", [None, HELD], ids=["evaluation", "training"])
@pytest.mark.parametrize("of_value", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("of_out", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
def test_output_and_parameter_may_differ_in_dtype(of_out, of_value, autocast, held):
    gain, out = gain_of(0.5, 0.75).to(of_value), outputs(of_out)

    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        scaled = gain(out, TIMES, held)
    scaled.float().sum().backward()

    assert scaled.dtype == of_out
    assert gain.value.grad.dtype == of_value
    assert gain.value.grad.any()
    exact = gain_of(0.5, 0.75)(out.detach().float(), TIMES, held)
    torch.testing.assert_close(scaled.float(), exact, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("prediction", list(PREDICTIONS))
@pytest.mark.parametrize("all_held", [True, False])
def test_a_flows_loss_of_samples_held_out_reaches_no_parameter_but_the_gain(prediction, all_held):
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
    assert ("gain.value" in taught) == all_held
    assert (taught == {"gain.value"}) == all_held
