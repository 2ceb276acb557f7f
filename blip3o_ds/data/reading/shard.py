"""Reading one shard: a plain webdataset tar, through the index beside it and without parsing.

A sample comes by one `preadv` straight into the caller's tensors, and its values are checked as they arrive.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from io import FileIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from blip3o_ds.data.format.codec import (
    SampleMemory,
    StoredTensor,
    check_values,
    decode_all,
    parse_header,
    stored_tensors,
)
from blip3o_ds.data.format.index import ShardIndex, check_tar_size, index_path
from blip3o_ds.data.format.schema import SCALE_SUFFIX, DatasetSpec
from blip3o_ds.errors import DataError
from blip3o_ds.files import reading

_MAX_HEADER_BYTES = 1 << 16
_READAHEAD_BYTES = 1 << 17  # Linux's default
_WILLNEED = os.POSIX_FADV_WILLNEED


@dataclass(frozen=True, eq=False)
class Sample:
    """One image's tensors by name, each [N, D]; `sample["eva"]` is one of them."""

    key: str
    tensors: dict[str, Tensor]

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    @staticmethod
    def empty(spec: DatasetSpec) -> dict[str, Tensor]:
        """Memory for one sample as it is stored."""
        return {tensor.name: torch.empty(tensor.shape, dtype=tensor.dtype) for tensor in stored_tensors(spec)}


