"""blip3o_kernels: the operations of the DiT that are worth fusing, each a plain function on tensors.

The model calls the functions of this package and does not know how they are computed; `reference` holds them in
plain PyTorch, `dispatch` says which path a call takes.
"""

from blip3o_kernels.dispatch import TRITON_INSTALLED, use_kernels
from blip3o_kernels.reference import FlowLoss

if TRITON_INSTALLED:
    from blip3o_kernels.attention import gqa_attention
    from blip3o_kernels.dequantize import dequantize_fp8
    from blip3o_kernels.flow_loss import flow_matching_loss
    from blip3o_kernels.rms_norm import rms_norm
    from blip3o_kernels.rope import qk_norm_rope
    from blip3o_kernels.sandwich import sandwich
    from blip3o_kernels.swiglu import swiglu
else:
    from blip3o_kernels.reference import (
        dequantize_fp8,
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
    "use_kernels",
]
