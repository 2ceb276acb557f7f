"""Kernels as operations of PyTorch in the namespace `blip3o`, with gradients under autograd and under `torch.func`.

`register_autograd` serves the first, and torch.compile with it; the function transforms need an `autograd.Function`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def custom_op(name: str, launch: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """`blip3o::name`, of the signature of `launch`.

    Args:
        fake: of the same arguments, gives outputs of the right shapes, dtypes and strides without values.
    """
    op = torch.library.custom_op(f"blip3o::{name}", launch, mutates_args=())
    op.register_fake(fake)
    return op


def differentiable(op: Any, save: Callable[..., None], gradients: Callable[..., Any]) -> Callable[..., Any]:
    """Give a custom operation its gradient, and return what to call in its place, by position.

    Args:
        save: `(ctx, inputs, output)`, keeps what the gradient needs.
        gradients: `(ctx, *upstream)`, one gradient or None for each input.
    """
    op.register_autograd(gradients, setup_context=save)

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(*inputs: Any) -> Any:
            return op(*inputs)

        setup_context = staticmethod(save)
        backward = staticmethod(gradients)

    def call(*inputs: Any) -> Any:
        if torch._C._are_functorch_transforms_active():
            return Function.apply(*inputs)
        return op(*inputs)

    return call


def save_inputs(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    """A `save` that keeps all inputs: tensors, or None, as `ctx.saved_tensors`, the others as `ctx.constants`."""
    ctx.save_for_backward(*[x for x in inputs if x is None or isinstance(x, Tensor)])
    ctx.constants = [x for x in inputs if x is not None and not isinstance(x, Tensor)]


def backward_op(name: str, launch: Callable[..., Any], fake: Callable[..., Any]) -> Callable[..., Any]:
    """Return what to call for `blip3o::name_backward`, an operation that is itself a gradient and has none."""
    op = custom_op(f"{name}_backward", launch, fake)

    def refuse(ctx: Any, *upstream: Any) -> Any:
        raise RuntimeError(f"{op._qualname}: has no second derivative; compute it under use_kernels('torch')")

    return differentiable(op, lambda ctx, inputs, output: None, refuse)


def like(*tensors: Tensor) -> tuple[Tensor, ...]:
    """New contiguous tensors without values, of these shapes and dtypes."""
    return tuple(x.new_empty(x.shape) for x in tensors)
