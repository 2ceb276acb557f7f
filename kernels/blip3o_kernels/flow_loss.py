"""The flow-matching loss with its diagnostics: squared error, cosine and both norms in one pass over two tensors.

The forward reads prediction and target once and writes a few sums for each program, added in a fixed order; the
backward reads both once and writes one gradient.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from blip3o_kernels import reference
from blip3o_kernels.autograd import differentiable, differentiable_once
from blip3o_kernels.checks import check_flow_matching_loss
from blip3o_kernels.dispatch import triton_chosen
from blip3o_kernels.launch import (
    ROW_OPTIONS,
    RowConfig,
    SumConfig,
    as_rows,
    cdiv,
    choose,
    next_power_of_2,
    row_candidates,
    row_config,
    shape_class,
    sum_candidates,
    sum_config,
    too_wide,
)
from blip3o_kernels.numeric import rounded
from blip3o_kernels.reference import FlowLoss


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


def launch_forward(prediction: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """mse `[B]`, and cosine, prediction's norm and target's norm `[3, B]`, fp32."""
    prediction, target = as_rows(prediction), as_rows(target)
    B, N, D = prediction.shape
    config = choose("flow_matching_loss", shape_class(prediction.dtype, D=D), prediction, forward_rule(N, D))
    splits, tiles = config.split(B, N)
    sums = torch.empty(4, B, splits, dtype=torch.float32, device=prediction.device)
    with torch.cuda.device_of(prediction):
        _forward_kernel[(B * splits,)](
            prediction, target, sums, *prediction.stride()[:2], *target.stride()[:2], N, splits, tiles, B * splits,
            D, next_power_of_2(D), config.rows, num_warps=config.num_warps, **ROW_OPTIONS,
        )  # fmt: skip
    return sums[0].sum(-1) / N, sums[1:].sum(-1) / N


def launch_backward(d_mse: Tensor, x: Tensor, other: Tensor) -> Tensor:
    """Gradient of x, `[B, N, D]` contiguous, where `x - other` is squared."""
    x, other = as_rows(x), as_rows(other)
    B, N, D = x.shape
    dx = torch.empty(B, N, D, dtype=x.dtype, device=x.device)
    config = choose("flow_matching_loss_backward", shape_class(x.dtype, D=D), x, backward_rule(N, D))
    blocks = cdiv(N, config.rows)
    with torch.cuda.device_of(x):
        _backward_kernel[(B * blocks,)](
            d_mse, x, other, dx, d_mse.stride(0), *x.stride()[:2], *other.stride()[:2], N, blocks,
            D, next_power_of_2(D), config.rows, num_warps=config.num_warps, **ROW_OPTIONS,
        )  # fmt: skip
    return dx


def forward_rule(N: int, D: int) -> SumConfig:
    """The default configuration of the forward kernel, which holds two tiles."""
    return sum_config(N, D, elements_per_thread=16)


def backward_rule(N: int, D: int) -> RowConfig:
    """The default configuration of the backward kernel, which holds two tiles."""
    return row_config(N, D, elements_per_thread=16)


def candidates(D: int) -> dict[str, list[RowConfig] | list[SumConfig]]:
    """What a search tries for each kernel."""
    return {
        "flow_matching_loss": sum_candidates(D, (8, 16, 32)),
        "flow_matching_loss_backward": row_candidates(D, (8, 16, 32)),
    }


def launches(shape: Any, dtype: torch.dtype) -> None:
    """Launch every kernel as the model does at these sizes (a `ModelShape`), on tensors without data."""
    prediction = torch.empty(shape.batch_size, shape.num_tokens, shape.clip_dim, dtype=dtype, device="meta")
    for target in (prediction, prediction.float()):
        mse, _ = launch_forward(prediction, target)
        launch_backward(mse, prediction, target)


@torch.library.custom_op("blip3o::flow_matching_loss", mutates_args=())
def _forward(prediction: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    return launch_forward(prediction, target)


@_forward.register_fake
def _(prediction: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    B = prediction.shape[0]
    return prediction.new_empty(B, dtype=torch.float32), prediction.new_empty(3, B, dtype=torch.float32)


@torch.library.custom_op("blip3o::flow_matching_loss_backward", mutates_args=())
def _backward(d_mse: Tensor, x: Tensor, other: Tensor) -> Tensor:
    return launch_backward(d_mse, x, other)


@_backward.register_fake
def _(d_mse: Tensor, x: Tensor, other: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(ctx: Any, d_mse: Tensor, d_diagnostics: Tensor) -> tuple[Tensor | None, Tensor | None]:
    prediction, target = ctx.saved_tensors
    wanted = ctx.needs_input_grad
    return (
        _loss_backward(d_mse, prediction, target) if wanted[0] else None,
        _loss_backward(d_mse, target, prediction) if wanted[1] else None,
    )


_loss = differentiable(_forward, _save, _gradients)
_loss_backward = differentiable_once(_backward)


def flow_matching_loss(prediction: Tensor, target: Tensor) -> FlowLoss:
    """`reference.flow_matching_loss`: squared error per sample, cosine and norms; only `mse` carries a gradient.

    Args:
        prediction, target: `[B, N, D]`, in any floating dtype. The kernel takes D to 8192.

    Raises:
        ValueError: naming the argument whose shape, dtype or device does not fit.
    """
    check_flow_matching_loss(prediction, target)
    if not triton_chosen(prediction, too_wide("prediction", prediction)):
        return reference.flow_matching_loss(prediction, target)
    mse, diagnostics = _loss(prediction, target)
    return FlowLoss(mse, *diagnostics.detach().unbind(0))
