"""The path from noise to data, `x_t = alpha(t) data + sigma(t) noise`, and what follows from it for velocities.

Time 0 is noise and time 1 is data. A path is four functions of t; everything else here is derived from them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor


class Path(ABC):
    """An interpolant of data and noise (stochastic interpolants: Albergo & Vanden-Eijnden 2023; SiT: Ma et al. 2024).

    `data`, `noise`, `clean`, `velocity` and `x_t` are `[B, N, D]`; t is `[B]`, or a scalar tensor for the whole batch.
    """

    @abstractmethod
    def alpha(self, t: Tensor) -> Tensor:
        """The share of data: 0 at t = 0, 1 at t = 1."""

    @abstractmethod
    def sigma(self, t: Tensor) -> Tensor:
        """The share of noise: 1 at t = 0, 0 at t = 1."""

    @abstractmethod
    def d_alpha(self, t: Tensor) -> Tensor:
        """The derivative of alpha."""

    @abstractmethod
    def d_sigma(self, t: Tensor) -> Tensor:
        """The derivative of sigma."""

    def wronskian(self, t: Tensor) -> Tensor:
        """`alpha' sigma - alpha sigma'`, positive wherever the path moves towards the data."""
        return self.d_alpha(t) * self.sigma(t) - self.alpha(t) * self.d_sigma(t)

    def point(self, data: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """`x_t = alpha data + sigma noise`."""
        t = per_sample(t)
        return self.alpha(t) * data + self.sigma(t) * noise

    def velocity(self, data: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """`dx_t/dt = alpha' data + sigma' noise`."""
        t = per_sample(t)
        return self.d_alpha(t) * data + self.d_sigma(t) * noise

    def velocity_from_clean(self, clean: Tensor, x_t: Tensor, t: Tensor, floor: float = 0.0) -> Tensor:
        """The velocity at x_t of a path that ends at `clean`: `(wronskian clean + sigma' x_t) / max(sigma, floor)`.

        It follows from `velocity` with `noise = (x_t - alpha clean) / sigma`. With no floor it is exact, and does not
        exist at t = 1; the floor keeps a loss on it finite.
        """
        t = per_sample(t)
        return (self.wronskian(t) * clean + self.d_sigma(t) * x_t) / self.sigma(t).clamp_min(floor)

    def clean_from_velocity(self, velocity: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The end of the path that passes x_t with `velocity`: `(sigma velocity - sigma' x_t) / wronskian`."""
        t = per_sample(t)
        return (self.sigma(t) * velocity - self.d_sigma(t) * x_t) / self.wronskian(t)


class LinearPath(Path):
    """Rectified flow: `x_t = t data + (1-t) noise`, a straight line (Liu et al. 2023, Lipman et al. 2023)."""

    def alpha(self, t: Tensor) -> Tensor:
        return t

    def sigma(self, t: Tensor) -> Tensor:
        return 1 - t

    def d_alpha(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def d_sigma(self, t: Tensor) -> Tensor:
        return -torch.ones_like(t)

    def wronskian(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)  # without the rounding error of (1-t) + t


PATHS: dict[str, Callable[[], Path]] = {"linear": LinearPath}


def per_sample(t: Tensor) -> Tensor:
    """`[B]` as `[B, 1, 1]`; a scalar stays one."""
    return t[:, None, None] if t.ndim else t
