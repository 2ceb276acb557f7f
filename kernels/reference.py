"""The DiT's operations in plain PyTorch: the path on CPU, and the oracle of every fused kernel.

All arithmetic is fp32 inside; an output has the dtype of its input, and parameters may have another dtype.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class FlowLoss(NamedTuple):
    """Per-sample loss and diagnostics of one batch, fp32; only `mse` carries a gradient."""

    mse: Tensor  # [B] mean squared error over tokens and channels
    cosine: Tensor  # [B] cosine of prediction and target, mean over tokens
    prediction_norm: Tensor  # [B] L2 norm of a token, mean over tokens
    target_norm: Tensor  # [B] L2 norm of a token, mean over tokens

    @property
    def loss(self) -> Tensor:
        """The scalar to minimise: mean of `mse` over the batch."""
        return self.mse.mean()


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6, scale: Tensor | None = None) -> Tensor:
    """`x / sqrt(mean(x²) + eps) * weight * (1 + scale)`, the mean over channels (Zhang & Sennrich 2019).

    Args:
        x: `[..., D]`; with `scale`, `[B, ..., D]`.
        weight: `[D]`.
        scale: `[B, D]`, one per sample, or None for no modulation.

    Raises:
        ValueError: naming the argument whose shape or dtype does not fit.
    """
    D = x.shape[-1]
    _check_floating("x", x)
    _check_shape("weight", weight, (D,))
    gain = weight.float()
    if scale is not None:
        _check_shape("scale", scale, (x.shape[0], D))
        gain = _per_sample(gain * (1 + scale.float()), x)
    return _normalized(x, eps, gain).to(x.dtype)


def sandwich(
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
        branch_out, residual: `[B, N, D]`, of one dtype.
        post_weight, next_pre_weight: `[D]`.
        gate, next_scale: `[B, D]`.

    Returns:
        `(new_residual, next_input)`, both `[B, N, D]`.

    Raises:
        ValueError: naming the argument whose shape or dtype does not fit.
    """
    _check_floating("branch_out", branch_out, dims=3)
    B, _, D = branch_out.shape
    _check_shape("residual", residual, branch_out.shape)
    _check_dtype("residual", residual, "branch_out", branch_out)
    _check_shape("post_weight", post_weight, (D,))
    _check_shape("gate", gate, (B, D))
    gain = _per_sample(post_weight.float() * torch.tanh(gate.float()), branch_out)
    new_residual = torch.add(residual, _normalized(branch_out, eps, gain)).to(residual.dtype)
    return new_residual, rms_norm(new_residual, next_pre_weight, eps, next_scale)


def qk_norm_rope(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """RMSNorm of every head of q and k (Henry et al. 2020), then rotary positions (Su et al. 2021).

    Channels `(2i, 2i+1)` of token n are a pair, turned by the angle whose cosine and sine are `cos[n, i]`, `sin[n, i]`.

    Args:
        q: `[B, N, H, D]`.  k: `[B, N, Hkv, D]`; with tables both have the tables' N, without they may differ.
        q_weight, k_weight: `[D]`.
        cos, sin: `[N, D/2]`, or both None for no rotation.

    Raises:
        ValueError: naming the argument whose shape or dtype does not fit.
    """
    if (cos is None) != (sin is None):
        raise ValueError("cos and sin: give both tables or neither")
    return _norm_rope("q", q, q_weight, cos, sin, eps), _norm_rope("k", k, k_weight, cos, sin, eps)


def gqa_attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """`softmax(q kᵀ * scale) v` where `H / Hkv` query heads share a key head (Ainslie et al. 2023), unmasked.

    Query head h reads key head `h // (H / Hkv)`.

    Args:
        q: `[B, Nq, H, D]`.  k, v: `[B, Nk, Hkv, D]`, H a multiple of Hkv.
        scale: of the logits; None is `D ** -0.5`.

    Returns:
        `[B, Nq, H, D]`.

    Raises:
        ValueError: naming the argument whose shape or dtype does not fit.
    """
    _check_floating("q", q, dims=4)
    _check_floating("k", k, dims=4)
    B, _, H, D = q.shape
    if k.shape[0] != B or k.shape[3] != D or H % k.shape[2]:
        raise ValueError(f"k: expected [{B}, Nk, Hkv, {D}] with Hkv dividing {H}, found {list(k.shape)}")
    _check_shape("v", v, k.shape)
    _check_dtype("k", k, "q", q)
    _check_dtype("v", v, "q", q)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # [B, H, N, D], as views
    out = F.scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=True)
    return out.transpose(1, 2)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """`silu(gate) * up` (Shazeer 2020), both `[..., D]` of one dtype.

    PyTorch's silu is fp32 inside; its result is rounded once before the product, which saves an fp32 copy of `gate`.

    Raises:
        ValueError: naming the argument whose shape or dtype does not fit.
    """
    _check_floating("gate", gate)
    _check_shape("up", up, gate.shape)
    _check_dtype("up", up, "gate", gate)
    return F.silu(gate) * up


