"""The argument checks of every operation, shared by the reference and the kernels so that both refuse alike.

Each raises ValueError that begins with the argument's name and says what was expected and what was found.
"""

from __future__ import annotations

import torch
from torch import Tensor


def check_shape(name: str, tensor: Tensor, expected: tuple[int, ...]) -> None:
    """The shape is exactly `expected`."""
    if tuple(tensor.shape) != tuple(expected):
        raise ValueError(f"{name}: expected shape {list(expected)}, found {list(tensor.shape)}")


def check_floating(name: str, tensor: Tensor, dims: int | None = None) -> None:
    """The dtype is floating, and there are `dims` dimensions (at least one, where not given)."""
    if not tensor.is_floating_point():
        raise ValueError(f"{name}: expected a floating dtype, found {tensor.dtype}")
    if dims is not None and tensor.dim() != dims:
        raise ValueError(f"{name}: expected {dims} dimensions, found shape {list(tensor.shape)}")
    if tensor.dim() == 0:
        raise ValueError(f"{name}: expected channels as the last dimension, found a scalar")


def check_dtype(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """The dtype is that of another argument."""
    if tensor.dtype != other.dtype:
        raise ValueError(f"{name}: expected {other.dtype} as {other_name} has, found {tensor.dtype}")


def check_device(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """The device is that of another argument."""
    if tensor.device != other.device:
        raise ValueError(f"{name}: expected device {other.device} as {other_name} has, found {tensor.device}")


def check_dequantize_fp8(stored: Tensor, scale: Tensor) -> None:
    """The arguments of `dequantize_fp8`."""
    if stored.dtype not in (torch.float8_e4m3fn, torch.uint8):
        raise ValueError(f"stored: expected float8_e4m3fn or its bytes as uint8, found {stored.dtype}")
    check_shape("scale", scale, stored.shape[:-1])
    if scale.dtype != torch.float32:
        raise ValueError(f"scale: expected float32, found {scale.dtype}")
    check_device("scale", scale, "stored", stored)


def check_rms_norm(x: Tensor, weight: Tensor, scale: Tensor | None) -> None:
    """The arguments of `rms_norm`."""
    D = x.shape[-1] if x.dim() else 0
    check_floating("x", x)
    _check_parameter("weight", weight, (D,), "x", x)
    if scale is not None:
        _check_parameter("scale", scale, (x.shape[0], D), "x", x)


def check_sandwich(
    branch_out: Tensor,
    residual: Tensor,
    post_weight: Tensor,
    gate: Tensor,
    next_pre_weight: Tensor,
    next_scale: Tensor,
) -> None:
    """The arguments of `sandwich`."""
    check_floating("branch_out", branch_out, dims=3)
    B, _, D = branch_out.shape
    check_shape("residual", residual, branch_out.shape)
    check_dtype("residual", residual, "branch_out", branch_out)
    check_device("residual", residual, "branch_out", branch_out)
    _check_parameter("post_weight", post_weight, (D,), "branch_out", branch_out)
    _check_parameter("gate", gate, (B, D), "branch_out", branch_out)
    _check_parameter("next_pre_weight", next_pre_weight, (D,), "branch_out", branch_out)
    _check_parameter("next_scale", next_scale, (B, D), "branch_out", branch_out)


def check_qk_norm_rope(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor | None, sin: Tensor | None
) -> None:
    """The arguments of `qk_norm_rope`."""
    if (cos is None) != (sin is None):
        raise ValueError("cos and sin: give both tables or neither")
    for name, x, weight in (("q", q, q_weight), ("k", k, k_weight)):
        check_floating(name, x, dims=4)
        N, D = x.shape[1], x.shape[3]
        _check_parameter(f"{name}_weight", weight, (D,), name, x)
        if cos is not None and sin is not None:
            if D % 2:
                raise ValueError(f"{name}: expected an even number of channels to rotate in pairs, found {D}")
            _check_parameter(f"cos (for {name})", cos, (N, D // 2), name, x)
            _check_parameter(f"sin (for {name})", sin, (N, D // 2), name, x)
    check_device("k", k, "q", q)


def check_gqa_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen: int | None = None,
) -> None:
    """The arguments of `gqa_attention`, of a dense batch or a packed one."""
    packing = (cu_seqlens_q, cu_seqlens_k, max_seqlen)
    packed = all(x is not None for x in packing)
    if not packed and any(x is not None for x in packing):
        raise ValueError("cu_seqlens_q, cu_seqlens_k and max_seqlen: give all three for a packed batch, or none")
    dims = 3 if packed else 4
    check_floating("q", q, dims)
    check_floating("k", k, dims)
    *B, _, H, D = q.shape
    if [*k.shape[:-3]] != B or k.shape[-1] != D or k.shape[-2] == 0 or H % k.shape[-2]:
        batch = "" if packed else f"{q.shape[0]}, "  # here, as torch.compile compiles anew for a size that is printed
        raise ValueError(f"k: expected [{batch}Nk, Hkv, {D}] with Hkv dividing {H}, found {list(k.shape)}")
    check_shape("v", v, k.shape)
    for name, x in (("k", k), ("v", v)):
        check_dtype(name, x, "q", q)
        check_device(name, x, "q", q)
    if scale is not None and not scale > 0:
        raise ValueError(f"scale: expected a positive number, found {scale}")
    if cu_seqlens_q is not None and cu_seqlens_k is not None and max_seqlen is not None:
        _check_packing(q, cu_seqlens_q, cu_seqlens_k, max_seqlen)


def _check_packing(q: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen: int) -> None:
    for name, x in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        if x.dtype != torch.int32 or x.dim() != 1 or x.shape[0] == 0:
            raise ValueError(f"{name}: expected int32 of shape [B + 1], found {x.dtype} of shape {list(x.shape)}")
        check_device(name, x, "q", q)
    check_shape("cu_seqlens_k", cu_seqlens_k, tuple(cu_seqlens_q.shape))
    if max_seqlen < 0:
        raise ValueError(f"max_seqlen: expected the length of the longest sample, found {max_seqlen}")


def check_swiglu(gate: Tensor, up: Tensor) -> None:
    """The arguments of `swiglu`."""
    check_floating("gate", gate)
    check_shape("up", up, gate.shape)
    check_dtype("up", up, "gate", gate)
    check_device("up", up, "gate", gate)


def check_flow_matching_loss(prediction: Tensor, target: Tensor) -> None:
    """The arguments of `flow_matching_loss`."""
    check_floating("prediction", prediction, dims=3)
    check_floating("target", target)
    check_shape("target", target, prediction.shape)
    check_device("target", target, "prediction", prediction)


def _check_parameter(name: str, tensor: Tensor, expected: tuple[int, ...], other_name: str, other: Tensor) -> None:
    """A floating tensor of this shape on the device of another argument; its dtype is its own."""
    check_shape(name, tensor, expected)
    check_floating(name, tensor)
    check_device(name, tensor, other_name, other)
