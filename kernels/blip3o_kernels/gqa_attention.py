"""Grouped-query attention without masks, forward and backward (Ainslie et al. 2023; after Dao 2023).

The kernels are in `gqa_attention_kernels.py`, their block sizes in `gqa_attention_config.py`; this file has the formula
and launches them.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from blip3o_kernels import gqa_attention_kernels as kernels
from blip3o_kernels.autograd import backward_op, custom_op, differentiable, like
from blip3o_kernels.checks import check_device, check_dtype, check_floating, check_shape
from blip3o_kernels.gqa_attention_config import AttentionConfig, attention_config, candidates
from blip3o_kernels.launch import FP_FUSION, arch_of, cdiv, choose, dense, next_power_of_2, shape_class
from blip3o_kernels.operation import Operation
from blip3o_kernels.workload import Maker, ModelShape, Tensors, Workload, head_dim, qk_width

MAX_HEAD_DIM = 128
LOG2_E = 1.4426950408889634


def reference(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """`softmax(q kᵀ * scale) v` where `H / Hkv` query heads share a key head (Ainslie et al. 2023), unmasked.

    Query head h reads key head `h // (H / Hkv)`.

    Args:
        q: `[B, Nq, H, D]`. The kernel takes D to 128.
        k, v: `[B, Nk, Hkv, D]`, H a multiple of Hkv.
        scale: of the logits, positive; None is `D ** -0.5`.

    Returns:
        `[B, Nq, H, D]`.

    Raises:
        ValueError: naming the argument whose shape, dtype, device or value does not fit.
    """
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # [B, H, N, D], as views
    out = F.scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=True)
    return out.transpose(1, 2)


def check(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> str | None:
    check_floating("q", q, dims=4)
    check_floating("k", k, dims=4)
    B, _, H, D = q.shape
    if k.shape[0] != B or k.shape[3] != D or k.shape[2] == 0 or H % k.shape[2]:
        raise ValueError(f"k: expected [{B}, Nk, Hkv, {D}] with Hkv dividing {H}, found {list(k.shape)}")
    check_shape("v", v, k.shape)
    for name, x in (("k", k), ("v", v)):
        check_dtype(name, x, "q", q)
        check_device(name, x, "q", q)
    if scale is not None and not scale > 0:
        raise ValueError(f"scale: expected a positive number, found {scale}")
    return f"q: expected head_dim up to {MAX_HEAD_DIM}, found {D}" if D > MAX_HEAD_DIM else None


def launch_forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """`(out, lse)`: out like q, contiguous; lse `[B, Nq, H]` fp32, log2 of a row's sum of exponentials."""
    q, k, v = (dense(x) for x in (q, k, v))
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:-1], dtype=torch.float32, device=q.device)
    if out.numel() == 0:
        return out, lse
    B, Nq, H, _ = q.shape
    Nk, Hkv = k.shape[1:3]
    config = _config("forward", q)
    blocks = cdiv(Nq * (H // Hkv), config.rows)
    with torch.cuda.device_of(q):
        kernels._forward_kernel[(B * Hkv * blocks,)](
            q, k, v, out, lse, scale * LOG2_E, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
            Nq, Nk, Hkv, blocks, **_constants(q, k, config),
        )  # fmt: skip
    return out, lse


def launch_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """`(dq, dk, dv)` of the shapes of q, k and v, contiguous."""
    grad_out, q, k, v = (dense(x) for x in (grad_out, q, k, v))
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    delta = torch.empty_like(lse)
    B, Nq, H, _ = q.shape
    Nk, Hkv = k.shape[1:3]
    arguments = (
        scale, scale * LOG2_E, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *grad_out.stride()[:3], Nq, Nk, Hkv,
    )  # fmt: skip
    with torch.cuda.device_of(q):
        if dq.numel():
            config = _config("dq", q)
            blocks = cdiv(Nq * (H // Hkv), config.rows)
            kernels._dq_kernel[(B * Hkv * blocks,)](
                q, k, v, out, grad_out, lse, dq, delta, *arguments, blocks, **_constants(q, k, config)
            )
        if dk.numel():
            config = _config("dkdv", q)
            blocks = cdiv(Nk, config.keys)
            kernels._dkdv_kernel[(B * Hkv * blocks,)](
                q, k, v, grad_out, lse, delta, dk, dv, *arguments, blocks, **_constants(q, k, config)
            )
    return dq, dk, dv


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
        "PRECISION": "tf32x3",  # of fp32 only: three products in tf32, nearly as exact as one in fp32
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
        **FP_FUSION,
    }


def launches(shape: ModelShape, dtype: torch.dtype) -> None:
    B, N, H, Hkv, D = shape.batch_size, shape.num_tokens, shape.num_heads, shape.num_kv_heads, shape.head_dim
    q, k, v = torch.empty(B, N, H + 2 * Hkv, D, dtype=dtype, device="meta").split((H, Hkv, Hkv), dim=2)
    out, lse = launch_forward(q, k, v, D**-0.5)
    launch_backward(torch.empty_like(out), q, k, v, out, lse, D**-0.5)


def _fake_forward(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:-1], dtype=torch.float32)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output)


def _gradients(ctx: Any, grad_out: Tensor, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    return *_backward(grad_out, *ctx.saved_tensors, ctx.scale), None


_forward = differentiable(custom_op("gqa_attention", launch_forward, _fake_forward), _save, _gradients)
_backward = backward_op("gqa_attention", launch_backward, lambda grad_out, q, k, v, *_: like(q, k, v))


def _fused(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
    return _forward(q, k, v, q.shape[-1] ** -0.5 if scale is None else float(scale))[0]


def _make(make: Maker, shape: ModelShape) -> Tensors:
    """q and k as the rotation leaves them, contiguous; v still in its projection."""
    q, k, v = make.qkv(shape)
    return *(x.detach().contiguous().requires_grad_() for x in (q, k)), v


def _make_cross(make: Maker, shape: ModelShape) -> Tensors:
    B, N, Hkv, D = shape.batch_size, shape.num_tokens, shape.num_kv_heads, shape.head_dim
    return make.leaf(B, N, shape.num_heads, D), *make.leaves((B, N, 2 * Hkv, D), (Hkv, Hkv), 2), *make.rope(shape)


def _rope_attention(operations: Any, q: Tensor, k: Tensor, v: Tensor, *parameters: Tensor) -> Tensor:
    q, k = operations.qk_norm_rope(q, k, *parameters, 1e-6)
    return operations.gqa_attention(q, k, v)


# Of a backward's five products one computes the scores again.
OPERATION = Operation(
    "gqa_attention",
    reference,
    check,
    _fused,
    launches,
    head_dim,
    lambda *sizes: {f"gqa_attention_{kernel}": configs for kernel, configs in candidates(*sizes).items()},
    (
        Workload("gqa_attention", _make, lambda operations, *x: operations.gqa_attention(*x), qk_width, (2, 4), (2, 5)),
        Workload("self_attention", lambda make, shape: (*make.qkv(shape), *make.rope(shape)), _rope_attention, qk_width,
                 (4, 7), (2, 5)),
        Workload("cross_attention", _make_cross, _rope_attention, qk_width, (4, 7), (2, 5)),
    ),
)  # fmt: skip
gqa_attention = OPERATION.public()
