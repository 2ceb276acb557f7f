"""How many floating-point operations the DiT costs, and how many a GPU could do at best: the two sides of the MFU.

Matrix products are counted exactly, two operations per multiply-add; norms, rotations and activations are not counted.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from blip3o_ds.config import ModelConfig


@dataclass(frozen=True)
class ForwardFlops:
    """Operations of one sample's forward pass, by part."""

    blocks: int
    inputs: (
        int  # products whose input needs no gradient: the projections of x_t, of EVA and of the timestep's sinusoids
    )
    rest: int

    @property
    def total(self) -> int:
        return self.blocks + self.inputs + self.rest


def forward_flops(config: ModelConfig) -> ForwardFlops:
    """Matrix products of a forward pass, per sample, term by term.

    A linear layer from width a to b on n tokens costs 2nab. Attention of n tokens to n costs 4nnW for scores and
    values, W being the width of all query heads, whatever the number of key heads.
    """
    N, W, F = config.num_tokens, config.hidden_size, config.ffn_dim
    kv_width = 2 * config.num_kv_heads * config.head_dim  # of keys and values together
    attention = 4 * N * N * W

    self_attention = 2 * N * W * (W + kv_width) + attention + 2 * N * W * W  # qkv, scores and values, out
    cross_attention = 2 * N * W * W + 2 * N * W * kv_width + attention + 2 * N * W * W  # q, kv, ..., out
    feed_forward = 2 * N * W * 2 * F + 2 * N * F * W  # gate and up, down
    modulation = 2 * W * 6 * W  # once per sample
    block = self_attention + cross_attention + feed_forward + modulation

    clip_in = 2 * N * config.clip_dim * W
    condition = 2 * N * config.eva_dim * W
    timestep_in = 2 * config.timestep_embed_dim * W
    linear_skip = 0 if config.linear_skip == "none" else 2 * N * config.eva_dim * config.clip_dim
    timestep_out = 2 * W * W
    first_modulation = 2 * W * W
    clip_out = 2 * N * W * config.clip_dim
    return ForwardFlops(
        blocks=config.num_layers * block,
        inputs=clip_in + condition + timestep_in + linear_skip,
        rest=timestep_out + first_modulation + clip_out,
    )


def forward_flops_per_sample(config: ModelConfig) -> int:
    """Operations to generate with: one forward pass of one sample."""
    return forward_flops(config).total


def train_flops_per_sample(config: ModelConfig, gradient_checkpointing: bool = False) -> int:
    """Operations of forward and backward for one sample.

    The backward pass costs twice the forward one, except that the products on the inputs have only weights to
    differentiate, which costs once. Checkpointing computes the blocks' forward again. For the MFU, which by definition
    counts no recomputation (Chowdhery et al. 2022), leave it False.
    """
    parts = forward_flops(config)
    return (4 if gradient_checkpointing else 3) * parts.blocks + 2 * parts.inputs + 3 * parts.rest


# Dense bf16 and fp16 rates of the tensor cores with fp32 accumulation, operations per second, from NVIDIA's data sheets
# (their figures "with sparsity" halved). The first pattern that is found in the device's name decides.
_PEAK_FLOPS: tuple[tuple[str, float], ...] = (
    (r"\bMIG\b", 0.0),  # a slice of a GPU has an unstated share of its rate
    (r"\bB200\b", 2250e12),  # DGX B200
    (r"\bH[12]00 NVL\b", 835e12),  # the PCIe cards joined by NVLink
    (r"\bH100 PCIe\b", 756e12),
    (r"\bH100\b", 989e12),  # SXM
    (r"\bH200\b", 989e12),
    (r"\bGH200\b", 989e12),
    (r"\bH800\b", 989e12),
    (r"\bA100\b", 312e12),  # SXM and PCIe alike
    (r"\bA800\b", 312e12),
    (r"\bA30\b", 165e12),
    (r"\bA10\b", 125e12),
    (r"\bL40S\b", 362e12),
    (r"\bL40\b", 181e12),
    (r"\bL4\b", 121e12),
)


def device_peak_flops(device_name: str) -> float | None:
    """Dense bf16 operations per second of the GPU that `torch.cuda.get_device_name` names; None if not known.

    An MFU in another precision than bf16 or fp16 has another peak, and this says nothing of it.
    """
    for pattern, peak in _PEAK_FLOPS:
        if re.search(pattern, device_name):
            return peak or None
    return None
