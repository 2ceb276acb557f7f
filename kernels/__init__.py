"""blip3o_kernels: the operations of the DiT that are worth fusing, each a plain function on tensors.

The model calls the functions of this package and does not know how they are computed; `reference` holds them in
plain PyTorch.
"""

from blip3o_kernels.dequantize import dequantize_fp8
from blip3o_kernels.reference import (
    FlowLoss,
    flow_matching_loss,
    gqa_attention,
    qk_norm_rope,
    rms_norm,
    sandwich,
    swiglu,
)

__all__ = [
    "FlowLoss",
    "dequantize_fp8",
    "flow_matching_loss",
    "gqa_attention",
    "qk_norm_rope",
    "rms_norm",
    "sandwich",
    "swiglu",
]
