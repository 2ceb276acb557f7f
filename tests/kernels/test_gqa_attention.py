"""The attention kernels against float64, forward and backward."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from blip3o_kernels import gqa_attention, use_kernels
from blip3o_kernels.gqa_attention import KERNELS, AttentionConfig, attention_config, candidates
from blip3o_kernels.registry import REFERENCE
from tests.kernels.accuracy import DEVICE, DTYPES, assert_kernel_is_accurate, random

SHAPES = [  # B, Nq, Nk, H, Hkv, D
    (1, 257, 257, 3, 1, 64),
    (2, 40, 33, 6, 2, 32),
    (1, 70, 129, 4, 4, 80),
    (2, 17, 64, 4, 1, 96),
    (1, 64, 16, 8, 4, 128),
    (1, 1, 2, 1, 1, 5),
]


def exact(q, k, v, scale=None):
    """Softmax of every pair, one query head at a time, from the formula."""
    G = q.shape[2] // k.shape[2]
    heads = []
    for h in range(q.shape[2]):
        logits = torch.einsum("bnd,bmd->bnm", q[:, :, h], k[:, :, h // G]) * (scale or q.shape[3] ** -0.5)
        heads.append(torch.einsum("bnm,bmd->bnd", logits.softmax(-1), v[:, :, h // G]))
    return torch.stack(heads, dim=2)


def arguments(B, Nq, Nk, H, Hkv, D, dtype=torch.float32):
    return [random(B, N, heads, D, dtype=dtype, seed=i) for i, (N, heads) in enumerate([(Nq, H), (Nk, Hkv), (Nk, Hkv)])]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients_are_as_accurate_as_plain_pytorch(shape, dtype):
    assert_kernel_is_accurate(gqa_attention, exact, arguments(*shape, dtype=dtype))


def test_a_batch_without_keys_gives_zeros():
    q, k, v = (x.requires_grad_() for x in arguments(2, 3, 0, 2, 1, 16))
    for mode in ("triton", "torch"):
        with use_kernels(mode):
            out = gqa_attention(q, k, v)
        gradients = torch.autograd.grad(out.sum(), (q, k, v))
        assert not out.any()
        assert all(not x.any() for x in gradients)


@pytest.mark.parametrize("dtype", DTYPES)
def test_slices_of_one_projection_are_taken_as_they_are(dtype):
    def of_projection(function):
        return lambda qkv: function(*qkv.split((4, 2, 2), dim=2))

    qkv = random(2, 21, 8, 32, dtype=dtype)
    assert_kernel_is_accurate(of_projection(gqa_attention), of_projection(exact), [qkv])
    assert_kernel_is_accurate(of_projection(gqa_attention), of_projection(exact), [qkv[:, 2:19]])


def test_slices_of_one_projection_are_not_copied(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "contiguous", lambda *_: pytest.fail("an input was copied"))
    q, k, v = random(1, 9, 4, 16).split((2, 1, 1), dim=2)
    with use_kernels("triton"):
        gqa_attention(q, k, v)


def test_channels_that_are_not_dense_are_copied():
    q, k, v = arguments(1, 6, 9, 2, 1, 32)
    assert_kernel_is_accurate(gqa_attention, exact, [q[..., ::2], k[..., ::2], v[..., 1::2]])
    assert_kernel_is_accurate(lambda *x: gqa_attention(*x).mT, lambda *x: exact(*x).mT, [q, k, v])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_of_few_keys_come_out_exactly(dtype):
    """Powers of two, exact in every dtype: operands taken for their bit patterns would not survive."""
    q = torch.zeros(1, 2, 1, 16, device=DEVICE, dtype=dtype)
    k = random(1, 4, 1, 16, dtype=dtype)
    v = torch.tensor([1.0, 2.0, 4.0, 9.0], device=DEVICE, dtype=dtype)[None, :, None, None].expand(k.shape)
    with use_kernels("triton"):
        assert torch.equal(gqa_attention(q, k, v), torch.full_like(q, 4.0))


@given(
    sizes=st.tuples(st.integers(1, 40), st.integers(1, 40), st.sampled_from([(1, 1), (4, 2), (3, 1)])),
    scale=st.sampled_from([1e-3, 0.3, 4.0]),
)
@settings(max_examples=10, deadline=None)
def test_weights_sum_to_one(sizes, scale):
    Nq, Nk, (H, Hkv) = sizes
    q, k, _ = arguments(1, Nq, Nk, H, Hkv, 16)
    with use_kernels("triton"):
        torch.testing.assert_close(
            gqa_attention(q, k, torch.ones_like(k), scale), torch.ones_like(q), rtol=0, atol=1e-6
        )


@given(Nk=st.integers(2, 50), seed=st.integers(0, 99))
@settings(max_examples=10, deadline=None)
def test_the_order_of_keys_does_not_matter(Nk, seed):
    q, k, v = arguments(1, 6, Nk, 4, 2, 16)
    order = torch.randperm(Nk, generator=torch.Generator().manual_seed(seed)).to(DEVICE)
    with use_kernels("triton"):
        torch.testing.assert_close(gqa_attention(q, k[:, order], v[:, order]), gqa_attention(q, k, v))


def test_large_logits_do_not_overflow():
    q, k, v = (20 * x for x in arguments(1, 9, 40, 2, 1, 16))
    with use_kernels("triton"):
        out = gqa_attention(q, k, v, 2.0)
    torch.testing.assert_close(out.double(), exact(*(x.double() for x in (q, k, v)), scale=2.0), rtol=1e-4, atol=1e-3)


def test_results_repeat_bitwise():
    leaves = [x.requires_grad_() for x in arguments(2, 33, 40, 6, 2, 32, dtype=torch.bfloat16)]
    runs = []
    for _ in range(2):
        with use_kernels("triton"):
            out = gqa_attention(*leaves)
        runs.append([out, *torch.autograd.grad(out, leaves, random(*out.shape, dtype=out.dtype, seed=5))])
    assert all(torch.equal(*pair) for pair in zip(*runs, strict=True))


@pytest.mark.parametrize("shape", [(0, 3, 4, 2, 1, 16), (2, 0, 4, 2, 1, 16)])
def test_an_empty_batch_gives_an_empty_output(shape):
    leaves = [x.requires_grad_() for x in arguments(*shape)]
    with use_kernels("triton"):
        out = gqa_attention(*leaves)
    gradients = torch.autograd.grad(out.sum(), leaves)
    assert out.shape == leaves[0].shape
    assert all(g.shape == x.shape and not g.any() for g, x in zip(gradients, leaves, strict=True))


def test_gradients_come_through_the_function_transforms():
    q, k, v = arguments(1, 5, 7, 2, 1, 16)
    with use_kernels("triton"):
        gradients = torch.func.grad(lambda *x: gqa_attention(*x).square().sum(), argnums=(0, 1, 2))(q, k, v)
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    expected = torch.autograd.grad(exact(*leaves).square().sum(), leaves)
    for found, wanted in zip(gradients, expected, strict=True):
        torch.testing.assert_close(found, wanted.float(), rtol=1e-4, atol=1e-5)


def test_torch_compile_traces_it_whole():
    torch._dynamo.reset()
    leaves = [x.requires_grad_() for x in arguments(1, 5, 7, 2, 1, 16)]
    compiled = torch.compile(lambda *x: gqa_attention(*x) * 2, fullgraph=True, backend="aot_eager")
    with use_kernels("triton"):
        results = [[y, *torch.autograd.grad(y.sum(), leaves)] for y in (compiled(*leaves), gqa_attention(*leaves) * 2)]
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


def test_the_operation_is_registered_as_pytorch_expects():
    q, k, v = arguments(1, 5, 7, 4, 2, 16)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    torch.library.opcheck(torch.ops.blip3o.gqa_attention.default, (*leaves, 0.25))
    out, lse = torch.ops.blip3o.gqa_attention(*(x.detach() for x in leaves), 0.25)
    torch.library.opcheck(
        torch.ops.blip3o.gqa_attention_backward.default,
        (torch.ones_like(out), *(x.detach() for x in leaves), out, lse, 0.25),
    )


def test_the_saved_lse_is_the_log2_of_the_sum():
    q, k, v = arguments(1, 5, 40, 2, 1, 16)
    _, lse = torch.ops.blip3o.gqa_attention(q, k, v, 0.25)
    logits = 0.25 * torch.einsum("bnhd,bmd->bnhm", q.double(), k[:, :, 0].double())
    torch.testing.assert_close(lse.double(), logits.logsumexp(-1) / math.log(2), rtol=1e-6, atol=1e-6)


def test_wide_heads_fall_back_to_plain_pytorch_by_default_only():
    q, k, v = arguments(1, 3, 4, 2, 1, 136)
    with use_kernels("auto"):
        torch.testing.assert_close(gqa_attention(q, k, v), REFERENCE.gqa_attention(q, k, v))
    with use_kernels("triton"), pytest.raises(ValueError, match="q: expected head_dim up to 128, found 136"):
        gqa_attention(q, k, v)


Q, K = random(1, 2, 4, 8), random(1, 3, 2, 8)


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("q", lambda: gqa_attention(Q[0], K, K)),
        ("q", lambda: gqa_attention(Q.int(), K, K)),
        ("k", lambda: gqa_attention(Q, random(1, 2, 3, 8), K)),
        ("k", lambda: gqa_attention(Q, random(2, 3, 2, 8), K)),
        ("k", lambda: gqa_attention(Q, random(1, 3, 2, 16), K)),
        ("k", lambda: gqa_attention(Q, K.half(), K.half())),
        ("v", lambda: gqa_attention(Q, K, K[:, :2])),
        ("v", lambda: gqa_attention(Q, K, K.to("meta"))),
        ("scale", lambda: gqa_attention(Q, K, K, -1.0)),
    ],
)
@pytest.mark.parametrize("mode", ["triton", "torch"])
def test_a_wrong_argument_is_named(name, call, mode):
    with use_kernels(mode), pytest.raises(ValueError, match=rf"^{name}: expected .*found"):
        call()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("D", [32, 64, 80, 128])
def test_a_search_begins_with_the_rule_and_stays_small(D, dtype):
    for arch in (80, 89, 90, 100, 120):
        space = candidates(D, dtype, arch)
        assert set(space) == set(KERNELS)
        for kernel, configs in space.items():
            assert configs[0] == attention_config(kernel, D, dtype, arch)
            assert len(set(configs)) == len(configs) <= 24
            assert all(isinstance(config, AttentionConfig) for config in configs)
