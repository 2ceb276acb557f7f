"""DeepSpeed compiles operations on first use (its all-reduce on CPU, Adam on the host), one process at a time.

PyTorch's lock for that is a file that is there while somebody compiles. A process that is killed leaves it, and then
every later run waits for ever, without a word. Here the lock is one that ends with its process.
"""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import Any

import torch

from blip3o_ds.errors import TrainingError
from blip3o_ds.files import FileLock, wait_for_lock

logger = logging.getLogger(__name__)

TIMEOUT_SECONDS = 900.0  # compiling takes a minute on two cores, and longer on a login node in use


class CompileLock:
    """Stands in for `torch.utils.cpp_extension.FileBaton`: held by whoever compiles into a folder.

    PyTorch lets those who come second load what the first has made. Here they hold the lock in turn, so if the first
    was killed, the next one compiles; where nothing is left to compile, that takes a moment.
    """

    def __init__(self, path: str, timeout_seconds: float) -> None:
        self._path, self._timeout = Path(path), timeout_seconds
        self._lock: FileLock | None = None

    def try_acquire(self) -> bool:
        """Wait for the lock; True, also where the file system has no locks. TrainingError after `timeout_seconds`."""
        folder = self._path.parent
        try:  # a file that a killed process left is no lock
            self._lock = wait_for_lock(self._path, self._timeout, f"that compiles in {folder}")
        except BlockingIOError:
            raise TrainingError(
                f"{folder}: another process has been compiling there for {self._timeout:g} s; end it, or give this run "
                "another folder in TORCH_EXTENSIONS_DIR"
            ) from None
        except OSError as error:
            logger.warning("%s: no lock, so two processes may compile there at a time: %s", folder, error)
        return True

    def release(self) -> None:
        if self._lock is not None:
            self._path.unlink(missing_ok=True)  # to programs that know only PyTorch's lock, a file is a lock
            self._lock.release()


def use_compile_lock() -> None:
    """Compile into the folder of this project from now on, and under a `CompileLock`."""
    os.environ["TORCH_EXTENSIONS_DIR"] = str(extensions_folder())

    from torch.utils import cpp_extension

    def lock(path: str, *_: Any, **__: Any) -> CompileLock:
        return CompileLock(path, TIMEOUT_SECONDS)

    cpp_extension.FileBaton = lock  # type: ignore[assignment, misc]


def extensions_folder() -> Path:
    """TORCH_EXTENSIONS_DIR, or where only this project compiles, and nobody who knows only PyTorch's lock."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    python = "".join(map(str, sys.version_info[:2]))
    own = cache / "blip3o_ds" / f"extensions-torch{torch.__version__}-py{python}"
    return Path(os.environ.get("TORCH_EXTENSIONS_DIR") or own)
