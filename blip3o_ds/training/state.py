"""What a checkpoint holds of a run besides the engine's tensors, and what a rollback replaces.

Together with the engine it is all that the remaining steps depend on, so a run that was killed and resumed continues
exactly as if it had not been killed.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from blip3o_ds.runs.checkpoint import Checkpoint


@dataclass
class TrainState:
    """Where a run stands, the same on every rank.

    The random number generators, which differ between ranks, lie in the checkpoint beside it (`rng_state`).
    """

    total_steps: int  # the learning rate's schedule depends on it
    step: int = 0  # the last one that was taken, or skipped
    best: dict[str, Any] | None = None  # `step` and `score` of the best evaluation
    skipped_in_a_row: int = 0
    rollbacks: int = 0
    loader: dict[str, int] = field(default_factory=dict)  # position in the data, as the loader states it

    def to_json(self) -> dict[str, Any]:
        """What `checkpoint.json` holds; the step stands there already."""
        content = asdict(self)
        del content["step"]
        return content

    @staticmethod
    def of(checkpoint: Checkpoint) -> TrainState:
        """The state that a checkpoint holds; old ones lack what was added later."""
        return TrainState(step=checkpoint.step, **checkpoint.state)


def rng_state() -> dict[str, Tensor]:
    """The state of this rank's default generators."""
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def restore_rng_state(state: dict[str, Tensor]) -> None:
    """Put back what `rng_state` returned."""
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
