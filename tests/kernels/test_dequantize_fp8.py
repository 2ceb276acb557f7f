"""fp8 with a scale per token: every code by its definition, and the kernel's bits those of the REFERENCE."""

from importlib import import_module

import pytest
import torch

from blip3o_kernels import dequantize_fp8, use_kernels
from blip3o_kernels.registry import REFERENCE


def e4m3_value(code):
    """By the format's definition: sign, 4 bits of exponent with bias 7, 3 of mantissa, no infinity."""
    sign, exponent, mantissa = (-1) ** (code >> 7), code >> 3 & 15, code & 7
    if (exponent, mantissa) == (15, 7):
        return float("nan")
    return sign * (2.0 ** (exponent - 7) * (1 + mantissa / 8) if exponent else 2.0**-6 * mantissa / 8)


def every_code(D):
    """All 256 codes in tokens of D channels, [256, D], in another place in each token."""
    return ((torch.arange(256)[:, None] + 7 * torch.arange(D)) % 256).to(torch.uint8)


def kernel(stored, scale, dtype):
    with use_kernels("triton"):
        return dequantize_fp8(stored, scale, dtype)


def test_every_code_has_the_value_that_the_format_defines():
    values = dequantize_fp8(every_code(1), torch.full((256,), 0.5), torch.float32)[:, 0]
    expected = torch.tensor([0.5 * e4m3_value(code) for code in range(256)])
    torch.testing.assert_close(values, expected, rtol=0, atol=0, equal_nan=True)


def test_every_token_has_its_own_scale_and_both_dtypes_of_the_codes_are_taken():
    stored = torch.tensor([[1.0, -2.0], [0.5, 448.0]]).to(torch.float8_e4m3fn)[None]  # [1, 2, 2]
    scale = torch.tensor([[10.0, 0.25]])
    for codes in (stored, stored.view(torch.uint8)):
        values = dequantize_fp8(codes, scale)
        assert values.dtype == torch.bfloat16
        assert values.tolist() == [[[10.0, -20.0], [0.125, 112.0]]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("D", [1, 40, 256])
def test_the_kernel_gives_the_bits_of_the_reference(dtype, D):
    stored = every_code(D)
    scale = torch.randn(256, generator=torch.Generator().manual_seed(0)).exp()
    expected = REFERENCE.dequantize_fp8(stored, scale, dtype)
    torch.testing.assert_close(kernel(stored, scale, dtype), expected, rtol=0, atol=0, equal_nan=True)


def test_the_kernel_takes_more_channels_than_a_block_more_dimensions_and_strided_arguments(monkeypatch):
    monkeypatch.setattr(import_module("blip3o_kernels.dequantize_fp8"), "_MAX_BLOCK", 32)
    stored = every_code(80).view(4, 64, 80)[:, ::2].view(torch.float8_e4m3fn)
    scale = torch.rand(32, 4).T
    expected = REFERENCE.dequantize_fp8(stored, scale)
    torch.testing.assert_close(kernel(stored, scale, torch.bfloat16), expected, rtol=0, atol=0, equal_nan=True)


def test_no_tokens_are_no_error():
    assert kernel(torch.empty(0, 8, dtype=torch.uint8), torch.empty(0), torch.bfloat16).shape == (0, 8)


@pytest.mark.parametrize(
    ("stored", "scale", "message"),
    [
        (torch.zeros(2, 3), torch.ones(2), "stored: expected float8_e4m3fn"),
        (torch.zeros(2, 3, dtype=torch.uint8), torch.ones(3), r"scale: expected shape \[2\], found \[3\]"),
        (torch.zeros(2, 3, dtype=torch.uint8), torch.ones(2).double(), "scale: expected float32"),
    ],
)
def test_arguments_that_do_not_fit_are_named(stored, scale, message):
    with pytest.raises(ValueError, match=message):
        dequantize_fp8(stored, scale)
