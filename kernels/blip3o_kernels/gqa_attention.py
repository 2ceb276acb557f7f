"""Grouped-query attention without masks, forward and backward (Ainslie et al. 2023; after Dao 2023).

The kernels are in `gqa_attention_kernels.py`; this file has the formula, launches them and chooses their block sizes.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from blip3o_kernels import gqa_attention_kernels as kernels
from blip3o_kernels.autograd import backward_op, differentiable, like
from blip3o_kernels.checks import check_floating, check_like, check_shape
from blip3o_kernels.launch import FP_FUSION, arch_of, cdiv, choose, dense, next_power_of_2, shape_class
from blip3o_kernels.operation import Operation
from blip3o_kernels.workload import Maker, ModelShape, Tensors, Workload

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
        check_like(name, x, "q", q)
    if scale is not None and not scale > 0:
        raise ValueError(f"scale: expected a positive number, found {scale}")
    return f"q: expected head_dim up to {MAX_HEAD_DIM}, found {D}" if D > MAX_HEAD_DIM else None


def launch_forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """`(out, lse)`: out like q, contiguous; lse `[B, Nq, H]` fp32, log2 of a row's sum of exponentials."""
    q, k, v = (dense(x) for x in (q, k, v))
    out, lse = _empty_outputs(q)
    if out.numel():
        _launch("forward", (q, k, v, out, lse, scale * LOG2_E), (q, k, v))
    return out, lse


def launch_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """`(dq, dk, dv)` of the shapes of q, k and v, contiguous."""
    grad_out, q, k, v = (dense(x) for x in (grad_out, q, k, v))
    dq, dk, dv = like(q, k, v)
    delta = torch.empty_like(lse)
    scales, strided = (scale, scale * LOG2_E), (q, k, v, grad_out)
    if dq.numel():
        _launch("dq", (q, k, v, out, grad_out, lse, dq, delta, *scales), strided)
    if dk.numel():
        _launch("dkdv", (q, k, v, grad_out, lse, delta, dk, dv, *scales), strided)
    return dq, dk, dv


def _launch(kernel: str, arguments: tuple[Any, ...], strided: tuple[Tensor, ...]) -> None:
    """Launch one of the kernels, whose next parameters are the strides of `strided`: q, k, v and perhaps others."""
    q, k, *_ = strided
    B, Nq, H, D = q.shape
    Nk, Hkv = k.shape[1:3]
    rule = attention_config(kernel, D, q.dtype, arch_of(q))
    config = choose(f"gqa_attention_{kernel}", shape_class(q.dtype, D=D), q, rule)
    blocks = cdiv(Nk, config.keys) if kernel == "dkdv" else cdiv(Nq * (H // Hkv), config.rows)
    strides = [stride for x in strided for stride in x.stride()[:3]]
    with torch.cuda.device_of(q):
        getattr(kernels, f"_{kernel}_kernel")[(B * Hkv * blocks,)](
            *arguments, *strides, Nq, Nk, Hkv, blocks,
            G=H // Hkv, D=D, BLOCK_D=max(next_power_of_2(D), 16), ROWS=config.rows, KEYS=config.keys,
            PRECISION="tf32x3",  # of fp32 only: three products in tf32, nearly as exact as one in fp32
            num_warps=config.num_warps, num_stages=config.num_stages, **FP_FUSION,
        )  # fmt: skip


def _empty_outputs(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:-1], dtype=torch.float32)


def launches(shape: ModelShape, dtype: torch.dtype) -> None:
    B, N, H, Hkv, D = shape.batch_size, shape.num_tokens, shape.num_heads, shape.num_kv_heads, shape.head_dim
    q, k, v = torch.empty(B, N, H + 2 * Hkv, D, dtype=dtype, device="meta").split((H, Hkv, Hkv), dim=2)
    out, lse = launch_forward(q, k, v, D**-0.5)
    launch_backward(torch.empty_like(out), q, k, v, out, lse, D**-0.5)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output)


