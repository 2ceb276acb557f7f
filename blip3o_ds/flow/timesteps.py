"""Where on the path the network is trained and evaluated: the law of training timesteps and the solvers' schedule."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from blip3o_ds.config import FlowConfig
from blip3o_ds.flow.path import Path
from blip3o_ds.flow.prior import LinearGaussian

Law = Callable[[Tensor], Tensor]  # the inverse CDF: numbers uniform in (0, 1) -> timesteps
GRID = 1024  # points of the table that inverts the law of the prior
REACH = 1000.0  # of the table, in standard deviations of the modes: all but a millionth of the variance at either end


@dataclass(frozen=True)
class Timesteps:
    """A law, a shift and a share of pure noise; times are float64."""

    law: Law
    spacing: Law  # of the solvers' times, for numbers evenly spaced over [0, 1]
    shift: float
    noise_share: float  # of the training samples, at t = 0: from there the posterior mean is read

    def draw(self, uniforms: np.ndarray) -> Tensor:
        """Training timesteps `[B]` from numbers `[B]` that are uniform in (0, 1)."""
        u = torch.from_numpy((uniforms - self.noise_share) / (1 - self.noise_share))
        t = shift_timesteps(self.law(u.clamp_min(1e-12)), self.shift)
        return torch.where(u < 0, 0.0, t)

    def schedule(self, steps: int) -> list[float]:
        """The `steps + 1` times of a solver, from 0 to 1."""
        inner = shift_timesteps(self.spacing(torch.linspace(0, 1, steps + 1, dtype=torch.float64)), self.shift)
        return [0.0, *inner[1:-1].tolist(), 1.0]


def uniform(u: Tensor) -> Tensor:
    """Every time is equally likely."""
    return u


def logit_normal(u: Tensor, mean: float, std: float) -> Tensor:
    """`sigmoid(mean + std n)` with n standard normal (Esser et al. 2024)."""
    return torch.sigmoid(mean + std * torch.special.ndtri(u))


class PriorLaw:
    """Every share of the prior's variance is resolved in an equal share of the draws.

    What the prior leaves open of the clean embedding falls from all of its variance at t = 0 to nothing at t = 1. Here
    that remainder is uniform, so the times follow from the data's own scales and no shift has to be guessed.
    """

    def __init__(self, prior: LinearGaussian, path: Path) -> None:
        variance = prior.variance.double().cpu().flatten()
        most, least = REACH * variance.max().sqrt(), variance.min().sqrt() / REACH  # noise over data
        ratio = torch.linspace(float(most.log()), float(least.log()), GRID, dtype=torch.float64).exp()
        histogram = variance.log().mul(16).round().div(16).exp().unique(return_counts=True)  # to 3 %: fewer terms
        value, weight = histogram[0], histogram[0] * histogram[1]
        left = (weight * (ratio**2)[:, None] / (value + (ratio**2)[:, None])).sum(dim=1) / weight.sum()
        self._resolved = 1 - left  # rising from near 0 to near 1
        self._t = _time_of_ratio(ratio, path)

    def __call__(self, u: Tensor) -> Tensor:
        resolved, t = self._resolved.numpy(), self._t.numpy()
        return torch.from_numpy(np.interp(u.numpy(), resolved, t))


def _time_of_ratio(ratio: Tensor, path: Path) -> Tensor:
    """The times at which `sigma / alpha` has these values, which fall; by bisection, since it falls on every path."""
    low, high = torch.zeros_like(ratio), torch.ones_like(ratio)
    for _ in range(60):
        middle = (low + high) / 2
        too_early = path.sigma(middle) > ratio * path.alpha(middle)
        low, high = torch.where(too_early, middle, low), torch.where(too_early, high, middle)
    return (low + high) / 2


def prior_laws(law: PriorLaw) -> tuple[Law, Law]:
    """The law, and solvers' times that crowd at both ends: the angle of a mode grows as the root of what is resolved.

    Equal shares of the variance would make the first and the last step long in the angle, and their errors the largest.
    """
    return law, lambda u: law(torch.sin(torch.pi * u / 2).square())


# -> the law of training, and that of the solvers' times
TIMESTEP_LAWS: dict[str, Callable[[FlowConfig, Path, LinearGaussian], tuple[Law, Law]]] = {
    "prior": lambda config, path, prior: prior_laws(PriorLaw(prior, path)),
    "uniform": lambda config, path, prior: (uniform, uniform),
    "logit_normal": lambda config, path, prior: (
        partial(logit_normal, mean=config.logit_mean, std=config.logit_std),
        uniform,
    ),
}


def shift_timesteps(t: Tensor, shift: float) -> Tensor:
    """Move timesteps towards noise for `shift > 1`: `sigma' = s sigma / (1 + (s-1) sigma)` (Esser et al. 2024).

    The rule is stated for the noise share of the linear path, and warps time in the same way for every path.
    """
    sigma = 1 - t
    return 1 - shift * sigma / (1 + (shift - 1) * sigma)
