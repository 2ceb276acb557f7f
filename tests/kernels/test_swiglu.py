"""The SwiGLU kernel against float64, on the halves of one projection."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from blip3o_kernels import swiglu, use_kernels
from blip3o_kernels.launch import tile_config
from blip3o_kernels.swiglu import candidates
from tests.kernels.accuracy import DEVICE, DTYPES, assert_kernel_is_accurate, random

SHAPES = [(2, 257, 48), (2, 3, 1000), (1, 1, 1), (2, 3, 4, 33), (7, 64), (129,), (3, 2, 2048)]


def exact(gate, up):
    return gate / (1 + torch.exp(-gate)) * up


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients_are_as_accurate_as_plain_pytorch(shape, dtype):
    gate, up = random(*shape, dtype=dtype), random(*shape, dtype=dtype, seed=1)
    assert_kernel_is_accurate(swiglu, exact, [gate, up])


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_halves_of_a_projection_are_taken_as_they_are(dtype):
    def halves(function):
        return lambda both: function(*both.chunk(2, dim=-1))

    both = random(2, 9, 66, dtype=dtype)
    assert_kernel_is_accurate(halves(swiglu), halves(exact), [both])
    assert_kernel_is_accurate(halves(swiglu), halves(exact), [both[:, 1:6]])


def test_channels_that_are_not_dense_are_copied():
    gate, up = random(2, 10, 7).transpose(1, 2), random(2, 7, 20, seed=1)[..., ::2]
    assert_kernel_is_accurate(swiglu, exact, [gate, up])


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # the interpreter's, where the sigmoid is zero
def test_large_values_saturate_without_nan():
    gate = torch.tensor([[-300.0, -100.0, -20.0, 20.0, 100.0, 300.0]], device=DEVICE)
    assert_kernel_is_accurate(swiglu, exact, [gate, torch.full_like(gate, 2.0)])


def test_both_gradients_are_halves_of_one_buffer():
    leaves = [random(2, 3, 8).requires_grad_(), random(2, 3, 8, seed=1).requires_grad_()]
    with use_kernels("triton"):
        d_gate, d_up = torch.autograd.grad(swiglu(*leaves).sum(), leaves)
    assert d_gate.untyped_storage().data_ptr() == d_up.untyped_storage().data_ptr()
    assert d_gate.stride() == d_up.stride() == (48, 16, 1)
    assert d_up.storage_offset() - d_gate.storage_offset() == 8


@pytest.mark.parametrize("shape", [(0, 4, 8), (2, 0, 8), (2, 3, 0)])
def test_an_empty_batch_gives_an_empty_output(shape):
    leaves = [random(*shape).requires_grad_() for _ in range(2)]
    with use_kernels("triton"):
        y = swiglu(*leaves)
        gradients = torch.autograd.grad(y.sum(), leaves)
    assert y.shape == gradients[0].shape == gradients[1].shape == shape


@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 40)), factor=st.sampled_from([-2.0, 0.5, 4.0])
)
@settings(max_examples=15, deadline=None)
def test_it_is_linear_in_up(shape, factor):
    gate, up = random(*shape), random(*shape, seed=1)
    with use_kernels("triton"):
        assert torch.equal(swiglu(gate, factor * up), factor * swiglu(gate, up))  # powers of two round nothing


def test_the_operation_is_registered_as_pytorch_expects():
    both = random(2, 3, 16)
    dy, (gate, up) = random(2, 3, 8), both.chunk(2, dim=-1)
    torch.library.opcheck(torch.ops.blip3o.swiglu_backward.default, (dy, gate, up))
    gate, up = both.requires_grad_().split(8, dim=-1)
    torch.library.opcheck(
        torch.ops.blip3o.swiglu.default, (gate.detach().requires_grad_(), up.detach().requires_grad_())
    )


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("gate", lambda: swiglu(torch.ones(2, 3, dtype=torch.int32), random(2, 3))),
        ("up", lambda: swiglu(random(2, 3), random(2, 4))),
        ("up", lambda: swiglu(random(2, 3), random(2, 3).half())),
        ("up", lambda: swiglu(random(2, 3), torch.ones(2, 3, device="meta"))),
    ],
)
def test_a_wrong_argument_is_named(name, call):
    with use_kernels("triton"), pytest.raises(ValueError, match=rf"^{name}: expected .*found"):
        call()


@pytest.mark.parametrize(("D", "columns"), [(4096, 1024), (1536, 512), (3072, 1024), (384, 128), (1000, 1024), (5, 8)])
def test_tiles_divide_the_channels_where_they_can(D, columns):
    config = tile_config(4096, D)
    assert (config.columns, config.rows) == (columns, 2048 // columns)


def test_a_search_has_something_to_try():
    assert all(len(configs) == len(set(configs)) > 1 for configs in candidates(1536).values())
