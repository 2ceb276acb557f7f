"""Elements past 2^31 of a tensor: a kernel that counted in 32 bits would read and write elsewhere."""

import pytest
import torch

from blip3o_kernels import flow_matching_loss, qk_norm_rope, rms_norm, sandwich, swiglu, use_kernels
from tests.kernels.accuracy import DEVICE

ELEMENTS = 2**31 if DEVICE == "cuda" else 2**12  # the interpreter checks the test itself
GPU_MEMORY = torch.cuda.get_device_properties(0).total_memory if DEVICE == "cuda" else None
D = 64
ROWS = ELEMENTS // D + 8


def rows(*shape, seed):
    """Zeros in fp16, but for the last 8 rows."""
    x = torch.zeros(*shape, dtype=torch.float16, device=DEVICE)
    x.view(-1, D)[-8:] = torch.randn(8, D, generator=torch.Generator().manual_seed(seed)).to(x)
    return x


def parameters(count):
    return [torch.randn(1, D, generator=torch.Generator().manual_seed(50 + i)).to(DEVICE) for i in range(count)]


def last(x):
    return x.reshape(-1, D)[-8:] if x.numel() > 8 * D else x.reshape(-1, D)


CASES = {
    "rms_norm": lambda x, y, p: rms_norm(x, p[0][0], 1e-6, p[1]),
    "sandwich": lambda x, y, p: sandwich(x, y, p[0][0], p[1], p[2][0], p[3]),
    "qk_norm_rope": lambda x, y, p: qk_norm_rope(x[:, :, None], y[:, :, None], p[0][0], p[1][0], None, None),
    "swiglu": lambda x, y, p: swiglu(x, y),
    "flow_matching_loss": lambda x, y, p: x.shape[1] * flow_matching_loss(x, y).mse,
}


@pytest.mark.skipif(GPU_MEMORY is not None and GPU_MEMORY < 60e9, reason="needs a GPU of 60 GB")
@pytest.mark.parametrize("name", CASES)
def test_the_last_rows_of_a_huge_tensor_are_those_of_a_small_one(name):
    results = []
    for count in (8, ROWS):
        x, y = (rows(1, count, D, seed=seed).requires_grad_() for seed in (0, 1))
        with use_kernels("triton"):
            outputs = CASES[name](x, y, parameters(4))
            outputs = [outputs] if isinstance(outputs, torch.Tensor) else outputs
            upstream = [rows(*z.shape, seed=9) if z.dim() > 1 else torch.ones_like(z) for z in outputs]
            gradient = torch.autograd.grad(outputs, x, upstream)[0]
        results.append([*(last(z.detach()) if z.dim() > 1 else z.detach() for z in outputs), last(gradient)])
    for small, huge in zip(*results, strict=True):
        torch.testing.assert_close(huge, small, rtol=2e-3, atol=2e-3)
