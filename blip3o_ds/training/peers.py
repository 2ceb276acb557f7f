"""The other ranks: agreeing on an outcome, and knowing when one of them is gone instead of waiting for it forever.

A dead rank shows only as a collective that fails or, with NCCL, never returns. So every rank writes a heartbeat into
the store at the rendezvous, and a thread on each reads those of all others.
"""

from __future__ import annotations

import contextlib
import datetime
import logging
import os
import socket
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from blip3o_ds.errors import Blip3oError, TrainingError

logger = logging.getLogger(__name__)

SILENCE_SECONDS = 30.0  # a rank that was not heard from for this long is gone
LAST_WORDS_SECONDS = 10  # for the main thread to end by itself, once a peer is known to be gone
FAILED = "failed: "

T = TypeVar("T")


def gather(value: T, group: dist.ProcessGroup | None = None) -> list[T]:
    """Every rank's `value`, in rank order; a collective."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value, group=group)
    return values


def on_rank_zero(work: Callable[[], T]) -> T:
    """Call `work` on rank 0; every rank returns its result, or raises its error so that none waits for another."""
    outcome: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            outcome[0] = work()
        except (Blip3oError, OSError) as error:
            outcome[1] = error
    dist.broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


class PeerWatch:
    """While its context lasts, a rank that ends or falls silent for `timeout` seconds is named and ends this one too.

    An error of a collective within the context becomes a `TrainingError` that names the rank.
    """

    def __init__(self, timeout: float) -> None:
        self._timeout = timeout
        self._rank = dist.get_rank()
        self._hosts = gather(socket.gethostname())
        self._closing = threading.Event()
        self._found = threading.Event()
        self._suspecting = False  # a collective failed: a shorter silence is proof
        self._problem = ""  # what the thread found
        self._last_words = ""  # what the others are told at the end
        self._thread: threading.Thread | None = None

    def __enter__(self) -> PeerWatch:
        if len(self._hosts) > 1:
            # A connection of its own: the thread must not wait for the main thread's use of the store.
            address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            timeout = datetime.timedelta(seconds=self._timeout)
            self._store = dist.TCPStore(address, port, is_master=False, timeout=timeout)
            self._store.set(_key(self._rank), "0")
            dist.barrier()  # all are there to be read
            self._thread = threading.Thread(target=self._run, name="peer-watch", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        if self._thread is None:
            return
        if error is not None and _is_collective(error):
            self._suspecting = True
            known = self._found.wait(self._timeout)
            self._closing.set()
            problem = self._problem if known else "another rank is gone or cannot be reached; its own output names it"
            raise TrainingError(f"{problem}; continue with --resume ({_one_line(error)})") from error
        self._last_words = "" if error is None else f"{FAILED}{_one_line(error)}"
        self._closing.set()
        self._thread.join(LAST_WORDS_SECONDS)  # not longer: it may be stuck in a network that is cut

    def _run(self) -> None:
        beats = 0
        heard = {rank: ("", time.monotonic()) for rank in range(len(self._hosts)) if rank != self._rank}
        while not self._closing.wait(self._timeout / 6):
            beats += 1
            try:
                self._store.set(_key(self._rank), str(beats))
                values = self._store.multi_get([_key(rank) for rank in heard])
            except RuntimeError as error:  # the type of the store's errors
                self._end(f"the rendezvous on rank 0 ({os.environ['MASTER_ADDR']}) is gone: {_one_line(error)}")
                return
            now = time.monotonic()
            for rank, value in zip(list(heard), values, strict=True):
                text, name = value.decode(), f"rank {rank} ({self._hosts[rank]})"
                if text.startswith(FAILED):
                    self._end(f"{name} {text}")
                    return
                if text != heard[rank][0]:
                    heard[rank] = text, now
                elif (silence := now - heard[rank][1]) > (self._timeout / 2 if self._suspecting else self._timeout):
                    self._end(f"{name} is gone: not heard from for {silence:.0f} s")
                    return
        if self._last_words:
            with contextlib.suppress(RuntimeError):  # the store ends with rank 0; then there is nobody left to tell
                self._store.set(_key(self._rank), self._last_words)

    def _end(self, problem: str) -> None:
        """Let the main thread end with the name, or end the process if that thread is stuck in a collective."""
        if self._closing.is_set():
            return
        self._problem = problem
        self._found.set()
        if self._closing.wait(LAST_WORDS_SECONDS):
            return
        logger.error("%s; this rank cannot continue without it and ends; continue with --resume", problem)
        for handler in logging.getLogger("blip3o_ds").handlers:
            handler.flush()
        os._exit(1)


def _is_collective(error: BaseException) -> bool:
    # NCCL's errors have a type; gloo raises plain RuntimeErrors that begin with the source file they come from.
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def _key(rank: int) -> str:
    return f"blip3o_ds/beat/{rank}"


def _one_line(error: BaseException) -> str:
    return str(error).splitlines()[0] if str(error) else repr(error)
