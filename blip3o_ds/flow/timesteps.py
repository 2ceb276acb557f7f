"""Where on the path the network is trained and evaluated: the law of training timesteps and the solvers' schedule.

Both are shifted towards the noise in the same way, so that a sampler visits the times that training visited.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from blip3o_ds.config import FlowConfig

Law = Callable[[Tensor], Tensor]  # the inverse CDF: numbers uniform in (0, 1) -> timesteps


@dataclass(frozen=True)
class Timesteps:
    """A law and a shift; times are float64."""

    law: Law
    shift: float

    def draw(self, uniforms: np.ndarray) -> Tensor:
        """Training timesteps `[B]` from numbers `[B]` that are uniform in (0, 1)."""
        return shift_timesteps(self.law(torch.from_numpy(uniforms)), self.shift)

    def schedule(self, steps: int) -> list[float]:
        """The `steps + 1` times of a solver, from 0 to 1."""
        return shift_timesteps(torch.linspace(0, 1, steps + 1, dtype=torch.float64), self.shift).tolist()


def uniform(u: Tensor) -> Tensor:
    """Every time is equally likely."""
    return u


def logit_normal(u: Tensor, mean: float, std: float) -> Tensor:
    """`sigmoid(mean + std n)` with n standard normal (Esser et al. 2024)."""
    return torch.sigmoid(mean + std * torch.special.ndtri(u))


TIMESTEP_LAWS: dict[str, Callable[[FlowConfig], Law]] = {
    "uniform": lambda config: uniform,
    "logit_normal": lambda config: partial(logit_normal, mean=config.logit_mean, std=config.logit_std),
}


def shift_timesteps(t: Tensor, shift: float) -> Tensor:
    """Move timesteps towards noise for `shift > 1`: `sigma' = s sigma / (1 + (s-1) sigma)` (Esser et al. 2024).

    The rule is stated for the noise share of the linear path, and warps time in the same way for every path.
    """
    sigma = 1 - t
    return 1 - shift * sigma / (1 + (shift - 1) * sigma)
