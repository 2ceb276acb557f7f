"""The one rule by which every kernel is judged, and what the kernels' tests share.

An error may be at most twice that of the same formula in plain PyTorch at the same precision, both against float64,
plus a floor of a few fp32 roundings; so may the mean error, which a rounding that leans to one side would raise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from blip3o_kernels import use_kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # without CUDA the kernels are interpreted
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FLOOR = 8 * torch.finfo(torch.float32).eps

Operation = Callable[..., Tensor | tuple[Tensor, ...]]


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Normal numbers, the same for every dtype up to its rounding."""
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return values.to(DEVICE, dtype)


def assert_as_accurate(found: Tensor, plain: Tensor, exact: Tensor, name: str) -> None:
    """The rule, for one tensor: what the kernel found, what plain PyTorch finds, and the float64 truth."""
    assert found.shape == plain.shape, f"{name}: shape {list(found.shape)}, expected {list(plain.shape)}"
    assert found.dtype == plain.dtype, f"{name}: {found.dtype}, expected {plain.dtype}"
    if exact.numel() == 0:
        return
    floor = FLOOR * exact.abs().max().item()
    error, allowed = (found.double() - exact).abs(), (plain.double() - exact).abs()
    for statistic in (torch.max, torch.mean):
        e, a = statistic(error).item(), statistic(allowed).item()
        assert e <= 2 * a + floor, f"{name}: {statistic.__name__} error {e:.3g}, of plain PyTorch {a:.3g}"


def assert_kernel_is_accurate(operation: Operation, exact: Operation, inputs: Sequence[Tensor | None]) -> None:
    """The rule, for every output of `operation(*inputs)` and the gradient of every input.

    Args:
        operation: runs as a kernel and, for comparison, in plain PyTorch.
        exact: the same function of float64 inputs.
    """
    kernel, plain = (_outputs_and_gradients(operation, inputs, mode) for mode in ("triton", "torch"))
    doubles = [None if x is None else x.double() for x in inputs]
    truth = _outputs_and_gradients(exact, doubles, "torch", dtypes=[x.dtype for x in plain])
    assert len(kernel) == len(plain) == len(truth)
    outputs = len(plain) - sum(x is not None for x in inputs)
    for i, tensors in enumerate(zip(kernel, plain, truth, strict=True)):
        assert_as_accurate(*tensors, name=f"output {i}" if i < outputs else f"gradient {i - outputs}")


def _outputs_and_gradients(
    function: Operation, inputs: Sequence[Tensor | None], mode: str, dtypes: Sequence[torch.dtype] | None = None
) -> list[Tensor]:
    """Outputs, then the gradient of every input that is there, for random upstream gradients.

    `dtypes` are what the outputs' upstream gradients are rounded to, so that every precision gets the same ones.
    """
    leaves = [None if x is None else x.detach().requires_grad_() for x in inputs]
    with use_kernels(mode):
        outputs = function(*leaves)
        outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
        dtypes = dtypes or [y.dtype for y in outputs]
        upstream = [random(*y.shape, dtype=dtypes[i], seed=100 + i).to(y.dtype) for i, y in enumerate(outputs)]
        sources = [x for x in leaves if x is not None]
        gradients = torch.autograd.grad(outputs, sources, upstream, allow_unused=True, materialize_grads=True)
    return [x.detach() for x in (*outputs, *gradients)]
