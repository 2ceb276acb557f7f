"""Gradients of custom operations, under ordinary autograd and under `torch.func`.

`register_autograd` serves the first, and torch.compile with it; the function transforms want an `autograd.Function`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def differentiable(op: Any, save: Callable[..., None], gradients: Callable[..., Any]) -> Callable[..., Any]:
    """Give a custom operation its gradient, and return what to call in its place, by position.

    Args:
        op: what `torch.library.custom_op` made.
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


def differentiable_once(op: Any) -> Callable[..., Any]:
    """Return what to call in place of a custom operation that is itself a gradient and has none."""

    def refuse(ctx: Any, *upstream: Any) -> Any:
        raise RuntimeError(f"{op._qualname}: has no second derivative; compute it under use_kernels('torch')")

    return differentiable(op, lambda ctx, inputs, output: None, refuse)
