"""The reference functions against float64 recomputations written another way."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from blip3o_kernels import flow_matching_loss, gqa_attention, qk_norm_rope, rms_norm, sandwich, swiglu

DTYPES = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}  # relative rounding, a little over one ulp


def random(*shape, dtype=torch.float64, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def exact_rms_norm(x, weight, eps, scale=None):
    x, weight = x.double().numpy(), weight.double().numpy()
    y = x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * weight
    return torch.from_numpy(y if scale is None else y * (1 + scale.double().numpy()[:, None]))


def assert_close(actual, expected, tolerance):
    torch.testing.assert_close(actual.double(), expected.double(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_scale", [False, True])
def test_rms_norm_is_the_formula_in_float64(dtype, with_scale):
    x, weight = random(3, 5, 48, dtype=dtype), random(48, dtype=dtype, seed=1)
    scale = random(3, 48, dtype=dtype, seed=2) if with_scale else None

    y = rms_norm(x, weight, 1e-3, scale)

    assert y.dtype == dtype
    assert_close(y, exact_rms_norm(x, weight, 1e-3, scale), 2 * DTYPES[dtype])


def test_rms_norm_keeps_its_precision_where_bf16_squares_would_not():
    x = torch.full((1, 1, 4096), 100.0, dtype=torch.bfloat16)
    assert torch.equal(rms_norm(x, torch.ones(4096)), torch.ones_like(x))


@pytest.mark.parametrize("dtype", DTYPES)
def test_sandwich_is_its_two_lines_in_float64(dtype):
    branch, residual = random(2, 7, 32, dtype=dtype), random(2, 7, 32, dtype=dtype, seed=1)
    post, pre = random(32, dtype=dtype, seed=2), random(32, dtype=dtype, seed=3)
    gate, scale = random(2, 32, dtype=dtype, seed=4), random(2, 32, dtype=dtype, seed=5)

    new_residual, next_input = sandwich(branch, residual, post, gate, pre, scale, 1e-5)

    expected = residual.double() + torch.tanh(gate.double())[:, None] * exact_rms_norm(branch, post, 1e-5)
    assert new_residual.dtype == next_input.dtype == dtype
    assert_close(new_residual, expected, 2 * DTYPES[dtype])
    assert_close(next_input, exact_rms_norm(new_residual, pre, 1e-5, scale), 2 * DTYPES[dtype])


def rotation_matrices(angles):
    """[N, D, D] float64, one 2x2 rotation per pair of channels on the diagonal."""
    N, pairs = angles.shape
    matrices = np.zeros((N, 2 * pairs, 2 * pairs))
    for n in range(N):
        for i in range(pairs):
            c, s = np.cos(angles[n, i]), np.sin(angles[n, i])
            matrices[n, 2 * i : 2 * i + 2, 2 * i : 2 * i + 2] = [[c, -s], [s, c]]
    return matrices


@pytest.mark.parametrize("dtype", DTYPES)
def test_qk_norm_rope_turns_pairs_by_rotation_matrices(dtype):
    q, k = random(2, 5, 4, 8, dtype=dtype), random(2, 5, 2, 8, dtype=dtype, seed=1)
    q_weight, k_weight = random(8, dtype=dtype, seed=2), random(8, dtype=dtype, seed=3)
    angles = np.random.default_rng(0).uniform(-3, 3, (5, 4))
    cos, sin = (torch.from_numpy(f(angles)).float() for f in (np.cos, np.sin))

    turned = qk_norm_rope(q, k, q_weight, k_weight, cos, sin, 1e-6)

    for y, x, weight in zip(turned, (q, k), (q_weight, k_weight), strict=True):
        normed = exact_rms_norm(x, weight, 1e-6).numpy()
        expected = np.einsum("nij,bnhj->bnhi", rotation_matrices(angles), normed)
        assert y.dtype == dtype
        assert_close(y, torch.from_numpy(expected), 3 * DTYPES[dtype])


def test_qk_norm_rope_without_tables_only_normalises():
    q, k, weight = random(1, 3, 2, 8), random(1, 6, 1, 8, seed=1), random(8, seed=2)
    q_out, k_out = qk_norm_rope(q.float(), k.float(), weight.float(), weight.float(), None, None)
    assert_close(q_out, exact_rms_norm(q, weight, 1e-6), 1e-5)
    assert_close(k_out, exact_rms_norm(k, weight, 1e-6), 1e-5)


@pytest.mark.parametrize("heads", [(6, 2), (4, 4), (4, 1)])
def test_gqa_attention_is_softmax_in_float64(heads):
    H, Hkv = heads
    q, k, v = random(2, 5, H, 8), random(2, 7, Hkv, 8, seed=1), random(2, 7, Hkv, 8, seed=2)

    out = gqa_attention(q.float(), k.float(), v.float(), scale=0.4)

    for h in range(H):
        shared = h // (H // Hkv)
        logits = 0.4 * np.einsum("bnd,bmd->bnm", q[:, :, h].numpy(), k[:, :, shared].numpy())
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        assert_close(out[:, :, h], torch.from_numpy(weights @ v[:, :, shared].numpy()), 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gqa_attention_and_its_gradients_are_those_of_repeated_heads(dtype):
    leaves = [random(2, 6, h, 16, dtype=dtype, seed=h).requires_grad_() for h in (6, 2)]
    leaves.append(random(2, 6, 2, 16, dtype=dtype, seed=9).requires_grad_())
    upstream = random(2, 6, 6, 16, dtype=dtype, seed=10)

    out = gqa_attention(*leaves)
    gradients = torch.autograd.grad(out, leaves, upstream)

    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    q, k, v = (x.repeat_interleave(6 // x.shape[2], dim=2).transpose(1, 2) for x in exact)
    expected = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    assert_close(out, expected, tolerance)
    for found, wanted in zip(gradients, torch.autograd.grad(expected, exact, upstream.double()), strict=True):
        assert_close(found, wanted, tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
def test_swiglu_is_the_formula_in_float64_on_strided_halves(dtype):
    gate, up = random(2, 3, 20, dtype=dtype).chunk(2, dim=-1)
    exact = gate.double() / (1 + torch.exp(-gate.double())) * up.double()
    assert_close(swiglu(gate, up), exact, 2 * DTYPES[dtype])


def test_flow_matching_loss_is_numpy():
    prediction, target = random(3, 4, 6), random(3, 4, 6, seed=1)

    result = flow_matching_loss(prediction.float(), target.float())

    p, t = prediction.numpy(), target.numpy()
    norms = np.linalg.norm(p, axis=-1), np.linalg.norm(t, axis=-1)
    assert_close(result.mse, torch.from_numpy(((p - t) ** 2).mean((1, 2))), 1e-5)
    assert_close(result.cosine, torch.from_numpy(((p * t).sum(-1) / norms[0] / norms[1]).mean(1)), 1e-5)
    assert_close(result.prediction_norm, torch.from_numpy(norms[0].mean(1)), 1e-5)
    assert_close(result.target_norm, torch.from_numpy(norms[1].mean(1)), 1e-5)
    assert result.loss.item() == pytest.approx(((p - t) ** 2).mean(), rel=1e-5)


def test_flow_matching_loss_of_zero_vectors_is_finite():
    result = flow_matching_loss(torch.zeros(1, 2, 3), torch.zeros(1, 2, 3))
    assert all(torch.isfinite(field).all() for field in result)


def test_gradients_match_finite_differences():
    """Directional derivatives in fp32 against central differences, for every input of every elementwise function."""
    table = torch.linspace(-1, 1, 3 * 4).view(3, 4)
    cases = [
        (lambda x, w, s: rms_norm(x, w, 1e-3, s), [(2, 3, 8), (8,), (2, 8)]),
        (lambda *a: torch.cat(sandwich(*a)), [(2, 3, 8), (2, 3, 8), (8,), (2, 8), (8,), (2, 8)]),
        (
            lambda q, k, a, b: torch.cat(qk_norm_rope(q, k, a, b, table.cos(), table.sin()), 2),
            [(1, 3, 2, 8), (1, 3, 1, 8), (8,), (8,)],
        ),
        (swiglu, [(2, 3, 8), (2, 3, 8)]),
        (lambda p, t: flow_matching_loss(p, t).mse, [(2, 3, 8), (2, 3, 8)]),
    ]
    for function, shapes in cases:
        inputs = [random(*shape, dtype=torch.float32, seed=i).requires_grad_() for i, shape in enumerate(shapes)]
        upstream = random(*function(*inputs).shape, dtype=torch.float32, seed=99)
        gradients = torch.autograd.grad(function(*inputs), inputs, upstream)
        for i, gradient in enumerate(gradients):
            direction = random(*shapes[i], dtype=torch.float32, seed=50 + i)
            ends = []
            for step in (-1e-2, 1e-2):
                moved = [x.detach() + step * direction if j == i else x.detach() for j, x in enumerate(inputs)]
                ends.append((function(*moved).double() * upstream).sum().item())
            assert (gradient * direction).sum().item() == pytest.approx((ends[1] - ends[0]) / 2e-2, rel=5e-3, abs=5e-3)


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("weight", lambda: rms_norm(torch.ones(1, 2, 4), torch.ones(5))),
        ("scale", lambda: rms_norm(torch.ones(2, 2, 4), torch.ones(4), scale=torch.ones(1, 4))),
        ("x", lambda: rms_norm(torch.ones(1, 4, dtype=torch.int64), torch.ones(4))),
        ("gate", lambda: sandwich(*[torch.ones(2, 3, 4)] * 2, torch.ones(4), torch.ones(4), *[torch.ones(4)] * 2)),
        ("residual", lambda: sandwich(torch.ones(2, 3, 4), torch.ones(2, 3, 4).half(), *[torch.ones(4)] * 4)),
        (
            "cos and sin",
            lambda: qk_norm_rope(*[torch.ones(1, 2, 1, 4)] * 2, *[torch.ones(4)] * 2, None, torch.ones(2, 2)),
        ),
        ("cos", lambda: qk_norm_rope(*[torch.ones(1, 2, 1, 4)] * 2, *[torch.ones(4)] * 2, *[torch.ones(3, 2)] * 2)),
        ("k", lambda: gqa_attention(torch.ones(1, 2, 4, 8), *[torch.ones(1, 2, 3, 8)] * 2)),
        ("v", lambda: gqa_attention(*[torch.ones(1, 2, 4, 8)] * 2, torch.ones(1, 3, 4, 8))),
        ("up", lambda: swiglu(torch.ones(2, 3), torch.ones(2, 4))),
        ("target", lambda: flow_matching_loss(torch.ones(1, 2, 3), torch.ones(1, 2, 4))),
    ],
)
def test_a_wrong_argument_is_named(name, call):
    with pytest.raises(ValueError, match=rf"^{name}\b.*"):
        call()
