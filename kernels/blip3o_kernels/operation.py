"""What the package knows of one operation, and the function that its callers see.

Every operation's file ends in an `Operation`; `registry.py` lists them.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, ParamSpec, TypeVar

import torch
from torch import Tensor

from blip3o_kernels.dispatch import triton_chosen
from blip3o_kernels.workload import ModelShape, Workload

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True)
class Operation(Generic[P, R]):
    """One operation. `check` and `kernel` get all arguments of `reference`, by position."""

    name: str
    reference: Callable[P, R]  # the formula in plain PyTorch; its signature and docstring are the public ones
    check: Callable[..., str | None]  # raises ValueError; returns why the kernel cannot take the arguments, or None
    kernel: Callable[..., R]
    launches: Callable[[ModelShape, torch.dtype], None]  # launches every kernel as the model does, on meta tensors
    channels: str  # the size of a `ModelShape` that launch configurations depend on, as D
    candidates: Callable[[int, torch.dtype, int], dict[str, Any]] | None = None  # (D, dtype, arch) -> kernel -> configs
    workloads: tuple[Workload, ...] = ()  # what is timed; the first has the operation's name
    deciding: int = 0  # position of the tensor whose device and dtype choose the path

    def public(self) -> Callable[P, R]:
        """The function to call: it checks its arguments and takes the kernel or the reference."""
        reference, check, kernel, deciding = self.reference, self.check, self.kernel, self.deciding
        signature = inspect.signature(reference)
        parameters = signature.parameters
        names = tuple(parameters)
        defaults = {name: p.default for name, p in parameters.items() if p.default is not p.empty}
        required = len(names) - len(defaults)

        @functools.wraps(reference)
        def function(*args: Any, **kwargs: Any) -> R:
            later = names[len(args) :]
            missing = [name for name in names[len(args) : required] if name not in kwargs]
            if missing or len(args) > len(names) or any(name not in later for name in kwargs):
                signature.bind(*args, **kwargs)  # raises the TypeError of a wrong call
            args = (*args, *[kwargs[name] if name in kwargs else defaults[name] for name in later])
            obstacle = check(*args)
            if triton_chosen(args[deciding], obstacle):
                return kernel(*args)
            return reference(*args)  # type: ignore[call-arg]  # ParamSpec knows no positional form

        function.__name__ = function.__qualname__ = self.name
        return function  # type: ignore[return-value]


def compute_dtype(x: Tensor) -> torch.dtype:
    """What a reference computes in: fp32, or float64 for float64, so that it can judge the kernels."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32
