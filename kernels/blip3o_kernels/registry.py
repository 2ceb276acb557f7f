"""The one table of operations: ahead-of-time compilation, search, benchmark, checks and tests take theirs from it.

A new operation is a file that ends in an `Operation`, and a line here.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from blip3o_kernels.dequantize_fp8 import OPERATION as DEQUANTIZE_FP8
from blip3o_kernels.flow_matching_loss import OPERATION as FLOW_MATCHING_LOSS
from blip3o_kernels.gqa_attention import OPERATION as GQA_ATTENTION
from blip3o_kernels.operation import Operation
from blip3o_kernels.qk_norm_rope import OPERATION as QK_NORM_ROPE
from blip3o_kernels.rms_norm import OPERATION as RMS_NORM
from blip3o_kernels.sandwich import OPERATION as SANDWICH
from blip3o_kernels.swiglu import OPERATION as SWIGLU

OPERATIONS: dict[str, Operation[Any, Any]] = {  # those first that cost a training step most: a search may end early
    operation.name: operation
    for operation in (GQA_ATTENTION, SANDWICH, QK_NORM_ROPE, SWIGLU, RMS_NORM, FLOW_MATCHING_LOSS, DEQUANTIZE_FP8)
}
REFERENCE = SimpleNamespace(**{name: operation.reference for name, operation in OPERATIONS.items()})
