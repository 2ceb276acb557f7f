"""Files that other processes may read or write at the same time: atomic writing, SHA-256, locks, and reading JSON.

A reader sees a whole file or none: everything is written under a temporary name in the same folder, synced and renamed,
and a failure leaves what was there before.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from blip3o_ds.errors import Blip3oError, DataError

logger = logging.getLogger(__name__)

QUIET_SECONDS = 5.0  # that a wait for a lock may last without a word
_REPEAT_SECONDS = 30.0
_POLL_SECONDS = 0.1


@contextmanager
def atomic_write(path: str | Path) -> Iterator[BinaryIO]:
    """Open `path` for binary writing; it appears under its name only when the block ends without an error."""
    path = Path(path)
    temporary = _temporary(path)
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_dir(path.parent)


def atomic_write_bytes(path: str | Path, content: bytes) -> None:
    """Write `content` to `path` in one step."""
    with atomic_write(path) as file:
        file.write(content)


def atomic_write_json(path: str | Path, content: Any) -> None:
    """Write `content` as indented JSON; NaN and infinity are refused, since JSON cannot express them."""
    atomic_write_bytes(path, json.dumps(content, indent=2, allow_nan=False).encode() + b"\n")


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """A temporary folder to fill; it appears under the name `path` only when the block ends without an error.

    Raises FileExistsError if something is at `path` already, other than an empty folder.
    """
    path = Path(path).absolute()
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise FileExistsError(f"{path} already exists; remove it or give another folder")
    temporary = _temporary(path)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        fsync_dir(temporary)
        os.replace(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    fsync_dir(path.parent)


@contextmanager
def reading(path: str | Path, error: type[Blip3oError] = DataError, remedy: str = "write it again") -> Iterator[None]:
    """Raise `error`, naming the file and the remedy, where the file is missing or the system refuses to read it."""
    try:
        yield
    except FileNotFoundError:
        raise error(f"{path} is missing; {remedy}") from None
    except OSError as failure:
        raise error(f"{path} cannot be read: {failure.strerror}; check the file system") from failure


def read_json(path: str | Path, error: type[Blip3oError] = DataError, remedy: str = "write it again") -> dict[str, Any]:
    """The JSON object in the file `path`; raises `error`, which names the file, what was found, and the remedy."""
    with reading(path, error, remedy):
        content = Path(path).read_bytes()
    return parse_json(content, path, error, remedy)


def parse_json(content: bytes, source: str | Path, error: type[Blip3oError], remedy: str) -> dict[str, Any]:
    """The JSON object in `content`, which was read from the file or URL `source`."""
    try:
        found = json.loads(content)
    except (ValueError, RecursionError) as failure:
        raise error(f"{source} is not JSON ({failure}); {remedy}") from None
    if not isinstance(found, dict):
        raise error(f"{source}: expected a JSON object, found {type(found).__name__!r}; {remedy}")
    return found


class HashingFile:
    """A binary file that counts and hashes what is read or written, so that no checksum needs a second pass."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._digest = hashlib.sha256()
        self.num_bytes = 0

    @property
    def sha256(self) -> str:
        """Hexadecimal, as `sha256sum` prints it."""
        return self._digest.hexdigest()

    def read(self, size: int = -1) -> bytes:
        content = self._file.read(size)
        self._count(content)
        return content

    def write(self, content: Any) -> int:
        written = self._file.write(content)
        self._count(content)
        return written

    def flush(self) -> None:
        self._file.flush()

    def _count(self, content: Any) -> None:
        self._digest.update(content)
        self.num_bytes += len(content)


def sha256_file(path: str | Path, chunk_bytes: int = 1 << 22) -> str:
    """Hexadecimal SHA-256 of a file's content."""
    with open(path, "rb") as raw:
        file = HashingFile(raw)
        while file.read(chunk_bytes):
            pass
    return file.sha256


class FileLock:
    """A lock on the file `path`, held until `release`, the end of the process, or until nobody refers to this object.

    The file is created if needed and never removed: a process that waits for a removed file and one that creates it
    again would both hold the lock. On a network file system the other hosts see the lock. Raises BlockingIOError if
    `wait` is false and another process holds the lock, OSError if the file system has no locks.
    """

    def __init__(self, path: str | Path, *, shared: bool = False, wait: bool = True) -> None:
        self._descriptor: int | None = None
        self._owner = os.getpid()
        kind = (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB)
        while self._descriptor is None:
            try:
                descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            except PermissionError:  # another user's file, which a local file system locks all the same
                descriptor = os.open(path, os.O_RDONLY)
            try:
                fcntl.flock(descriptor, kind)
                if _is_same_file(descriptor, path):  # unless a user removed it between the two calls
                    self._descriptor = descriptor
            finally:
                if self._descriptor is None:
                    os.close(descriptor)

    def __enter__(self) -> FileLock:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def release(self) -> None:
        if self._descriptor is None:
            return
        if os.getpid() == self._owner:  # a forked process has a copy, so closing is not enough
            fcntl.flock(self._descriptor, fcntl.LOCK_UN)
        os.close(self._descriptor)
        self._descriptor = None

    __del__ = release


def wait_for_lock(path: str | Path, timeout_seconds: float, reason: str) -> FileLock:
    """The lock on `path`, after a wait for whoever holds it; BlockingIOError if that is longer than `timeout_seconds`.

    A wait of more than a few seconds says in the log what it is for: `reason`.
    """
    started = time.monotonic()
    speak = started + QUIET_SECONDS
    while True:
        try:
            return FileLock(path, wait=False)
        except BlockingIOError:
            now = time.monotonic()
            if now - started > timeout_seconds:
                raise
        if now > speak:
            logger.warning("waiting for another process %s", reason)  # seen on every rank, and before logs are set up
            speak = now + _REPEAT_SECONDS
        time.sleep(_POLL_SECONDS)


def _is_same_file(descriptor: int, path: str | Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def fsync_dir(path: str | Path) -> None:
    """Make a rename in `path` durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _temporary(path: Path) -> Path:
    # Two nodes that share the file system may have the same process id.
    return path.with_name(f".{path.name}.{os.getpid()}{secrets.randbelow(10**9):09d}.tmp")
