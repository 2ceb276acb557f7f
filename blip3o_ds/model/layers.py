"""The layers of a DiT block.

Every parameter is used inside the forward of the module that owns it, because sharded training (ZeRO-3) gathers a
module's parameters just before its forward and frees them after it.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blip3o_kernels import gqa_attention, qk_norm_rope, rms_norm, sandwich, swiglu

Rope = tuple[Tensor, Tensor]  # (cos, sin), each [N, D/2]


class RMSNorm(nn.Module):
    """RMSNorm over channels, optionally modulated per sample by `1 + scale`."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        return rms_norm(x, self.weight, self.eps, scale)  # x: [B, N, D], scale: [B, D]


class Sandwich(nn.Module):
    """The end of one branch and the start of the next, fused: post-norm, gate, residual, next pre-norm.

    It owns the next branch's pre-norm weight, so that no module uses another module's parameters.
    """

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.post_weight = nn.Parameter(torch.ones(dim))
        self.next_pre_weight = nn.Parameter(torch.ones(dim))

    def forward(self, branch_out: Tensor, residual: Tensor, gate: Tensor, next_scale: Tensor) -> tuple[Tensor, Tensor]:
        """`(new residual, next branch's input)`, both `[B, N, D]`; gate and next_scale are `[B, D]`."""
        return sandwich(branch_out, residual, self.post_weight, gate, self.next_pre_weight, next_scale, self.eps)


class SelfAttention(nn.Module):
    """Grouped-query attention among the tokens, with per-head RMSNorm on q and k and rotary positions."""

    def __init__(self, dim: int, num_heads: int, num_kv_heads: int, eps: float) -> None:
        super().__init__()
        self.heads = (num_heads, num_kv_heads, num_kv_heads)
        self.head_dim = dim // num_heads
        self.eps = eps
        self.qkv = projection(dim, sum(self.heads) * self.head_dim)
        self.out = projection(dim, dim)
        self.q_weight = nn.Parameter(torch.ones(self.head_dim))
        self.k_weight = nn.Parameter(torch.ones(self.head_dim))

    def forward(self, x: Tensor, rope: Rope) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (-1, self.head_dim)).split(self.heads, dim=2)  # [B, N, H|Hkv, D]
        q, k = qk_norm_rope(q, k, self.q_weight, self.k_weight, *rope, self.eps)
        return self.out(gqa_attention(q, k, v).flatten(2))


class CrossAttention(nn.Module):
    """Grouped-query attention from the tokens to the condition's; both lie on the same grid, so both may be rotated."""

    def __init__(self, dim: int, num_heads: int, num_kv_heads: int, eps: float) -> None:
        super().__init__()
        self.head_dim = dim // num_heads
        self.eps = eps
        self.q = projection(dim, dim)
        self.kv = projection(dim, 2 * num_kv_heads * self.head_dim)
        self.out = projection(dim, dim)
        self.q_weight = nn.Parameter(torch.ones(self.head_dim))
        self.k_weight = nn.Parameter(torch.ones(self.head_dim))

    def forward(self, x: Tensor, condition: Tensor, rope: Rope | None) -> Tensor:
        q = self.q(x).unflatten(-1, (-1, self.head_dim))  # [B, N, H, D]
        k, v = self.kv(condition).unflatten(-1, (-1, self.head_dim)).chunk(2, dim=2)  # [B, N, Hkv, D]
        cos, sin = rope or (None, None)
        q, k = qk_norm_rope(q, k, self.q_weight, self.k_weight, cos, sin, self.eps)
        return self.out(gqa_attention(q, k, v).flatten(2))


