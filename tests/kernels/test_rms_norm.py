"""The RMSNorm kernel against float64, and every way in which the model calls it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from blip3o_kernels import rms_norm, use_kernels
from blip3o_kernels.rms_norm import candidates
from tests.kernels.accuracy import DEVICE, DTYPES, assert_kernel_is_accurate, random

SHAPES = [(2, 257, 48), (3, 5, 1000), (1, 1, 5), (2, 3, 4, 33), (7, 64), (129,)]


def exact(x, weight, scale=None):
    y = x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * weight
    return y if scale is None else y * (1 + scale.view(len(scale), *[1] * (x.dim() - 2), -1))


def normed(x, weight, scale=None):
    return rms_norm(x, weight, 1e-5, scale)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients_are_as_accurate_as_plain_pytorch(shape, dtype):
    x, weight = random(*shape, dtype=dtype), random(shape[-1], dtype=dtype, seed=1)
    assert_kernel_is_accurate(normed, exact, [x, weight])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES[:-1])
def test_a_scale_for_every_sample_is_as_accurate(shape, dtype):
    x, weight = random(*shape, dtype=dtype), random(shape[-1], dtype=dtype, seed=1)
    scale = random(shape[0], shape[-1], dtype=dtype, seed=2)
    assert_kernel_is_accurate(normed, exact, [x, weight, scale])


def test_gradients_of_parameters_have_the_parameters_dtype():
    x = random(2, 9, 40, dtype=torch.bfloat16)
    assert_kernel_is_accurate(normed, exact, [x, random(40, seed=1), random(2, 40, seed=2, dtype=torch.float16)])


def test_the_widest_rows_and_many_samples_are_summed_right():
    assert_kernel_is_accurate(normed, exact, [random(2, 3, 8192), random(8192, seed=1), random(2, 8192, seed=2)])
    assert_kernel_is_accurate(normed, exact, [random(70, 2, 8), random(8, seed=1), random(70, 8, seed=2)])


def test_strided_views_are_taken_as_they_are():
    x = random(4, 10, 3, 16, dtype=torch.bfloat16)[:, 1:8, 1]  # rows of a projection, tokens of a slice
    weight, scale = random(32, seed=1)[::2], random(4, 48, seed=2)[:, 16:32]
    assert_kernel_is_accurate(normed, exact, [x, weight, scale])
    assert_kernel_is_accurate(normed, exact, [random(2, 16, 7).transpose(1, 2), weight])  # channels not dense: copied


@pytest.mark.parametrize("shape", [(0, 4, 8), (2, 0, 8)])
def test_an_empty_batch_gives_empty_output_and_zero_gradients(shape):
    x, weight = random(*shape).requires_grad_(), random(8).requires_grad_()
    scale = random(shape[0], 8).requires_grad_()
    with use_kernels("triton"):
        y = rms_norm(x, weight, scale=scale)
        gradients = torch.autograd.grad(y.sum(), (x, weight, scale))
    assert y.shape == x.shape
    assert all(not gradient.any() for gradient in gradients)


def test_gradients_repeat_bit_for_bit():
    x, weight, scale = random(3, 70, 24), random(24, seed=1), random(3, 24, seed=2)

    def gradients():
        leaves = [t.clone().requires_grad_() for t in (x, weight, scale)]
        return torch.autograd.grad(normed(*leaves).square().sum(), leaves)

    with use_kernels("triton"):
        assert all(torch.equal(a, b) for a, b in zip(gradients(), gradients(), strict=True))


def test_absent_rows_of_a_tile_leave_no_nan_where_eps_is_zero():
    def function(x, weight):
        return rms_norm(x, weight, 0.0)

    assert_kernel_is_accurate(
        function, lambda x, w: x * x.square().mean(-1, keepdim=True).rsqrt() * w, [random(1, 3, 8), random(8)]
    )


@given(
    scaling=st.floats(1e-2, 1e2), shape=st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(2, 40))
)  # fmt: skip
@settings(max_examples=15, deadline=None)
def test_the_length_of_x_does_not_matter(scaling, shape):
    x, weight = random(*shape), torch.ones(shape[-1], device=DEVICE)
    with use_kernels("triton"):
        y, of_scaled = rms_norm(x, weight, 0.0), rms_norm(scaling * x, weight, 0.0)
    torch.testing.assert_close(y, of_scaled, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(y.square().mean(-1), torch.ones(shape[:-1], device=DEVICE), rtol=1e-5, atol=0)


@pytest.mark.parametrize("scaled", [False, True])
def test_the_operation_is_registered_as_pytorch_expects(scaled):
    x, weight = random(2, 3, 8).requires_grad_(), random(8).requires_grad_()
    scale = random(2, 8).requires_grad_() if scaled else None
    torch.library.opcheck(torch.ops.blip3o.rms_norm.default, (x, weight, scale, 1e-6))
    y = (x.detach(), weight.detach(), None if scale is None else scale.detach())
    torch.library.opcheck(torch.ops.blip3o.rms_norm_backward.default, (random(2, 3, 8), *y, 1e-6))


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("weight", lambda: rms_norm(random(1, 2, 4), random(5))),
        ("weight", lambda: rms_norm(random(1, 2, 4), torch.ones(4, dtype=torch.int64))),
        ("weight", lambda: rms_norm(random(1, 2, 4), torch.ones(4, device="meta"))),
        ("scale", lambda: rms_norm(random(2, 2, 4), random(4), scale=random(1, 4))),
        ("x", lambda: rms_norm(torch.ones(1, 4, dtype=torch.int64), random(4))),
        ("x", lambda: rms_norm(torch.ones(()), random(4))),
        ("no Triton kernel.*float64", lambda: rms_norm(random(1, 4, dtype=torch.float64), random(4))),
        ("no Triton kernel.*8192", lambda: rms_norm(random(1, 8193), random(8193))),
    ],
)
def test_a_wrong_argument_is_named(name, call):
    with use_kernels("triton"), pytest.raises(ValueError, match=rf"^{name}\b.*"):
        call()


@pytest.mark.parametrize("D", [1, 384, 1000, 1024, 8192])
def test_a_search_has_something_to_try_and_every_candidate_holds_whole_rows(D):
    for configs in candidates(D).values():
        assert len(configs) == len(set(configs))
        assert all(1 <= config.num_warps <= 16 and config.rows & (config.rows - 1) == 0 for config in configs)
    assert D < 16 or all(candidates(D).values())
