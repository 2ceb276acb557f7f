"""DeepSpeed's files of a checkpoint: copied to host memory when it saves, written to disk later by a thread.

DeepSpeed passes what it stores to a "checkpoint engine"; ours only copies, so a step waits for memory and not for the
disk. Reading admits tensors, plain containers and the few classes named here, and runs no code from the file.
"""

from __future__ import annotations

import copy
import os
import pickle
import re
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed.runtime.fp16.loss_scaler as loss_scaler
import torch
from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointEngine
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address

from blip3o_ds.errors import CheckpointError
from blip3o_ds.files import HashingFile, sha256_file

ADMITTED = [ZeroStageEnum, fragment_address, loss_scaler.LossScaler, loss_scaler.DynamicLossScaler]


class SnapshotEngine(CheckpointEngine):
    def __init__(self) -> None:
        super().__init__()
        self._snapshots: dict[str, Any] = {}

    def create(self, info: Any) -> None: ...

    def save(self, state_dict: Any, path: str) -> None:
        self._snapshots[Path(path).name] = copy_to_host(state_dict)

    def take(self) -> dict[str, Any]:
        """The copies since the last call, by the name of the file that each belongs in."""
        taken, self._snapshots = self._snapshots, {}
        return taken

    def load(self, path: str, map_location: Any = None) -> Any:
        return read_file(path, map_location)

    def commit(self, info: Any) -> bool:
        return True

    def preserves_storage_sharing(self) -> bool:
        return False  # every tensor is copied separately


def read_file(path: str | Path, map_location: Any = None) -> Any:
    """What torch.save wrote, without running code from it; a `CheckpointError` if it holds more than is admitted."""
    try:
        with torch.serialization.safe_globals(ADMITTED):
            return torch.load(path, map_location=map_location, weights_only=True)
    except OSError:
        raise
    except Exception as error:  # torch raises anything
        if not isinstance(error, pickle.UnpicklingError):
            raise CheckpointError(f"{path}: is not what torch.save writes ({error!r})") from None
        # Not all of PyTorch's message, which advises to load the file whatever it does.
        found = re.search(r"GLOBAL (\S+)", str(error))
        raise CheckpointError(
            f"{path}: holds more than tensors and plain values{f' ({found[1]})' if found else ''} and is not read, as "
            "reading could run code; this project did not write it, so do not trust the run"
        ) from None


def copy_to_host(value: Any) -> Any:
    """A copy that later steps cannot change, tensors in host memory; transfers from a GPU may still be under way."""
    if isinstance(value, torch.Tensor):
        host = torch.empty(value.shape, dtype=value.dtype, pin_memory=value.is_cuda)
        return host.copy_(value.detach(), non_blocking=True)
    if type(value) in (dict, OrderedDict):
        return type(value)((key, copy_to_host(item)) for key, item in value.items())
    if type(value) in (list, tuple):
        return type(value)(copy_to_host(item) for item in value)
    return copy.deepcopy(value)


def write_verified(path: Path, write: Callable[[Any], Any]) -> dict[str, Any]:
    """Write a file through `write`, sync it, read it back; return its `bytes` and `sha256` as they left memory."""
    with open(path, "wb") as file:
        hashed = HashingFile(file)
        write(hashed)
        file.flush()
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # so that it is read from the disk below
    if sha256_file(path) != hashed.sha256:
        raise OSError(f"{path}: read back, it is not what was written; the storage is faulty or full")
    return {"bytes": hashed.num_bytes, "sha256": hashed.sha256}
