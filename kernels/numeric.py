"""Functions that run inside several kernels, on fp32 values in registers."""

import triton
import triton.language as tl
from blip3o_kernels.dispatch import INTERPRET

INTERPRETED = tl.constexpr(INTERPRET)


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """fp32 to `dtype`, to nearest even. The interpreter's own conversion to bf16 cuts the bits off."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        x = (bits & 0xFFFF0000).to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def tanh(x):
    """Hyperbolic tangent, to a few ulp at every size: a series where the quotient would cancel."""
    square = x * x
    series = x * (1 + square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * (62 / 2835)))))
    quotient = 1 - 2 / (1 + tl.exp(2 * x))
    return tl.where(square < 0.04, series, quotient)