def _gradients(ctx: Any, grad_out: Tensor, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    return *_backward(grad_out, *ctx.saved_tensors, ctx.scale), None


_forward = differentiable("gqa_attention", launch_forward, _empty_outputs, _gradients, _save)
_backward = backward_op("gqa_attention", launch_backward, lambda *x: like(*x[1:4]))


def _fused(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
    return _forward(q, k, v, q.shape[-1] ** -0.5 if scale is None else float(scale))[0]


def _candidates(*sizes: Any) -> dict[str, Any]:
    return {f"gqa_attention_{kernel}": configs for kernel, configs in candidates(*sizes).items()}


def _make(make: Maker, shape: ModelShape) -> Tensors:
    """q and k as the rotation leaves them, contiguous; v still in its projection."""
    q, k, v = make.qkv(shape)
    return *(x.detach().contiguous().requires_grad_() for x in (q, k)), v


def _make_cross(make: Maker, shape: ModelShape) -> Tensors:
    B, N, Hkv, D = shape.batch_size, shape.num_tokens, shape.num_kv_heads, shape.head_dim
    return make.leaf(B, N, shape.num_heads, D), *make.leaves((B, N, 2 * Hkv, D), (Hkv, Hkv), 2), *make.rope(shape)


def _make_self(make: Maker, shape: ModelShape) -> Tensors:
    return *make.qkv(shape), *make.rope(shape)


def _rope_attention(operations: Any, q: Tensor, k: Tensor, v: Tensor, *parameters: Tensor) -> Tensor:
    return operations.gqa_attention(*operations.qk_norm_rope(q, k, *parameters), v)


# Of a backward's five products one computes the scores again.
WORKLOADS = (
    Workload("gqa_attention", _make, "qk_width", (2, 4), (2, 5)),
    Workload("self_attention", _make_self, "qk_width", (4, 7), (2, 5), _rope_attention),
    Workload("cross_attention", _make_cross, "qk_width", (4, 7), (2, 5), _rope_attention),
)
# A block holds its scores and accumulators in registers, 255 a thread, so head_dim and precision decide its size. Those
# of the rule compile for every architecture without a spill (`python -m blip3o_kernels.aot`); none has been timed yet.
KERNELS = ("forward", "dq", "dkdv")


@dataclass(frozen=True)
class AttentionConfig:
    """A block is `rows` queries (of all heads of a group) by `keys` keys."""

    rows: int
    keys: int
    num_warps: int
    num_stages: int


def attention_config(kernel: str, D: int, dtype: torch.dtype, arch: int) -> AttentionConfig:
    """The rule.

    Hopper and Blackwell's data centre parts multiply in warpgroups of 64 rows and like two blocks of 8 warps on a
    multiprocessor; the others keep operands in registers and get smaller blocks. fp32 is three tf32 products, whose
    split operands fill the registers of even small blocks.

    Args:
        kernel: `forward`, `dq` or `dkdv`.
        D: head_dim, up to 128.
        arch: compute capability, 90 for 9.0.
    """
    wide = D > 64
    warpgroups = arch // 10 in (9, 10)
    if dtype == torch.float32:
        return _fp32_config(kernel, wide)
    if kernel == "dq":
        return AttentionConfig(64, 32, 4, 2) if wide else AttentionConfig(64, 64, 4, 3)
    if kernel == "dkdv":
        if wide:
            return AttentionConfig(32, 64, 8, 2)
        return AttentionConfig(32, 128, 8, 3) if warpgroups else AttentionConfig(64, 64, 4, 2)
    if warpgroups:
        return AttentionConfig(128, 64, 8, 2 if wide else 3)
    return AttentionConfig(64, 32, 4, 2) if wide else AttentionConfig(64, 64, 4, 3)


def _fp32_config(kernel: str, wide: bool) -> AttentionConfig:
    if wide:
        return AttentionConfig(16, 32, 4, 2) if kernel == "forward" else AttentionConfig(16, 16, 8, 1)
    return {
        "forward": AttentionConfig(32, 32, 4, 2),
        "dq": AttentionConfig(32, 32, 8, 1),
        "dkdv": AttentionConfig(32, 32, 8, 2),
    }[kernel]


def candidates(D: int, dtype: torch.dtype, arch: int) -> dict[str, list[AttentionConfig]]:
    """What a search tries for each kernel: the rule's, and what is likely to fit registers; in fp32 only the rule's."""
    space = [AttentionConfig(*sizes) for sizes in product((32, 64, 128), (32, 64, 128), (4, 8), (2, 3))]
    found = {}
    for kernel in KERNELS:
        limit = 0 if dtype == torch.float32 else 160 if kernel == "dkdv" else 128
        fitting = [config for config in space if 48 <= _registers(kernel, config, D) <= limit]
        found[kernel] = list(dict.fromkeys([attention_config(kernel, D, dtype, arch), *fitting]))
    return found


def _registers(kernel: str, config: AttentionConfig, D: int) -> float:
    """Registers of a thread for scores, their 16-bit copies and accumulators; addresses and operands need more."""
    scores = config.rows * config.keys
    elements = {
        "forward": 1.5 * scores + config.rows * D,
        "dq": 2.5 * scores + config.rows * D,
        "dkdv": 3 * scores + 2 * config.keys * D,
    }[kernel]
    return elements / (32 * config.num_warps)


OPERATION = Operation("gqa_attention", reference, check, _fused, launches, "head_dim", _candidates, WORKLOADS)
gqa_attention = OPERATION.public()
