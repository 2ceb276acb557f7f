"""SwiGLU's product, forward and backward, on the two halves of one projection as they lie (Shazeer 2020).

The backward writes both gradients into one buffer, gate's half before up's: where they are concatenated again for the
projection, torch.compile finds nothing left to copy.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from blip3o_kernels.autograd import backward_op, differentiable, like
from blip3o_kernels.checks import check_floating, check_like, check_shape
from blip3o_kernels.launch import ROW_OPTIONS, as_rows, cdiv, choose, shape_class, tile_candidates, tile_config
from blip3o_kernels.numeric import rounded
from blip3o_kernels.operation import Operation
from blip3o_kernels.triton_language import tl, triton
from blip3o_kernels.workload import Maker, ModelShape, Tensors, Workload


def reference(gate: Tensor, up: Tensor) -> Tensor:
    """`silu(gate) * up` (Shazeer 2020), both `[..., D]` of one dtype.

    PyTorch's silu is fp32 inside; its result is rounded once before the product, which saves an fp32 copy of `gate`.
    The kernel rounds once, after the product.

    Raises:
        ValueError: naming the argument whose shape, dtype or device does not fit.
    """
    return F.silu(gate) * up


def check(gate: Tensor, up: Tensor) -> None:
    check_floating("gate", gate)
    check_shape("up", up, gate.shape)
    check_like("up", up, "gate", gate)


@triton.jit(do_not_specialize=["N", "row_blocks", "column_blocks"])
def _forward_kernel(
    gate, up, y, gate_b, gate_n, up_b, up_n, N, D, row_blocks, column_blocks, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    b, n, d = tile_of_program(row_blocks, column_blocks, ROWS, COLUMNS)
    inside = (n < N) & (d < D)
    g = tl.load(gate + b * gate_b + n * gate_n + d, mask=inside, other=0).to(tl.float32)
    u = tl.load(up + b * up_b + n * up_n + d, mask=inside, other=0).to(tl.float32)
    out = g * tl.sigmoid(g) * u
    tl.store(y + (b * N + n) * D + d, rounded(out, y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["N", "row_blocks", "column_blocks"])
def _backward_kernel(
    dy, gate, up, d_both, dy_b, dy_n, gate_b, gate_n, up_b, up_n, N, D, row_blocks, column_blocks,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    b, n, d = tile_of_program(row_blocks, column_blocks, ROWS, COLUMNS)
    inside = (n < N) & (d < D)
    upstream = tl.load(dy + b * dy_b + n * dy_n + d, mask=inside, other=0).to(tl.float32)
    g = tl.load(gate + b * gate_b + n * gate_n + d, mask=inside, other=0).to(tl.float32)
    u = tl.load(up + b * up_b + n * up_n + d, mask=inside, other=0).to(tl.float32)
    sigmoid = tl.sigmoid(g)
    d_gate = upstream * u * sigmoid * (1 + g * (1 - sigmoid))
    d_up = upstream * g * sigmoid
    out = d_both + (b * N + n) * (2 * D) + d
    tl.store(out, rounded(d_gate, d_both.dtype.element_ty), mask=inside)
    tl.store(out + D, rounded(d_up, d_both.dtype.element_ty), mask=inside)


@triton.jit
def tile_of_program(row_blocks, column_blocks, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Sample, tokens [ROWS, 1] and channels [1, COLUMNS] of this program."""
    row_block = tl.program_id(0) // column_blocks
    d = (tl.program_id(0) % column_blocks) * COLUMNS + tl.arange(0, COLUMNS)
    n = (row_block % row_blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    return (row_block // row_blocks).to(tl.int64), n[:, None], d[None, :]


def launch_forward(gate: Tensor, up: Tensor) -> Tensor:
    """y of gate's shape, contiguous."""
    return _launch("swiglu", _forward_kernel, like(gate)[0], gate, up)


def launch_backward(dy: Tensor, gate: Tensor, up: Tensor) -> Tensor:
    """Gradients of gate and up side by side, `[..., 2 D]`, contiguous."""
    return _launch("swiglu_backward", _backward_kernel, _empty_both(dy, gate, up), dy, gate, up)


def _launch(op: str, kernel: Any, out: Tensor, *inputs: Tensor) -> Tensor:
    inputs = tuple(as_rows(x, per_sample=False) for x in inputs)
    B, N, D = inputs[0].shape
    config = choose(op, shape_class(out.dtype, D=D), out, tile_config(N, D))
    blocks = cdiv(N, config.rows), cdiv(D, config.columns)
    arguments = *inputs, out, *[stride for x in inputs for stride in x.stride()[:2]], N, D, *blocks
    with torch.cuda.device_of(out):
        kernel[(B * blocks[0] * blocks[1],)](
            *arguments, config.rows, config.columns, num_warps=config.num_warps, **ROW_OPTIONS
        )
    return out


def _empty_both(dy: Tensor, gate: Tensor, up: Tensor) -> Tensor:
    return gate.new_empty(*gate.shape[:-1], 2 * gate.shape[-1])


def candidates(D: int, *_: Any) -> dict[str, Any]:
    """What a search tries for each kernel."""
    return dict.fromkeys(("swiglu", "swiglu_backward"), tile_candidates(D))


def launches(shape: ModelShape, dtype: torch.dtype) -> None:
    both = torch.empty(shape.batch_size, shape.num_tokens, 2 * shape.ffn_dim, dtype=dtype, device="meta")
    gate, up = both.chunk(2, dim=-1)
    launch_backward(launch_forward(gate, up), gate, up)


def _gradients(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
    gate, up = ctx.saved_tensors
    # The dimension counted from the front, as autograd concatenates: the compiler matches the two literally.
    d_gate, d_up = _backward(dy, gate, up).split_with_sizes([gate.shape[-1]] * 2, dim=gate.dim() - 1)
    return d_gate, d_up


_fused = differentiable("swiglu", launch_forward, lambda gate, up: like(gate)[0], _gradients)
_backward = backward_op("swiglu", launch_backward, _empty_both)


def _make(make: Maker, shape: ModelShape) -> Tensors:
    D = shape.ffn_dim
    return make.leaves((shape.batch_size, shape.num_tokens, 2 * D), (D, D), -1)


WORKLOADS = (Workload("swiglu", _make, "ffn_dim", (3, 5)),)
OPERATION = Operation("swiglu", reference, check, _fused, launches, "ffn_dim", candidates, WORKLOADS)
swiglu = OPERATION.public()
