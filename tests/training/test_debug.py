"""What the debug mode collects."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from blip3o_ds.training.meter import DebugProbe


def test_losses_that_are_not_finite_are_left_out_of_the_timestep_bins(one_rank):
    probe = DebugProbe(SimpleNamespace(device=torch.device("cpu")))
    mse = torch.tensor([1.0, float("nan"), 3.0, float("inf")])

    probe.add(SimpleNamespace(mse=mse), torch.tensor([0.05, 0.05, 0.05, 0.95]))

    assert probe.reduce() == {"loss_by_t/0.0": 2.0}