def flow_matching_loss(prediction: Tensor, target: Tensor) -> FlowLoss:
    """Mean squared error per sample, with the cosine and norms that tell how a run is going.

    Args:
        prediction, target: `[B, N, D]`, in any floating dtype.

    Raises:
        ValueError: naming the argument whose shape or dtype does not fit.
    """
    _check_floating("prediction", prediction, dims=3)
    _check_floating("target", target)
    _check_shape("target", target, prediction.shape)
    prediction, target = prediction.float(), target.float()
    mse = (prediction - target).square().mean(dim=(1, 2))
    with torch.no_grad():
        prediction_norm = prediction.norm(dim=-1)  # [B, N]
        target_norm = target.norm(dim=-1)
        dot = (prediction * target).sum(dim=-1)
        cosine = dot / (prediction_norm * target_norm).clamp_min(1e-12)
    return FlowLoss(mse, cosine.mean(dim=1), prediction_norm.mean(dim=1), target_norm.mean(dim=1))


def dequantize_fp8(stored: Tensor, scale: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """`stored * scale` per token: embeddings kept as fp8 (e4m3, Micikevicius et al. 2022) with a scale for each token.

    Args:
        stored: `[..., D]`, float8_e4m3fn or the same bytes as uint8.
        scale: `[...]`, fp32.
        dtype: of the result; the product is fp32 and rounded once.

    Returns:
        `[..., D]` of `dtype`.

    Raises:
        ValueError: naming the argument whose shape or dtype does not fit.
    """
    check_dequantize_fp8(stored, scale)
    return (stored.view(torch.float8_e4m3fn).float() * scale[..., None]).to(dtype)


def check_dequantize_fp8(stored: Tensor, scale: Tensor) -> None:
    """Raise ValueError unless the arguments are what `dequantize_fp8` takes."""
    if stored.dtype not in (torch.float8_e4m3fn, torch.uint8):
        raise ValueError(f"stored: expected float8_e4m3fn or its bytes as uint8, found {stored.dtype}")
    _check_shape("scale", scale, stored.shape[:-1])
    if scale.dtype != torch.float32:
        raise ValueError(f"scale: expected float32, found {scale.dtype}")


def _normalized(x: Tensor, eps: float, gain: Tensor) -> Tensor:
    """`x / rms(x) * gain` in fp32."""
    x = x.float()
    mean_square = torch.linalg.vecdot(x, x)[..., None] / x.shape[-1]  # one pass, no tensor of squares
    return x * gain * torch.rsqrt(mean_square + eps)


def _per_sample(values: Tensor, x: Tensor) -> Tensor:
    """`[B, D]` as `[B, 1, ..., 1, D]`, to broadcast over the tokens of x."""
    return values.view(x.shape[0], *[1] * (x.dim() - 2), x.shape[-1])


def _norm_rope(name: str, x: Tensor, weight: Tensor, cos: Tensor | None, sin: Tensor | None, eps: float) -> Tensor:
    _check_floating(name, x, dims=4)
    N, D = x.shape[1], x.shape[3]
    _check_shape(f"{name}_weight", weight, (D,))
    y = _normalized(x, eps, weight.float())
    if cos is not None and sin is not None:
        _check_shape(f"cos (for {name})", cos, (N, D // 2))
        _check_shape(f"sin (for {name})", sin, (N, D // 2))
        y = _rotate_pairs(y, cos.float()[:, None], sin.float()[:, None])  # tables: [N, 1, D/2]
    return y.to(x.dtype)


def _rotate_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Channels (2i, 2i+1) as a complex number, times `cos + i sin`: half the time of four real products on CPU."""
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * torch.complex(cos, sin)).flatten(-2)


def _check_shape(name: str, tensor: Tensor, expected: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != tuple(expected):
        raise ValueError(f"{name}: expected shape {list(expected)}, found {list(tensor.shape)}")


def _check_floating(name: str, tensor: Tensor, dims: int | None = None) -> None:
    if not tensor.is_floating_point():
        raise ValueError(f"{name}: expected a floating dtype, found {tensor.dtype}")
    if dims is not None and tensor.dim() != dims:
        raise ValueError(f"{name}: expected {dims} dimensions, found shape {list(tensor.shape)}")


def _check_dtype(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    if tensor.dtype != other.dtype:
        raise ValueError(f"{name}: expected {other.dtype} as {other_name} has, found {tensor.dtype}")
