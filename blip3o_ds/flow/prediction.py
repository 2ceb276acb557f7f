"""What the network outputs, how that becomes a clean embedding or a motion, and what of it the loss compares.

The loss and the solvers see the network only through a `Prediction`, so another output is one class and one line.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from blip3o_ds.config import FlowConfig
from blip3o_ds.flow.path import Path, per_sample
from blip3o_ds.flow.prior import LinearGaussian

Model = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # (x_t, t, eva, drop) -> [B, N, Dc]


@dataclass(frozen=True)
class Point:
    """A point of the path, and the prior's guess of where it ends."""

    x_t: Tensor  # [B, N, Dc] fp32
    t: Tensor  # [B], or a scalar for the whole batch
    guess: Tensor | None  # [B, N, Dc] fp32; None for a prediction that uses no prior


@dataclass(frozen=True)
class Prediction(ABC):
    """The meaning of a network's output `[B, N, Dc]` at a point."""

    path: Path
    prior: LinearGaussian

    def guess(self, eva: Tensor, folds: Sequence[int] | None) -> Tensor | None:
        """What is known of the clean embedding without the network, `[B, N, Dc]`; `folds` as `LinearGaussian.mean`."""
        return None

    def output(self, model: Model, point: Point, eva: Tensor, drop: Tensor) -> Tensor:
        """The network's output; the only place that calls the network."""
        return model(point.x_t, point.t.expand(len(eva)).float(), eva, drop)

    @abstractmethod
    def target(self, data: Tensor, noise: Tensor, point: Point) -> Tensor:
        """The output of a network that knows both ends of the path."""

    @abstractmethod
    def clean(self, output: Tensor, point: Point) -> Tensor:
        """The clean embedding that the output stands for, fp32."""

    def loss_velocity(self, output: Tensor, point: Point, floor: float) -> Tensor:
        """The velocity that a loss can compare: it stays finite at t = 1."""
        return self.path.velocity_from_clean(self.clean(output, point), point.x_t, point.t, floor)

    def slope(self, output: Tensor, point: Point) -> Tensor:
        """What a solver holds fixed or averages over a step: here the velocity, exact, for t < 1."""
        return self.path.velocity_from_clean(self.clean(output, point), point.x_t, point.t)

    def advance(self, point: Point, slope: Tensor, end: Tensor) -> Tensor:
        """x at the time `end` when the slope stays as it is from the point on; t and `end` are scalars."""
        return point.x_t + (end - point.t) * slope


