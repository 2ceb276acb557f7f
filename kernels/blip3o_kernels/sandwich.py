"""The end of one branch and the beginning of the next: post-norm, tanh gate, residual add, pre-norm and modulation.

One pass: the forward reads two tensors and writes two, the backward reads four and writes two, each once. Sums over
tokens go through partial sums in a fixed order, as in `rms_norm`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from blip3o_kernels.autograd import backward_op, differentiable, like
from blip3o_kernels.checks import check_floating, check_like, check_parameter, check_shape, too_wide
from blip3o_kernels.launch import RowRule, SumRule, as_rows, candidates_of, cdiv, dense, launch_rows
from blip3o_kernels.numeric import inverse_rms, load_gain, load_row, norm_gradient, rounded, tanh
from blip3o_kernels.operation import Operation, compute_dtype
from blip3o_kernels.rms_norm import gain_gradients, normalized, per_sample
from blip3o_kernels.triton_language import tl, triton
from blip3o_kernels.workload import Maker, ModelShape, Tensors, Workload, parameter_dtypes


def reference(
    branch_out: Tensor,
    residual: Tensor,
    post_weight: Tensor,
    gate: Tensor,
    next_pre_weight: Tensor,
    next_scale: Tensor,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """End one branch of a block and begin the next one (sandwich norm, after Lumina-Next, Zhuo et al. 2024).

        new_residual = residual + tanh(gate) * rms_norm(branch_out, post_weight)
        next_input   = rms_norm(new_residual, next_pre_weight, scale=next_scale)

    The second line reads `new_residual` as rounded to its dtype.

    Args:
        branch_out, residual: `[B, N, D]`, of one dtype. The kernel takes D to 8192.
        post_weight, next_pre_weight: `[D]`.
        gate, next_scale: `[B, D]`.

    Returns:
        `(new_residual, next_input)`, both `[B, N, D]`.

    Raises:
        ValueError: naming the argument whose shape, dtype or device does not fit.
    """
    dtype = compute_dtype(residual)
    gain = per_sample(post_weight.to(dtype) * torch.tanh(gate.to(dtype)), branch_out)
    new_residual = torch.add(residual, normalized(branch_out, eps, gain)).to(residual.dtype)
    gain = per_sample(next_pre_weight.to(dtype) * (1 + next_scale.to(dtype)), branch_out)
    return new_residual, normalized(new_residual, eps, gain).to(residual.dtype)


def check(branch_out: Tensor, residual: Tensor, *parameters: Any) -> str | None:
    check_floating("branch_out", branch_out, dims=3)
    B, _, D = branch_out.shape
    check_shape("residual", residual, branch_out.shape)
    check_like("residual", residual, "branch_out", branch_out)
    names = ("post_weight", "gate", "next_pre_weight", "next_scale")
    for name, parameter, shape in zip(names, parameters, ((D,), (B, D)) * 2, strict=False):  # eps comes last
        check_parameter(name, parameter, shape, "branch_out", branch_out)
    return too_wide("branch_out", branch_out)


@triton.jit(do_not_specialize=["N", "blocks"])
def _forward_kernel(
    branch_out, residual, post_weight, gate, pre_weight, scale, new_residual, next_input,
    branch_b, branch_n, residual_b, residual_n, gate_b, scale_b, N, blocks, eps,
    D: tl.constexpr, BD: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    b = (tl.program_id(0) // blocks).to(tl.int64)
    n = (tl.program_id(0) % blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, BD)
    inside = (n < N)[:, None] & (d < D)[None, :]
    post_gain = load_row(post_weight, d, D) * tanh(load_row(gate + b * gate_b, d, D))
    pre_gain = load_gain(pre_weight, scale, b * scale_b, d, D)
    branch = load_tile(branch_out + b * branch_b, n, branch_n, d, inside)
    stream = load_tile(residual + b * residual_b, n, residual_n, d, inside)

    stream += branch * inverse_rms(branch, n < N, eps, D) * post_gain[None, :]
    stream = rounded(stream, new_residual.dtype.element_ty)
    out = (b * N + n)[:, None] * D + d[None, :]
    tl.store(new_residual + out, stream, mask=inside)

    stream = stream.to(tl.float32)
    normed = stream * inverse_rms(stream, n < N, eps, D) * pre_gain[None, :]
    tl.store(next_input + out, rounded(normed, next_input.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["N", "splits", "tiles"])
def _backward_kernel(
    d_new_residual, d_next_input, branch_out, new_residual, post_weight, gate, pre_weight, scale,
    d_branch, d_residual, post_partial, pre_partial,
    d_new_residual_b, d_new_residual_n, d_next_input_b, d_next_input_n, branch_b, branch_n, gate_b, scale_b,
    N, splits, tiles, eps, D: tl.constexpr, BD: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    b = (tl.program_id(0) // splits).to(tl.int64)
    first = (tl.program_id(0) % splits).to(tl.int64) * tiles * ROWS
    d = tl.arange(0, BD)
    post_gain = (load_row(post_weight, d, D) * tanh(load_row(gate + b * gate_b, d, D)))[None, :]
    pre_gain = load_gain(pre_weight, scale, b * scale_b, d, D)[None, :]
    post_total = tl.zeros([ROWS, BD], tl.float32)
    pre_total = tl.zeros([ROWS, BD], tl.float32)
    for tile in range(tiles):
        n = first + tile * ROWS + tl.arange(0, ROWS)
        inside = (n < N)[:, None] & (d < D)[None, :]
        stream = load_tile(new_residual + b * N * D, n, D, d, inside)
        upstream = load_tile(d_next_input + b * d_next_input_b, n, d_next_input_n, d, inside)
        d_stream = load_tile(d_new_residual + b * d_new_residual_b, n, d_new_residual_n, d, inside)
        branch = load_tile(branch_out + b * branch_b, n, branch_n, d, inside)
        out = (b * N + n)[:, None] * D + d[None, :]

        rstd = inverse_rms(stream, n < N, eps, D)
        pre_total += upstream * (stream * rstd)
        d_stream += norm_gradient(upstream * pre_gain, stream, rstd, D)
        tl.store(d_residual + out, rounded(d_stream, d_residual.dtype.element_ty), mask=inside)

        rstd = inverse_rms(branch, n < N, eps, D)
        post_total += d_stream * (branch * rstd)
        d_stream = norm_gradient(d_stream * post_gain, branch, rstd, D)
        tl.store(d_branch + out, rounded(d_stream, d_branch.dtype.element_ty), mask=inside)
    partial = tl.program_id(0).to(tl.int64) * D + d
    tl.store(post_partial + partial, tl.sum(post_total, axis=0), mask=d < D)
    tl.store(pre_partial + partial, tl.sum(pre_total, axis=0), mask=d < D)


@triton.jit
def load_tile(pointer, n, stride_n, d, inside):
    """[ROWS, BD] fp32, zero outside."""
    return tl.load(pointer + n[:, None] * stride_n + d[None, :], mask=inside, other=0).to(tl.float32)


FORWARD = RowRule("sandwich", elements_per_thread=16)  # holds two tiles
BACKWARD = SumRule("sandwich_backward", elements_per_thread=8, tile=2048, tried=(8, 16))  # four tiles and two sums
candidates = candidates_of(FORWARD, BACKWARD)


def launch_forward(
    branch: Tensor, stream: Tensor, post_weight: Tensor, gate: Tensor, pre_weight: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """New residual and next input, `[B, N, D]`, contiguous."""
    branch, stream, gate, scale = as_rows(branch), as_rows(stream), dense(gate), dense(scale)
    B, N, D = branch.shape
    new_residual, next_input = like(branch, branch)
    config = FORWARD.choose(branch, N, D)
    blocks = cdiv(N, config.rows)
    tensors = stream, post_weight.contiguous(), gate, pre_weight.contiguous(), scale, new_residual, next_input
    strides = *branch.stride()[:2], *stream.stride()[:2], gate.stride(0), scale.stride(0)
    launch_rows(_forward_kernel, B * blocks, config, D, branch, *tensors, *strides, N, blocks, eps)
    return new_residual, next_input


def launch_backward(
    d_stream: Tensor,
    upstream: Tensor,
    branch: Tensor,
    new_residual: Tensor,
    post_weight: Tensor,
    gate: Tensor,
    pre_weight: Tensor,
    scale: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the six tensors of `sandwich`, in its order, from those of its two outputs."""
    branch, d_stream, upstream = as_rows(branch), as_rows(d_stream), as_rows(upstream)
    post_weight, gate, pre_weight, scale = post_weight.contiguous(), dense(gate), pre_weight.contiguous(), dense(scale)
    B, N, D = branch.shape
    d_branch, d_residual = like(branch, branch)
    config = BACKWARD.choose(branch, N, D)
    splits, tiles = config.split(B, N)
    post, pre = (torch.empty(B, splits, D, dtype=torch.float32, device=branch.device) for _ in range(2))
    tensors = upstream, branch, new_residual, post_weight, gate, pre_weight, scale, d_branch, d_residual, post, pre
    strides = *d_stream.stride()[:2], *upstream.stride()[:2], *branch.stride()[:2], gate.stride(0), scale.stride(0)
    launch_rows(_backward_kernel, B * splits, config, D, d_stream, *tensors, *strides, N, splits, tiles, eps)
    post_gradients = gain_gradients(post, post_weight, gate, gate=True)
    return d_branch, d_residual, *post_gradients, *gain_gradients(pre, pre_weight, scale)


