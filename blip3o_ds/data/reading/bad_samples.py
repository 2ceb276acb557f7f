"""What happens when a sample or a shard cannot be read: the run stops, or goes on with another and says so.

Which one takes its place is the dataset's rule (see `EmbeddingDataset`); here are the policy, and the record of what
was met.
"""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import json
import logging
import os
import threading
from pathlib import Path
from typing import Any, Literal

from blip3o_ds.errors import DataError

logger = logging.getLogger(__name__)

OnBad = Literal["error", "skip"]
SLOW_READ_SECONDS = 10.0  # a read that takes longer, or a wait for one, is reported


class FaultLog:
    """The policy for bad samples and bad shards, and the record of those met. Safe for several threads.

    `error` raises what was found; `skip` lets the reader go on. Each bad sample or shard is logged once, and written
    as one line of JSON to the file that `write_to` names: time, rank, shard, key (null for a whole shard), error.
    """

    def __init__(self, on_bad_sample: OnBad = "error", on_bad_shard: OnBad = "error") -> None:
        self.num_replaced = 0  # reads that were given another sample than the one at their place
        self._on_bad_sample = on_bad_sample
        self._on_bad_shard = on_bad_shard
        self._path: Path | None = None
        self._rank = 0
        self._seen: set[tuple[str, str | None]] = set()
        self._slow: set[str] = set()
        self._lock = threading.Lock()

    def write_to(self, path: Path, rank: int) -> None:
        """Append to `path` from now on; all ranks may share it."""
        self._path, self._rank = path, rank

    def bad_sample(self, shard: str, key: str, error: DataError) -> None:
        """Note a sample that cannot be read, or raise `error` if that is the policy."""
        if self._on_bad_sample == "error":
            raise error
        self._note(shard, key, error)

    def bad_shard(self, shard: str, error: DataError) -> None:
        """Note a shard of which nothing can be read, or raise `error` if that is the policy."""
        if self._on_bad_shard == "error":
            raise error
        self._note(shard, None, error)

    def replaced(self) -> None:
        """Count a read that was given another sample."""
        with self._lock:
            self.num_replaced += 1

    def slow(self, shard: str, seconds: float) -> None:
        """Warn, once for each file, of a read that took `seconds` or is still going on after them."""
        with self._lock:
            if shard in self._slow:
                return
            self._slow.add(shard)
        logger.warning("%s: a read takes more than %.0f s; its file system is slow or does not answer", shard, seconds)

    def _note(self, shard: str, key: str | None, error: DataError) -> None:
        with self._lock:
            if (shard, key) in self._seen:
                return
            self._seen.add((shard, key))
        logger.warning("bad %s, another takes its place: %s", "shard" if key is None else "sample", error)
        if self._path is not None:
            now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
            line = {"time": now, "rank": self._rank, "shard": shard, "key": key, "error": str(error)}
            _append_line(self._path, line)


def _append_line(path: Path, content: dict[str, Any]) -> None:
    """One write of one line under a lock, so that lines of several ranks stay whole on network file systems too."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            with contextlib.suppress(OSError):  # a file system without locks has O_APPEND
                fcntl.lockf(descriptor, fcntl.LOCK_EX)
            os.write(descriptor, (json.dumps(content) + "\n").encode())
        finally:
            os.close(descriptor)
    except OSError as error:
        # The record is an account of the run, not a part of it: the log has the same line.
        logger.warning("%s: cannot be written (%s)", path, error)
