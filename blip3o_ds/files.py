"""Writing files so that a reader sees the whole file or none of it.

Everything is written under a temporary name in the same folder, synced, and renamed; a failure removes the
temporary file and leaves what was there before.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO


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
    """Write `content` as indented JSON; NaN and infinity are refused, since JSON has no word for them."""
    text = json.dumps(content, indent=2, allow_nan=False)
    atomic_write_bytes(path, (text + "\n").encode())


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """A temporary folder to fill; it appears under the name `path` only when the block ends without an error.

    Raises:
        FileExistsError: something is at `path` already, other than an empty folder.
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


def sha256_file(path: str | Path, chunk_bytes: int = 1 << 22) -> str:
    """Hexadecimal SHA-256 of a file's content, as `sha256sum` prints it."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(chunk_bytes):
            digest.update(chunk)
    return digest.hexdigest()


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
