"""What a run does about a step whose gradient is not finite: skip it, return to the last checkpoint, or stop.

After a return the data continues behind the samples that failed. A step is a function of its samples, so the same ones
would fail again.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from blip3o_ds.errors import TrainingError
from blip3o_ds.runs.folder import BAD_BATCHES, CHECKPOINTS
from blip3o_ds.training.anomalies import record_bad_batch
from blip3o_ds.training.checkpoint import load_checkpoint, newest_checkpoint
from blip3o_ds.training.state import TrainState
from blip3o_ds.training.telemetry import Progress

if TYPE_CHECKING:
    from blip3o_ds.training.setup import Run

logger = logging.getLogger(__name__)


def skip_or_roll_back(run: Run, keys: Sequence[str], losses: Sequence[Tensor]) -> bool:
    """Record a step that was skipped; True if the run returned to a checkpoint, for it was one too many in a row.

    Args:
        keys: of this rank's samples.
        losses: `[B]` of each of its micro-batches.

    Raises:
        TrainingError: there is no checkpoint, or the run has returned `train.max_rollbacks` times already.
    """
    state = run.state
    state.skipped_in_a_row += 1
    logger.warning("step %d skipped: the gradient is not finite (%d in a row)", state.step, state.skipped_in_a_row)
    record_bad_batch(run.folder / BAD_BATCHES, state.step, keys, losses)
    if state.skipped_in_a_row <= run.config.train.max_skipped_steps:
        return False
    _roll_back(run)
    return True


def _roll_back(run: Run) -> None:
    train, failed = run.config.train, run.state
    run.saver.finish()
    checkpoint = newest_checkpoint(run.folder / CHECKPOINTS)
    if checkpoint is None or failed.rollbacks >= train.max_rollbacks:
        saved = f"the last good checkpoint is {checkpoint.path}" if checkpoint else "no checkpoint was written yet"
        raise TrainingError(
            f"step {failed.step}: loss or gradient is not finite, more than train.max_skipped_steps = "
            f"{train.max_skipped_steps} steps in a row, after {failed.rollbacks} of train.max_rollbacks = "
            f"{train.max_rollbacks} returns to a checkpoint; {saved}, the samples are in {run.folder / BAD_BATCHES}. "
            "Lower train.learning_rate, or look for the cause with --debug_mode"
        )
    load_checkpoint(run.engine, checkpoint)
    logger.warning("back to %s, with the samples after step %d's", checkpoint.path, failed.step)
    run.state = TrainState.of(checkpoint)
    run.state.rollbacks, run.state.skipped_in_a_row = failed.rollbacks + 1, 0
    run.writer.rewind(run.state.step)
    run.progress = Progress(run.state.total_steps, run.state.step)
    run.meter.reset()
