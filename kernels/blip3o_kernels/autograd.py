"""Kernels as operations of PyTorch in the namespace `blip3o`, with gradients under autograd and under `torch.func`.

`register_autograd` serves the first, and torch.compile with it; the function transforms need an `autograd.Function`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def save_inputs(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    """Keeps all inputs: tensors, or None, as `ctx.saved_tensors`, the others as `ctx.constants`."""
    ctx.save_for_backward(*[x for x in inputs if x is None or isinstance(x, Tensor)])
    ctx.constants = [x for x in inputs if x is not None and not isinstance(x, Tensor)]


def differentiable(
    name: str,
    launch: Callable[..., Any],
    fake: Callable[..., Any],
    gradients: Callable[..., Any],
    save: Callable[..., None] = save_inputs,
) -> Callable[..., Any]:
    """What to call, by position, for the new operation `blip3o::name`, of the signature of `launch`.

    Args:
        fake: of the same arguments, gives outputs of the right shapes, dtypes and strides without values.
        gradients: `(ctx, *upstream)`, one gradient or None for each input.
        save: `(ctx, inputs, output)`, keeps what the gradient needs.
    """
    op = torch.library.custom_op(f"blip3o::{name}", launch, mutates_args=())
    op.register_fake(fake)
    op.register_autograd(gradients, setup_context=save)

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(*inputs: Any) -> Any:
            return op(*inputs)

        setup_context = staticmethod(save)
        backward = staticmethod(gradients)

    def call(*inputs: Any) -> Any:
        return Function.apply(*inputs) if torch._C._are_functorch_transforms_active() else op(*inputs)

    return call


def backward_op(name: str, launch: Callable[..., Any], fake: Callable[..., Any]) -> Callable[..., Any]:
    """What to call for `blip3o::name_backward`, an operation that is itself a gradient and has none."""

    def refuse(ctx: Any, *upstream: Any) -> Any:
        raise RuntimeError(f"blip3o::{name}_backward: has no second derivative; compute it under use_kernels('torch')")

    return differentiable(f"{name}_backward", launch, fake, refuse, lambda ctx, inputs, output: None)


def like(*tensors: Tensor) -> tuple[Tensor, ...]:
    """New contiguous tensors without values, of these shapes and dtypes."""
    return tuple(x.new_empty(x.shape) for x in tensors)
