"""What is timed: the operations' workloads at the DiT's shapes, with the bytes and operations that each must take."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from blip3o_kernels.registry import OPERATIONS
from blip3o_kernels.workload import SHAPES, Maker, ModelShape, Tensors

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
PRESETS = ("base", "large", "small", "tiny")  # in the order they are timed
SWEEP_TOKENS = tuple(1024 * 2**i for i in range(10))  # 1k to 512k
PASSES = {"forward": (0,), "backward": (1,), "both": (0, 1)}  # indices of a workload's counts

WORKLOADS = {workload.name: workload for operation in OPERATIONS.values() for workload in operation.workloads}
ATTENTION = tuple(workload.name for workload in OPERATIONS["gqa_attention"].workloads)


@dataclass(frozen=True)
class Cost:
    """What one pass cannot do without, as `kernels/README.md` counts it."""

    bytes: int  # every tensor read once, every result written once; parameters, modulations and tables left out
    flops: int  # of matrix products only


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
        """What `forward`, `backward` or `both` must move and multiply."""
        workload, shape, counted = WORKLOADS[self.workload], self.shape, PASSES[name]
        tensors, products = (sum(counts[i] for i in counted) for counts in (workload.tensors, workload.products))
        moved = tensors * self.tokens * getattr(shape, workload.width) * DTYPES[self.dtype].itemsize
        if products:  # attention also writes or reads an fp32 number for every row of scores
            moved += 4 * self.tokens * shape.num_heads * len(counted)
        return Cost(moved, products * 2 * self.tokens * shape.num_tokens * shape.hidden_size)

    def arguments(self, device: torch.device | str, seed: int = 0) -> Tensors:
        """Random tensors; those that the model differentiates require a gradient, and are leaves."""
        return WORKLOADS[self.workload].make(Maker(DTYPES[self.dtype], device, seed), self.shape)


def model_shape(preset: str, num_tokens: int, batch_size: int) -> ModelShape:
    """A preset's sizes.

    Raises:
        ValueError: no such preset, or a number of tokens that the model does not have.
    """
    found = {shape.name: shape for shape in SHAPES}.get(f"{preset}-{num_tokens}")
    if found is None:
        raise ValueError(f"expected one of {', '.join(shape.name for shape in SHAPES)}, found {preset}-{num_tokens}")
    return replace(found, batch_size=batch_size)


def model_cases(
    workloads: list[str], dtypes: list[str], presets: list[str], batches: list[int], tokens: list[int]
) -> list[Case]:
    """The grid of the DiT's shapes."""
    return [
        Case(workload, model_shape(preset, N, B), dtype)
        for preset in presets
        for dtype in dtypes
        for workload in workloads
        for N in tokens
        for B in batches
    ]


def sweep_cases(workloads: list[str], dtypes: list[str], tokens: tuple[int, ...] = SWEEP_TOKENS) -> list[Case]:
    """The base preset's shapes from few tokens to very many, 256 of a sample."""
    return [
        Case(workload, model_shape("base", 256, count // 256), dtype, sweep=True)
        for dtype in dtypes
        for workload in workloads
        for count in tokens
    ]
