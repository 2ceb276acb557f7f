"""The loss kernel against float64: four numbers a sample, and the gradient of the first."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from blip3o_kernels import flow_matching_loss, use_kernels
from blip3o_kernels.flow_matching_loss import candidates
from tests.kernels.accuracy import DEVICE, DTYPES, assert_as_accurate, assert_kernel_is_accurate, random

SHAPES = [(2, 257, 48), (3, 5, 1000), (1, 1, 1), (2, 3, 33), (1, 2, 8192)]


def exact_mse(prediction, target):
    return (prediction - target).square().mean(dim=(1, 2))


def mse(prediction, target):
    return flow_matching_loss(prediction, target).mse


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_error_and_both_gradients_are_as_accurate_as_plain_pytorch(shape, dtype):
    prediction, target = random(*shape, dtype=dtype), random(*shape, dtype=dtype, seed=1)
    assert_kernel_is_accurate(mse, exact_mse, [prediction, target])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_diagnostics_are_as_accurate_and_carry_no_gradient(shape, dtype):
    prediction, target = random(*shape, dtype=dtype).requires_grad_(), random(*shape, dtype=dtype, seed=1)
    found, plain = ({}, {})
    for mode, result in (("triton", found), ("torch", plain)):
        with use_kernels(mode):
            result.update(flow_matching_loss(prediction, target)._asdict())

    p, t = prediction.detach().double(), target.double()
    norms = p.norm(dim=-1), t.norm(dim=-1)
    exact = {
        "cosine": ((p * t).sum(-1) / norms[0] / norms[1]).mean(1),
        "prediction_norm": norms[0].mean(1),
        "target_norm": norms[1].mean(1),
    }
    for name, expected in exact.items():
        assert not found[name].requires_grad
        assert_as_accurate(found[name], plain[name], expected, name)
    assert found["mse"].requires_grad


def test_dtypes_may_differ_and_each_gradient_has_its_own():
    inputs = [random(2, 9, 40, dtype=torch.bfloat16), random(2, 9, 40, seed=1)]
    assert_kernel_is_accurate(mse, exact_mse, inputs)


def test_strided_views_are_taken_as_they_are():
    prediction, target = random(4, 10, 3, 16)[:, 1:8, 1], random(4, 16, 7, seed=1).transpose(1, 2)
    assert_kernel_is_accurate(mse, exact_mse, [prediction, target])


def test_the_mean_over_samples_has_a_gradient_through_an_expanded_one():
    prediction, target = random(3, 4, 8).requires_grad_(), random(3, 4, 8, seed=1)
    with use_kernels("triton"):
        (found,) = torch.autograd.grad(flow_matching_loss(prediction, target).loss, prediction)
    torch.testing.assert_close(found, 2 * (prediction.detach() - target) / (3 * 4 * 8), rtol=1e-5, atol=1e-7)


def test_a_target_without_gradient_gets_none():
    prediction, target = random(2, 3, 8).requires_grad_(), random(2, 3, 8, seed=1)
    with use_kernels("triton"):
        flow_matching_loss(prediction, target).loss.backward()
    assert prediction.grad is not None
    assert target.grad is None


def test_zero_vectors_are_finite():
    with use_kernels("triton"):
        result = flow_matching_loss(torch.zeros(1, 2, 3, device=DEVICE), torch.zeros(1, 2, 3, device=DEVICE))
    assert all(torch.equal(field, torch.zeros(1, device=DEVICE)) for field in result)


def test_an_empty_batch_has_no_losses():
    prediction = random(0, 4, 8).requires_grad_()
    with use_kernels("triton"):
        result = flow_matching_loss(prediction, random(0, 4, 8))
        (gradient,) = torch.autograd.grad(result.mse.sum(), prediction)
    assert all(field.shape == (0,) for field in result)
    assert gradient.shape == (0, 4, 8)


def test_many_samples_do_not_mix():
    prediction, target = random(1, 3, 8).repeat(70, 1, 1), random(70, 3, 8, seed=1)
    assert_kernel_is_accurate(mse, exact_mse, [prediction, target])


@given(factor=st.floats(0.125, 8.0), shape=st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 40)))
@settings(max_examples=15, deadline=None)
def test_a_multiple_of_the_target_has_cosine_one(factor, shape):
    target = random(*shape)
    with use_kernels("triton"):
        result = flow_matching_loss(factor * target, target)
    torch.testing.assert_close(result.cosine, torch.ones(shape[0], device=DEVICE), rtol=0, atol=1e-5)
    torch.testing.assert_close(result.prediction_norm, factor * result.target_norm, rtol=1e-5, atol=1e-5)


def test_the_operation_is_registered_as_pytorch_expects():
    prediction, target = random(2, 3, 8), random(2, 3, 8, seed=1)
    torch.library.opcheck(torch.ops.blip3o.flow_matching_loss_backward.default, (random(2), prediction, target))
    torch.library.opcheck(torch.ops.blip3o.flow_matching_loss.default, (prediction.requires_grad_(), target))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_torch_compile_traces_it_whole(backend):
    torch._dynamo.reset()
    prediction, target = random(2, 3, 8).requires_grad_(), random(2, 3, 8, seed=1)
    compiled = torch.compile(flow_matching_loss, fullgraph=True, backend=backend)
    with use_kernels("triton"):
        expected, found = flow_matching_loss(prediction, target), compiled(prediction, target)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    (gradient,) = torch.autograd.grad(found.loss, prediction)
    assert torch.equal(gradient, torch.autograd.grad(expected.loss, prediction)[0])


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("prediction", lambda: flow_matching_loss(random(2, 3), random(2, 3))),
        ("prediction", lambda: flow_matching_loss(torch.ones(1, 2, 3, dtype=torch.int32), random(1, 2, 3))),
        ("target", lambda: flow_matching_loss(random(1, 2, 3), random(1, 2, 4))),
        ("target", lambda: flow_matching_loss(random(1, 2, 3), torch.ones(1, 2, 3, dtype=torch.int32))),
        ("target", lambda: flow_matching_loss(random(1, 2, 3), torch.ones(1, 2, 3, device="meta"))),
    ],
)
def test_a_wrong_argument_is_named(name, call):
    with use_kernels("triton"), pytest.raises(ValueError, match=rf"^{name}: expected .*found"):
        call()


@pytest.mark.parametrize("D", [768, 1000, 1024])
def test_a_search_has_something_to_try(D):
    assert all(len(configs) == len(set(configs)) > 1 for configs in candidates(D).values())
