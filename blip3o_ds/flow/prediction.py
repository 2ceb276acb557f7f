"""What the network outputs, how that becomes a clean embedding or a velocity, and what of it the loss compares.

The loss and the solvers see the network only through a `Prediction`, so another output is one class and one line.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from torch import Tensor

from blip3o_ds.config import FlowConfig
from blip3o_ds.flow.path import Path

Model = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # (x_t, t, eva, drop) -> [B, N, Dc]


@dataclass(frozen=True)
class Prediction(ABC):
    """The meaning of a network's output `[B, N, Dc]` at a point x_t of the path; t is `[B]`."""

    path: Path

    outputs_clean: ClassVar[bool] = False  # whether a map from EVA to the clean embedding can be added to the output

    def output(self, model: Model, x_t: Tensor, t: Tensor, eva: Tensor, drop: Tensor) -> Tensor:
        """The network's output; the only place that calls the network, so a preconditioner scales it here."""
        return model(x_t, t, eva, drop)

    @abstractmethod
    def target(self, data: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """The output of a network that knows both ends of the path."""

    @abstractmethod
    def clean(self, output: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The clean embedding that the output stands for, fp32."""

    def loss_velocity(self, output: Tensor, x_t: Tensor, t: Tensor, floor: float) -> Tensor:
        """The velocity that the loss compares: it stays finite at t = 1, unlike the one that the sampler follows."""
        return self.path.velocity_from_clean(self.clean(output, x_t, t), x_t, t, floor)


class SamplePrediction(Prediction):
    """The network outputs the clean embedding (Li & He 2025, arXiv 2511.13720)."""

    outputs_clean = True

    def target(self, data: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        return data

    def clean(self, output: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        return output.float()


class VelocityPrediction(Prediction):
    """The network outputs the velocity (Lipman et al. 2023), which needs no division and so no floor."""

    def target(self, data: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        return self.path.velocity(data, noise, t)

    def clean(self, output: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        return self.path.clean_from_velocity(output.float(), x_t, t)

    def loss_velocity(self, output: Tensor, x_t: Tensor, t: Tensor, floor: float) -> Tensor:
        return output


PREDICTIONS: dict[str, Callable[[Path], Prediction]] = {"sample": SamplePrediction, "velocity": VelocityPrediction}

# (prediction, output, target, x_t, t) -> the two tensors [B, N, Dc] that the loss compares
LossWeight = Callable[[Prediction, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def velocity_weight(
    prediction: Prediction, output: Tensor, target: Tensor, x_t: Tensor, t: Tensor, floor: float
) -> tuple[Tensor, Tensor]:
    """Compare velocities: the error of the clean embedding times `(wronskian / max(sigma, floor))^2`.

    On the linear path that is `1 / max(1-t, floor)^2`. Both velocities have the same floor, so beyond it the optimum
    is still the clean embedding.
    """
    return prediction.loss_velocity(output, x_t, t, floor), prediction.loss_velocity(target, x_t, t, floor)


LOSS_WEIGHTS: dict[str, Callable[[FlowConfig], LossWeight]] = {
    "velocity": lambda config: partial(velocity_weight, floor=config.min_time_to_data),
}
