"""How many floating-point operations the DiT takes, and how many a GPU can do: numerator and denominator of the MFU.

Matrix products are counted exactly, as two operations per multiply-add. Norms, rotations and activations are ignored.
"""

from __future__ import annotations

import re

from blip3o_ds.config import ModelConfig


def forward_flops(config: ModelConfig) -> tuple[int, int, int]:
    """The matrix products of one sample's forward pass: `(blocks, inputs, rest)`.

    A linear layer from width a to width b takes 2Nab operations on N tokens. Attention of N tokens to N takes 4NNW for
    scores and values, W being the width of all query heads, however many key heads there are. `inputs` are products
    whose input needs no gradient: projections of x_t, of EVA, of the timestep's sinusoids.
    """
    N, W, F = config.num_tokens, config.hidden_size, config.ffn_dim
    kv_width = 2 * config.num_kv_heads * config.head_dim  # keys and values together
    attention = 4 * N * N * W

    self_attention = 2 * N * W * (W + kv_width) + attention + 2 * N * W * W  # qkv, scores and values, out
    cross_attention = 2 * N * W * W + 2 * N * W * kv_width + attention + 2 * N * W * W  # q, kv, ..., out
    feed_forward = 2 * N * W * 2 * F + 2 * N * F * W  # gate and up, down
    block = feed_forward + self_attention + cross_attention + 2 * W * 6 * W  # the modulation, once per sample
    if config.attention == "none":
        block = feed_forward + 2 * W * 2 * W

    clip_in = 2 * N * config.clip_dim * W
    condition = 2 * N * config.eva_dim * W
    timestep_in = 2 * config.timestep_embed_dim * W
    inputs = clip_in + condition + timestep_in
    timestep_out = 2 * W * W
    first_modulation = 2 * W * W
    clip_out = 2 * N * W * config.clip_dim
    return config.num_layers * block, inputs, timestep_out + first_modulation + clip_out


def train_flops_per_sample(config: ModelConfig, activation_checkpointing: bool = False) -> int:
    """Operations in the forward and backward pass of one sample.

    The backward pass takes twice the forward's operations; only once for the products on the inputs, which have no
    gradient of the input. Checkpointing repeats the blocks' forward pass. The MFU by definition counts no recomputation
    (Chowdhery et al. 2022), so leave it out there.
    """
    blocks, inputs, rest = forward_flops(config)
    return (4 if activation_checkpointing else 3) * blocks + 2 * inputs + 3 * rest


# Operations per second of the tensor cores, dense bf16 or fp16 with fp32 accumulation, from NVIDIA's data sheets (their
# figures "with sparsity" halved). The first pattern found in the device's name decides.
_PEAK_FLOPS: tuple[tuple[str, float], ...] = (
    (r"\bMIG\b", 0.0),  # a slice of a GPU; the name does not say how large
    (r"\bB200\b", 2250e12),  # DGX B200
    (r"\bH[12]00 NVL\b", 835e12),  # the PCIe cards joined by NVLink
    (r"\bH100 PCIe\b", 756e12),
    (r"\b(H100|H200|GH200|H800)\b", 989e12),  # SXM
    (r"\b(A100|A800)\b", 312e12),  # SXM and PCIe alike
    (r"\bA30\b", 165e12),
    (r"\bA10\b", 125e12),
    (r"\bL40S\b", 362e12),
    (r"\bL40\b", 181e12),
    (r"\bL4\b", 121e12),
)


def device_peak_flops(device_name: str) -> float | None:
    """Dense bf16 or fp16 operations per second of the GPU with this name (`torch.cuda.get_device_name`), if known."""
    return next((peak for pattern, peak in _PEAK_FLOPS if re.search(pattern, device_name)), None) or None
