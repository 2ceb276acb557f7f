"""The average of the weights as a state of the optimizer."""

import numpy as np
import torch

from blip3o_ds.training.ema import STATE_KEY, attach_ema


def test_the_average_follows_its_recursion_with_the_ramp():
    weight = torch.nn.Parameter(torch.randn(5, dtype=torch.float64))
    optimizer = torch.optim.AdamW([weight], lr=0.1)
    attach_ema(optimizer, 0.3)
    seen = []
    for _ in range(6):
        weight.grad = torch.randn(5, dtype=torch.float64)
        optimizer.step()
        seen.append(weight.detach().numpy().copy())

    expected = seen[0]
    for step, value in enumerate(seen[1:], start=2):
        keep = min(0.3, (1 + step) / (10 + step))
        expected = keep * expected + (1 - keep) * value
    np.testing.assert_allclose(optimizer.state[weight][STATE_KEY].numpy(), expected, rtol=1e-6)


def test_the_average_is_saved_and_restored_with_the_optimizer():
    def make():
        weight = torch.nn.Parameter(torch.ones(3))
        optimizer = torch.optim.AdamW([weight], lr=0.1)
        attach_ema(optimizer, 0.9)
        return weight, optimizer

    weight, optimizer = make()
    weight.grad = torch.ones(3)
    optimizer.step()
    other_weight, other = make()
    other.load_state_dict(optimizer.state_dict())

    assert torch.equal(other.state[other_weight][STATE_KEY], optimizer.state[weight][STATE_KEY])
