"""RMSNorm over channels with an optional modulation per sample, forward and backward (Zhang & Sennrich 2019).

A program keeps whole rows in registers, so every tensor is read once; the backward recomputes the norm from x, which it
reads anyway. Sums over tokens go through partial sums in a fixed order: gradients repeat bit for bit.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from blip3o_kernels.autograd import backward_op, differentiable, like
from blip3o_kernels.checks import check_floating, check_parameter, too_wide
from blip3o_kernels.launch import ROW_OPTIONS, RowRule, SumRule, as_rows, candidates_of, cdiv, dense, launch_rows
from blip3o_kernels.numeric import inverse_rms, load_gain, load_row, norm_gradient, rounded, tanh
from blip3o_kernels.operation import Operation, compute_dtype
from blip3o_kernels.triton_language import tl, triton
from blip3o_kernels.workload import Maker, ModelShape, Tensors, Workload, parameter_dtypes


def reference(x: Tensor, weight: Tensor, eps: float = 1e-6, scale: Tensor | None = None) -> Tensor:
    """`x / sqrt(mean(x²) + eps) * weight * (1 + scale)`, the mean over channels (Zhang & Sennrich 2019).

    Args:
        x: `[..., D]`; with `scale`, `[B, ..., D]`. The kernel takes D to 8192.
        weight: `[D]`.
        scale: `[B, D]`, one per sample, or None for no modulation.

    Raises:
        ValueError: naming the argument whose shape, dtype or device does not fit.
    """
    gain = weight.to(compute_dtype(x))
    if scale is not None:
        gain = per_sample(gain * (1 + scale.to(gain.dtype)), x)
    return normalized(x, eps, gain).to(x.dtype)


def normalized(x: Tensor, eps: float, gain: Tensor) -> Tensor:
    """`x / rms(x) * gain`, computed in gain's dtype and not rounded to x's."""
    x = x.to(gain.dtype)
    mean_square = torch.linalg.vecdot(x, x)[..., None] / x.shape[-1]  # one pass, no tensor of squares
    return x * gain * torch.rsqrt(mean_square + eps)


def per_sample(values: Tensor, x: Tensor) -> Tensor:
    """`[B, D]` as `[B, 1, ..., 1, D]`, to broadcast over the tokens of x."""
    return values.view(x.shape[0], *[1] * (x.dim() - 2), x.shape[-1])


def check(x: Tensor, weight: Tensor, eps: float, scale: Tensor | None) -> str | None:
    D = x.shape[-1] if x.dim() else 0
    check_floating("x", x)
    check_parameter("weight", weight, (D,), "x", x)
    if scale is not None:
        check_parameter("scale", scale, (x.shape[0], D), "x", x)
    return too_wide("x", x)


@triton.jit(do_not_specialize=["N", "blocks"])
def _forward_kernel(
    x, weight, scale, y, x_b, x_n, scale_b, N, blocks, eps, D: tl.constexpr, BD: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    b = (tl.program_id(0) // blocks).to(tl.int64)
    n = (tl.program_id(0) % blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, BD)
    inside = (n < N)[:, None] & (d < D)[None, :]
    gain = load_gain(weight, scale, b * scale_b, d, D)
    values = tl.load(x + b * x_b + n[:, None] * x_n + d[None, :], mask=inside, other=0).to(tl.float32)
    out = values * inverse_rms(values, n < N, eps, D) * gain[None, :]
    tl.store(y + (b * N + n)[:, None] * D + d[None, :], rounded(out, y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["N", "splits", "tiles"])
def _backward_kernel(
    dy, x, weight, scale, dx, partial, dy_b, dy_n, x_b, x_n, scale_b, N, splits, tiles, eps,
    D: tl.constexpr, BD: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    b = (tl.program_id(0) // splits).to(tl.int64)
    first = (tl.program_id(0) % splits).to(tl.int64) * tiles * ROWS
    d = tl.arange(0, BD)
    gain = load_gain(weight, scale, b * scale_b, d, D)[None, :]
    total = tl.zeros([ROWS, BD], tl.float32)  # of dy * normed, which the gradients of weight and scale are made of
    for tile in range(tiles):
        n = first + tile * ROWS + tl.arange(0, ROWS)
        inside = (n < N)[:, None] & (d < D)[None, :]
        values = tl.load(x + b * x_b + n[:, None] * x_n + d[None, :], mask=inside, other=0).to(tl.float32)
        upstream = tl.load(dy + b * dy_b + n[:, None] * dy_n + d[None, :], mask=inside, other=0).to(tl.float32)
        rstd = inverse_rms(values, n < N, eps, D)
        total += upstream * (values * rstd)
        out = norm_gradient(upstream * gain, values, rstd, D)
        tl.store(dx + (b * N + n)[:, None] * D + d[None, :], rounded(out, dx.dtype.element_ty), mask=inside)
    tl.store(partial + tl.program_id(0).to(tl.int64) * D + d, tl.sum(total, axis=0), mask=d < D)


@triton.jit(do_not_specialize=["splits"])
def _factor_gradient_kernel(
    partial, weight, factor, d_factor, products, factor_b, splits,
    D: tl.constexpr, BD: tl.constexpr, ROWS: tl.constexpr, GATE: tl.constexpr,
):  # fmt: skip
    blocks: tl.constexpr = (D + BD - 1) // BD
    b = (tl.program_id(0) // blocks).to(tl.int64)
    d = (tl.program_id(0) % blocks) * BD + tl.arange(0, BD)
    total = sum_rows(partial + b * splits * D, d, splits, D, BD, ROWS)
    value = load_row(factor + b * factor_b, d, D)
    gradient = load_row(weight, d, D) * total
    if GATE:
        value = tanh(value)
        gradient *= 1 - value * value
    else:
        value += 1
    tl.store(d_factor + b * D + d, rounded(gradient, d_factor.dtype.element_ty), mask=d < D)
    tl.store(products + b * D + d, value * total, mask=d < D)


@triton.jit(do_not_specialize=["count"])
def _column_sums_kernel(rows, sums, count, D: tl.constexpr, BD: tl.constexpr, ROWS: tl.constexpr):
    d = tl.program_id(0) * BD + tl.arange(0, BD)
    total = sum_rows(rows, d, count, D, BD, ROWS)
    tl.store(sums + d, rounded(total, sums.dtype.element_ty), mask=d < D)


@triton.jit
def sum_rows(rows, d, count, D: tl.constexpr, BD: tl.constexpr, ROWS: tl.constexpr):
    """Sum of `[count, D]` fp32 over its rows, at channels d, in an order that depends only on the count."""
    total = tl.zeros([ROWS, BD], tl.float32)
    for first in range(0, count, ROWS):
        row = (first + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        total += tl.load(rows + row * D + d[None, :], mask=(row < count) & (d < D)[None, :], other=0)
    return tl.sum(total, axis=0)


FORWARD = RowRule("rms_norm", elements_per_thread=32, tried=(8, 16, 32, 64))
BACKWARD = SumRule("rms_norm_backward", elements_per_thread=16)  # holds two tiles and their sum
candidates = candidates_of(FORWARD, BACKWARD)


def launch_forward(x: Tensor, weight: Tensor, scale: Tensor | None, eps: float) -> Tensor:
    """y of x's shape, contiguous."""
    rows, weight = as_rows(x, scale is not None), weight.contiguous()
    scale, scale_b = _modulation(scale)
    B, N, D = rows.shape
    (y,) = like(x)
    config = FORWARD.choose(x, N, D)
    blocks = cdiv(N, config.rows)
    strides = *rows.stride()[:2], scale_b
    launch_rows(_forward_kernel, B * blocks, config, D, rows, weight, scale, y, *strides, N, blocks, eps)
    return y


