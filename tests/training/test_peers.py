"""A rank that ends or hangs: the others end soon, and say which it was."""

from __future__ import annotations

import signal
import time

import pytest

SETTINGS = {"train.max_steps": 5000, "train.timeout_seconds": 20}


@pytest.mark.slow
@pytest.mark.parametrize("gone", [0, 1])
def test_the_others_end_with_the_name_of_a_rank_that_was_killed(start_ranks, gone):
    ranks = start_ranks("out", 2, SETTINGS)
    ranks.wait_for_step(5)
    ranks.processes[gone].kill()
    killed_at = time.monotonic()
    status = ranks.processes[1 - gone].wait(60)

    assert status == 1, ranks.log(1 - gone)
    assert time.monotonic() - killed_at < 60
    assert f"rank {gone}" in ranks.log(1 - gone), ranks.log(1 - gone)
    assert "--resume" in ranks.log(1 - gone)


@pytest.mark.slow
def test_a_rank_that_hangs_is_not_waited_for(start_ranks):
    ranks = start_ranks("out", 2, SETTINGS)
    ranks.wait_for_step(5)
    ranks.processes[1].send_signal(signal.SIGSTOP)
    stopped_at = time.monotonic()
    status = ranks.processes[0].wait(60)

    assert status == 1
    assert time.monotonic() - stopped_at < 60
    assert "rank 1" in ranks.log(0)
    assert "is gone: not heard from for" in ranks.log(0)
