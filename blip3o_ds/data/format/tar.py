"""Going through a shard's tar from end to end, reading each byte once: the samples, and the checksum of the whole.

It takes what the writer writes and says where a tar is otherwise; `tarfile` would take a damaged header for the end.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from blip3o_ds.errors import DataError
from blip3o_ds.files import HashingFile, reading

_CHUNK_BYTES = 1 << 20
_MAX_PAX_BYTES = 1 << 16
_REGULAR = (tarfile.REGTYPE, tarfile.AREGTYPE)


@dataclass(frozen=True)
class Member:
    """A sample as the tar holds it: content of its two files, empty for one that is missing, and where they start."""

    key: str
    tensors: bytes = b""
    tensors_offset: int = 0
    meta: bytes = b""
    meta_offset: int = 0


class TarWalk:
    """Iterates over the samples of the tar at `path`; afterwards `num_bytes` and `sha256` are of the whole file.

    A damaged tar ends the iteration, with the reason in `damage`; DataError for a file that cannot be read at all.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.num_bytes = 0
        self.sha256 = ""
        self.damage: str | None = None

    def __iter__(self) -> Iterator[Member]:
        with reading(self.path), open(self.path, "rb") as raw:
            file = HashingFile(raw)
            try:
                yield from _samples(file, self.path.stat().st_size)
            except (DataError, tarfile.HeaderError) as error:
                self.damage = str(error)
            while file.read(_CHUNK_BYTES):
                pass
        self.num_bytes, self.sha256 = file.num_bytes, file.sha256


def _read(file: HashingFile, size: int) -> bytes:
    start = file.num_bytes
    content = file.read(size)
    if len(content) != size:
        raise DataError(f"the file ends at byte {file.num_bytes}, within {size} bytes that begin at {start}")
    return content


def _samples(file: HashingFile, file_bytes: int) -> Iterator[Member]:
    half: Member | None = None  # the .safetensors that waits for its .json
    for name, offset, content in _members(file, file_bytes):
        key, _, suffix = name.partition(".")
        if suffix == "json":
            if half is not None and half.key != key:
                yield half
                half = None
            yield replace(half or Member(key), meta=content, meta_offset=offset)
            half = None
        elif suffix == "safetensors":
            if half is not None:
                yield half
            half = Member(key, content, offset)
        else:
            raise DataError(f"{name!r} is neither a .safetensors nor a .json file")
    if half is not None:
        yield half


def _members(file: HashingFile, file_bytes: int) -> Iterator[tuple[str, int, bytes]]:
    """Name, offset and content of every file in the tar."""
    long_name = None
    while any(block := _read(file, tarfile.BLOCKSIZE)):
        info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        start = file.num_bytes
        name = info.name if long_name is None else long_name
        if not 0 <= info.size <= file_bytes - start:
            raise DataError(f"{name!r} claims {info.size} bytes at byte {start} of {file_bytes}")
        if info.type == tarfile.XHDTYPE and info.size <= _MAX_PAX_BYTES:
            long_name = _pax_path(_read(file, info.size))
        elif info.type in _REGULAR:
            yield name, start, _read(file, info.size)
            long_name = None
        else:
            raise DataError(f"{name!r} is not a regular file (type {info.type!r})")
        _read(file, -info.size % tarfile.BLOCKSIZE)


def _pax_path(content: bytes) -> str | None:
    """The path among pax records, each `LENGTH name=value\\n` with its own length in front."""
    path = None
    while content:
        digits, space, _ = content.partition(b" ")
        length = int(digits) if digits.isdigit() and len(digits) < 6 else 0
        name, equals, value = content[len(digits) + 1 : length - 1].partition(b"=")
        if not (space and equals and content[length - 1 : length] == b"\n"):
            raise DataError("a pax header is damaged")
        if name == b"path":
            path = value.decode("utf-8", "surrogateescape")
        content = content[length:]
    return path
