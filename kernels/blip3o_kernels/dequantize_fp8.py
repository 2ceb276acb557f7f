"""Embeddings stored as fp8 with a scale per token, expanded in one pass: decode, scale, cast.

It moves one byte in and two (bf16) or four (fp32) out for each value and computes next to nothing, so the memory's
bandwidth is its limit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from blip3o_kernels.checks import check_device, check_shape
from blip3o_kernels.launch import ROW_OPTIONS, cdiv, next_power_of_2
from blip3o_kernels.numeric import rounded
from blip3o_kernels.operation import Operation
from blip3o_kernels.triton_language import tl, triton
from blip3o_kernels.workload import ModelShape


def reference(stored: Tensor, scale: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """`stored * scale` per token: embeddings kept as fp8 (e4m3, Micikevicius et al. 2022) with a scale for each token.

    Both paths give the same bits.

    Args:
        stored: `[..., D]`, float8_e4m3fn or the same bytes as uint8.
        scale: `[...]`, fp32.
        dtype: of the result; the product is fp32 and rounded once.

    Returns:
        `[..., D]` of `dtype`.

    Raises:
        ValueError: naming the argument whose shape, dtype or device does not fit.
    """
    return (stored.view(torch.float8_e4m3fn).float() * scale[..., None]).to(dtype)


def check(stored: Tensor, scale: Tensor, dtype: torch.dtype) -> None:
    if stored.dtype not in (torch.float8_e4m3fn, torch.uint8):
        raise ValueError(f"stored: expected float8_e4m3fn or its bytes as uint8, found {stored.dtype}")
    check_shape("scale", scale, stored.shape[:-1])
    if scale.dtype != torch.float32:
        raise ValueError(f"scale: expected float32, found {scale.dtype}")
    check_device("scale", scale, "stored", stored)


_MAX_BLOCK = 4096  # channels of one program
_VALUES_PER_THREAD = 16  # one load of 16 bytes


@triton.jit
def _dequantize_kernel(stored, scale, out, D, BD: tl.constexpr):
    """One program expands up to BD channels of one token."""
    token = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * BD + tl.arange(0, BD)
    inside = channel < D
    code = tl.load(stored + token * D + channel, mask=inside, other=0).to(tl.uint16)
    # Sign, exponent and mantissa moved to their places in fp16, whose exponent has 8 more of bias. Unlike the
    # conversion in hardware this runs on every GPU, and subnormals (of fp16 as well) come out exactly.
    half = (((code & 0x80) << 8) | ((code & 0x7F) << 7)).to(tl.float16, bitcast=True)
    value = half.to(tl.float32) * 256.0
    value = tl.where((code & 0x7F) == 0x7F, float("nan"), value)
    value *= tl.load(scale + token)
    tl.store(out + token * D + channel, rounded(value, out.dtype.element_ty), mask=inside)


def launch(stored: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The kernel on contiguous copies where the arguments are not contiguous."""
    D = stored.shape[-1]
    out = torch.empty(stored.shape, dtype=dtype, device=stored.device)
    if out.numel() == 0:
        return out
    BD = min(next_power_of_2(D), _MAX_BLOCK)
    num_warps = max(1, BD // (32 * _VALUES_PER_THREAD))
    grid = (scale.numel(), cdiv(D, BD))
    stored = stored.contiguous().view(torch.uint8)
    with torch.cuda.device_of(stored):
        _dequantize_kernel[grid](stored, scale.contiguous(), out, D, BD=BD, num_warps=num_warps, **ROW_OPTIONS)
    return out


def launches(shape: ModelShape, dtype: torch.dtype) -> None:
    for D in (shape.eva_dim, shape.clip_dim):
        stored = torch.empty(shape.batch_size, shape.num_tokens, D, dtype=torch.float8_e4m3fn, device="meta")
        scale = torch.empty(shape.batch_size, shape.num_tokens, dtype=torch.float32, device="meta")
        launch(stored, scale, dtype)


OPERATION = Operation("dequantize_fp8", reference, check, launch, launches, "eva_dim", deciding=1)
dequantize_fp8 = OPERATION.public()