class SwiGLU(nn.Module):
    """`down(silu(gate(x)) * up(x))`, with gate and up in one projection."""

    def __init__(self, dim: int, ffn_dim: int) -> None:
        super().__init__()
        self.gate_up = projection(dim, 2 * ffn_dim)
        self.down = projection(ffn_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(swiglu(gate, up))


class Calibration(nn.Module):
    """What samples held out of training teach about the network's output: `gain(t) output - narrowing input`.

    The gain says how far the output is trusted: a network that has seen few images is too sure of itself on new ones.
    It is a factor from 0 to 1, piecewise linear in t, and 1 at initialisation. The narrowing, 0 there, draws
    samples together where the network knows the mean better than the prior does but has not learnt to take away the
    prior's noise: by itself it makes standard deviations `exp(-narrowing)` of the prior's, for in `GaussianPrediction`
    the input is `s sin(a) w` and the output `s dw/da`. Both become the least-squares ones on images that are new to the
    network; in an overfit test, which has none, on those that it learns.
    """

    KNOTS = 9  # over t from 0 to 1
    GAIN_BOUNDS = (0.0, 1.0)  # to which the optimizer clamps it
    NARROWING_BOUNDS = (0.0, math.inf)  # the prior's variance is that of new images: it is not too small
    RATE = 10.0  # times the learning rate: Adam moves a number by about the rate in a step, and these are near 1
    MEMORY = 0.999  # Adam's beta2: held-out samples at t > 0 are rare, with a short memory each would be a large step

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(self.KNOTS))
        self.narrowing = nn.Parameter(torch.zeros(1))

    def forward(self, out: Tensor, noisy: Tensor, timesteps: Tensor, held: Tensor | None) -> Tensor:
        """out, noisy: [B, N, Dc], timesteps: [B]; the result has the dtype of out.

        `held` [B] bool: True for samples that teach these numbers alone; the others do not see them, and teach all
        else. None: every sample sees them, and teaches both.

        The factor is fp32: under autocast, or in a model of low precision, out and the parameters differ in dtype.
        """
        place = timesteps.float() * (self.KNOTS - 1)
        left = place.long().clamp(0, self.KNOTS - 2)
        gain = self.gain.float()
        factor = torch.lerp(gain[left], gain[left + 1], place - left).to(out.dtype)[:, None, None]
        narrowing = self.narrowing.to(out.dtype) * noisy.to(out.dtype)
        if held is None:
            return factor * out - narrowing
        return torch.where(held[:, None, None], factor * out.detach() - narrowing, out)


class TimestepEmbedding(nn.Module):
    """Maps timesteps in [0, 1] to the vector that every modulation reads: sinusoids of 1000 t, an MLP, a final SiLU."""

    def __init__(self, embed_dim: int, dim: int) -> None:
        super().__init__()
        self.embed_dim = embed_dim
        self.fc1 = projection(embed_dim, dim, bias=True)
        self.fc2 = projection(dim, dim, bias=True)

    def forward(self, timesteps: Tensor) -> Tensor:
        x = sinusoids(timesteps, self.embed_dim).to(self.fc1.weight.dtype)  # [B, embed_dim]
        return F.silu(self.fc2(F.silu(self.fc1(x))))  # [B, D]


class Modulation(nn.Module):
    """adaLN: `count` vectors `[B, D]` (scales and gates) from the timestep embedding, all zero at initialisation."""

    def __init__(self, dim: int, count: int) -> None:
        super().__init__()
        self.count = count
        self.linear = zero_projection(dim, count * dim)

    def forward(self, timestep: Tensor) -> tuple[Tensor, ...]:
        return self.linear(timestep).chunk(self.count, dim=-1)


class Condition(nn.Module):
    """EVA embeddings, projected and normalised once for all blocks; dropped samples get a learned null token."""

    def __init__(self, eva_dim: int, dim: int, eps: float) -> None:
        super().__init__()
        self.proj = projection(eva_dim, dim, bias=True)
        self.norm = RMSNorm(dim, eps)
        self.null = nn.Parameter(torch.randn(dim))  # unit RMS, like the normalised condition

    def forward(self, eva: Tensor, drop: Tensor | None) -> Tensor:
        condition = self.norm(self.proj(eva))  # [B, N, D]
        if drop is None:
            return condition
        return torch.where(drop[:, None, None], self.null.to(condition.dtype), condition)


def sinusoids(timesteps: Tensor, dim: int, max_period: float = 10000.0) -> Tensor:
    """Cosines and sines `[B, dim]` fp32 of `1000 t` at geometric frequencies (Vaswani et al. 2017)."""
    half = dim // 2
    exponents = torch.arange(half, dtype=torch.float32, device=timesteps.device) / half
    angles = 1000.0 * timesteps.float()[:, None] * torch.exp(-math.log(max_period) * exponents)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def zero_projection(in_dim: int, out_dim: int) -> nn.Linear:
    """A linear layer initialised to zero, for modulations and the output."""
    linear = nn.Linear(in_dim, out_dim)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear


def projection(in_dim: int, out_dim: int, bias: bool = False) -> nn.Linear:
    """A linear layer whose output has the variance of its input at initialisation."""
    linear = nn.Linear(in_dim, out_dim, bias=bias)
    nn.init.normal_(linear.weight, std=in_dim**-0.5)
    if bias:
        nn.init.zeros_(linear.bias)
    return linear
