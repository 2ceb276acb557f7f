"""RMSNorm of every head of q and k, then rotary positions, forward and backward (Henry et al. 2020; Su et al. 2021).

One launch serves q and k, each read as it lies in its projection. The results are new tensors: the backward needs the
projection's output, so writing over it would only be right where nothing is differentiated.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from blip3o_kernels.autograd import backward_op, differentiable, like
from blip3o_kernels.checks import check_device, check_floating, check_parameter, too_wide
from blip3o_kernels.launch import RowRule, SumRule, candidates_of, cdiv, dense, launch_rows
from blip3o_kernels.numeric import inverse_rms, load_row, norm_gradient, rounded
from blip3o_kernels.operation import Operation, compute_dtype
from blip3o_kernels.rms_norm import gain_gradients, normalized
from blip3o_kernels.triton_language import tl, triton
from blip3o_kernels.workload import ModelShape, Workload, parameter_dtypes


def reference(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor | None, sin: Tensor | None, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """RMSNorm of every head of q and k (Henry et al. 2020), then rotary positions (Su et al. 2021).

    Channels `(2i, 2i+1)` of token n are a pair, turned by the angle whose cosine and sine are `cos[n, i]`, `sin[n, i]`.

    Args:
        q: `[B, N, H, D]`.  k: `[B, N, Hkv, D]`; with tables both have the tables' N, without they may differ.
        q_weight, k_weight: `[D]`.
        cos, sin: `[N, D/2]`, or both None for no rotation. The kernel gives them no gradient.

    Raises:
        ValueError: naming the argument whose shape, dtype or device does not fit.
    """
    return _norm_rope(q, q_weight, cos, sin, eps), _norm_rope(k, k_weight, cos, sin, eps)


def _norm_rope(x: Tensor, weight: Tensor, cos: Tensor | None, sin: Tensor | None, eps: float) -> Tensor:
    y = normalized(x, eps, weight.to(compute_dtype(x)))
    if cos is not None and sin is not None:
        y = _rotate_pairs(y, cos.to(y.dtype)[:, None], sin.to(y.dtype)[:, None])  # tables: [N, 1, D/2]
    return y.to(x.dtype)


def _rotate_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Channels (2i, 2i+1) as a complex number, times `cos + i sin`: half the time of four real products on CPU."""
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * torch.complex(cos, sin)).flatten(-2)


