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

# (x_t, t, eva, drop) -> [B, N, Dc]; in training `held` follows, as `DiT.forward` takes it
Model = Callable[..., Tensor]


@dataclass(frozen=True)
class Point:
    """A point of the path in the coordinates of a prediction, and the prior's guess of where it ends."""

    x: Tensor  # [B, N, Dc] fp32
    t: Tensor  # [B], or a scalar for the whole batch
    guess: Tensor  # [B, N, Dc] fp32, an embedding; empty for a prediction that uses no prior


@dataclass(frozen=True)
class Prediction(ABC):
    """The meaning of a network's output `[B, N, Dc]` at a point, whose coordinates are x_t unless it says otherwise."""

    path: Path
    prior: LinearGaussian

    def guess(self, eva: Tensor, folds: Sequence[int] | None) -> Tensor:
        """What is known of the clean embedding without the network, `[B, N, Dc]`; `folds` as `LinearGaussian.mean`."""
        return eva.new_empty(0)

    def start(self, noise: Tensor) -> Tensor:
        """The coordinates of pure noise, at t = 0."""
        return noise

    @abstractmethod
    def training_pair(self, data: Tensor, noise: Tensor, t: Tensor, guess: Tensor) -> tuple[Point, Tensor]:
        """The point between both ends, and the output there of a network that knows them."""

    def output(self, model: Model, point: Point, eva: Tensor, drop: Tensor, held: Tensor | None = None) -> Tensor:
        """The network's output; the only place that calls the network."""
        return self._call(model, point.x, point, eva, drop, held)

    def _call(self, model: Model, x: Tensor, point: Point, eva: Tensor, drop: Tensor, held: Tensor | None) -> Tensor:
        inputs = x, point.t.expand(len(eva)).float(), eva, drop
        return model(*inputs) if held is None else model(*inputs, held)

    @abstractmethod
    def clean(self, output: Tensor, point: Point) -> Tensor:
        """The clean embedding that the output stands for, fp32."""

    def embedding(self, point: Point) -> Tensor:
        """x_t."""
        return point.x

    def displacement(self, output: Tensor, point: Point) -> Tensor:
        """Clean embedding less x_t, up to a rotation of the channels and what the guess contributes.

        The distance of two of them is that of the clean embeddings; they are parallel to velocities on the linear path.
        """
        return self.clean(output, point) - point.x

    def loss_velocity(self, output: Tensor, point: Point, floor: float) -> Tensor:
        """The velocity that a loss can compare: it stays finite at t = 1."""
        return self.path.velocity_from_clean(self.clean(output, point), self.embedding(point), point.t, floor)

    def slope(self, output: Tensor, point: Point) -> Tensor:
        """What a solver averages over a step: here the velocity, exact, for t < 1."""
        return self.path.velocity_from_clean(self.clean(output, point), point.x, point.t)

    def advance(self, x: Tensor, slope: Tensor, start: Tensor, end: Tensor) -> Tensor:
        """The coordinates at the time `end` when the slope stays as it is; both times are scalars."""
        return x + (end - start) * slope

    def finish(self, point: Point) -> Tensor:
        """The embedding that a point at t = 1 is."""
        return point.x


class SamplePrediction(Prediction):
    """The network outputs the clean embedding (Li & He 2025, arXiv 2511.13720)."""

    def training_pair(self, data: Tensor, noise: Tensor, t: Tensor, guess: Tensor) -> tuple[Point, Tensor]:
        return Point(self.path.point(data, noise, t), t, guess), data

    def clean(self, output: Tensor, point: Point) -> Tensor:
        return output.float()


class VelocityPrediction(Prediction):
    """The network outputs the velocity (Lipman et al. 2023), which needs no division and so no floor."""

    def training_pair(self, data: Tensor, noise: Tensor, t: Tensor, guess: Tensor) -> tuple[Point, Tensor]:
        return Point(self.path.point(data, noise, t), t, guess), self.path.velocity(data, noise, t)

    def clean(self, output: Tensor, point: Point) -> Tensor:
        return self.path.clean_from_velocity(output.float(), point.x, point.t)

    def loss_velocity(self, output: Tensor, point: Point, floor: float) -> Tensor:
        return output


