"""Grouped-query attention without masks, forward and backward, of dense or packed batches (after Dao 2023).

The G query heads that share a key head are one matrix of Nq * G rows; row r is head `r % G` of token `r // G`. So a
block of rows reads K and V once for the group, 257 tokens of 3 heads are 6 blocks of 128 rows and a little, not 3 * 3,
and one program holds all that a key's gradient is summed from: there are no atomics, and results repeat bitwise.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from blip3o_kernels import reference
from blip3o_kernels.attention_config import AttentionConfig, attention_config
from blip3o_kernels.autograd import differentiable, differentiable_once
from blip3o_kernels.checks import check_gqa_attention
from blip3o_kernels.dispatch import triton_chosen
from blip3o_kernels.launch import FP_FUSION, arch_of, cdiv, choose, next_power_of_2, shape_class
from blip3o_kernels.numeric import INTERPRETED, rounded

MAX_HEAD_DIM = 128
LOG2_E = 1.4426950408889634
EDGE = tl.constexpr(16)  # the least block of tl.dot: what whole blocks leave over goes in steps of it
SIZES = ["Nq", "Nk", "Hkv", "num_blocks"]  # one compilation for all values of these


@triton.jit
def _dot(a, b, PRECISION: tl.constexpr):
    if INTERPRETED:  # which would multiply the bit patterns of bf16
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def _tokens(cu_seqlens, b, N):
    """Index of sample b's first token among all tokens, and how many it has."""
    if cu_seqlens is None:
        return b.to(tl.int64) * N, N
    else:
        first = tl.load(cu_seqlens + b)
        return first.to(tl.int64), tl.load(cu_seqlens + b + 1) - first


@triton.jit
def _head(x, cu_seqlens, b, first, h, stride_b, stride_n, stride_h):
    """Address of head h in sample b's first token."""
    if cu_seqlens is None:
        return x + b.to(tl.int64) * stride_b + h * stride_h
    else:
        return x + first * stride_n + h * stride_h