def check(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor | None, sin: Tensor | None, eps: float
) -> str | None:
    if (cos is None) != (sin is None):
        raise ValueError("cos and sin: give both tables or neither")
    for name, x, weight in (("q", q, q_weight), ("k", k, k_weight)):
        check_floating(name, x, dims=4)
        N, D = x.shape[1], x.shape[3]
        check_parameter(f"{name}_weight", weight, (D,), name, x)
        if cos is not None and sin is not None:
            if D % 2:
                raise ValueError(f"{name}: expected an even number of channels to rotate in pairs, found {D}")
            check_parameter(f"cos (for {name})", cos, (N, D // 2), name, x)
            check_parameter(f"sin (for {name})", sin, (N, D // 2), name, x)
    check_device("k", k, "q", q)
    return too_wide("q", q)


@triton.jit(do_not_specialize=["Nq", "Nk", "q_blocks", "k_blocks"])
def _forward_kernel(
    q, k, q_weight, k_weight, cos, sin, q_out, k_out, q_b, q_n, q_h, k_b, k_n, k_h,
    Nq, Nk, q_blocks, k_blocks, eps,
    H: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    b = (tl.program_id(0) // (q_blocks + k_blocks)).to(tl.int64)
    block = tl.program_id(0) % (q_blocks + k_blocks)
    if block < q_blocks:
        out = q_out + b * Nq * H * D
        _forward_rows(q + b * q_b, q_weight, cos, sin, out, q_n, q_h, Nq, block, eps, H, D, BD, ROWS)
    else:
        out = k_out + b * Nk * HKV * D
        _forward_rows(k + b * k_b, k_weight, cos, sin, out, k_n, k_h, Nk, block - q_blocks, eps, HKV, D, BD, ROWS)


@triton.jit
def _forward_rows(
    x, weight, cos, sin, y, x_n, x_h, N, block, eps,
    H: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row = block.to(tl.int64) * ROWS + tl.arange(0, ROWS)  # head row % H of token row // H
    n, present = row // H, row < N * H
    d = tl.arange(0, BD)
    inside = present[:, None] & (d < D)[None, :]
    pointers = x + (n * x_n + (row % H) * x_h)[:, None] + d[None, :]
    values = tl.load(pointers, mask=inside, other=0).to(tl.float32)
    out = values * inverse_rms(values, present, eps, D) * load_row(weight, d, D)[None, :]
    if cos is not None:
        out = turned(out, cos, sin, n, present, 1, D, BD, ROWS)
    tl.store(y + row[:, None] * D + d[None, :], rounded(out, y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["Nq", "Nk", "q_splits", "k_splits", "tiles"])
def _backward_kernel(
    dq, dk, q, k, q_weight, k_weight, cos, sin, dq_out, dk_out, q_partial, k_partial,
    dq_b, dq_n, dq_h, dk_b, dk_n, dk_h, q_b, q_n, q_h, k_b, k_n, k_h, Nq, Nk, q_splits, k_splits, tiles, eps,
    H: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    b = (tl.program_id(0) // (q_splits + k_splits)).to(tl.int64)
    split = tl.program_id(0) % (q_splits + k_splits)
    if split < q_splits:
        out = dq_out + b * Nq * H * D
        partial = q_partial + (b * q_splits + split) * D
        _backward_rows(dq + b * dq_b, q + b * q_b, q_weight, cos, sin, out, partial, dq_n, dq_h, q_n, q_h, Nq,
                       split, tiles, eps, H, D, BD, ROWS)  # fmt: skip
    else:
        split -= q_splits
        out = dk_out + b * Nk * HKV * D
        partial = k_partial + (b * k_splits + split) * D
        _backward_rows(dk + b * dk_b, k + b * k_b, k_weight, cos, sin, out, partial, dk_n, dk_h, k_n, k_h, Nk,
                       split, tiles, eps, HKV, D, BD, ROWS)  # fmt: skip


@triton.jit
def _backward_rows(
    dy, x, weight, cos, sin, dx, partial, dy_n, dy_h, x_n, x_h, N, split, tiles, eps,
    H: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    d = tl.arange(0, BD)
    gain = load_row(weight, d, D)[None, :]
    total = tl.zeros([ROWS, BD], tl.float32)
    for tile in range(tiles):
        row = (split * tiles + tile).to(tl.int64) * ROWS + tl.arange(0, ROWS)
        n, h, present = row // H, row % H, row < N * H
        inside = present[:, None] & (d < D)[None, :]
        upstream = tl.load(dy + (n * dy_n + h * dy_h)[:, None] + d[None, :], mask=inside, other=0).to(tl.float32)
        values = tl.load(x + (n * x_n + h * x_h)[:, None] + d[None, :], mask=inside, other=0).to(tl.float32)
        if cos is not None:
            upstream = turned(upstream, cos, sin, n, present, -1, D, BD, ROWS)
        rstd = inverse_rms(values, present, eps, D)
        total += upstream * (values * rstd)
        out = norm_gradient(upstream * gain, values, rstd, D)
        tl.store(dx + row[:, None] * D + d[None, :], rounded(out, dx.dtype.element_ty), mask=inside)
    tl.store(partial + d, tl.sum(total, axis=0), mask=d < D)


@triton.jit
def turned(
    x, cos, sin, n, present, DIRECTION: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    """Every pair (2i, 2i+1) of [ROWS, BD] turned by its angle, or back where DIRECTION is -1."""
    i = tl.arange(0, BD // 2)
    inside = present[:, None] & (i < D // 2)[None, :]
    table = n[:, None] * (D // 2) + i[None, :]
    c = tl.load(cos + table, mask=inside, other=0).to(tl.float32)
    s = DIRECTION * tl.load(sin + table, mask=inside, other=0).to(tl.float32)
    even, odd = tl.split(tl.reshape(x, (ROWS, BD // 2, 2)))
    return tl.reshape(tl.join(even * c - odd * s, even * s + odd * c), (ROWS, BD))


# The rows are heads of tokens. The backward holds two tiles and their sum; of wide heads a thread gets less, as with
# more ptxas spills a register or two on sm_90 and sm_100.
FORWARD = RowRule("qk_norm_rope", elements_per_thread=16)
BACKWARD = SumRule("qk_norm_rope_backward", elements_per_thread=8, tile=2048)
BACKWARD_WIDE = SumRule("qk_norm_rope_backward", elements_per_thread=4, tile=1024)
candidates = candidates_of(FORWARD, BACKWARD)


def launch_forward(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor | None, sin: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """q and k, normalised and turned, contiguous."""
    q, k = dense(q), dense(k)
    B, Nq, H, D = q.shape
    Nk, Hkv = k.shape[1:3]
    q_out, k_out = like(q, k)
    config = FORWARD.choose(q, Nq * H, D)
    q_blocks, k_blocks = cdiv(Nq * H, config.rows), cdiv(Nk * Hkv, config.rows)
    tensors = k, *_contiguous(q_weight, k_weight, cos, sin), q_out, k_out
    sizes = *q.stride()[:3], *k.stride()[:3], Nq, Nk, q_blocks, k_blocks, eps, H, Hkv
    launch_rows(_forward_kernel, B * (q_blocks + k_blocks), config, D, q, *tensors, *sizes)
    return q_out, k_out


def launch_backward(
    dq: Tensor,
    dk: Tensor,
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, q_weight and k_weight."""
    dq, dk, q, k = dense(dq), dense(dk), dense(q), dense(k)
    B, Nq, H, D = q.shape
    Nk, Hkv = k.shape[1:3]
    dq_out, dk_out = like(q, k)
    config = (BACKWARD_WIDE if D > 64 else BACKWARD).choose(q, Nq * H, D)
    q_splits, tiles = config.split(B, Nq * H)
    k_splits = cdiv(Nk * Hkv, config.rows * tiles)
    q_partial, k_partial = (q.new_empty(B, splits, D, dtype=torch.float32) for splits in (q_splits, k_splits))
    tensors = dk, q, k, *_contiguous(q_weight, k_weight, cos, sin), dq_out, dk_out, q_partial, k_partial
    strides = *dq.stride()[:3], *dk.stride()[:3], *q.stride()[:3], *k.stride()[:3]
    sizes = Nq, Nk, q_splits, k_splits, tiles, eps, H, Hkv
    launch_rows(_backward_kernel, B * (q_splits + k_splits), config, D, dq, *tensors, *strides, *sizes)
    return dq_out, dk_out, gain_gradients(q_partial, q_weight)[0], gain_gradients(k_partial, k_weight)[0]


def _contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if x is None else x.contiguous() for x in tensors]


def launches(shape: ModelShape, dtype: torch.dtype) -> None:
    B, N, H, Hkv, D = shape.batch_size, shape.num_tokens, shape.num_heads, shape.num_kv_heads, shape.head_dim
    qkv = torch.empty(B, N, H + 2 * Hkv, D, dtype=dtype, device="meta")
    q, k, _ = qkv.split((H, Hkv, Hkv), dim=2)
    table = torch.empty(N, D // 2, device="meta")
    for parameters in parameter_dtypes(dtype):
        for tables in (table, None):
            weight = torch.empty(D, dtype=parameters, device="meta")
            q_out, k_out = launch_forward(q, k, weight, weight, tables, tables, 1e-6)
            launch_backward(q_out, k_out, q, k, weight, weight, tables, tables, 1e-6)


def _gradients(ctx: Any, dq: Tensor, dk: Tensor) -> tuple[Tensor | None, ...]:
    return *_backward(dq, dk, *ctx.saved_tensors, *ctx.constants), None, None, None


_fused = differentiable("qk_norm_rope", launch_forward, lambda q, k, *_: like(q, k), _gradients)
_backward = backward_op("qk_norm_rope", launch_backward, lambda *x: like(*x[2:6]))

WORKLOADS = (
    Workload("qk_norm_rope", lambda make, shape: (*make.qkv(shape)[:2], *make.rope(shape)), "qk_width", (2, 3)),
)
OPERATION = Operation("qk_norm_rope", reference, check, _fused, launches, "head_dim", candidates, WORKLOADS)
qk_norm_rope = OPERATION.public()
