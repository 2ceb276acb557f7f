"""Generation: the flow's ODE solved from noise (t = 0) to data (t = 1), with classifier-free guidance.

The state is fp32 whatever the model's dtype, and the schedule of times is shifted as the training's timesteps are.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from blip3o_ds.config import SamplerConfig
from blip3o_ds.flow.objective import FlowObjective, Model, shift_timesteps

Field = Callable[[Tensor, float], Tensor]  # the velocity at (x, t)
Step = Callable[[Field, Tensor, float, float], Tensor]  # x at the second time from x at the first


@torch.no_grad()
def sample(
    model: Model, flow: FlowObjective, eva: Tensor, noise: Tensor, sampler: SamplerConfig, shift: float | None = None
) -> Tensor:
    """Generate CLIP embeddings for a batch of conditions.

    Args:
        eva: `[B, N, De]`.
        noise: `[B, N, Dc]`, standard normal, on the model's device.
        shift: of the schedule; None is the shift of training, `flow.config.timestep_shift`.

    Returns:
        `[B, N, Dc]` fp32, in the space that the model was trained in.
    """
    shift = flow.config.timestep_shift if shift is None else shift
    step = _STEPS[sampler.solver]
    field = _guided_field(model, flow, eva, sampler.guidance_scale)
    times = shift_timesteps(torch.linspace(0, 1, sampler.steps + 1, dtype=torch.float64), shift).tolist()
    x = noise.float()
    for start, end in pairwise(times):
        x = step(field, x, start, end)
    return x


@torch.no_grad()
def posterior_mean(model: Model, flow: FlowObjective, eva: Tensor, noise: Tensor) -> Tensor:
    """The model's clean embedding from pure noise, `[B, N, Dc]` fp32: an estimate of E[clip | eva].

    It has the least squared error of all outputs, and less variety than the data: no sample of their distribution.
    """
    noise = noise.float()
    t = torch.zeros(len(noise), device=noise.device)
    return flow.denoise(model(noise, t, eva, _all(noise, False)), noise, t)


def euler_step(field: Field, x: Tensor, start: float, end: float) -> Tensor:
    """First order, one evaluation."""
    return x + (end - start) * field(x, start)


def midpoint_step(field: Field, x: Tensor, start: float, end: float) -> Tensor:
    """Second order, two evaluations."""
    middle = (start + end) / 2
    return x + (end - start) * field(euler_step(field, x, start, middle), middle)


def heun_step(field: Field, x: Tensor, start: float, end: float) -> Tensor:
    """Second order, two evaluations; the step that reaches the data is Euler's (Karras et al. 2022).

    The velocity of a clean-embedding prediction does not exist at t = 1, where x is the prediction itself.
    """
    slope = field(x, start)
    x_end = x + (end - start) * slope
    if end >= 1.0:
        return x_end
    return x + (end - start) * (slope + field(x_end, end)) / 2


_STEPS: dict[str, Step] = {"euler": euler_step, "midpoint": midpoint_step, "heun": heun_step}


def _guided_field(model: Model, flow: FlowObjective, eva: Tensor, guidance_scale: float) -> Field:
    """Velocity with guidance `v = v_uncond + g (v_cond - v_uncond)` (Ho & Salimans 2022); g = 1 needs one forward.

    The velocity is `(x̂ - x) / (1-t)` with no floor under `1-t`. The floor belongs to the loss: here it would stop
    short of the data and leave noise in every sample.
    """

    def velocity(x: Tensor, time: float, drop: bool) -> Tensor:
        t = torch.full((len(x),), time, device=x.device)
        clean = flow.denoise(model(x, t, eva, _all(x, drop)), x, t)
        return (clean - x) / (1 - time)

    def guided(x: Tensor, time: float) -> Tensor:
        conditional = velocity(x, time, drop=False)
        if guidance_scale == 1.0:
            return conditional
        unconditional = velocity(x, time, drop=True)
        return unconditional + guidance_scale * (conditional - unconditional)

    return guided


def _all(x: Tensor, value: bool) -> Tensor:
    return torch.full((len(x),), value, device=x.device)