class GaussianPrediction(Prediction):
    """The network corrects the flow of the linear-Gaussian prior, which is known exactly.

    In every mode of the prior, with standard deviation s, let `y = (clip - mean) / s` and `tan(angle) = alpha s / sigma`.
    The path is then a rotation from noise to y, `w = cos(angle) noise + sin(angle) y`, and w is what is left of x_t when
    its mean and standard deviation under the prior are taken out. The network sees w, and outputs the derivative in the
    angle, `cos(angle) y - sin(angle) noise` (a preconditioning as that of Karras et al. 2022 and Lu & Song 2024, mode by
    mode). Everything has unit variance. An output of zero is the prior itself: its posterior mean at every t, and exact
    samples of it in any number of steps, so training begins there.
    """

    def guess(self, eva: Tensor, folds: Sequence[int] | None) -> Tensor | None:
        return self.prior.mean(eva, folds)

    def output(self, model: Model, point: Point, eva: Tensor, drop: Tensor) -> Tensor:
        seen = self.prior.tokens.T @ self._whitened(point)  # as tokens again: the network attends to places
        return model(seen, point.t.expand(len(eva)).float(), self.prior.standard_eva(eva), drop)

    def target(self, data: Tensor, noise: Tensor, point: Point) -> Tensor:
        cos, sin = self._rotation(point.t)
        y = self.prior.to_modes(data - point.guess) / self.prior.std
        return self.prior.tokens.T @ (cos * y - sin * self.prior.to_modes(noise))

    def clean(self, output: Tensor, point: Point) -> Tensor:
        cos, sin = self._rotation(point.t)
        y = sin * self._whitened(point) + cos * self._modes(output)
        return point.guess + self.prior.from_modes(self.prior.std * y)

    def slope(self, output: Tensor, point: Point) -> Tensor:
        return self._modes(output)

    def advance(self, point: Point, slope: Tensor, end: Tensor) -> Tensor:
        w = self._whitened(point) + (self._angle(end) - self._angle(point.t)) * slope
        return self.path.alpha(end) * point.guess + self.prior.from_modes(self._std(end) * w)

    def _whitened(self, point: Point) -> Tensor:
        """x_t in modes without the mean and the standard deviation that it has under the prior."""
        mean = self.path.alpha(per_sample(point.t)) * point.guess
        return self.prior.to_modes(point.x_t - mean) / self._std(point.t)

    def _modes(self, output: Tensor) -> Tensor:
        return self.prior.tokens @ output.float()

    def _std(self, t: Tensor) -> Tensor:
        t = per_sample(t)
        return (self.path.alpha(t).square() * self.prior.variance + self.path.sigma(t).square()).sqrt()

    def _rotation(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine of the angle, [B, N, Dc]."""
        std = self._std(t)
        t = per_sample(t)
        return self.path.sigma(t) / std, self.path.alpha(t) * self.prior.std / std

    def _angle(self, t: Tensor) -> Tensor:
        t = per_sample(t)
        share = self.path.alpha(t) * self.prior.std
        return torch.atan2(share, self.path.sigma(t).to(share))


class RegressionPrediction(GaussianPrediction):
    """The network corrects the prior's mean and sees no noise: regression on squared error, a point and no sampler.

    It is there to be compared with: the same network, inputs and budget without a flow.
    """

    def output(self, model: Model, point: Point, eva: Tensor, drop: Tensor) -> Tensor:
        nothing = torch.zeros_like(point.x_t)
        return model(nothing, torch.zeros(len(eva), device=eva.device), self.prior.standard_eva(eva), drop)

    def target(self, data: Tensor, noise: Tensor, point: Point) -> Tensor:
        return self.prior.tokens.T @ (self.prior.to_modes(data - point.guess) / self.prior.std)

    def clean(self, output: Tensor, point: Point) -> Tensor:
        return point.guess + self.prior.from_modes(self.prior.std * self._modes(output))

    def advance(self, point: Point, slope: Tensor, end: Tensor) -> Tensor:
        clean = point.guess + self.prior.from_modes(self.prior.std * slope)
        return clean if end >= 1 else point.x_t


class SamplePrediction(Prediction):
    """The network outputs the clean embedding (Li & He 2025, arXiv 2511.13720)."""

    def target(self, data: Tensor, noise: Tensor, point: Point) -> Tensor:
        return data

    def clean(self, output: Tensor, point: Point) -> Tensor:
        return output.float()


class VelocityPrediction(Prediction):
    """The network outputs the velocity (Lipman et al. 2023), which needs no division and so no floor."""

    def target(self, data: Tensor, noise: Tensor, point: Point) -> Tensor:
        return self.path.velocity(data, noise, point.t)

    def clean(self, output: Tensor, point: Point) -> Tensor:
        return self.path.clean_from_velocity(output.float(), point.x_t, point.t)

    def loss_velocity(self, output: Tensor, point: Point, floor: float) -> Tensor:
        return output


PREDICTIONS: dict[str, Callable[[Path, LinearGaussian], Prediction]] = {
    "gaussian": GaussianPrediction,
    "sample": SamplePrediction,
    "velocity": VelocityPrediction,
    "regression": RegressionPrediction,
}

# (prediction, output, target, point) -> the two tensors [B, N, Dc] that the loss compares
LossWeight = Callable[[Prediction, Tensor, Tensor, Point], tuple[Tensor, Tensor]]


def posterior_weight(prediction: Prediction, output: Tensor, target: Tensor, point: Point) -> tuple[Tensor, Tensor]:
    """The error of the clean embedding, divided by what the linear-Gaussian prior leaves of it at this t.

    So the loss is 1 at every t for a network that knows no more than the prior, and every t counts alike. Both tensors
    are displacements from x_t, which are parallel to velocities on the linear path.
    """
    prior, t = prediction.prior, per_sample(point.t)
    share = prior.variance * prediction.path.sigma(t).square()
    left = share / (prediction.path.alpha(t).square() * prior.variance + prediction.path.sigma(t).square())
    scale = left.mean(dim=(1, 2), keepdim=True).rsqrt()  # t < 1, so something is left
    return tuple(scale * (prediction.clean(x, point) - point.x_t) for x in (output, target))


def velocity_weight(
    prediction: Prediction, output: Tensor, target: Tensor, point: Point, floor: float
) -> tuple[Tensor, Tensor]:
    """Compare velocities: the error of the clean embedding times `(wronskian / max(sigma, floor))^2`.

    On the linear path that is `1 / max(1-t, floor)^2`. Both velocities have the same floor, so beyond it the optimum
    is still the clean embedding.
    """
    return prediction.loss_velocity(output, point, floor), prediction.loss_velocity(target, point, floor)


LOSS_WEIGHTS: dict[str, Callable[[FlowConfig], LossWeight]] = {
    "posterior": lambda config: posterior_weight,
    "velocity": lambda config: partial(velocity_weight, floor=config.min_time_to_data),
}