class GaussianPrediction(Prediction):
    """The network corrects the flow of the linear-Gaussian prior, which is known exactly.

    In every mode of the prior, with standard deviation s, let `y = (clip - mean) / s` and `tan(a) = alpha s / sigma`.
    The path is then a rotation from noise to y, `w = cos(a) noise + sin(a) y`, where w is x_t without the mean and the
    standard deviation that it has under the prior. Coordinates are w in modes. The prior expects `clip - mean` to be
    `s sin(a) w`, given x_t; the network sees that as tokens, and outputs what is to be added to it, over cos(a):
    `s (cos(a) y - sin(a) noise)`, which is s times the derivative of w in the angle. Both are in units of the prior's
    root mean square error (a preconditioning as those of Karras et al. 2022 and Lu & Song 2024, mode by mode). At t = 0
    it sees EVA alone and corrects the mean. An output of zero is the prior itself, its posterior mean at every t and
    exact samples of it in any number of steps, so training begins there.

    Input and output keep the modes' own sizes. With modes of equal size, what the network gets wrong would be largest
    in the image's mean, where s is a hundred times that of fine detail, and few images say what it should be.
    """

    def guess(self, eva: Tensor, folds: Sequence[int] | None) -> Tensor:
        return self.prior.mean(eva, folds)

    def start(self, noise: Tensor) -> Tensor:
        return self.prior.to_modes(noise)

    def training_pair(self, data: Tensor, noise: Tensor, t: Tensor, guess: Tensor) -> tuple[Point, Tensor]:
        cos, sin = self._rotation(t)
        residual, noise = self.prior.to_modes(data - guess), self.prior.to_modes(noise)
        point = Point(cos * noise + sin * residual / self.prior.std, t, guess)
        return point, self._tokens((cos * residual - sin * self.prior.std * noise) / self.prior.rms)

    def output(self, model: Model, point: Point, eva: Tensor, drop: Tensor, held: Tensor | None = None) -> Tensor:
        seen = self._tokens(self._expected(point) / self.prior.rms)
        return self._call(model, seen, point, self.prior.standard_eva(eva), drop, held)

    def clean(self, output: Tensor, point: Point) -> Tensor:
        return point.guess + self.prior.from_modes(self._residual(output, point))

    def embedding(self, point: Point) -> Tensor:
        alpha = self.path.alpha(per_sample(point.t))
        return alpha * point.guess + self.prior.from_modes(self._std(point.t) * point.x)

    def displacement(self, output: Tensor, point: Point) -> Tensor:
        return self._tokens(self._residual(output, point) - self._std(point.t) * point.x)

    def slope(self, output: Tensor, point: Point) -> Tensor:
        return self.prior.rms / self.prior.std * self._modes(output)

    def advance(self, x: Tensor, slope: Tensor, start: Tensor, end: Tensor) -> Tensor:
        return x + (self._angle(end) - self._angle(start)) * slope

    def finish(self, point: Point) -> Tensor:
        return point.guess + self.prior.from_modes(self.prior.std * point.x)

    def _expected(self, point: Point) -> Tensor:
        """What the prior expects of `clip - mean` given x_t, in modes: nothing at t = 0, all of it at t = 1."""
        _, sin = self._rotation(point.t)
        return self.prior.std * sin * point.x

    def _residual(self, output: Tensor, point: Point) -> Tensor:
        """`clip - mean` in modes, as the output has it."""
        cos, _ = self._rotation(point.t)
        return self._expected(point) + self.prior.rms * cos * self._modes(output)

    def _tokens(self, modes: Tensor) -> Tensor:
        return self.prior.tokens.T @ modes

    def _modes(self, output: Tensor) -> Tensor:
        return self.prior.tokens @ output.float()

    def _std(self, t: Tensor) -> Tensor:
        """The standard deviation of x_t under the prior, by mode."""
        t = per_sample(t)
        return (self.path.alpha(t).square() * self.prior.variance + self.path.sigma(t).square()).sqrt()

    def _rotation(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine of the angle, by mode."""
        std = self._std(t)
        t = per_sample(t)
        return self.path.sigma(t) / std, self.path.alpha(t) * self.prior.std / std

    def _angle(self, t: Tensor) -> Tensor:
        share = self.path.alpha(t) * self.prior.std
        return torch.atan2(share, self.path.sigma(t).to(share))


class RegressionPrediction(GaussianPrediction):
    """The network corrects the prior's mean and sees neither noise nor time: regression on squared error, a point.

    It is there to be compared with: the same network, inputs and budget without a flow.
    """

    def training_pair(self, data: Tensor, noise: Tensor, t: Tensor, guess: Tensor) -> tuple[Point, Tensor]:
        nothing = torch.zeros_like(noise)
        return super().training_pair(data, nothing, torch.zeros_like(t), guess)

    def output(self, model: Model, point: Point, eva: Tensor, drop: Tensor, held: Tensor | None = None) -> Tensor:
        nothing = Point(torch.zeros_like(point.x), torch.zeros_like(point.t), point.guess)
        return super().output(model, nothing, eva, drop, held)

    def clean(self, output: Tensor, point: Point) -> Tensor:
        return point.guess + self.prior.from_modes(self.prior.rms * self._modes(output))

    def advance(self, x: Tensor, slope: Tensor, start: Tensor, end: Tensor) -> Tensor:
        return slope  # the same at every point


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

    So the loss is 1 at every t for a network that knows no more than the prior, of images new to both, and every t
    counts alike.
    """
    scale = prediction.prior.left_open(prediction.path, point.t).rsqrt()  # t < 1, so something is left
    scale = per_sample(scale)
    return scale * prediction.displacement(output, point), scale * prediction.displacement(target, point)


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
