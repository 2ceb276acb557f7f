"""The kernels of `gqa_attention`, forward and backward (after Dao 2023).

The G query heads that share a key head are one matrix of Nq * G rows; row r is head `r % G` of token `r // G`. So a
block of rows reads K and V once for the group, and one program holds all that a key's gradient is summed from: there
are no atomics, and results repeat bitwise.
"""

from __future__ import annotations

from blip3o_kernels.numeric import INTERPRETED, rounded
from blip3o_kernels.triton_language import tl, triton

EDGE = tl.constexpr(16)  # the least block of tl.dot: what whole blocks leave over goes in steps of it
SIZES = ["Nq", "Nk", "Hkv", "num_blocks"]  # one compilation for all values of these


@triton.jit
def _dot(a, b, PRECISION: tl.constexpr):
    if INTERPRETED:  # which would multiply the bit patterns of bf16
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision=PRECISION)


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
    q, k, v, out, lse, scale_log2,
    stride_qb, stride_qn, stride_qh, stride_kb, stride_kn, stride_kh, stride_vb, stride_vn, stride_vh,
    Nq, Nk, Hkv, num_blocks,
    G: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """A program computes ROWS rows of one group of heads of one sample."""
    block, head = tl.program_id(0) % num_blocks, tl.program_id(0) // num_blocks
    b, h = (head // Hkv).to(tl.int64), head % Hkv
    H = Hkv * G
    q += b * stride_qb + h * G * stride_qh
    k += b * stride_kb + h * stride_kh
    v += b * stride_vb + h * stride_vh
    row = b * Nq * H + h * G
    out, lse = out + row * D, lse + row
    start = block * ROWS
    left = Nq * G - start
    if left > EDGE:
        _forward_rows(q, k, v, out, lse, start, Nq, Nk, H, scale_log2, stride_qn, stride_qh, stride_kn, stride_vn,
                      G, D, BLOCK_D, ROWS, KEYS, PRECISION)  # fmt: skip
    else:
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
    q, k, v, out, grad_out, lse, dq, delta, scale, scale_log2,
    stride_qb, stride_qn, stride_qh, stride_kb, stride_kn, stride_kh, stride_vb, stride_vn, stride_vh,
    stride_gb, stride_gn, stride_gh,
    Nq, Nk, Hkv, num_blocks,
    G: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """A program computes ROWS rows of dq, and `delta`, the sum of out * grad_out of a row, for the next kernel."""
    block, head = tl.program_id(0) % num_blocks, tl.program_id(0) // num_blocks
    b, h = (head // Hkv).to(tl.int64), head % Hkv
    H = Hkv * G
    q += b * stride_qb + h * G * stride_qh
    k += b * stride_kb + h * stride_kh
    v += b * stride_vb + h * stride_vh
    grad_out += b * stride_gb + h * G * stride_gh
    row = b * Nq * H + h * G
    out, dq, lse, delta = out + row * D, dq + row * D, lse + row, delta + row
    start = block * ROWS
    left = Nq * G - start
    if left > EDGE:
        _dq_rows(q, k, v, out, grad_out, lse, dq, delta, start, Nq, Nk, H, scale, scale_log2,
                 stride_qn, stride_qh, stride_kn, stride_vn, stride_gn, stride_gh,
                 G, D, BLOCK_D, ROWS, KEYS, PRECISION)  # fmt: skip
    else:
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
    q, k, v, grad_out, lse, delta, dk, dv, scale, scale_log2,
    stride_qb, stride_qn, stride_qh, stride_kb, stride_kn, stride_kh, stride_vb, stride_vn, stride_vh,
    stride_gb, stride_gn, stride_gh,
    Nq, Nk, Hkv, num_blocks,
    G: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """A program computes dk and dv of KEYS keys of one head of one sample, over all rows of the group."""
    block, head = tl.program_id(0) % num_blocks, tl.program_id(0) // num_blocks
    b, h = (head // Hkv).to(tl.int64), head % Hkv
    H = Hkv * G
    q += b * stride_qb + h * G * stride_qh
    k += b * stride_kb + h * stride_kh
    v += b * stride_vb + h * stride_vh
    grad_out += b * stride_gb + h * G * stride_gh
    row, key = b * Nq * H + h * G, (b * Nk * Hkv + h) * D
    lse, delta, dk, dv = lse + row, delta + row, dk + key, dv + key
    start = block * KEYS
    left = Nk - start
    if left > EDGE:
        _dkdv_keys(q, k, v, grad_out, lse, delta, dk, dv, start, Nq, Nk, H, Hkv, scale, scale_log2,
                   stride_qn, stride_qh, stride_kn, stride_vn, stride_gn, stride_gh,
                   G, D, BLOCK_D, ROWS, KEYS, PRECISION)  # fmt: skip
    else:
        _dkdv_keys(q, k, v, grad_out, lse, delta, dk, dv, start, Nq, Nk, H, Hkv, scale, scale_log2,
                   stride_qn, stride_qh, stride_kn, stride_vn, stride_gn, stride_gh,
                   G, D, BLOCK_D, ROWS, EDGE, PRECISION)  # fmt: skip
