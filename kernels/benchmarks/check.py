"""Whether every operation is right here: against its reference in float64, by the rule of the tests, on small shapes.

On a GPU the compiled kernels are checked, without one those of Triton's interpreter.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import blip3o_kernels
from benchmarks.providers import gradients
from benchmarks.workloads import ATTENTION, WORKLOADS, Case
from blip3o_kernels import use_kernels
from blip3o_kernels.registry import REFERENCE
from blip3o_kernels.workload import ModelShape, Tensors

SMALL = ModelShape("small", 48, 6, 2, 40, 33, clip_dim=24, batch_size=2)  # odd lengths, sizes that are no powers of two
PARTS = {name: ("qk_norm_rope", "gqa_attention") for name in ATTENTION[1:]}  # checked one by one
FLOOR = 8 * torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class Verdict:
    """The worst of an operation's outputs and gradients: its error over what the rule allows."""

    operation: str
    dtype: str
    worst: float  # at most 1
    tensor: str  # where

    @property
    def right(self) -> bool:
        return self.worst <= 1


def check(operations: list[str], dtypes: list[str], device: torch.device | str) -> Iterator[Verdict]:
    """An error may be twice that of plain PyTorch at the same precision, plus a few roundings of fp32."""
    for operation in dict.fromkeys(part for name in operations for part in PARTS.get(name, (name,))):
        for dtype in dtypes:
            yield _check(Case(operation, SMALL, dtype), device)


def _check(case: Case, device: torch.device | str) -> Verdict:
    arguments = case.arguments(device)
    with use_kernels("triton"):
        kernel = _results(case, blip3o_kernels, arguments)
    plain = _results(case, REFERENCE, arguments)
    doubles = tuple(x.detach().double().requires_grad_(x.requires_grad) for x in arguments)
    exact = _results(case, REFERENCE, doubles, [y.dtype for _, y in plain])
    errors = [
        (_error(found, truth) / (2 * _error(expected, truth) + FLOOR * truth.abs().max().item() + 1e-300), name)
        for (name, found), (_, expected), (_, truth) in zip(kernel, plain, exact, strict=True)
    ]
    return Verdict(case.workload, case.dtype, *max(errors))


def _results(
    case: Case, operations: Any, arguments: Tensors, dtypes: list[torch.dtype] | None = None
) -> list[tuple[str, Tensor]]:
    """Outputs and gradients with their names, for the same upstream gradients at every precision."""
    outputs = WORKLOADS[case.workload].run(operations, arguments)
    generator = torch.Generator().manual_seed(1)
    draws = [torch.randn(y.shape, generator=generator, dtype=torch.float64) for y in outputs]
    targets = zip(draws, outputs, dtypes or [y.dtype for y in outputs], strict=False)
    upstream = tuple(draw.to(y.device, dtype).to(y.dtype) for draw, y, dtype in targets)
    found = [(f"output {i}", y.detach()) for i, y in enumerate(outputs)]
    return found + [(f"gradient {i}", g) for i, g in enumerate(gradients(outputs, arguments, upstream))]


def _error(found: Tensor, exact: Tensor) -> float:
    return torch.nan_to_num((found.double() - exact).abs(), nan=float("inf")).max().item()
