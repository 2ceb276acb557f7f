"""What a checkpoint holds of a run besides the engine's tensors, and what a rollback replaces.

Together with the engine it is all that the remaining steps depend on.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from blip3o_ds.runs.checkpoint import Checkpoint


@dataclass
class TrainState:
    """Where a run stands, the same on every rank; the ranks' random number generators lie in the checkpoint too."""

    total_steps: int  # the learning rate's schedule depends on it
    step: int = 0  # the last one that was taken, or skipped
    best: dict[str, Any] | None = None  # `step` and `score` of the best evaluation
    skipped_in_a_row: int = 0
    rollbacks: int = 0
    loader: dict[str, int] = field(default_factory=dict)  # position in the data, as the loader states it

    def to_json(self) -> dict[str, Any]:
        """What `checkpoint.json` holds; the step stands there already."""
        return {name: value for name, value in asdict(self).items() if name != "step"}

    @staticmethod
    def of(checkpoint: Checkpoint) -> TrainState:
        """The state that a checkpoint holds; old ones lack what was added later."""
        return TrainState(step=checkpoint.step, **checkpoint.state)
