"""The kernel of per-head RMSNorm and rotary positions against float64 rotation of complex pairs."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from blip3o_kernels import qk_norm_rope, use_kernels
from blip3o_kernels.qk_norm_rope import candidates
from tests.kernels.accuracy import DEVICE, DTYPES, assert_kernel_is_accurate, random

SHAPES = [(1, 257, 3, 1, 16), (2, 5, 6, 2, 64), (2, 3, 4, 4, 96), (1, 2, 1, 1, 2), (2, 9, 5, 1, 128)]  # B, N, H, Hkv, D


def tables(N, D, seed=0):
    angles = 3 * random(N, D // 2, dtype=torch.float64, seed=seed)
    return angles.cos().float(), angles.sin().float()


def exact_rows(x, weight, cos, sin):
    x = x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * weight
    if cos is None:
        return x
    turn = torch.complex(cos.double(), sin.double())[:, None]
    return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * turn).flatten(-2)


def pair(cos, sin):
    """The kernel and its exact counterpart, with these tables."""

    def fused(q, k, q_weight, k_weight):
        return qk_norm_rope(q, k, q_weight, k_weight, cos, sin, 1e-5)

    def exact(q, k, q_weight, k_weight):
        return exact_rows(q, q_weight, cos, sin), exact_rows(k, k_weight, cos, sin)

    return fused, exact


def arguments(B, N, H, Hkv, D, dtype=torch.float32, parameters=None, Nk=None):
    q, k = random(B, N, H, D, dtype=dtype), random(B, Nk or N, Hkv, D, dtype=dtype, seed=1)
    return [q, k, *(random(D, dtype=parameters or dtype, seed=seed) for seed in (2, 3))]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients_are_as_accurate_as_plain_pytorch(shape, dtype):
    assert_kernel_is_accurate(*pair(*tables(shape[1], shape[4])), arguments(*shape, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_without_tables_lengths_may_differ_and_channels_be_odd(dtype):
    assert_kernel_is_accurate(*pair(None, None), arguments(2, 5, 4, 2, 33, dtype, Nk=70))


def test_gradients_of_parameters_have_the_parameters_dtype():
    inputs = arguments(2, 9, 4, 2, 40, torch.bfloat16, parameters=torch.float32)
    assert_kernel_is_accurate(*pair(*tables(9, 40)), inputs)


def test_slices_of_one_projection_are_taken_as_they_are():
    H, Hkv, D = 4, 2, 16
    weights = random(D, seed=2), random(D, seed=3)
    fused, exact = pair(*tables(6, D))

    def of_projection(function):
        return lambda qkv: function(*qkv.unflatten(-1, (-1, D)).split((H, Hkv, Hkv), dim=2)[:2], *weights)

    assert_kernel_is_accurate(of_projection(fused), of_projection(exact), [random(2, 6, (H + 2 * Hkv) * D)])


def test_heads_before_tokens_and_sparse_channels_are_taken_too():
    q, k = random(2, 4, 6, 16).transpose(1, 2), random(2, 6, 2, 32, seed=1)[..., ::2]
    assert_kernel_is_accurate(*pair(*tables(6, 16)), [q, k, random(16, seed=2), random(32, seed=3)[::2]])


def test_many_programs_are_summed_right():
    assert_kernel_is_accurate(*pair(*tables(3, 8)), arguments(140, 3, 2, 1, 8))


@pytest.mark.parametrize("shape", [(0, 4, 2, 1, 8), (2, 0, 2, 1, 8)])
def test_an_empty_batch_gives_empty_outputs_and_zero_gradients(shape):
    leaves = [x.requires_grad_() for x in arguments(*shape)]
    with use_kernels("triton"):
        q, k = qk_norm_rope(*leaves, *tables(shape[1], 8))
        gradients = torch.autograd.grad(q.sum() + k.sum(), leaves)
    assert q.shape == leaves[0].shape
    assert k.shape == leaves[1].shape
    assert all(not gradient.any() for gradient in gradients)


@given(
    sizes=st.tuples(st.integers(1, 2), st.integers(1, 9), st.integers(1, 3)),
    D=st.sampled_from([2, 6, 16, 40]),
    seed=st.integers(0, 99),
)
@settings(max_examples=15, deadline=None)
def test_a_turn_keeps_the_norm_of_every_pair_and_the_inputs_untouched(sizes, D, seed):
    q, k = random(*sizes, D, seed=seed), random(*sizes, D, seed=seed + 1)
    before, ones = q.clone(), torch.ones(D, device=DEVICE)
    with use_kernels("triton"):
        turned = qk_norm_rope(q, k, ones, ones, *tables(sizes[1], D, seed))
        straight = qk_norm_rope(q, k, ones, ones, None, None)
    for a, b in zip(turned, straight, strict=True):
        norms = [x.unflatten(-1, (-1, 2)).norm(dim=-1) for x in (a, b)]
        torch.testing.assert_close(*norms, rtol=1e-5, atol=1e-6)
    assert torch.equal(q, before)


def test_scores_depend_on_the_difference_of_positions_alone():
    N, D = 12, 16
    angles = torch.arange(N, device=DEVICE)[:, None] * torch.linspace(0.1, 2, D // 2, device=DEVICE)
    q, k = (random(1, 1, 1, D, seed=seed).expand(1, N, 1, D) for seed in (0, 1))
    ones = torch.ones(D, device=DEVICE)
    with use_kernels("triton"):
        q, k = qk_norm_rope(q, k, ones, ones, angles.cos(), angles.sin())
    scores = q[0, :, 0] @ k[0, :, 0].T
    for shift in range(1, N):
        diagonal = scores.diagonal(shift)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("with_tables", [False, True])
def test_the_operation_is_registered_as_pytorch_expects(with_tables):
    inputs = arguments(2, 3, 4, 2, 8)
    cos, sin = tables(3, 8) if with_tables else (None, None)
    torch.library.opcheck(torch.ops.blip3o.qk_norm_rope_backward.default, (*inputs[:2], *inputs, cos, sin, 1e-6))
    leaves = [x.requires_grad_() for x in inputs]
    torch.library.opcheck(torch.ops.blip3o.qk_norm_rope.default, (*leaves, cos, sin, 1e-6))


@pytest.mark.parametrize(
    ("name", "position", "wrong"),
    [
        ("q", 0, random(2, 3, 8)),
        ("k", 1, torch.ones(2, 3, 1, 8, dtype=torch.int32)),
        ("q_weight", 2, random(7)),
        ("k_weight", 3, torch.empty(8, device="meta")),
        ("cos and sin", 4, None),
        (r"cos \(for q\)", 4, random(2, 4)),
        (r"sin \(for q\)", 5, random(3, 8)),
        (r"cos \(for k\)", 1, random(2, 5, 2, 8)),
    ],
)
def test_a_wrong_argument_is_named(name, position, wrong):
    inputs = [*arguments(2, 3, 4, 2, 8), *tables(3, 8)]
    inputs[position] = wrong
    with use_kernels("triton"), pytest.raises(ValueError, match=rf"^{name}: "):
        qk_norm_rope(*inputs)


def test_an_odd_head_cannot_be_turned():
    with use_kernels("triton"), pytest.raises(ValueError, match=r"^q: expected an even number of channels"):
        qk_norm_rope(*arguments(1, 3, 2, 1, 7), *tables(3, 7))


@pytest.mark.parametrize("D", [32, 64, 96, 128])
def test_a_search_has_something_to_try(D):
    assert all(len(configs) == len(set(configs)) > 1 for configs in candidates(D).values())
