"""What the meter makes of the steps between two log lines."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest
import torch

from blip3o_ds.data.reading.loader import Batch
from blip3o_ds.planning.flops import train_flops_per_sample
from blip3o_ds.training.engine import StepReport
from blip3o_ds.training.meter import StepMeter
from blip3o_kernels import FlowLoss
from tests.training.conftest import small_config


@pytest.mark.parametrize("activation_checkpointing", [False, True])
def test_mfu_leaves_recomputation_out_and_hfu_counts_it(one_rank, activation_checkpointing):
    config = small_config(2, **{"train.activation_checkpointing": activation_checkpointing})
    loader = SimpleNamespace(wait_seconds=0.0, num_replaced=0)
    meter = StepMeter(config, loader, torch.device("cpu"))
    meter.peak_flops = 1e12
    tensors = {"clip": torch.ones(4, 16, 8), "eva": torch.ones(4, 16, 12)}

    meter.add(Batch(tensors, torch.arange(4), list("abcd")), FlowLoss(*torch.ones(4, 4)), torch.rand(4))
    time.sleep(0.01)
    meter.finish_step(StepReport(True, grad_norm=1.0, learning_rate=0.1))
    metrics = meter.reduce()

    needed = train_flops_per_sample(config.model)
    computed = train_flops_per_sample(config.model, activation_checkpointing)
    assert metrics["mfu"] == pytest.approx(metrics["samples_per_second"] * needed / 1e12)
    assert metrics["hfu"] == pytest.approx(metrics["samples_per_second"] * computed / 1e12)
    assert (metrics["hfu"] > 1.2 * metrics["mfu"]) == activation_checkpointing
