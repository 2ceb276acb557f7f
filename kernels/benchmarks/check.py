"""Whether every operation is right here: against float64, by the rule of the tests, on small shapes.

On a GPU the compiled kernels are checked, without one those of Triton's interpreter.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

import blip3o_kernels
from benchmarks.providers import gradients
from benchmarks.workloads import WORKLOADS, Arguments, Case, Outputs
from blip3o_kernels import reference, use_kernels
from blip3o_kernels.aot import ModelShape

SMALL = ModelShape("small", 48, 6, 2, 40, 33, clip_dim=24, batch_size=2)  # odd lengths, sizes that are no powers of two
PARTS = {name: ("qk_norm_rope", "gqa_attention") for name in ("self_attention", "cross_attention")}  # checked apart
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
    plain = _results(case, reference, arguments)
    doubles = tuple(x.detach().double().requires_grad_(x.requires_grad) for x in arguments)
    exact = _results(case, ORACLE, doubles, [y.dtype for _, y in plain])
    errors = [
        (_error(found, truth) / (2 * _error(expected, truth) + FLOOR * truth.abs().max().item() + 1e-300), name)
        for (name, found), (_, expected), (_, truth) in zip(kernel, plain, exact, strict=True)
    ]
    return Verdict(case.workload, case.dtype, *max(errors))


def _results(
    case: Case, operations: Any, arguments: Arguments, dtypes: list[torch.dtype] | None = None
) -> list[tuple[str, Tensor]]:
    """Outputs and gradients with their names, for the same upstream gradients at every precision."""
    outputs = WORKLOADS[case.workload].run(operations, arguments)
    upstream = _upstream(outputs, dtypes or [y.dtype for y in outputs])
    found = [(f"output {i}", y.detach()) for i, y in enumerate(outputs)]
    return found + [(f"gradient {i}", g) for i, g in enumerate(gradients(outputs, arguments, upstream))]


def _upstream(outputs: Outputs, dtypes: list[torch.dtype]) -> Outputs:
    generator = torch.Generator().manual_seed(1)
    return tuple(
        torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.device, dtype).to(y.dtype)
        for y, dtype in zip(outputs, dtypes, strict=False)
    )


def _error(found: Tensor, exact: Tensor) -> float:
    return torch.nan_to_num((found.double() - exact).abs(), nan=float("inf")).max().item()


def _rms_norm(x: Tensor, weight: Tensor, eps: float, scale: Tensor | None = None) -> Tensor:
    normed = x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight
    return normed if scale is None else normed * (1 + scale[:, None])


def _sandwich(
    branch: Tensor, residual: Tensor, post: Tensor, gate: Tensor, pre: Tensor, scale: Tensor, eps: float
) -> Outputs:
    residual = residual + gate.tanh()[:, None] * _rms_norm(branch, post, eps)
    return residual, _rms_norm(residual, pre, eps, scale)


def _qk_norm_rope(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, eps: float
) -> Outputs:
    def turned(x: Tensor) -> Tensor:
        even, odd, c, s = x[..., ::2], x[..., 1::2], cos[:, None], sin[:, None]
        return torch.stack([even * c - odd * s, even * s + odd * c], dim=-1).flatten(-2)

    return turned(_rms_norm(q, q_weight, eps)), turned(_rms_norm(k, k_weight, eps))


def _gqa_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], dim=2) for x in (k, v))
    weights = (torch.einsum("bnhd,bmhd->bhnm", q, k) * q.shape[3] ** -0.5).softmax(-1)
    return torch.einsum("bhnm,bmhd->bnhd", weights, v)


def _swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return gate / (1 + torch.exp(-gate)) * up


def _flow_matching_loss(prediction: Tensor, target: Tensor) -> Outputs:
    p, t = prediction.detach(), target
    cosine = (p * t).sum(-1) / (p.norm(dim=-1) * t.norm(dim=-1))
    mse = (prediction - target).square().mean(dim=(1, 2))
    return mse, cosine.mean(-1), p.norm(dim=-1).mean(-1), t.norm(dim=-1).mean(-1)


ORACLE = SimpleNamespace(
    rms_norm=_rms_norm,
    sandwich=_sandwich,
    qk_norm_rope=_qk_norm_rope,
    gqa_attention=_gqa_attention,
    swiglu=_swiglu,
    flow_matching_loss=_flow_matching_loss,
)
