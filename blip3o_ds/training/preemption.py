"""Stopping a run from outside: SIGUSR1 and SIGTERM end it after a step that all ranks agree on, saved and resumable.

SIGUSR1 means "time is nearly up" (`#SBATCH --signal=USR1@120`): under SLURM the job is queued again. The sender of
SIGTERM decides what happens next: a preempting scheduler queues the job again, `scancel` does not.
"""

from __future__ import annotations

import logging
import signal
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

logger = logging.getLogger(__name__)


class StopSignal:
    """Remembers this process's signals while its context lasts, and tells all ranks about them at the same step."""

    def __init__(self) -> None:
        self._received = 0
        self._flag = torch.zeros(1, dtype=torch.int32)
        self._reduction: dist.Work | None = None
        self._group = dist.new_group(backend="gloo")  # on the host, beside the GPUs' own collectives
        self._former: dict[int, Any] = {}

    def __enter__(self) -> StopSignal:
        self._former = {number: signal.signal(number, self._remember) for number in (signal.SIGUSR1, signal.SIGTERM)}
        return self

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)
        if error is None and self._reduction is not None:
            self._reduction.wait()  # nobody leaves while another still takes part

    def agreed(self) -> signal.Signals | None:
        """The signal that some rank had received by the call before this one; the same on every rank.

        Every rank calls it once a step. Nobody waits: the answer is that of an all-reduce begun a step ago.
        """
        if self._reduction is not None:
            self._reduction.wait()
        decided = int(self._flag)
        self._flag = torch.tensor([self._received], dtype=torch.int32)
        self._reduction = dist.all_reduce(self._flag, dist.ReduceOp.MAX, group=self._group, async_op=True)
        return signal.Signals(decided) if decided else None

    def _remember(self, number: int, frame: Any) -> None:
        self._received = number


def requeue_or_explain(run_dir: Path, received: signal.Signals, environment: Mapping[str, str]) -> None:
    """On rank 0, after the save: have SLURM queue the job again if it was SIGUSR1, or say how to resume."""
    job = environment.get("SLURM_JOB_ID")
    if received == signal.SIGUSR1 and job is not None:
        try:
            command = ["scontrol", "requeue", job]
            subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=True)
            logger.info("job %s is queued again", job)
            return
        except (OSError, subprocess.CalledProcessError) as error:  # no such command on this node, or it refused
            problem = getattr(error, "output", None) or str(error)
            logger.warning("`scontrol requeue %s` failed: %s", job, problem.strip())
    logger.info("to continue, start the same command with --resume %s", run_dir)
