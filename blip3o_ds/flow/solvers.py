"""Generation: the flow's ODE solved from noise (t = 0) to data (t = 1), with classifier-free guidance.

The state is fp32 whatever the model's dtype, and the schedule of times is shifted as the training's timesteps are.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from blip3o_ds.config import SamplerConfig
from blip3o_ds.flow.prediction import Model
from blip3o_ds.settings import choose

if TYPE_CHECKING:
    from blip3o_ds.flow.flow import Flow  # which imports the table below

Field = Callable[[Tensor, float], Tensor]  # the velocity at (x, t)
Solver = Callable[[Field, Tensor, float, float], Tensor]  # x at the second time from x at the first


@torch.no_grad()
def sample(model: Model, flow: Flow, eva: Tensor, noise: Tensor, sampler: SamplerConfig) -> Tensor:
    """CLIP embeddings `[B, N, Dc]` fp32, in the model's space, from eva `[B, N, De]` and standard normal noise.

    `noise` is `[B, N, Dc]`, on the model's device. Raises ConfigError if there is no solver of that name.
    """
    step = choose(SOLVERS, sampler.solver, "eval.sampler.solver")
    field = _guided_field(model, flow, eva, sampler.guidance_scale)
    x = noise.float()
    for start, end in pairwise(flow.timesteps.schedule(sampler.steps)):
        x = step(field, x, start, end)
    return x


@torch.no_grad()
def posterior_mean(model: Model, flow: Flow, eva: Tensor, noise: Tensor) -> Tensor:
    """The model's clean embedding from pure noise, `[B, N, Dc]` fp32: an estimate of E[clip | eva].

    It has the least squared error of all outputs and less variety than the data, so it is not a sample of it.
    """
    noise = noise.float()
    t = torch.zeros(len(noise), device=noise.device)
    return flow.clean(model, noise, t, eva, _all(noise, False))


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


SOLVERS: dict[str, Solver] = {"euler": euler_step, "midpoint": midpoint_step, "heun": heun_step}


def _guided_field(model: Model, flow: Flow, eva: Tensor, guidance_scale: float) -> Field:
    """Velocity with guidance `v = v_uncond + g (v_cond - v_uncond)` (Ho & Salimans 2022); g = 1 needs one forward."""

    def guided(x: Tensor, time: float) -> Tensor:
        conditional = flow.sampling_velocity(model, x, time, eva, _all(x, False))
        if guidance_scale == 1.0:
            return conditional
        unconditional = flow.sampling_velocity(model, x, time, eva, _all(x, True))
        return unconditional + guidance_scale * (conditional - unconditional)

    return guided


def _all(x: Tensor, value: bool) -> Tensor:
    return torch.full((len(x),), value, device=x.device)
