"""The sandwich kernel against float64: both outputs, six gradients."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from blip3o_kernels import sandwich, use_kernels
from blip3o_kernels.sandwich import candidates
from tests.kernels.accuracy import DEVICE, DTYPES, assert_kernel_is_accurate, random

SHAPES = [(2, 257, 48), (2, 5, 1000), (3, 1, 7), (1, 3, 64)]


def exact_norm(x, weight):
    return x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * weight


def exact(branch, residual, post, gate, pre, scale):
    new_residual = residual + torch.tanh(gate)[:, None] * exact_norm(branch, post)
    return new_residual, exact_norm(new_residual, pre) * (1 + scale)[:, None]


def fused(*inputs):
    return sandwich(*inputs, 1e-5)


def arguments(B, N, D, dtype=torch.float32, parameters=None):
    parameters = parameters or dtype
    tokens = [random(B, N, D, dtype=dtype, seed=seed) for seed in (0, 1)]
    post, gate, pre, scale = (
        random(*shape, dtype=parameters, seed=2 + i) for i, shape in enumerate([(D,), (B, D), (D,), (B, D)])
    )
    return [*tokens, post, gate, pre, scale]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients_are_as_accurate_as_plain_pytorch(shape, dtype):
    assert_kernel_is_accurate(fused, exact, arguments(*shape, dtype))


def test_gradients_of_parameters_have_the_parameters_dtype():
    assert_kernel_is_accurate(fused, exact, arguments(2, 9, 40, torch.bfloat16, parameters=torch.float32))


def test_the_widest_rows_and_many_samples_are_summed_right():
    assert_kernel_is_accurate(fused, exact, arguments(1, 3, 8192))
    assert_kernel_is_accurate(fused, exact, arguments(70, 2, 8))


@pytest.mark.parametrize("size", [0.0, 1e-4, 0.199, 0.201, 1.0, 30.0])
def test_gates_of_every_size_are_as_accurate(size):
    inputs = arguments(2, 6, 32)
    inputs[3] = size * torch.sign(inputs[3])
    assert_kernel_is_accurate(fused, exact, inputs)


def test_strided_views_are_taken_as_they_are():
    branch = random(2, 9, 3, 16, dtype=torch.bfloat16)[:, 1:8, 1]
    residual = random(2, 7, 32, dtype=torch.bfloat16, seed=1)[..., 16:]
    post, pre = random(32, seed=2)[::2], random(16, seed=3)
    gate, scale = random(2, 96, seed=4).chunk(6, dim=-1)[2:4]
    assert_kernel_is_accurate(fused, exact, [branch, residual, post, gate, pre, scale])


@pytest.mark.parametrize("shape", [(0, 4, 8), (2, 0, 8)])
def test_an_empty_batch_gives_empty_outputs_and_zero_gradients(shape):
    leaves = [x.requires_grad_() for x in arguments(*shape)]
    with use_kernels("triton"):
        outputs = sandwich(*leaves)
        gradients = torch.autograd.grad(sum(y.sum() for y in outputs), leaves)
    assert all(y.shape == shape for y in outputs)
    assert all(not gradient.any() for gradient in gradients)


@pytest.mark.parametrize("used", [0, 1])
def test_one_output_alone_can_be_used(used):
    assert_kernel_is_accurate(lambda *x: fused(*x)[used], lambda *x: exact(*x)[used], arguments(2, 5, 16))


@given(shape=st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(2, 40)))
@settings(max_examples=15, deadline=None)
def test_a_closed_gate_hands_the_residual_on_untouched(shape):
    branch, residual, post, gate, pre, scale = arguments(*shape)
    with use_kernels("triton"):
        new_residual, next_input = sandwich(branch, residual, post, 0 * gate, torch.ones_like(pre), 0 * scale, 0.0)
    assert torch.equal(new_residual, residual)
    expected = torch.ones(shape[:2], device=DEVICE)
    torch.testing.assert_close(next_input.square().mean(-1), expected, rtol=1e-5, atol=0)


def test_the_operation_is_registered_as_pytorch_expects():
    inputs = arguments(2, 3, 8)
    torch.library.opcheck(
        torch.ops.blip3o.sandwich_backward.default, (inputs[0], inputs[1], inputs[0], *inputs[1:], 1e-6)
    )
    torch.library.opcheck(torch.ops.blip3o.sandwich.default, (*[x.requires_grad_() for x in inputs], 1e-6))


@pytest.mark.parametrize(
    ("name", "position", "wrong"),
    [
        ("branch_out", 0, random(4, 8)),
        ("residual", 1, random(2, 4, 8)),
        ("residual", 1, random(2, 3, 8).half()),
        ("residual", 1, torch.empty(2, 3, 8, device="meta")),
        ("post_weight", 2, random(7)),
        ("gate", 3, random(8)),
        ("next_pre_weight", 4, random(1, 8)),
        ("next_scale", 5, random(3, 8)),
        ("next_scale", 5, torch.ones(2, 8, dtype=torch.int32)),
    ],
)
@pytest.mark.parametrize("mode", ["triton", "torch"])
def test_a_wrong_argument_is_named(name, position, wrong, mode):
    inputs = arguments(2, 3, 8)
    inputs[position] = wrong
    with use_kernels(mode), pytest.raises(ValueError, match=rf"^{name}: expected .*found"):
        sandwich(*inputs)


@pytest.mark.parametrize("D", [384, 1000, 1024, 8192])
def test_a_search_has_something_to_try(D):
    assert all(len(configs) == len(set(configs)) > 1 for configs in candidates(D).values())
