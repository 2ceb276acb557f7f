"""A very small DiT trains through the kernels exactly as it does in plain PyTorch, without knowing."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from blip3o_ds.config import FlowConfig, ModelConfig
from blip3o_ds.flow.flow import Flow
from blip3o_ds.model.dit import DiT
from blip3o_kernels import use_kernels
from tests.flows import random_prior
from tests.kernels.accuracy import DEVICE, random

CONFIG = ModelConfig(
    eva_dim=10, clip_dim=6, grid_size=2, token_layout="cls_patch", hidden_size=64, num_layers=2, num_heads=2,
    num_kv_heads=1, ffn_dim=72, timestep_embed_dim=16,
)  # fmt: skip
FUSED = ("rms_norm", "sandwich", "qk_norm_rope", "gqa_attention", "swiglu", "flow_matching_loss")


class Operations(TorchDispatchMode):
    """The names of the package's operations that were called."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "blip3o":
            self.names.add(function._opname)
        return function(*args, **(kwargs or {}))


def build(dtype=torch.float32, num_layers=2):
    """A DiT with open gates, so that every gradient counts from the first step."""
    torch.manual_seed(0)
    model = DiT(CONFIG.model_copy(update={"num_layers": num_layers})).to(DEVICE, dtype)
    with torch.no_grad():
        for i, parameter in enumerate(model.parameters()):
            if not parameter.any():
                parameter.copy_(0.3 * random(*parameter.shape, seed=i))
    return model


def batch(size=2):
    N = CONFIG.num_tokens
    clip, noise, eva = random(size, N, 6), random(size, N, 6, seed=1), random(size, N, 10, seed=2)
    return clip, eva, noise, torch.linspace(0.1, 0.8, size, device=DEVICE), torch.arange(size, device=DEVICE) == 0


def train(mode, steps=2, dtype=torch.float32, model=None):
    model = build(dtype) if model is None else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
    prior = random_prior(CONFIG.num_tokens, CONFIG.eva_dim, CONFIG.clip_dim).to(DEVICE)
    objective, losses = Flow.from_config(FlowConfig(), prior), []
    with use_kernels(mode):
        for _ in range(steps):
            loss = objective.loss(model, *batch()).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return losses, {name: value.grad for name, value in model.named_parameters()}


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 2e-2)])
def test_losses_match_those_of_plain_pytorch(dtype, tolerance):
    with Operations() as operations:
        losses, gradients = train("triton", dtype=dtype)
    expected, expected_gradients = train("torch", dtype=dtype)

    assert operations.names >= {*FUSED, *(f"{name}_backward" for name in FUSED)}
    assert losses == pytest.approx(expected, rel=tolerance)
    assert losses[-1] < losses[0]
    assert gradients.keys() == expected_gradients.keys()
    if dtype == torch.float32:
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, expected_gradients[name], rtol=5e-3, atol=5e-4, msg=name)


def test_activation_checkpointing_changes_nothing():
    model = build()
    model.activation_checkpointing = True
    losses, gradients = train("triton", steps=1, model=model)
    expected, expected_gradients = train("triton", steps=1)
    assert losses == expected
    assert all(torch.equal(gradient, expected_gradients[name]) for name, gradient in gradients.items())


def test_autocast_keeps_fp32_parameters_and_gradients():
    with torch.autocast(DEVICE, torch.bfloat16):
        losses, gradients = train("triton", steps=2)
        expected, _ = train("torch", steps=2)
    assert losses == pytest.approx(expected, rel=2e-2)
    assert all(gradient.dtype == torch.float32 for gradient in gradients.values())


def test_torch_compile_traces_the_model_whole():
    torch._dynamo.reset()
    compiled = torch.compile(build(num_layers=1), fullgraph=True, backend="aot_eager")
    losses, _ = train("triton", steps=2, model=compiled)
    assert losses == pytest.approx(train("triton", steps=2, model=build(num_layers=1))[0], rel=1e-5)
