"""What is timed: the package's operations at the DiT's shapes, with the bytes and operations that each must take.

A workload calls the functions of a namespace (`blip3o_kernels`, or its `reference`), so that every provider does the
same work on the same tensors, which lie as they do in the model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from blip3o_kernels.aot import SHAPES, ModelShape

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
PRESETS = ("base", "large", "small", "tiny")  # in the order they are timed
SWEEP_PRESET = "base"
SWEEP_TOKENS = tuple(1024 * 2**i for i in range(10))  # 1k to 512k

Arguments = tuple[Tensor, ...]
Outputs = tuple[Tensor, ...]


@dataclass(frozen=True)
class Cost:
    """What one pass cannot do without, as `kernels/README.md` counts it."""

    bytes: int  # every tensor read once, every result written once; parameters, modulations and tables left out
    flops: int = 0  # of matrix products alone

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.bytes + other.bytes, self.flops + other.flops)


@dataclass(frozen=True)
class Workload:
    """One operation, or two that follow each other."""

    name: str
    make: Callable[[_Maker, ModelShape], Arguments]
    call: Callable[..., Any]  # (operations, *arguments)
    forward: Callable[[ModelShape, int], Cost]  # of the bytes of an element
    backward: Callable[[ModelShape, int], Cost]

    def run(self, operations: Any, arguments: Arguments) -> Outputs:
        """The outputs as a tuple."""
        outputs = self.call(operations, *arguments)
        return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)


@dataclass(frozen=True)
class Case:
    """A workload at one shape."""

    workload: str
    shape: ModelShape
    dtype: str
    sweep: bool = False  # part of the sweep over tokens, not of the presets' grid

    @property
    def tokens(self) -> int:
        return self.shape.batch_size * self.shape.num_tokens

    @property
    def preset(self) -> str:
        return self.shape.name.partition("-")[0]

    def cost(self, name: str) -> Cost:
        """Of `forward`, `backward` or `both`."""
        workload, size = WORKLOADS[self.workload], DTYPES[self.dtype].itemsize
        forward, backward = workload.forward(self.shape, size), workload.backward(self.shape, size)
        return {"forward": forward, "backward": backward, "both": forward + backward}[name]

    def arguments(self, device: torch.device | str, seed: int = 0) -> Arguments:
        """Random tensors; those that the model differentiates require a gradient, and are leaves."""
        return WORKLOADS[self.workload].make(_Maker(DTYPES[self.dtype], device, seed), self.shape)


def model_shape(preset: str, num_tokens: int, batch_size: int) -> ModelShape:
    """A preset's sizes.

    Raises:
        ValueError: no such preset, or a number of tokens that the model does not have.
    """
    found = {shape.name: shape for shape in SHAPES}.get(f"{preset}-{num_tokens}")
    if found is None:
        raise ValueError(f"expected one of {', '.join(shape.name for shape in SHAPES)}, found {preset}-{num_tokens}")
    return replace(found, batch_size=batch_size)


class _Maker:
    """Makes a case's tensors, the same for the same seed and device."""

    def __init__(self, dtype: torch.dtype, device: torch.device | str, seed: int) -> None:
        self.dtype, self.device = dtype, device
        self.generator = torch.Generator(device).manual_seed(seed)

    def constant(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(*shape, generator=self.generator, device=self.device, dtype=dtype or self.dtype)

    def leaf(self, *shape: int) -> Tensor:
        return self.constant(*shape).requires_grad_()

    def leaves(self, whole: tuple[int, ...], sizes: tuple[int, ...], dim: int) -> Arguments:
        """Slices of one tensor along `dim`, each a leaf that keeps its strides."""
        return tuple(part.detach().requires_grad_() for part in self.constant(*whole).split(sizes, dim))

    def tables(self, shape: ModelShape) -> Arguments:
        angles = 3 * self.constant(shape.num_tokens, shape.head_dim // 2, dtype=torch.float32)
        return angles.cos(), angles.sin()

    def weights(self, shape: ModelShape) -> Arguments:
        return self.leaf(shape.head_dim), self.leaf(shape.head_dim)


def _rows(shape: ModelShape) -> tuple[int, int, int]:
    return shape.batch_size, shape.num_tokens, shape.hidden_size


def _rms_norm(make: _Maker, shape: ModelShape) -> Arguments:
    return make.leaf(*_rows(shape)), make.leaf(shape.hidden_size)


def _modulated_rms_norm(make: _Maker, shape: ModelShape) -> Arguments:
    return *_rms_norm(make, shape), make.leaf(shape.batch_size, shape.hidden_size)


def _sandwich(make: _Maker, shape: ModelShape) -> Arguments:
    B, _, D = _rows(shape)
    gate, scale = make.leaves((B, 6 * D), (D, D, 4 * D), -1)[:2]
    return make.leaf(*_rows(shape)), make.leaf(*_rows(shape)), make.leaf(D), gate, make.leaf(D), scale


def _qkv(make: _Maker, shape: ModelShape) -> Arguments:
    heads = (shape.num_heads, shape.num_kv_heads, shape.num_kv_heads)
    return make.leaves((shape.batch_size, shape.num_tokens, sum(heads), shape.head_dim), heads, 2)


def _qk_norm_rope(make: _Maker, shape: ModelShape) -> Arguments:
    q, k, _ = _qkv(make, shape)
    return q, k, *make.weights(shape), *make.tables(shape)


def _gqa_attention(make: _Maker, shape: ModelShape) -> Arguments:
    """q and k as the rotation leaves them, contiguous; v still in its projection."""
    q, k, v = _qkv(make, shape)
    return *(x.detach().contiguous().requires_grad_() for x in (q, k)), v


def _self_attention(make: _Maker, shape: ModelShape) -> Arguments:
    return *_qkv(make, shape), *make.weights(shape), *make.tables(shape)


def _cross_attention(make: _Maker, shape: ModelShape) -> Arguments:
    B, N, Hkv = shape.batch_size, shape.num_tokens, shape.num_kv_heads
    q = make.leaf(B, N, shape.num_heads, shape.head_dim)
    k, v = make.leaves((B, N, 2 * Hkv, shape.head_dim), (Hkv, Hkv), 2)
    return q, k, v, *make.weights(shape), *make.tables(shape)


def _swiglu(make: _Maker, shape: ModelShape) -> Arguments:
    F = shape.ffn_dim
    return make.leaves((shape.batch_size, shape.num_tokens, 2 * F), (F, F), -1)


def _flow_matching_loss(make: _Maker, shape: ModelShape) -> Arguments:
    sizes = shape.batch_size, shape.num_tokens, shape.clip_dim
    return make.leaf(*sizes), make.constant(*sizes)


def _call_rms_norm(operations: Any, x: Tensor, weight: Tensor) -> Tensor:
    return operations.rms_norm(x, weight, 1e-6)


def _call_modulated_rms_norm(operations: Any, x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    return operations.rms_norm(x, weight, 1e-6, scale)


def _call_sandwich(operations: Any, *arguments: Tensor) -> Outputs:
    return operations.sandwich(*arguments, 1e-6)


def _call_qk_norm_rope(operations: Any, *arguments: Tensor) -> Outputs:
    return operations.qk_norm_rope(*arguments, 1e-6)


def _call_gqa_attention(operations: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return operations.gqa_attention(q, k, v)


def _call_rope_attention(operations: Any, q: Tensor, k: Tensor, v: Tensor, *parameters: Tensor) -> Tensor:
    q, k = operations.qk_norm_rope(q, k, *parameters, 1e-6)
    return operations.gqa_attention(q, k, v)


def _call_swiglu(operations: Any, gate: Tensor, up: Tensor) -> Tensor:
    return operations.swiglu(gate, up)


def _call_flow_matching_loss(operations: Any, prediction: Tensor, target: Tensor) -> Outputs:
    return operations.flow_matching_loss(prediction, target)


def _moves(count: int, width: Callable[[ModelShape], int]) -> Callable[[ModelShape, int], Cost]:
    """The cost of a pass that reads and writes `count` tensors of `width` channels a token."""
    return lambda shape, size: Cost(count * shape.batch_size * shape.num_tokens * width(shape) * size)


def _hidden(shape: ModelShape) -> int:
    return shape.hidden_size


def _qk_width(shape: ModelShape) -> int:
    return (shape.num_heads + shape.num_kv_heads) * shape.head_dim


def _attention_cost(tensors: int, products: int) -> Callable[[ModelShape, int], Cost]:
    """`tensors` of each head and the log of each row's sum; `products` of the scores' size."""

    def cost(shape: ModelShape, size: int) -> Cost:
        T = shape.batch_size * shape.num_tokens
        bytes_moved = tensors * T * _qk_width(shape) * size + 4 * T * shape.num_heads
        return Cost(bytes_moved, products * 2 * T * shape.num_tokens * shape.hidden_size)

    return cost


def _sum(*costs: Callable[[ModelShape, int], Cost]) -> Callable[[ModelShape, int], Cost]:
    return lambda shape, size: costs[0](shape, size) + costs[1](shape, size)


_ROPE = _moves(2, _qk_width), _moves(3, _qk_width)
_ATTENTION = _attention_cost(2, 2), _attention_cost(4, 5)  # of the five, one computes the scores again
_BOTH = _sum(_ROPE[0], _ATTENTION[0]), _sum(_ROPE[1], _ATTENTION[1])


def _ffn(shape: ModelShape) -> int:
    return shape.ffn_dim


def _clip(shape: ModelShape) -> int:
    return shape.clip_dim


WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("rms_norm", _rms_norm, _call_rms_norm, _moves(2, _hidden), _moves(3, _hidden)),
        Workload("modulated_rms_norm", _modulated_rms_norm, _call_modulated_rms_norm, _moves(2, _hidden),
                 _moves(3, _hidden)),
        Workload("sandwich", _sandwich, _call_sandwich, _moves(4, _hidden), _moves(6, _hidden)),
        Workload("qk_norm_rope", _qk_norm_rope, _call_qk_norm_rope, *_ROPE),
        Workload("swiglu", _swiglu, _call_swiglu, _moves(3, _ffn), _moves(5, _ffn)),
        Workload("flow_matching_loss", _flow_matching_loss, _call_flow_matching_loss, _moves(2, _clip),
                 _moves(3, _clip)),
        Workload("gqa_attention", _gqa_attention, _call_gqa_attention, *_ATTENTION),
        Workload("self_attention", _self_attention, _call_rope_attention, *_BOTH),
        Workload("cross_attention", _cross_attention, _call_rope_attention, *_BOTH),
    )
}  # fmt: skip
ATTENTION = ("gqa_attention", "self_attention", "cross_attention")


def model_cases(
    operations: list[str], dtypes: list[str], presets: list[str], batches: list[int], tokens: list[int]
) -> list[Case]:
    """The grid of the DiT's shapes."""
    return [
        Case(operation, model_shape(preset, N, B), dtype)
        for preset in presets
        for dtype in dtypes
        for operation in operations
        for N in tokens
        for B in batches
    ]


def sweep_cases(operations: list[str], dtypes: list[str], tokens: tuple[int, ...] = SWEEP_TOKENS) -> list[Case]:
    """The base preset's shapes from few tokens to very many, 256 of a sample."""
    return [
        Case(operation, model_shape(SWEEP_PRESET, 256, count // 256), dtype, sweep=True)
        for dtype in dtypes
        for operation in operations
        for count in tokens
    ]
