"""How errors at different times are weighed against each other in the loss.

A weight turns output and target into the two tensors whose squared difference is the loss, so that the fused loss and
its diagnostics (norms, cosine) serve every weight.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor

from blip3o_ds.config import FlowConfig
from blip3o_ds.flow.prediction import Prediction

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
