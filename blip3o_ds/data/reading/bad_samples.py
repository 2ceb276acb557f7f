"""What happens when a sample or a shard cannot be read: the run stops, or reads another one and says so.

`BadSamples` is the run's policy and record, `Replacements` a dataset's rule for which sample is read instead.
"""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import json
import logging
import threading
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, Literal

from blip3o_ds.errors import DataError

logger = logging.getLogger(__name__)

OnBad = Literal["error", "skip"]
Place = tuple[int, int]  # shard, and index in the shard
SLOW_READ_SECONDS = 10.0  # a read that takes longer, or a wait for one, is reported


class BadSamples:
    """The policy for bad samples and bad shards, and the record of those met. Safe for several threads.

    `error` raises what was found; `skip` lets the reader continue. Each bad sample or shard is logged once, and written
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

    def add(self, shard: str, key: str | None, error: DataError) -> None:
        """Record a sample, or a whole shard if `key` is None, or raise `error` if that is the policy."""
        if (self._on_bad_shard if key is None else self._on_bad_sample) == "error":
            raise error
        with self._lock:
            if (shard, key) in self._seen:
                return
            self._seen.add((shard, key))
        logger.warning("bad %s, another takes its place: %s", "shard" if key is None else "sample", error)
        if self._path is not None:
            now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
            line = {"time": now, "rank": self._rank, "shard": shard, "key": key, "error": str(error)}
            _append_line(self._path, line)

    def replaced(self) -> None:
        with self._lock:
            self.num_replaced += 1

    def slow(self, shard: str, seconds: float) -> None:
        """Warn, once for each file, of a read that took `seconds` or is still going on after them."""
        with self._lock:
            if shard in self._slow:
                return
            self._slow.add(shard)
        logger.warning("%s: a read takes more than %.0f s; its file system is slow or does not answer", shard, seconds)


class Replacements:
    """Which sample of a dataset is read where the one at a place is bad: a function of the data and the place.

    For a bad sample it is the next sound one of its shard, from the first again after the last; for a shard that
    cannot be opened, or has no sound sample, the sample `index` modulo its size of the next shard, in the same way.
    """

    def __init__(self, bad_samples: BadSamples, shard_names: Sequence[str], shard_sizes: Sequence[int]) -> None:
        self._record = bad_samples
        self._names = shard_names
        self._sizes = shard_sizes
        self.bad_shards: set[int] = set()  # found so far
        self._bad_samples: set[Place] = set()

    def places(self, shard: int, index: int) -> Iterator[Place]:
        """The places to try for the sample at (`shard`, `index`), itself first, without those found bad so far."""
        for other in chain(range(shard, len(self._sizes)), range(shard)):
            size = self._sizes[other]
            for step in range(size):
                if other in self.bad_shards:
                    break
                place = other, (index + step) % size
                if place not in self._bad_samples:
                    yield place
            else:
                self.add_shard(other, DataError(f"{self._names[other]}: none of its {size} samples can be read"))

    def add_sample(self, place: Place, key: str, error: DataError) -> None:
        """Never try this sample again, or raise `error` if that is the policy."""
        self._record.add(self._names[place[0]], key, error)
        self._bad_samples.add(place)

    def add_shard(self, shard: int, error: DataError) -> None:
        """The same for a whole shard."""
        self._record.add(self._names[shard], None, error)
        self.bad_shards.add(shard)


def _append_line(path: Path, content: dict[str, Any]) -> None:
    """One write of one line under a lock, so that lines of several ranks stay whole on network file systems too."""
    try:
        with open(path, "ab", buffering=0) as file:
            with contextlib.suppress(OSError):  # a file system without locks has at least O_APPEND
                fcntl.lockf(file, fcntl.LOCK_EX)
            file.write((json.dumps(content) + "\n").encode())
    except OSError as error:
        # The run does not need this record, and the log has the same line.
        logger.warning("%s: cannot be written (%s)", path, error)