@triton.jit
def _load(x, offsets, inside, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """`[rows, BLOCK_D]`, zero past D and where not `inside`, which is None if every row is inside."""
    d = tl.arange(0, BLOCK_D)
    pointers = x + offsets[:, None] + d[None, :]
    if inside is not None and BLOCK_D > D:
        return tl.load(pointers, mask=inside[:, None] & (d < D)[None, :], other=0.0)
    elif inside is not None:
        return tl.load(pointers, mask=inside[:, None], other=0.0)
    elif BLOCK_D > D:
        return tl.load(pointers, mask=(d < D)[None, :], other=0.0)
    else:
        return tl.load(pointers)


@triton.jit
def _load_again(x, offsets, inside, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """As `_load`, at every call: what it gives is not kept in registers around a loop."""
    d = tl.arange(0, BLOCK_D)
    mask = inside[:, None] & (d < D)[None, :]
    return tl.load(x + offsets[:, None] + d[None, :], mask=mask, other=0.0, volatile=True)


@triton.jit
def _store(x, offsets, inside, values, D: tl.constexpr, BLOCK_D: tl.constexpr):
    d = tl.arange(0, BLOCK_D)
    mask = inside[:, None] & (d < D)[None, :] if BLOCK_D > D else inside[:, None]
    tl.store(x + offsets[:, None] + d[None, :], rounded(values, x.dtype.element_ty), mask=mask)


@triton.jit
def _attend(q, acc, top, total, k, v, offsets_k, offsets_v, inside, scale_log2, D: tl.constexpr,
            BLOCK_D: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Online softmax over one more block of keys: `acc` and `total` are relative to 2 ** `top`."""
    s = _dot(q, tl.trans(_load(k, offsets_k, inside, D, BLOCK_D)), PRECISION)  # [rows, keys]
    if inside is not None:
        s = tl.where(inside[None, :], s, float("-inf"))
    new_top = tl.maximum(top, tl.max(s, 1) * scale_log2)
    p = tl.exp2(s * scale_log2 - new_top[:, None])
    shrink = tl.exp2(top - new_top)
    acc = acc * shrink[:, None]
    value = _load(v, offsets_v, inside, D, BLOCK_D)
    acc += _dot(rounded(p, value.dtype), value, PRECISION)
    return acc, new_top, total * shrink + tl.sum(p, 1)


@triton.jit
def _forward_rows(q, k, v, out, lse, start, Nq, Nk, H, scale_log2, stride_qn, stride_qh, stride_kn, stride_vn,
                  G: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
                  PRECISION: tl.constexpr):  # fmt: skip
    rows = start + tl.arange(0, ROWS)
    inside = rows < Nq * G
    n, g = (rows // G).to(tl.int64), rows % G
    query = _load(q, n * stride_qn + g * stride_qh, inside, D, BLOCK_D)
    acc = tl.zeros([ROWS, BLOCK_D], tl.float32)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    whole = Nk // KEYS * KEYS
    keys = tl.arange(0, KEYS).to(tl.int64)
    for _ in range(0, whole, KEYS):
        acc, top, total = _attend(query, acc, top, total, k, v, keys * stride_kn, keys * stride_vn, None,
                                  scale_log2, D, BLOCK_D, PRECISION)  # fmt: skip
        k += tl.cast(stride_kn, tl.int64) * KEYS
        v += tl.cast(stride_vn, tl.int64) * KEYS
    few = tl.arange(0, EDGE).to(tl.int64)
    for j in tl.range(whole, Nk, EDGE, num_stages=1):
        acc, top, total = _attend(query, acc, top, total, k, v, few * stride_kn, few * stride_vn, j + few < Nk,
                                  scale_log2, D, BLOCK_D, PRECISION)  # fmt: skip
        k += tl.cast(stride_kn, tl.int64) * EDGE
        v += tl.cast(stride_vn, tl.int64) * EDGE
    total = tl.where(total > 0, total, 1.0)  # no keys: zeros
    _store(out, (n * H + g) * D, inside, acc / total[:, None], D, BLOCK_D)
    tl.store(lse + n * H + g, top + tl.log2(total), mask=inside)


@triton.jit(do_not_specialize=SIZES)
def _forward_kernel(
    q, k, v, cu_seqlens_q, cu_seqlens_k, out, lse, scale_log2,
    stride_qb, stride_qn, stride_qh, stride_kb, stride_kn, stride_kh, stride_vb, stride_vn, stride_vh,
    Nq, Nk, Hkv, num_blocks,
    G: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """A program computes ROWS rows of one group of heads of one sample."""
    block, head = tl.program_id(0) % num_blocks, tl.program_id(0) // num_blocks
    b, h = head // Hkv, head % Hkv
    H = Hkv * G
    first_q, Nq = _tokens(cu_seqlens_q, b, Nq)
    first_k, Nk = _tokens(cu_seqlens_k, b, Nk)
    q = _head(q, cu_seqlens_q, b, first_q, h * G, stride_qb, stride_qn, stride_qh)
    k = _head(k, cu_seqlens_k, b, first_k, h, stride_kb, stride_kn, stride_kh)
    v = _head(v, cu_seqlens_k, b, first_k, h, stride_vb, stride_vn, stride_vh)
    out += (first_q * H + h * G) * D
    lse += first_q * H + h * G
    start = block * ROWS
    left = Nq * G - start
    if left > EDGE:
        _forward_rows(q, k, v, out, lse, start, Nq, Nk, H, scale_log2, stride_qn, stride_qh, stride_kn, stride_vn,
                      G, D, BLOCK_D, ROWS, KEYS, PRECISION)  # fmt: skip
    elif left > 0:
        _forward_rows(q, k, v, out, lse, start, Nq, Nk, H, scale_log2, stride_qn, stride_qh, stride_kn, stride_vn,
                      G, D, BLOCK_D, EDGE, KEYS, PRECISION)  # fmt: skip


@triton.jit
def _dq_step(query, grad, grad_out, offsets_g, rows_inside, acc, lse, delta, k, v, offsets_k, offsets_v, inside,
             scale_log2, D: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Add one block of keys to dq."""
    key = _load(k, offsets_k, inside, D, BLOCK_D)
    p = tl.exp2(_dot(query, tl.trans(key), PRECISION) * scale_log2 - lse[:, None])  # [rows, keys]
    if inside is not None:
        p = tl.where(inside[None, :], p, 0.0)
    if BLOCK_D > 64 and key.dtype == tl.float32:  # which would spill
        grad = _load_again(grad_out, offsets_g, rows_inside, D, BLOCK_D)
    dp = _dot(grad, tl.trans(_load(v, offsets_v, inside, D, BLOCK_D)), PRECISION)
    ds = p * (dp - delta[:, None])
    return acc + _dot(rounded(ds, key.dtype), key, PRECISION)


@triton.jit
def _dq_rows(q, k, v, out, grad_out, lse, dq, delta, start, Nq, Nk, H, scale, scale_log2,
             stride_qn, stride_qh, stride_kn, stride_vn, stride_gn, stride_gh, G: tl.constexpr, D: tl.constexpr,
             BLOCK_D: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    rows = start + tl.arange(0, ROWS)
    inside = rows < Nq * G
    n, g = (rows // G).to(tl.int64), rows % G
    query = _load(q, n * stride_qn + g * stride_qh, inside, D, BLOCK_D)
    offsets_g = n * stride_gn + g * stride_gh
    grad = _load(grad_out, offsets_g, inside, D, BLOCK_D)
    result = _load(out, (n * H + g) * D, inside, D, BLOCK_D)
    row_delta = tl.sum(result.to(tl.float32) * grad.to(tl.float32), 1)
    tl.store(delta + n * H + g, row_delta, mask=inside)
    row_lse = tl.load(lse + n * H + g, mask=inside, other=float("inf"))  # outside: weights of zero
    acc = tl.zeros([ROWS, BLOCK_D], tl.float32)
    whole = Nk // KEYS * KEYS
    keys = tl.arange(0, KEYS).to(tl.int64)
    for _ in range(0, whole, KEYS):
        acc = _dq_step(query, grad, grad_out, offsets_g, inside, acc, row_lse, row_delta, k, v,
                       keys * stride_kn, keys * stride_vn, None, scale_log2, D, BLOCK_D, PRECISION)  # fmt: skip
        k += tl.cast(stride_kn, tl.int64) * KEYS
        v += tl.cast(stride_vn, tl.int64) * KEYS
    few = tl.arange(0, EDGE).to(tl.int64)
    for j in tl.range(whole, Nk, EDGE, num_stages=1):
        acc = _dq_step(query, grad, grad_out, offsets_g, inside, acc, row_lse, row_delta, k, v,
                       few * stride_kn, few * stride_vn, j + few < Nk, scale_log2, D, BLOCK_D, PRECISION)  # fmt: skip
        k += tl.cast(stride_kn, tl.int64) * EDGE
        v += tl.cast(stride_vn, tl.int64) * EDGE
    _store(dq, (n * H + g) * D, inside, acc * scale, D, BLOCK_D)


@triton.jit(do_not_specialize=SIZES)
def _dq_kernel(
    q, k, v, out, grad_out, lse, cu_seqlens_q, cu_seqlens_k, dq, delta, scale, scale_log2,
    stride_qb, stride_qn, stride_qh, stride_kb, stride_kn, stride_kh, stride_vb, stride_vn, stride_vh,
    stride_gb, stride_gn, stride_gh,
    Nq, Nk, Hkv, num_blocks,
    G: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """A program computes ROWS rows of dq, and `delta`, the sum of out * grad_out of a row, for the next kernel."""
    block, head = tl.program_id(0) % num_blocks, tl.program_id(0) // num_blocks
    b, h = head // Hkv, head % Hkv
    H = Hkv * G
    first_q, Nq = _tokens(cu_seqlens_q, b, Nq)
    first_k, Nk = _tokens(cu_seqlens_k, b, Nk)
    q = _head(q, cu_seqlens_q, b, first_q, h * G, stride_qb, stride_qn, stride_qh)
    k = _head(k, cu_seqlens_k, b, first_k, h, stride_kb, stride_kn, stride_kh)
    v = _head(v, cu_seqlens_k, b, first_k, h, stride_vb, stride_vn, stride_vh)
    grad_out = _head(grad_out, cu_seqlens_q, b, first_q, h * G, stride_gb, stride_gn, stride_gh)
    row = first_q * H + h * G
    out, dq, lse, delta = out + row * D, dq + row * D, lse + row, delta + row
    start = block * ROWS
    left = Nq * G - start
    if left > EDGE:
        _dq_rows(q, k, v, out, grad_out, lse, dq, delta, start, Nq, Nk, H, scale, scale_log2,
                 stride_qn, stride_qh, stride_kn, stride_vn, stride_gn, stride_gh,
                 G, D, BLOCK_D, ROWS, KEYS, PRECISION)  # fmt: skip
    elif left > 0:
        _dq_rows(q, k, v, out, grad_out, lse, dq, delta, start, Nq, Nk, H, scale, scale_log2,
                 stride_qn, stride_qh, stride_kn, stride_vn, stride_gn, stride_gh,
                 G, D, BLOCK_D, EDGE, KEYS, PRECISION)  # fmt: skip


@triton.jit
def _dkdv_step(key, value, dk, dv, q, grad_out, lse, delta, rows, count, H, scale_log2, stride_qn, stride_qh,
               stride_gn, stride_gh, G: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, EDGES: tl.constexpr,
               PRECISION: tl.constexpr):  # fmt: skip
    """Add one block of rows to dk and dv; all is transposed, `[keys, rows]`."""
    inside = rows < count if EDGES else None
    n, g = (rows // G).to(tl.int64), rows % G
    query = _load(q, n * stride_qn + g * stride_qh, inside, D, BLOCK_D)
    grad = _load(grad_out, n * stride_gn + g * stride_gh, inside, D, BLOCK_D)
    if EDGES:
        row_lse = tl.load(lse + n * H + g, mask=inside, other=float("inf"))  # outside: weights of zero
        row_delta = tl.load(delta + n * H + g, mask=inside, other=0.0)
    else:
        row_lse, row_delta = tl.load(lse + n * H + g), tl.load(delta + n * H + g)
    p = tl.exp2(_dot(key, tl.trans(query), PRECISION) * scale_log2 - row_lse[None, :])
    dv += _dot(rounded(p, grad.dtype), grad, PRECISION)
    dp = _dot(value, tl.trans(grad), PRECISION)
    ds = p * (dp - row_delta[None, :])
    dk += _dot(rounded(ds, query.dtype), query, PRECISION)
    return dk, dv


@triton.jit
def _dkdv_keys(q, k, v, grad_out, lse, delta, dk, dv, start, Nq, Nk, H, Hkv, scale, scale_log2,
               stride_qn, stride_qh, stride_kn, stride_vn, stride_gn, stride_gh, G: tl.constexpr, D: tl.constexpr,
               BLOCK_D: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    keys = start + tl.arange(0, KEYS).to(tl.int64)
    inside = keys < Nk
    key = _load(k, keys * stride_kn, inside, D, BLOCK_D)
    value = _load(v, keys * stride_vn, inside, D, BLOCK_D)
    acc_k = tl.zeros([KEYS, BLOCK_D], tl.float32)
    acc_v = tl.zeros([KEYS, BLOCK_D], tl.float32)
    count = Nq * G
    whole = count // ROWS * ROWS
    for i in range(0, whole, ROWS):
        acc_k, acc_v = _dkdv_step(key, value, acc_k, acc_v, q, grad_out, lse, delta, i + tl.arange(0, ROWS), count,
                                  H, scale_log2, stride_qn, stride_qh, stride_gn, stride_gh,
                                  G, D, BLOCK_D, False, PRECISION)  # fmt: skip
    for i in tl.range(whole, count, EDGE, num_stages=1):
        acc_k, acc_v = _dkdv_step(key, value, acc_k, acc_v, q, grad_out, lse, delta, i + tl.arange(0, EDGE), count,
                                  H, scale_log2, stride_qn, stride_qh, stride_gn, stride_gh,
                                  G, D, BLOCK_D, True, PRECISION)  # fmt: skip
    _store(dk, keys * Hkv * D, inside, acc_k * scale, D, BLOCK_D)
    _store(dv, keys * Hkv * D, inside, acc_v, D, BLOCK_D)


@triton.jit(do_not_specialize=SIZES)
def _dkdv_kernel(
    q, k, v, grad_out, lse, delta, cu_seqlens_q, cu_seqlens_k, dk, dv, scale, scale_log2,
    stride_qb, stride_qn, stride_qh, stride_kb, stride_kn, stride_kh, stride_vb, stride_vn, stride_vh,
    stride_gb, stride_gn, stride_gh,
    Nq, Nk, Hkv, num_blocks,
    G: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """A program computes dk and dv of KEYS keys of one head of one sample, over all rows of the group."""
    block, head = tl.program_id(0) % num_blocks, tl.program_id(0) // num_blocks
    b, h = head // Hkv, head % Hkv
    H = Hkv * G
    first_q, Nq = _tokens(cu_seqlens_q, b, Nq)
    first_k, Nk = _tokens(cu_seqlens_k, b, Nk)
    q = _head(q, cu_seqlens_q, b, first_q, h * G, stride_qb, stride_qn, stride_qh)
    k = _head(k, cu_seqlens_k, b, first_k, h, stride_kb, stride_kn, stride_kh)
    v = _head(v, cu_seqlens_k, b, first_k, h, stride_vb, stride_vn, stride_vh)
    grad_out = _head(grad_out, cu_seqlens_q, b, first_q, h * G, stride_gb, stride_gn, stride_gh)
    row, key = first_q * H + h * G, (first_k * Hkv + h) * D
    lse, delta, dk, dv = lse + row, delta + row, dk + key, dv + key
    start = block * KEYS
    left = Nk - start
    if left > EDGE:
        _dkdv_keys(q, k, v, grad_out, lse, delta, dk, dv, start, Nq, Nk, H, Hkv, scale, scale_log2,
                   stride_qn, stride_qh, stride_kn, stride_vn, stride_gn, stride_gh,
                   G, D, BLOCK_D, ROWS, KEYS, PRECISION)  # fmt: skip
    elif left > 0:
        _dkdv_keys(q, k, v, grad_out, lse, delta, dk, dv, start, Nq, Nk, H, Hkv, scale, scale_log2,
                   stride_qn, stride_qh, stride_kn, stride_vn, stride_gn, stride_gh,
                   G, D, BLOCK_D, ROWS, EDGE, PRECISION)  # fmt: skip


def launch_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen: int = 0,
) -> tuple[Tensor, Tensor]:
    """`(out, lse)`: out like q, contiguous; lse `[B, Nq, H]` or `[Tq, H]` fp32, log2 of a row's sum of exponentials."""
    q, k, v = (_dense_channels(x) for x in (q, k, v))
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:-1], dtype=torch.float32, device=q.device)
    if out.numel() == 0:
        return out, lse
    B, Nq, Nk = _sizes(q, k, cu_seqlens_q, max_seqlen)
    H, Hkv = q.shape[-2], k.shape[-2]
    config = _config("forward", q)
    blocks = cdiv(Nq * (H // Hkv), config.rows)
    with torch.cuda.device_of(q):
        _forward_kernel[(B * Hkv * blocks,)](
            q, k, v, cu_seqlens_q, cu_seqlens_k, out, lse, scale * LOG2_E,
            *_strides(q), *_strides(k), *_strides(v), Nq, Nk, Hkv, blocks, **_constants(q, k, config),
        )  # fmt: skip
    return out, lse


def launch_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """`(dq, dk, dv)` of the shapes of q, k and v, contiguous."""
    grad_out, q, k, v = (_dense_channels(x) for x in (grad_out, q, k, v))
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    delta = torch.empty_like(lse)
    B, Nq, Nk = _sizes(q, k, cu_seqlens_q, max_seqlen)
    H, Hkv = q.shape[-2], k.shape[-2]
    arguments = (
        scale, scale * LOG2_E, *_strides(q), *_strides(k), *_strides(v), *_strides(grad_out), Nq, Nk, Hkv,
    )  # fmt: skip
    with torch.cuda.device_of(q):
        if dq.numel():
            config = _config("dq", q)
            blocks = cdiv(Nq * (H // Hkv), config.rows)
            _dq_kernel[(B * Hkv * blocks,)](
                q, k, v, out, grad_out, lse, cu_seqlens_q, cu_seqlens_k, dq, delta,
                *arguments, blocks, **_constants(q, k, config),
            )  # fmt: skip
        if dk.numel():
            config = _config("dkdv", q)
            blocks = cdiv(Nk, config.keys)
            _dkdv_kernel[(B * Hkv * blocks,)](
                q, k, v, grad_out, lse, delta, cu_seqlens_q, cu_seqlens_k, dk, dv,
                *arguments, blocks, **_constants(q, k, config),
            )  # fmt: skip
    return dq, dk, dv


def _dense_channels(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _sizes(q: Tensor, k: Tensor, cu_seqlens: Tensor | None, max_seqlen: int) -> tuple[int, int, int]:
    """Samples, and the most queries and keys that one has."""
    if cu_seqlens is None:
        return q.shape[0], q.shape[1], k.shape[1]
    return cu_seqlens.shape[0] - 1, max_seqlen, max_seqlen


def _strides(x: Tensor) -> tuple[int, ...]:
    """Of sample, token and head."""
    return x.stride()[:3] if x.dim() == 4 else (0, *x.stride()[:2])


def _config(kernel: str, q: Tensor) -> AttentionConfig:
    D = q.shape[-1]
    default = attention_config(kernel, D, q.dtype, arch_of(q))
    return choose(f"gqa_attention_{kernel}", shape_class(q.dtype, D=D), q, default)


def _constants(q: Tensor, k: Tensor, config: AttentionConfig) -> dict[str, Any]:
    D = q.shape[-1]
    return {
        "G": q.shape[-2] // k.shape[-2],
        "D": D,
        "BLOCK_D": max(next_power_of_2(D), 16),
        "ROWS": config.rows,
        "KEYS": config.keys,
        "PRECISION": "tf32x3",  # of fp32 alone: three products in tf32, nearly as exact as one in fp32
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
        **FP_FUSION,
    }


def launches(shape: Any, dtype: torch.dtype) -> None:
    """Launch every kernel as the model does at these sizes (a `ModelShape`), on tensors without data."""
    B, N, H, Hkv, D = shape.batch_size, shape.num_tokens, shape.num_heads, shape.num_kv_heads, shape.head_dim
    qkv = torch.empty(B, N, H + 2 * Hkv, D, dtype=dtype, device="meta")
    cu_seqlens = torch.empty(B + 1, dtype=torch.int32, device="meta")
    for x, packing in ((qkv, ()), (qkv.flatten(0, 1), (cu_seqlens, cu_seqlens, N))):
        q, k, v = x.split((H, Hkv, Hkv), dim=-2)
        out, lse = launch_forward(q, k, v, D**-0.5, *packing)
        launch_backward(torch.empty_like(out), q, k, v, out, lse, D**-0.5, *packing)


@torch.library.custom_op("blip3o::gqa_attention", mutates_args=())
def _forward(
    q: Tensor, k: Tensor, v: Tensor, scale: float,
    cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None, max_seqlen: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return launch_forward(q, k, v, scale, cu_seqlens_q, cu_seqlens_k, max_seqlen)


@_forward.register_fake
def _(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:-1], dtype=torch.float32)


@torch.library.custom_op("blip3o::gqa_attention_backward", mutates_args=())
def _backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float,
    cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None, max_seqlen: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return launch_backward(grad_out, q, k, v, out, lse, scale, cu_seqlens_q, cu_seqlens_k, max_seqlen)


@_backward.register_fake
def _(grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, ctx.scale, cu_seqlens_q, cu_seqlens_k, ctx.max_seqlen = inputs
    ctx.save_for_backward(q, k, v, *output, cu_seqlens_q, cu_seqlens_k)


def _gradients(ctx: Any, grad_out: Tensor, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    *tensors, cu_seqlens_q, cu_seqlens_k = ctx.saved_tensors
    grads = _attention_backward(grad_out, *tensors, ctx.scale, cu_seqlens_q, cu_seqlens_k, ctx.max_seqlen)
    return *grads, None, None, None, None


_attention = differentiable(_forward, _save, _gradients)
_attention_backward = differentiable_once(_backward)


def gqa_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen: int | None = None,
) -> Tensor:
    """`reference.gqa_attention`: `softmax(q kᵀ * scale) v`, heads in groups, of `[B, N, H, D]` or packed `[T, H, D]`.

    The kernel takes head_dim up to 128. It does not read `cu_seqlens` on the host, so that nothing waits for the GPU:
    wrong contents or too small a `max_seqlen` go unnoticed and leave results undefined.

    Raises:
        ValueError: naming the argument whose shape, dtype, device or value does not fit.
    """
    check_gqa_attention(q, k, v, scale, cu_seqlens_q, cu_seqlens_k, max_seqlen)
    D = q.shape[-1]
    obstacle = f"q: expected head_dim up to {MAX_HEAD_DIM}, found {D}" if D > MAX_HEAD_DIM else None
    if not triton_chosen(q, obstacle):
        return reference.gqa_attention(q, k, v, scale, cu_seqlens_q, cu_seqlens_k, max_seqlen)
    scale = D**-0.5 if scale is None else float(scale)
    return _attention(q, k, v, scale, cu_seqlens_q, cu_seqlens_k, max_seqlen or 0)[0]
