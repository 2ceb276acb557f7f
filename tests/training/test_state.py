"""The state of a run, from a checkpoint and back."""

from __future__ import annotations

from pathlib import Path

from blip3o_ds.runs.checkpoint import Checkpoint
from blip3o_ds.training.checkpoint import TrainState

BEST = {"step": 5, "metric": "energy_score", "score": 0.5}
LOADER = {"epoch": 1, "samples_consumed": 40}


def test_a_checkpoint_gives_back_the_state_that_was_stored():
    state = TrainState(20, step=7, best=BEST, skipped_in_a_row=1, rollbacks=2, loader=LOADER)

    assert TrainState.of(Checkpoint(Path("step_00000007"), 7, 1, 2, state.to_json())) == state


def test_a_checkpoint_older_than_the_counts_of_skips_and_rollbacks_is_read():
    old = {"loader": LOADER, "total_steps": 20, "best": None}

    state = TrainState.of(Checkpoint(Path("step_00000007"), 7, 1, 2, old))

    assert state == TrainState(20, step=7, loader=LOADER)
