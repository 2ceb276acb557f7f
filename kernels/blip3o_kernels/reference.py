"""The DiT's operations in plain PyTorch: the path on CPU, and the oracle of every fused kernel.

All arithmetic is fp32 inside; an output has the dtype of its input, and parameters may have another dtype.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from blip3o_kernels.checks import (
    check_dequantize_fp8,
    check_flow_matching_loss,
    check_gqa_attention,
    check_qk_norm_rope,
    check_rms_norm,
    check_sandwich,
    check_swiglu,
)


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
    check_rms_norm(x, weight, scale)
    gain = weight.float()
    if scale is not None:
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
    check_sandwich(branch_out, residual, post_weight, gate, next_pre_weight, next_scale)
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
    check_qk_norm_rope(q, k, q_weight, k_weight, cos, sin)
    return _norm_rope(q, q_weight, cos, sin, eps), _norm_rope(k, k_weight, cos, sin, eps)


def gqa_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen: int | None = None,
) -> Tensor:
    """`softmax(q kᵀ * scale) v` where `H / Hkv` query heads share a key head (Ainslie et al. 2023), unmasked.

    Query head h reads key head `h // (H / Hkv)`. Samples of different lengths may be packed one behind the other; a
    sample without keys gives zeros.

    Args:
        q: `[B, Nq, H, D]`; packed, `[Tq, H, D]`.
        k, v: `[B, Nk, Hkv, D]`, H a multiple of Hkv; packed, `[Tk, Hkv, D]`.
        scale: of the logits, positive; None is `D ** -0.5`.
        cu_seqlens_q, cu_seqlens_k: `[B + 1]` int32, None for a dense batch: sample b is tokens `cu_seqlens[b]` up to
            `cu_seqlens[b + 1]`, and the samples are all tokens.
        max_seqlen: at least the most queries or keys of a sample, if packed.

    Returns:
        As q.

    Raises:
        ValueError: naming the argument whose shape, dtype, device or value does not fit.
    """
    check_gqa_attention(q, k, v, scale, cu_seqlens_q, cu_seqlens_k, max_seqlen)
    if cu_seqlens_q is None or cu_seqlens_k is None or max_seqlen is None:
        return _dense_attention(q, k, v, scale)
    lengths_q = _lengths("cu_seqlens_q", cu_seqlens_q, q.shape[0], max_seqlen)
    lengths_k = _lengths("cu_seqlens_k", cu_seqlens_k, k.shape[0], max_seqlen)
    samples = zip(q.split(lengths_q), k.split(lengths_k), v.split(lengths_k), strict=True)
    return torch.cat([q[:0], *(_dense_attention(*(x[None] for x in sample), scale)[0] for sample in samples)])


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """`silu(gate) * up` (Shazeer 2020), both `[..., D]` of one dtype.

    PyTorch's silu is fp32 inside; its result is rounded once before the product, which saves an fp32 copy of `gate`.

    Raises:
        ValueError: naming the argument whose shape or dtype does not fit.
    """
    check_swiglu(gate, up)
    return F.silu(gate) * up


def flow_matching_loss(prediction: Tensor, target: Tensor) -> FlowLoss:
    """Mean squared error per sample, with the cosine and norms that tell how a run is going.

    Args:
        prediction, target: `[B, N, D]`, in any floating dtype.

    Raises:
        ValueError: naming the argument whose shape or dtype does not fit.
    """
    check_flow_matching_loss(prediction, target)
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


def _dense_attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # [B, H, N, D], as views
    out = F.scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=True)
    return out.transpose(1, 2)


def _lengths(name: str, cu_seqlens: Tensor, total: int, max_seqlen: int) -> list[int]:
    ends = cu_seqlens.tolist()
    lengths = [end - start for start, end in pairwise(ends)]
    if ends[0] != 0 or ends[-1] != total or min(lengths, default=0) < 0:
        raise ValueError(f"{name}: expected to rise from 0 to {total}, the number of tokens, found {ends}")
    if max(lengths, default=0) > max_seqlen:
        raise ValueError(f"max_seqlen: expected at least {max(lengths)}, by {name}, found {max_seqlen}")
    return lengths


def _normalized(x: Tensor, eps: float, gain: Tensor) -> Tensor:
    """`x / rms(x) * gain` in fp32."""
    x = x.float()
    mean_square = torch.linalg.vecdot(x, x)[..., None] / x.shape[-1]  # one pass, no tensor of squares
    return x * gain * torch.rsqrt(mean_square + eps)


def _per_sample(values: Tensor, x: Tensor) -> Tensor:
    """`[B, D]` as `[B, 1, ..., 1, D]`, to broadcast over the tokens of x."""
    return values.view(x.shape[0], *[1] * (x.dim() - 2), x.shape[-1])


def _norm_rope(x: Tensor, weight: Tensor, cos: Tensor | None, sin: Tensor | None, eps: float) -> Tensor:
    y = _normalized(x, eps, weight.float())
    if cos is not None and sin is not None:
        y = _rotate_pairs(y, cos.float()[:, None], sin.float()[:, None])  # tables: [N, 1, D/2]
    return y.to(x.dtype)


def _rotate_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Channels (2i, 2i+1) as a complex number, times `cos + i sin`: half the time of four real products on CPU."""
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * torch.complex(cos, sin)).flatten(-2)
