"""How errors at different times are weighed against each other in the loss.

A weight turns output and target into the two tensors whose squared difference is the loss, so that the fused loss and
its diagnostics (norms, cosine) serve every weight.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from blip3o_ds.config import FlowConfig
from blip3o_ds.flow.prediction import Prediction


class LossWeight(ABC):
    """A choice of what the loss compares."""

    @abstractmethod
    def compared(
        self, prediction: Prediction, output: Tensor, target: Tensor, x_t: Tensor, t: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The network's output and its target, both `[B, N, Dc]`, in the quantity and scale that the loss compares."""


@dataclass(frozen=True)
class VelocityWeight(LossWeight):
    """Compare velocities: the error of the clean embedding times `(wronskian / max(sigma, floor))^2`.

    On the linear path that is `1 / max(1-t, floor)^2`. Both velocities have the same floor, so beyond it the optimum
    is still the clean embedding.
    """

    floor: float

    def compared(
        self, prediction: Prediction, output: Tensor, target: Tensor, x_t: Tensor, t: Tensor
    ) -> tuple[Tensor, Tensor]:
        return (
            prediction.loss_velocity(output, x_t, t, self.floor),
            prediction.loss_velocity(target, x_t, t, self.floor),
        )


LOSS_WEIGHTS: dict[str, Callable[[FlowConfig], LossWeight]] = {
    "velocity": lambda config: VelocityWeight(config.min_time_to_data),
}
