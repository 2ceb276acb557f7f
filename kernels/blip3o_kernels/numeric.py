"""Functions that run inside several kernels, on fp32 values in registers."""

from __future__ import annotations

from blip3o_kernels.dispatch import INTERPRET
from blip3o_kernels.triton_language import tl, triton

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


@triton.jit
def load_row(pointer, d, D: tl.constexpr):
    """[BD] fp32, zero past D."""
    return tl.load(pointer + d, mask=d < D, other=0).to(tl.float32)


@triton.jit
def load_gain(weight, scale, scale_offset, d, D: tl.constexpr):
    """`weight * (1 + scale)` of one sample, [BD] fp32."""
    gain = load_row(weight, d, D)
    if scale is not None:
        gain *= 1 + load_row(scale + scale_offset, d, D)
    return gain


@triton.jit
def inverse_rms(values, present, eps, D: tl.constexpr):
    """[ROWS, 1] of [ROWS, BD]; 1 for rows that are not present, whose zeros must not become NaN where eps is zero."""
    mean_square = tl.sum(values * values, axis=1) / D + eps
    return tl.rsqrt(tl.where(present, mean_square, 1.0))[:, None]


@triton.jit
def norm_gradient(upstream, values, rstd, D: tl.constexpr):
    """Gradient of `values` from that of `values * rstd`, [ROWS, BD] fp32."""
    along = tl.sum(upstream * values, axis=1)[:, None]  # does not wait for rstd
    return rstd * (upstream - values * (rstd * rstd * along / D))
