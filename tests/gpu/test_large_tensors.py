"""Tensors of more than 2^31 elements: what lies behind that offset comes out as it does alone."""

import pytest
import torch

from benchmarks.providers import gradients, providers
from benchmarks.workloads import Case, model_shape

pytestmark = [pytest.mark.gpu, pytest.mark.xdist_group("large")]  # one after the other, for the memory

BATCHES = {  # so that inputs and outputs alike pass 2^31 at the large preset's widths
    "rms_norm": 8200,
    "sandwich": 8200,
    "qk_norm_rope": 8200,
    "gqa_attention": 8200,
    "swiglu": 2100,
    "flow_matching_loss": 8200,
}
NEEDED = 44 * 2**30  # bytes


def results(name, arguments, upstream=None):
    """Outputs, and gradients of what has tokens."""
    outputs = providers(name)[0].run(arguments)
    if upstream is None:
        generator = torch.Generator("cuda").manual_seed(1)
        upstream = tuple(torch.empty_like(y).normal_(generator=generator) for y in outputs)
    found = gradients(outputs, arguments, upstream)
    leaves = [x for x in arguments if x.requires_grad]
    tokens = [gradient for gradient, x in zip(found, leaves, strict=True) if x.dim() > 2]
    return [y.detach() for y in outputs], tokens, upstream


@pytest.mark.parametrize("name", BATCHES)
def test_the_last_samples_are_as_they_are_alone(name):
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    if free < NEEDED:
        pytest.skip(f"needs {NEEDED >> 30} GiB of free GPU memory, found {free >> 30}")
    B = BATCHES[name]
    arguments = Case(name, model_shape("large", 256, B), "bf16").arguments("cuda")
    outputs, token_gradients, upstream = results(name, arguments)
    assert max(x.numel() for x in (*arguments, *outputs)) > 2**31

    def last(x):
        return x[-2:] if x.shape[0] == B else x

    few = tuple(last(x).detach().clone().requires_grad_(x.requires_grad) for x in arguments)
    alone = results(name, few, tuple(last(dy).clone() for dy in upstream))
    for found, expected in zip([*outputs, *token_gradients], [*alone[0], *alone[1]], strict=True):
        if name == "flow_matching_loss" and found.dim() == 1:
            torch.testing.assert_close(last(found), expected)  # sums of a sample may be divided among other programs
        else:
            assert torch.equal(last(found), expected)
