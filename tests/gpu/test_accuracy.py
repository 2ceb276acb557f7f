"""The kernels as compiled for this GPU, by the rule of `tests/kernels/accuracy.py`, at the presets' own sizes.

`tests/kernels` holds the grid of odd shapes and strides; it too runs compiled where there is a GPU.
"""

from importlib import import_module

import pytest
import torch

from benchmarks.providers import gradients, providers
from benchmarks.workloads import PRESETS, WORKLOADS, Case, model_shape
from blip3o_kernels import gqa_attention, swiglu
from tests.kernels.accuracy import DTYPES, assert_kernel_is_accurate, random

pytestmark = pytest.mark.gpu

SHAPES = [model_shape(preset, N, 3) for preset in PRESETS for N in (256, 257)]
by_shape = pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def of(module):
    """The functions that a kernel's own test judges it with."""
    return import_module(f"tests.kernels.test_{module}")


@by_dtype
@by_shape
def test_rms_norm(shape, dtype):
    B, N, D = shape.batch_size, shape.num_tokens, shape.hidden_size
    x, weight, scale = random(B, N, D, dtype=dtype), random(D, dtype=dtype, seed=1), random(B, D, dtype=dtype, seed=2)
    assert_kernel_is_accurate(of("rms_norm").normed, of("rms_norm").exact, [x, weight, scale])


@by_dtype
@by_shape
def test_sandwich(shape, dtype):
    inputs = of("sandwich").arguments(shape.batch_size, shape.num_tokens, shape.hidden_size, dtype)
    assert_kernel_is_accurate(of("sandwich").fused, of("sandwich").exact, inputs)


@by_dtype
@by_shape
def test_qk_norm_rope(shape, dtype):
    sizes = shape.batch_size, shape.num_tokens, shape.num_heads, shape.num_kv_heads, shape.head_dim
    fused, exact = of("qk_norm_rope").pair(*of("qk_norm_rope").tables(shape.num_tokens, shape.head_dim))
    assert_kernel_is_accurate(fused, exact, of("qk_norm_rope").arguments(*sizes, dtype))


@by_dtype
@by_shape
def test_gqa_attention(shape, dtype):
    N = shape.num_tokens
    sizes = shape.batch_size, N, N, shape.num_heads, shape.num_kv_heads, shape.head_dim
    inputs = of("gqa_attention").arguments(*sizes, dtype=dtype)
    assert_kernel_is_accurate(gqa_attention, of("gqa_attention").exact, inputs)


@by_dtype
@by_shape
def test_swiglu(shape, dtype):
    both = random(shape.batch_size, shape.num_tokens, 2 * shape.ffn_dim, dtype=dtype)

    def halves(function):
        return lambda both: function(*both.chunk(2, dim=-1))

    assert_kernel_is_accurate(halves(swiglu), halves(of("swiglu").exact), [both])


@by_dtype
@by_shape
def test_flow_matching_loss(shape, dtype):
    sizes = shape.batch_size, shape.num_tokens, shape.clip_dim
    prediction, target = random(*sizes, dtype=dtype), random(*sizes, dtype=dtype, seed=1)
    assert_kernel_is_accurate(of("flow_matching_loss").mse, of("flow_matching_loss").exact_mse, [prediction, target])


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("name", WORKLOADS)
def test_results_repeat_bit_for_bit(name, dtype):
    arguments = Case(name, model_shape("large", 257, 64), dtype).arguments("cuda")
    runs = []
    for _ in range(2):
        outputs = providers(name)[0].run(arguments)
        runs.append([*outputs, *gradients(outputs, arguments, tuple(torch.ones_like(y) for y in outputs))])
    assert all(torch.equal(*pair) for pair in zip(*runs, strict=True))
