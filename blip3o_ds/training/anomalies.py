"""Losses and gradients that go wrong: a spike is reported, a step that is not finite is skipped or undone.

Undoing is a return to the last checkpoint; the data then continues behind the samples that failed, since a step is a
function of its samples and the same ones would fail again.
"""

from __future__ import annotations

import json
import logging
import statistics
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from blip3o_ds.errors import CheckpointError, TrainingError
from blip3o_ds.progress import Progress
from blip3o_ds.runs.folder import BAD_BATCHES, CHECKPOINTS
from blip3o_ds.training.checkpoint import TrainState, load_checkpoint, newest_checkpoint
from blip3o_ds.training.peers import gather

if TYPE_CHECKING:
    from blip3o_ds.training.setup import Run

logger = logging.getLogger(__name__)

SPIKE = 6.0  # robust standard deviations


def skip_or_roll_back(run: Run, keys: Sequence[str], losses: Sequence[Tensor]) -> bool:
    """Record a step that was not applied; True if it was one too many in a row and the run rolled back.

    `keys` are this rank's samples of the step, `losses` [B] those of each micro-batch. A `TrainingError` says that
    there is no checkpoint, or that the run has rolled back `train.max_rollbacks` times already.
    """
    state = run.state
    state.skipped_in_a_row += 1
    logger.warning("step %d skipped: the gradient is not finite (%d in a row)", state.step, state.skipped_in_a_row)
    _record(run, keys, losses)
    if state.skipped_in_a_row <= run.config.train.max_skipped_steps:
        return False
    _roll_back(run)
    return True


def _record(run: Run, keys: Sequence[str], losses: Sequence[Tensor]) -> None:
    """Append `step`, `keys` (of all ranks), and those whose own loss is `not_finite`, to `bad_batches.jsonl`."""
    finite = [bool(value) for loss in losses for value in loss.isfinite().tolist()]
    samples = [sample for rank in gather(list(zip(keys, finite, strict=True))) for sample in rank]
    if run.rank == 0:
        not_finite = [key for key, is_finite in samples if not is_finite]
        line = {"step": run.state.step, "keys": [key for key, _ in samples], "not_finite": not_finite}
        with open(run.folder / BAD_BATCHES, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def _roll_back(run: Run) -> None:
    train, failed = run.config.train, run.state
    checkpoint = run.saver.finish()
    saved = f"the last good checkpoint is {checkpoint.path}" if checkpoint else "no checkpoint was written yet"
    if checkpoint is not None and failed.rollbacks < train.max_rollbacks:
        try:
            checkpoint = newest_checkpoint(run.folder / CHECKPOINTS)
        except CheckpointError as error:  # on every rank
            checkpoint, saved = None, str(error)
    if checkpoint is None or failed.rollbacks >= train.max_rollbacks:
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
    run.progress = Progress("training", run.state.total_steps, "steps", run.state.step)
    run.meter.reset()


class SpikeDetector:
    """How far a loss lies above the ones before it, in robust standard deviations.

    The deviation is 1.4826 times the median absolute one (as for a normal distribution) of the last `window` losses;
    until half of them are there, the score is 0.
    """

    def __init__(self, window: int = 64) -> None:
        self._window = window
        self._losses: deque[float] = deque(maxlen=window)

    def score(self, loss: float) -> float:
        """The robust z-score of `loss`, which counts among the losses from then on."""
        score = 0.0
        if len(self._losses) >= self._window // 2:
            median = statistics.median(self._losses)
            deviation = statistics.median(abs(value - median) for value in self._losses)
            score = (loss - median) / max(1.4826 * deviation, 1e-3 * abs(median), 1e-12)
        self._losses.append(loss)
        return score

    def is_spike(self, score: float) -> bool:
        return score > SPIKE
