"""Operations counted by formula against PyTorch's own counter on a real forward and backward pass."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from blip3o_ds.config import ModelConfig
from blip3o_ds.model.dit import DiT
from blip3o_ds.planning.flops import device_peak_flops, forward_flops, train_flops_per_sample

CONFIG = ModelConfig(
    eva_dim=24, clip_dim=12, grid_size=4, hidden_size=32, num_layers=3, num_heads=4, num_kv_heads=2, ffn_dim=48
)
B = 2


def count(config: ModelConfig, backward: bool) -> int:
    model = DiT(config)
    inputs = torch.randn(B, config.num_tokens, config.clip_dim), torch.rand(B)
    eva = torch.randn(B, config.num_tokens, config.eva_dim)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # matrix products that are counted
        out = model(*inputs, eva)
        if backward:
            out.sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("attention", ["full", "none"])
@pytest.mark.parametrize("token_layout", ["patch_only", "cls_patch"])
def test_the_forward_formula_is_what_pytorch_counts(token_layout, attention):
    config = CONFIG.model_copy(update={"token_layout": token_layout, "attention": attention})

    assert B * sum(forward_flops(config)) == count(config, backward=False)


@pytest.mark.parametrize("attention", ["full", "none"])
def test_a_training_step_is_what_pytorch_counts(attention):
    config = CONFIG.model_copy(update={"attention": attention})
    assert B * train_flops_per_sample(config) == count(config, backward=True)


def test_checkpointing_adds_the_blocks_forward_pass():
    without, with_it = train_flops_per_sample(CONFIG), train_flops_per_sample(CONFIG, activation_checkpointing=True)

    assert without < with_it < 4 / 3 * without


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("?", None),
    ],
)
def test_a_gpus_peak_is_known_by_its_name_or_not_at_all(name, expected):
    assert device_peak_flops(name) == expected
