"""Who computes a workload: these kernels, plain PyTorch, torch.compile, SDPA's backends, and other libraries.

All of them get the same arguments and must give the same outputs; a library that is not installed is left out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import blip3o_kernels
from benchmarks.workloads import ATTENTION, WORKLOADS
from blip3o_kernels import use_kernels
from blip3o_kernels.registry import REFERENCE
from blip3o_kernels.workload import Tensors

OURS = "triton"
SDPA = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}


@dataclass(frozen=True)
class Provider:
    """A name and a function of a workload's arguments."""

    name: str
    run: Callable[[Tensors], Tensors]


def providers(name: str, backend: str = "inductor") -> list[Provider]:
    """Those that can compute this workload, ours first.

    Compiled functions are new ones; forget those of other shapes with `torch.compiler.reset()` before.

    Args:
        backend: of torch.compile.
    """
    workload = WORKLOADS[name]

    def ours(arguments: Tensors) -> Tensors:
        with use_kernels("triton"):
            return workload.run(blip3o_kernels, arguments)

    plain = partial(workload.run, REFERENCE)
    compiled = torch.compile(lambda *arguments: plain(arguments), fullgraph=True, backend=backend)
    found = [
        Provider(OURS, ours),
        Provider("pytorch", plain),
        Provider("compile", partial(_dynamic_batch, lambda arguments: compiled(*arguments))),
    ]
    if name in ATTENTION:
        rope = torch.compile(REFERENCE.qk_norm_rope, fullgraph=True, backend=backend)
        for kernel in SDPA:
            operations = SimpleNamespace(qk_norm_rope=rope, gqa_attention=partial(_sdpa, kernel))
            found.append(Provider(kernel, partial(_dynamic_batch, partial(workload.run, operations))))
    functions = {library: operations[name] for library, operations in LIBRARIES.items() if name in operations}
    found += [Provider(library, run) for library, run in functions.items() if find_spec(MODULES[library])]
    return found


def _dynamic_batch(function: Callable[[Tensors], Tensors], arguments: Tensors) -> Tensors:
    """One compilation for all batch sizes; every other size is compiled in."""
    batch = arguments[0].shape[0]
    for x in arguments:
        if x.shape[0] == batch and (x.dim() > 2 or (x.dim() == 2 and x.requires_grad)):
            torch._dynamo.maybe_mark_dynamic(x, 0)
    return function(arguments)


def _sdpa(kernel: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention by exactly this one of PyTorch's kernels, which raises RuntimeError if it cannot."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if kernel == "efficient":  # knows no groups: its keys are copied for every query head
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    with sdpa_kernel(SDPA[kernel]):
        out = F.scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1])
    return out.transpose(1, 2)


def _liger_rms_norm(arguments: Tensors) -> Tensors:
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    x, weight = arguments
    return (LigerRMSNormFunction.apply(x, weight, 1e-6, 0.0, "gemma", False),)


def _liger_modulated_rms_norm(arguments: Tensors) -> Tensors:
    from liger_kernel.ops.modulated_rms_norm import LigerModulatedRMSNormFunction

    x, weight, scale = arguments
    return (LigerModulatedRMSNormFunction.apply(x, weight, scale, None, 1e-6, 0.0, "gemma", False),)


def _liger_swiglu(arguments: Tensors) -> Tensors:
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    return (LigerSiLUMulFunction.apply(*arguments),)


def _quack_rms_norm(arguments: Tensors) -> Tensors:
    from quack import rmsnorm

    x, weight = arguments
    return (rmsnorm(x.flatten(0, 1), weight, eps=1e-6).view(x.shape),)


LIBRARIES: dict[str, dict[str, Callable[[Tensors], Tensors]]] = {  # what other libraries have of these workloads
    "liger": {"rms_norm": _liger_rms_norm, "modulated_rms_norm": _liger_modulated_rms_norm, "swiglu": _liger_swiglu},
    "quack": {"rms_norm": _quack_rms_norm},
}
MODULES = {"liger": "liger_kernel", "quack": "quack"}


def upstream_of(outputs: Tensors) -> Tensors:
    """Random gradients of the outputs, always the same."""
    generator = torch.Generator(outputs[0].device).manual_seed(1)
    return tuple(torch.empty_like(y).normal_(generator=generator) for y in outputs)


def gradients(outputs: Tensors, arguments: Tensors, upstream: Tensors, retain_graph: bool = False) -> Tensors:
    """The backward pass: gradients of every argument that requires one."""
    pairs = [(y, dy) for y, dy in zip(outputs, upstream, strict=True) if y.requires_grad]
    leaves = [x for x in arguments if x.requires_grad]
    return torch.autograd.grad([y for y, _ in pairs], leaves, [dy for _, dy in pairs], retain_graph=retain_graph)
