"""A DiT learns through the kernels what it learns in plain PyTorch."""

import importlib.util

import pytest
import torch

from tests.conftest import PROJECT

pytestmark = pytest.mark.gpu

STEPS, WINDOW = 200, 20


def losses(mode, config):
    spec = importlib.util.spec_from_file_location("train_step", PROJECT / "scripts" / "train_step.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    step = module.TrainStep(config, 16, mode, compiled=False)
    return torch.stack([step() for _ in range(STEPS)]).cpu()


def test_the_loss_curve_over_200_steps_is_that_of_plain_pytorch():
    from blip3o_ds.config import ModelConfig

    config = ModelConfig(
        eva_dim=256, clip_dim=128, token_layout="cls_patch", hidden_size=384, num_layers=6, num_heads=6,
        num_kv_heads=2, ffn_dim=1536,
    )  # fmt: skip
    found, expected = (losses(mode, config) for mode in ("triton", "torch"))
    assert expected[-1] < 0.8 * expected[0]
    torch.testing.assert_close(found[:5], expected[:5], rtol=1e-2, atol=0)
    curves = [curve.unflatten(0, (-1, WINDOW)).mean(1) for curve in (found, expected)]
    torch.testing.assert_close(*curves, rtol=2e-2, atol=0)
