"""How the model calls the operations: its sizes, tensors that lie as they do in the model, and what a call must move.

An operation's file describes its own calls as `Workload`s; the benchmarks time them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Tensors = tuple[Tensor, ...]


@dataclass(frozen=True)
class ModelShape:
    """The sizes that an operation's launches depend on."""

    name: str
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    ffn_dim: int
    num_tokens: int
    eva_dim: int = 4096
    clip_dim: int = 1024
    batch_size: int = 8

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def rows(self) -> tuple[int, int, int]:
        """`[B, N, D]` of the tokens between two branches."""
        return self.batch_size, self.num_tokens, self.hidden_size

    @property
    def qk_width(self) -> int:
        """Channels of a token in q and k together."""
        return (self.num_heads + self.num_kv_heads) * self.head_dim


_PRESETS = {
    "tiny": (384, 6, 2, 1536),
    "small": (512, 8, 4, 2048),
    "base": (768, 12, 4, 3072),
    "large": (1024, 16, 8, 4096),
}
SHAPES = tuple(ModelShape(f"{name}-{N}", *sizes, N) for name, sizes in _PRESETS.items() for N in (256, 257))


@dataclass(frozen=True)
class Workload:
    """One operation, or two in a row, as the model calls them."""

    name: str
    make: Callable[[Maker, ModelShape], Tensors]  # the arguments
    width: str  # the size of a `ModelShape` that is the channels of a token in one of its tensors
    tensors: tuple[int, int]  # read or written by the forward and by the backward, without the small ones
    products: tuple[int, int] = (0, 0)  # of matrices, each of the scores' size; then also a number for every row
    call: Callable[..., Any] | None = None  # (operations, *arguments); None calls the operation of this name

    def run(self, operations: Any, arguments: Tensors) -> Tensors:
        """The outputs, as a tuple, of a namespace that has the operations."""
        outputs = self.call(operations, *arguments) if self.call else getattr(operations, self.name)(*arguments)
        return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)


class Maker:
    """Makes random tensors, the same for the same seed and device; leaves require a gradient."""

    def __init__(self, dtype: torch.dtype, device: torch.device | str, seed: int) -> None:
        self.dtype, self.device = dtype, device
        self.generator = torch.Generator(device).manual_seed(seed)

    def constant(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(*shape, generator=self.generator, device=self.device, dtype=dtype or self.dtype)

    def leaf(self, *shape: int) -> Tensor:
        return self.constant(*shape).requires_grad_()

    def leaves(self, whole: tuple[int, ...], sizes: tuple[int, ...], dim: int) -> Tensors:
        """Slices of one tensor along `dim`, each a leaf that keeps its strides."""
        return tuple(part.detach().requires_grad_() for part in self.constant(*whole).split(sizes, dim))

    def qkv(self, shape: ModelShape) -> Tensors:
        """q, k and v of one projection."""
        heads = (shape.num_heads, shape.num_kv_heads, shape.num_kv_heads)
        return self.leaves((shape.batch_size, shape.num_tokens, sum(heads), shape.head_dim), heads, 2)

    def rope(self, shape: ModelShape) -> Tensors:
        """The weights of both norms, and the tables of the rotation."""
        weights = self.leaf(shape.head_dim), self.leaf(shape.head_dim)
        angles = 3 * self.constant(shape.num_tokens, shape.head_dim // 2, dtype=torch.float32)
        return *weights, angles.cos(), angles.sin()


def parameter_dtypes(dtype: torch.dtype) -> tuple[torch.dtype, ...]:
    """What a model's parameters may be where its activations are `dtype`: the same, and fp32 under bf16 autocast."""
    return (dtype, torch.float32) if dtype == torch.bfloat16 else (dtype,)
