"""Generation: the flow's ODE solved from noise (t = 0) to data (t = 1), with classifier-free guidance.

A solver averages slopes over a step; what a slope is, and where it leads, the prediction says. Guidance (Ho & Salimans
2022) is `slope_uncond + g (slope_cond - slope_uncond)`; with a prior, it acts on what the network adds to it. The state
is fp32 whatever the model's dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from blip3o_ds.config import SamplerConfig
from blip3o_ds.errors import ConfigError
from blip3o_ds.flow.prediction import Model, Point
from blip3o_ds.settings import choose

if TYPE_CHECKING:
    from blip3o_ds.flow.flow import Flow  # which imports the table below

Slope = Callable[[Tensor, float], Tensor]  # at (x, t)
Advance = Callable[[Tensor, Tensor, float, float], Tensor]  # (x, slope, start, end) -> x at the end
Solver = Callable[[Slope, Advance, Tensor, float, float], Tensor]  # x at the second time from x at the first


@torch.no_grad()
def sample(
    model: Model,
    flow: Flow,
    eva: Tensor,
    noise: Tensor,
    sampler: SamplerConfig,
    folds: Sequence[int] | None = None,
) -> Tensor:
    """CLIP embeddings `[B, N, Dc]` fp32, in the model's space, from eva `[B, N, De]` and standard normal noise.

    `noise` is `[B, N, Dc]`, on the model's device; `folds` as `LinearGaussian.mean` takes them. Raises ConfigError if
    there is no solver of that name, or for guidance of a model that was trained with no `cond_dropout`.
    """
    step = choose(SOLVERS, sampler.solver, "eval.sampler.solver")
    check_guidance(sampler, flow.cond_dropout)
    prediction, guess = flow.prediction, flow.prediction.guess(eva, folds)

    def slope(x: Tensor, time: float) -> Tensor:
        point = Point(x, _scalar(time, x), guess)
        conditional = prediction.slope(prediction.output(model, point, eva, _all(x, False)), point)
        if sampler.guidance_scale == 1.0:
            return conditional
        unconditional = prediction.slope(prediction.output(model, point, eva, _all(x, True)), point)
        return unconditional + sampler.guidance_scale * (conditional - unconditional)

    def advance(x: Tensor, slope: Tensor, start: float, end: float) -> Tensor:
        return prediction.advance(x, slope, _scalar(start, x), _scalar(end, x))

    x = prediction.start(noise.float())
    for start, end in pairwise(flow.timesteps.schedule(sampler.steps)):
        x = step(slope, advance, x, start, end)
    return prediction.finish(Point(x, _scalar(1.0, x), guess))


def check_guidance(sampler: SamplerConfig, cond_dropout: float) -> None:
    """ConfigError if a network that never learnt to do without its condition is to be asked what it says without."""
    if sampler.guidance_scale != 1.0 and not cond_dropout:
        raise ConfigError(
            f"eval.sampler.guidance_scale = {sampler.guidance_scale:g} needs a model trained with flow.cond_dropout "
            "above 0, and it is 0; set the scale to 1, or train with a dropout"
        )


@torch.no_grad()
def posterior_mean(model: Model, flow: Flow, eva: Tensor, noise: Tensor, folds: Sequence[int] | None = None) -> Tensor:
    """The model's clean embedding from pure noise, `[B, N, Dc]` fp32: an estimate of E[clip | eva].

    It has the least squared error of all outputs and less variety than the data, so it is not a sample of it. `folds`
    as `LinearGaussian.mean` takes them.
    """
    prediction = flow.prediction
    point = Point(prediction.start(noise.float()), _scalar(0.0, noise), prediction.guess(eva, folds))
    return prediction.clean(prediction.output(model, point, eva, _all(noise, False)), point)


def euler_step(slope: Slope, advance: Advance, x: Tensor, start: float, end: float) -> Tensor:
    """First order, one evaluation."""
    return advance(x, slope(x, start), start, end)


def midpoint_step(slope: Slope, advance: Advance, x: Tensor, start: float, end: float) -> Tensor:
    """Second order, two evaluations."""
    middle = (start + end) / 2
    x_middle = advance(x, slope(x, start), start, middle)
    return advance(x, slope(x_middle, middle), start, end)


def heun_step(slope: Slope, advance: Advance, x: Tensor, start: float, end: float) -> Tensor:
    """Second order, two evaluations; the step that reaches the data is Euler's (Karras et al. 2022).

    The velocity of a clean-embedding prediction does not exist at t = 1, where x is the prediction itself.
    """
    first = slope(x, start)
    x_end = advance(x, first, start, end)
    if end >= 1.0:
        return x_end
    return advance(x, (first + slope(x_end, end)) / 2, start, end)


SOLVERS: dict[str, Solver] = {"euler": euler_step, "midpoint": midpoint_step, "heun": heun_step}


def _scalar(time: float, like: Tensor) -> Tensor:
    """A time in float64, which does not change the dtype of what it is multiplied with."""
    return torch.tensor(time, dtype=torch.float64, device=like.device)


def _all(x: Tensor, value: bool) -> Tensor:
    return torch.full((len(x),), value, device=x.device)