def launches(shape: ModelShape, dtype: torch.dtype) -> None:
    B, _, D = shape.rows
    x = torch.empty(shape.rows, dtype=dtype, device="meta")
    gate, scale = torch.empty(B, 6 * D, dtype=dtype, device="meta").chunk(6, dim=-1)[:2]
    for parameters in parameter_dtypes(dtype):
        weight = torch.empty(D, dtype=parameters, device="meta")
        launch_forward(x, x, weight, gate, weight, scale, 1e-6)
        launch_backward(x, x, x, x, weight, gate, weight, scale, 1e-6)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    branch, _, *parameters, ctx.eps = inputs
    ctx.save_for_backward(branch, output[0], *parameters)


def _gradients(ctx: Any, d_new_residual: Tensor, d_next_input: Tensor) -> tuple[Tensor | None, ...]:
    return *_backward(d_new_residual, d_next_input, *ctx.saved_tensors, ctx.eps), None


_fused = differentiable("sandwich", launch_forward, lambda branch, *_: like(branch, branch), _gradients, _save)
_backward = backward_op("sandwich", launch_backward, lambda *x: like(x[2], x[2], *x[4:-1]))


def _make(make: Maker, shape: ModelShape) -> Tensors:
    B, _, D = shape.rows
    gate, scale = make.leaves((B, 6 * D), (D, D, 4 * D), -1)[:2]
    return make.leaf(*shape.rows), make.leaf(*shape.rows), make.leaf(D), gate, make.leaf(D), scale


WORKLOADS = (Workload("sandwich", _make, "hidden_size", (4, 6)),)
OPERATION = Operation("sandwich", reference, check, _fused, launches, "hidden_size", candidates, WORKLOADS)
sandwich = OPERATION.public()