def launch_backward(
    dy: Tensor, x: Tensor, weight: Tensor, scale: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and scale; the last is an empty tensor without a scale."""
    per_sample = scale is not None
    rows, upstream, weight = as_rows(x, per_sample), as_rows(dy, per_sample), weight.contiguous()
    scale, scale_b = _modulation(scale)
    B, N, D = rows.shape
    (dx,) = like(x)
    config = BACKWARD.choose(x, N, D)
    splits, tiles = config.split(B, N)
    partial = torch.empty(B, splits, D, dtype=torch.float32, device=x.device)
    strides = *upstream.stride()[:2], *rows.stride()[:2], scale_b
    arguments = rows, weight, scale, dx, partial, *strides, N, splits, tiles, eps
    launch_rows(_backward_kernel, B * splits, config, D, upstream, *arguments)
    return dx, *gain_gradients(partial, weight, scale)


def _modulation(scale: Tensor | None) -> tuple[Tensor | None, int]:
    """The scale with dense channels and the stride of its samples."""
    if scale is None:
        return None, 0
    scale = dense(scale)
    return scale, scale.stride(0)


def gain_gradients(
    partial: Tensor, weight: Tensor, factor: Tensor | None = None, gate: bool = False
) -> tuple[Tensor, Tensor]:
    """Gradients of `weight` and `factor` whose gain is `weight * (1 + factor)`, or `weight * tanh(factor)` with `gate`.

    Args:
        partial: `[B, splits, D]` fp32, sums over a part of a sample's tokens of upstream gradient times normed input.
        factor: `[B, D]`, or None; its gradient is then an empty tensor.
    """
    B, splits, D = partial.shape
    d_weight = torch.empty_like(weight)
    with torch.cuda.device_of(partial):
        if factor is None:
            rows, d_factor = partial.view(B * splits, D), weight.new_empty(0)
        else:
            rows = torch.empty(B, D, dtype=torch.float32, device=weight.device)
            (d_factor,) = like(factor)
            _factor_gradient_kernel[(B * cdiv(D, 64),)](
                partial, weight, factor, d_factor, rows, factor.stride(0), splits,
                D, 64, 32, gate, num_warps=4, **ROW_OPTIONS,
            )  # fmt: skip
        _column_sums_kernel[(cdiv(D, 32),)](
            rows, d_weight, rows.shape[0], D, 32, 128, num_warps=8, **ROW_OPTIONS
        )  # fmt: skip
    return d_weight, d_factor


def launches(shape: ModelShape, dtype: torch.dtype) -> None:
    B, _, D = shape.rows
    x = torch.empty(shape.rows, dtype=dtype, device="meta")
    scale = torch.empty(B, 6 * D, dtype=dtype, device="meta")[:, :D]
    for parameters in parameter_dtypes(dtype):
        for modulation in (scale, None):
            weight = torch.empty(D, dtype=parameters, device="meta")
            launch_forward(x, weight, modulation, 1e-6)
            launch_backward(x, x, weight, modulation, 1e-6)


def _fake_backward(dy: Tensor, x: Tensor, weight: Tensor, scale: Tensor | None, eps: float) -> tuple[Tensor, ...]:
    return like(x, weight, weight[:0] if scale is None else scale)


def _gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, scale = ctx.saved_tensors
    dx, d_weight, d_scale = _backward(dy, x, weight, scale, *ctx.constants)
    return dx, d_weight, None if scale is None else d_scale, None


_forward = differentiable("rms_norm", launch_forward, lambda x, *_: like(x)[0], _gradients)
_backward = backward_op("rms_norm", launch_backward, _fake_backward)


def _fused(x: Tensor, weight: Tensor, eps: float, scale: Tensor | None) -> Tensor:
    return _forward(x, weight, scale, eps)


def _make(make: Maker, shape: ModelShape) -> Tensors:
    return make.leaf(*shape.rows), make.leaf(shape.hidden_size)


def _make_modulated(make: Maker, shape: ModelShape) -> Tensors:
    return *_make(make, shape), make.leaf(shape.batch_size, shape.hidden_size)


def _modulated(operations: Any, x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    return operations.rms_norm(x, weight, scale=scale)


WORKLOADS = (
    Workload("rms_norm", _make, "hidden_size", (2, 3)),
    Workload("modulated_rms_norm", _make_modulated, "hidden_size", (2, 3), call=_modulated),
)
OPERATION = Operation("rms_norm", reference, check, _fused, launches, "hidden_size", candidates, WORKLOADS)
rms_norm = OPERATION.public()