class ShardReader:
    """Reads samples of one shard through its index. Safe to use from several threads.

    By `preadv`, which from the page cache is about as fast as a memory map, from a remote file system takes fewer
    requests, and where the file is truncated meanwhile gives a DataError, where a map kills the process.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.index = ShardIndex.load(index_path(self.path))
        self.spec, self.keys = self.index.spec, self.index.keys
        check_tar_size(self.path, self.index.num_bytes)
        with reading(self.path):
            self._file = FileIO(self.path)
        self._advice_bytes = _readahead_bytes(os.fstat(self._file.fileno()).st_dev)
        self._header, self._relative, self._in_file_order = self._common_header()
        self._scales = [tensor.name for tensor in self._in_file_order if tensor.name.endswith(SCALE_SUFFIX)]

    def __len__(self) -> int:
        return len(self.keys)

    def read(self, i: int) -> Sample:
        """Sample `i`, in the stored dtype (fp8-e4m3 as bf16), in memory of its own."""
        out = Sample.empty(self.spec)
        return Sample(self.read_into(i, out), decode_all(out))

    def read_into(self, i: int, out: Mapping[str, Tensor], skip_tokens: int = 0) -> str:
        """Copy sample `i`, without the first `skip_tokens` tokens of the image, as it is stored; returns its key.

        `out` has a contiguous CPU tensor for each of the `stored_tensors` of the spec that leaves, by its name.
        Raises DataError naming shard and key for a damaged header, a value that is not finite, or a read that fails.
        """
        memory = out if isinstance(out, SampleMemory) else SampleMemory(out)
        start = int(self.index.members["tensors_offset"][i])
        for name, offset in self._relative.items():
            if self.index.tensors[name][i] != start + offset:
                raise DataError(f"{self._where(i)}: the index gives another offset for {name} than the sample's header")
        header = bytearray(len(self._header))
        pieces: list[Any] = [header]
        for tensor in self._in_file_order:
            if skip_tokens and tensor.on_grid:
                pieces.append(bytearray(skip_tokens * (tensor.num_bytes // tensor.shape[0])))
            for piece in memory.pieces[tensor.name]:
                pieces.append(piece.bytes)
                start = self._read_at(start, pieces, i)
                pieces = []
                if header != self._header:
                    parse_header(self._read_header(i), self.spec, self._where(i))  # says what differs, if it can
                    raise DataError(f"{self._where(i)}: its safetensors header is not that of the shard's others")
                if piece.has_nonfinite():
                    check_values({tensor.name: memory[tensor.name]}, self._where(i))
        for name in self._scales:
            check_values({name: memory[name]}, self._where(i))
        return self.keys[i]

    def will_need(self, i: int) -> bool:
        """Have the system read sample `i` into the page cache in the background; False if it is there already."""
        start, size = (int(self.index.members[name][i]) for name in ("tensors_offset", "tensors_size"))
        if self._is_cached(start) and self._is_cached(start + size - 1):
            return False
        for piece in range(start, start + size, self._advice_bytes):
            os.posix_fadvise(self._file.fileno(), piece, min(self._advice_bytes, start + size - piece), _WILLNEED)
        return True

    def meta(self, i: int) -> dict[str, Any]:
        """What came with sample `i`: its caption and whatever else the source had."""
        content = bytearray(int(self.index.members["meta_size"][i]))
        self._read_at(int(self.index.members["meta_offset"][i]), [content], i)
        try:
            return json.loads(content)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{self._where(i)}: its .json is damaged ({error})") from error

    def _where(self, i: int) -> str:
        return f"{self.path}: sample {self.keys[i]}"

    def _common_header(self) -> tuple[bytearray, dict[str, int], list[StoredTensor]]:
        """The header of the first sample that has a sound one; all others must have the same bytes."""
        errors = []
        for i in range(len(self)):
            try:
                content, where = self._read_header(i), self._where(i)
                length, relative = parse_header(content, self.spec, where)
                return content[:length], relative, _in_file_order(self.spec, length, relative, where)
            except DataError as error:
                errors.append(error)
        raise errors[0]

    def _read_header(self, i: int) -> bytearray:
        content = bytearray(min(int(self.index.members["tensors_size"][i]), _MAX_HEADER_BYTES))
        self._read_at(int(self.index.members["tensors_offset"][i]), [content], i)
        return content

    def _read_at(self, offset: int, pieces: list[Any], i: int) -> int:
        """Fill arrays of bytes one after another with the file's from `offset`, for sample `i`; returns their end."""
        end = offset + sum(map(len, pieces))
        while True:
            try:
                count = os.preadv(self._file.fileno(), pieces, offset)
            except OSError as error:
                raise DataError(f"{self._where(i)}: reading failed: {error.strerror}; check the file system") from error
            offset += count
            if offset == end:
                return end
            if count == 0:
                raise DataError(
                    f"{self._where(i)}: the file ends before the sample does (nothing at byte {offset}): it was "
                    "truncated while it was read; copy it again"
                )
            while count >= len(pieces[0]):
                count -= len(pieces.pop(0))
            pieces[0] = memoryview(pieces[0])[count:]

    def _is_cached(self, offset: int) -> bool:
        try:
            return os.preadv(self._file.fileno(), [bytearray(1)], offset, os.RWF_NOWAIT) == 1
        except OSError:  # it would have to wait, or this file system cannot tell
            return False


@cache
def _readahead_bytes(device: int) -> int:
    """How much the system reads ahead of a file on this device; it cuts off advice to read at the same length."""
    number = f"{os.major(device)}:{os.minor(device)}"
    # A file system has an entry of the first kind, a partition of a disk one of the second.
    for setting in (f"/sys/class/bdi/{number}/read_ahead_kb", f"/sys/dev/block/{number}/../queue/read_ahead_kb"):
        with suppress(OSError, ValueError):
            return max(_READAHEAD_BYTES, int(Path(setting).read_text()) << 10)
    return _READAHEAD_BYTES


def _in_file_order(spec: DatasetSpec, length: int, offsets: dict[str, int], where: str) -> list[StoredTensor]:
    """The tensors as they follow each other in a sample's file, after a header of `length` bytes."""
    tensors = sorted(stored_tensors(spec), key=lambda tensor: offsets[tensor.name])
    for tensor in tensors:
        if offsets[tensor.name] != length:
            raise DataError(
                f"{where}: tensor {tensor.name} starts at byte {offsets[tensor.name]} of the sample's file, expected "
                f"{length}: its safetensors header is damaged; write this shard again"
            )
        length += tensor.num_bytes
    return tensors
