"""Casts to the stored dtypes and the search for values that are not finite."""

from __future__ import annotations

import pytest
import torch

from blip3o_ds.data.format.codec import check_values, decode, encode, has_nonfinite
from blip3o_ds.errors import DataError


@pytest.mark.parametrize("magnitude", [1e-30, 1e-3, 1.0, 1e4, 1e30])
def test_fp8_rounds_each_value_by_at_most_a_sixteenth(magnitude):
    values = magnitude * torch.randn(64, 256, generator=torch.Generator().manual_seed(0))

    decoded = decode(*encode(values, "fp8-e4m3")).float()

    # e4m3 keeps 3 bits of mantissa: half a step is 2**-4 relative, or half the least subnormal (2**-10) times the
    # scale; bf16 on the way out adds 2**-9.
    scale = values.abs().amax(-1, keepdim=True) / 448
    bound = values.abs() * (2**-4 + 2**-8) + scale * 2**-10 * 1.01
    assert ((decoded - values).abs() <= bound).all()


def test_fp8_keeps_tokens_of_zeros():
    stored, scale = encode(torch.zeros(3, 8), "fp8-e4m3")
    assert decode(stored, scale).eq(0).all()
    assert scale.isfinite().all()


def test_fp8_scales_every_token_by_itself():
    values = torch.tensor([[1e-4, -1e-4], [100.0, 50.0]])
    torch.testing.assert_close(decode(*encode(values, "fp8-e4m3")).float(), values, rtol=0.01, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_one_bad_value_is_found(dtype, bad):
    values = torch.randn(7, 9).to(dtype)
    assert not has_nonfinite(values)
    values[3, 5] = bad
    assert has_nonfinite(values)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_search_agrees_with_isfinite_on_all_bit_patterns(dtype):
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    for chunk in patterns.split(64):  # neighbours share sign and exponent
        assert has_nonfinite(chunk) == (not bool(chunk.isfinite().all()))


def test_other_dtypes_and_strides_are_searched_as_well():
    values = torch.zeros(6, 8, dtype=torch.float64)
    values[0, 1] = float("nan")
    assert has_nonfinite(values)
    assert has_nonfinite(values.float().T)
    assert not has_nonfinite(values.float()[:, ::2])


def test_both_signs_of_nan_are_found():
    for bits in (0x7FC00001, -0x3FFFFF):
        assert has_nonfinite(torch.tensor([bits], dtype=torch.int32).view(torch.float32))


def test_the_search_knows_both_nans_of_fp8():
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    assert [code for code in range(256) if has_nonfinite(codes[code : code + 1])] == [0x7F, 0xFF]


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), 1e36])
def test_a_scale_that_makes_a_value_infinite_is_refused(scale):
    with pytest.raises(DataError, match="shard: sample a: eva_scale holds NaN or a value beyond"):
        check_values({"eva_scale": torch.tensor([scale])}, "shard: sample a")
