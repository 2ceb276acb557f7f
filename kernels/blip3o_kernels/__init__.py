"""blip3o_kernels: the operations of the DiT that are worth fusing, each a plain function on tensors.

The model calls the functions of this package and does not know how they are computed: `dispatch` chooses between a
Triton kernel and plain PyTorch.
"""

from blip3o_kernels.dequantize_fp8 import dequantize_fp8
from blip3o_kernels.dispatch import use_kernels
from blip3o_kernels.flow_matching_loss import FlowLoss, flow_matching_loss
from blip3o_kernels.gqa_attention import gqa_attention
from blip3o_kernels.qk_norm_rope import qk_norm_rope
from blip3o_kernels.rms_norm import rms_norm
from blip3o_kernels.sandwich import sandwich
from blip3o_kernels.swiglu import swiglu

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
