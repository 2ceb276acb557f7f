"""Reports how far a long job is, at what rate, and how long it will still take.

On a terminal one line is rewritten in place; elsewhere, as in a job's log file, a line is logged every ten seconds.
"""

from __future__ import annotations

import logging
import shutil
import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

logger = logging.getLogger(__name__)

LOG_SECONDS = 10.0
_LIVE_SECONDS = 0.2
_CLEAR_LINE = "\r\x1b[K"

_T = TypeVar("_T")


class Progress:
    """The progress of the job `what` from `start` to `total`, both counted in `unit`.

    What was done before `start` does not count towards the rate.
    """

    def __init__(self, what: str, total: float, unit: str = "images", start: float = 0) -> None:
        self._what, self._total, self._unit, self._start = what, total, unit, start
        self._began = self._reported = time.monotonic()
        is_quiet = logging.getLogger("blip3o_ds").level > logging.INFO  # a rank that only reports warnings
        self._is_live = sys.stderr.isatty() and not is_quiet

    def over(self, items: Iterable[_T]) -> Iterator[_T]:
        """Yield `items`, each of which is one `unit` of work."""
        try:
            for number, item in enumerate(items, start=1):
                yield item
                self.at(number)
        finally:
            self.end()

    def at(self, done: float, detail: str | None = None) -> None:
        """Report that `done` is done, if it is time for it; `detail` takes the place of the counts and the rate."""
        now = time.monotonic()
        if self._is_live and done >= self._total:
            self.end()
        elif now - self._reported >= (_LIVE_SECONDS if self._is_live else LOG_SECONDS):
            self._reported = now
            rate = (done - self._start) / (now - self._began)
            detail = detail or f"{done} of {self._total} {self._unit}, {rate:.3g}/s"
            left = format_duration((self._total - done) / rate) if rate > 0 else "unknown time"
            text = f"{self._what}: {detail}, {left} left"
            if self._is_live:
                sys.stderr.write(_CLEAR_LINE + text[: shutil.get_terminal_size().columns - 1])
                sys.stderr.flush()
            else:
                logger.info("%s", text)

    def end(self) -> None:
        """Remove the line on the terminal."""
        if self._is_live:
            sys.stderr.write(_CLEAR_LINE)

    def resume_at(self, done: float) -> None:
        """What is done up to here was found done, and says nothing about the rate."""
        self._start = done

    def seconds_left(self, done: float) -> float:
        """The time that the rest will take at the rate so far; `done` is more than was done at the start."""
        return (time.monotonic() - self._began) / (done - self._start) * (self._total - done)


def format_duration(seconds: float) -> str:
    """`75 -> 1m15s`, `4000 -> 1h06m`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"
