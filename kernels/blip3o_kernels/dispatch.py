"""Which path an operation takes: its Triton kernel or plain PyTorch.

The environment variable `BLIP3O_KERNELS` (auto, triton or torch; read once, when the package is imported) gives the
mode, `use_kernels` changes it for a while. `auto` takes the kernel for CUDA tensors and PyTorch for all others.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

import torch
from torch import Tensor

MODES = ("auto", "triton", "torch")
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

INTERPRET = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")  # as Triton reads it
TRITON_INSTALLED = find_spec("triton") is not None


def _checked(mode: str, source: str) -> str:
    if mode not in MODES:
        raise ValueError(f"{source}: expected one of {', '.join(MODES)}, found {mode!r}")
    return mode


# A plain global, so that torch.compile guards on it and recompiles when it changes.
_mode = _checked(os.environ.get("BLIP3O_KERNELS", "auto"), "environment variable BLIP3O_KERNELS")


@contextmanager
def use_kernels(mode: str) -> Iterator[None]:
    """Choose the path of every operation called within the block, in this process.

    A backward pass takes the path of its forward, wherever it runs.

    Args:
        mode: `auto`, `triton` or `torch`.

    Raises:
        ValueError: another mode.
    """
    global _mode
    before, _mode = _mode, _checked(mode, "use_kernels")
    try:
        yield
    finally:
        _mode = before


def triton_chosen(x: Tensor, obstacle: str | None = None) -> bool:
    """Whether an operation on `x` runs as a Triton kernel.

    Args:
        obstacle: why the kernel cannot take these arguments, or None. Under `auto` the operation then runs in PyTorch.

    Raises:
        ValueError: the mode is `triton`, and the kernel cannot take these arguments.
        RuntimeError: the mode is `triton`, and no kernel can run here at all.
    """
    if _mode == "torch" or (_mode == "auto" and not (x.is_cuda and TRITON_INSTALLED)):
        return False
    if obstacle is None and x.dtype not in KERNEL_DTYPES:
        obstacle = f"expected float32, bfloat16 or float16, found {x.dtype}"
    if _mode == "auto":
        return obstacle is None
    if not TRITON_INSTALLED:
        raise RuntimeError("BLIP3O_KERNELS=triton, but Triton is not installed; install it or use BLIP3O_KERNELS=auto")
    if not (x.is_cuda or INTERPRET):
        raise RuntimeError(
            f"BLIP3O_KERNELS=triton, but a tensor is on {x.device}: a Triton kernel takes CUDA tensors; "
            "use BLIP3O_KERNELS=auto, or start Python with TRITON_INTERPRET=1 to interpret kernels on the CPU"
        )
    if obstacle is not None:
        raise ValueError(f"no Triton kernel for these arguments: {obstacle}; use BLIP3O_KERNELS=auto")
    return True
