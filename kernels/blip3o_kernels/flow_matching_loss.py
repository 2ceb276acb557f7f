"""The flow-matching loss with its diagnostics: squared error, cosine and both norms in one pass over two tensors.

The forward reads prediction and target once and writes a few sums for each program, added in a fixed order; the
backward reads both once and writes one gradient.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from blip3o_kernels.autograd import backward_op, differentiable, like
from blip3o_kernels.checks import check_device, check_floating, check_shape, too_wide
from blip3o_kernels.launch import RowRule, SumRule, as_rows, candidates_of, cdiv, launch_rows
from blip3o_kernels.numeric import rounded
from blip3o_kernels.operation import Operation, compute_dtype
from blip3o_kernels.triton_language import tl, triton
from blip3o_kernels.workload import Maker, ModelShape, Tensors, Workload


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


def reference(prediction: Tensor, target: Tensor) -> FlowLoss:
    """Mean squared error per sample, with the cosine and norms that tell how a run is going.

    Args:
        prediction, target: `[B, N, D]`, in any floating dtype. The kernel takes D to 8192.

    Raises:
        ValueError: naming the argument whose shape, dtype or device does not fit.
    """
    dtype = compute_dtype(prediction)
    prediction, target = prediction.to(dtype), target.to(dtype)
    mse = (prediction - target).square().mean(dim=(1, 2))
    with torch.no_grad():
        prediction_norm = prediction.norm(dim=-1)  # [B, N]
        target_norm = target.norm(dim=-1)
        dot = (prediction * target).sum(dim=-1)
        cosine = dot / (prediction_norm * target_norm).clamp_min(1e-12)
    return FlowLoss(mse, cosine.mean(dim=1), prediction_norm.mean(dim=1), target_norm.mean(dim=1))


def check(prediction: Tensor, target: Tensor) -> str | None:
    check_floating("prediction", prediction, dims=3)
    check_floating("target", target)
    check_shape("target", target, prediction.shape)
    check_device("target", target, "prediction", prediction)
    return too_wide("prediction", prediction)


@triton.jit(do_not_specialize=["N", "splits", "tiles", "programs"])
def _forward_kernel(
    prediction, target, sums, prediction_b, prediction_n, target_b, target_n, N, splits, tiles, programs,
    D: tl.constexpr, BD: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    b = (tl.program_id(0) // splits).to(tl.int64)
    first = (tl.program_id(0) % splits).to(tl.int64) * tiles * ROWS
    d = tl.arange(0, BD)
    squared = tl.zeros([ROWS], tl.float32)
    cosine = tl.zeros([ROWS], tl.float32)
    prediction_norm = tl.zeros([ROWS], tl.float32)
    target_norm = tl.zeros([ROWS], tl.float32)
    for tile in range(tiles):
        n = first + tile * ROWS + tl.arange(0, ROWS)
        inside = (n < N)[:, None] & (d < D)[None, :]
        offset = n[:, None] * prediction_n + d[None, :]
        p = tl.load(prediction + b * prediction_b + offset, mask=inside, other=0).to(tl.float32)
        offset = n[:, None] * target_n + d[None, :]
        t = tl.load(target + b * target_b + offset, mask=inside, other=0).to(tl.float32)
        p_norm, t_norm = tl.sqrt(tl.sum(p * p, axis=1)), tl.sqrt(tl.sum(t * t, axis=1))
        squared += tl.sum((p - t) * (p - t), axis=1)
        cosine += tl.sum(p * t, axis=1) / tl.maximum(p_norm * t_norm, 1e-12)
        prediction_norm += p_norm
        target_norm += t_norm
    out = sums + tl.program_id(0)  # [4, programs]
    tl.store(out, tl.sum(squared, axis=0) / D)
    tl.store(out + programs, tl.sum(cosine, axis=0))
    tl.store(out + 2 * programs, tl.sum(prediction_norm, axis=0))
    tl.store(out + 3 * programs, tl.sum(target_norm, axis=0))


@triton.jit(do_not_specialize=["N", "blocks"])
def _backward_kernel(
    d_mse, x, other, dx, d_mse_b, x_b, x_n, other_b, other_n, N, blocks,
    D: tl.constexpr, BD: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    b = (tl.program_id(0) // blocks).to(tl.int64)
    n = (tl.program_id(0) % blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, BD)
    inside = (n < N)[:, None] & (d < D)[None, :]
    values = tl.load(x + b * x_b + n[:, None] * x_n + d[None, :], mask=inside, other=0).to(tl.float32)
    others = tl.load(other + b * other_b + n[:, None] * other_n + d[None, :], mask=inside, other=0).to(tl.float32)
    factor = 2 * tl.load(d_mse + b * d_mse_b).to(tl.float32) / D / N
    out = factor * (values - others)
    tl.store(dx + (b * N + n)[:, None] * D + d[None, :], rounded(out, dx.dtype.element_ty), mask=inside)


FORWARD = SumRule("flow_matching_loss", elements_per_thread=16)
BACKWARD = RowRule("flow_matching_loss_backward", elements_per_thread=16)
candidates = candidates_of(FORWARD, BACKWARD)


def launch_forward(prediction: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """mse `[B]`, and cosine, prediction's norm and target's norm `[3, B]`, fp32."""
    prediction, target = as_rows(prediction), as_rows(target)
    B, N, D = prediction.shape
    config = FORWARD.choose(prediction, N, D)
    splits, tiles = config.split(B, N)
    sums = torch.empty(4, B, splits, dtype=torch.float32, device=prediction.device)
    arguments = target, sums, *prediction.stride()[:2], *target.stride()[:2], N, splits, tiles, B * splits
    launch_rows(_forward_kernel, B * splits, config, D, prediction, *arguments)
    return sums[0].sum(-1) / N, sums[1:].sum(-1) / N


def launch_backward(d_mse: Tensor, x: Tensor, other: Tensor) -> Tensor:
    """Gradient of x, `[B, N, D]` contiguous, where `x - other` is squared."""
    x, other = as_rows(x), as_rows(other)
    B, N, D = x.shape
    (dx,) = like(x)
    config = BACKWARD.choose(x, N, D)
    blocks = cdiv(N, config.rows)
    arguments = x, other, dx, d_mse.stride(0), *x.stride()[:2], *other.stride()[:2], N, blocks
    launch_rows(_backward_kernel, B * blocks, config, D, d_mse, *arguments)
    return dx


def launches(shape: ModelShape, dtype: torch.dtype) -> None:
    prediction = torch.empty(shape.batch_size, shape.num_tokens, shape.clip_dim, dtype=dtype, device="meta")
    for target in (prediction, prediction.float()):
        mse, _ = launch_forward(prediction, target)
        launch_backward(mse, prediction, target)


def _fake_forward(prediction: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    B = prediction.shape[0]
    return prediction.new_empty(B, dtype=torch.float32), prediction.new_empty(3, B, dtype=torch.float32)


def _gradients(ctx: Any, d_mse: Tensor, d_diagnostics: Tensor) -> tuple[Tensor | None, ...]:
    tensors = ctx.saved_tensors
    pairs = zip(ctx.needs_input_grad, (tensors, tensors[::-1]), strict=True)
    return tuple(_backward(d_mse, *pair) if wanted else None for wanted, pair in pairs)


_forward = differentiable("flow_matching_loss", launch_forward, _fake_forward, _gradients)
_backward = backward_op("flow_matching_loss", launch_backward, lambda d_mse, x, other: like(x)[0])


def _fused(prediction: Tensor, target: Tensor) -> FlowLoss:
    mse, diagnostics = _forward(prediction, target)
    return FlowLoss(mse, *diagnostics.detach().unbind(0))


def _make(make: Maker, shape: ModelShape) -> Tensors:
    sizes = shape.batch_size, shape.num_tokens, shape.clip_dim
    return make.leaf(*sizes), make.constant(*sizes)


WORKLOADS = (Workload("flow_matching_loss", _make, "clip_dim", (2, 3)),)
OPERATION = Operation("flow_matching_loss", reference, check, _fused, launches, "clip_dim", candidates, WORKLOADS)
flow_matching_loss = OPERATION.public()
