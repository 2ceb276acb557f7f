"""Pictures inside Debian packages: fetched with apt-get, unpacked without installing, and listed with a loader each.

It needs no root and changes nothing on the system. Qt resource files (.rcc) are opened like folders.
"""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from blip3o_ds.encoders.images import IMAGE_SUFFIXES
from blip3o_ds.errors import DataError

_RCC_ZLIB, _RCC_FOLDER, _RCC_ZSTD = 1, 2, 4  # flags of a node


@dataclass(frozen=True)
class Picture:
    """An encoded picture in a package; `path` is inside the package, or inside one of its Qt resource files."""

    package: str
    version: str
    path: str
    read: Callable[[], bytes]


def fetch_package(package: str, folder: Path) -> tuple[str, Path]:
    """Download a Debian package into `folder` and unpack it there; returns its version and the unpacked root.

    Raises DataError, which names the package, where it cannot be had or opened.
    """
    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        raise DataError(
            f"{package}: the photographs come in Debian packages; apt-get and dpkg-deb are not on this system"
        )
    download = folder / f"{package}.download"
    download.mkdir(parents=True)
    # As the user who runs it: apt-get's own user may not write into this folder.
    _run(["apt-get", "download", "-q", "-o", "APT::Sandbox::User=root", package], download, package)
    files = list(download.glob("*.deb"))
    if len(files) != 1:
        raise DataError(f"{package}: expected one .deb from apt-get download, found {len(files)}; run apt-get update")
    version = _run(["dpkg-deb", "-f", str(files[0]), "Version"], download, package).strip()
    root = folder / package
    _run(["dpkg-deb", "-x", str(files[0]), str(root)], download, package)
    shutil.rmtree(download)
    return version, root


def _run(command: list[str], folder: Path, package: str) -> str:
    environment = {**os.environ, "LC_ALL": "C"}
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if result.returncode:
        lines = [line for line in result.stderr.splitlines() if line.startswith(("E:", "dpkg-deb:"))]
        raise DataError(
            f"the Debian package {package} could not be fetched: {' '.join(lines) or result.stderr.strip()} "
            f"(`{' '.join(command[:2])}`). Check that the package mirror can be reached and run `apt-get update`"
        )
    return result.stdout


def pictures_in(package: str, version: str, root: Path) -> Iterator[Picture]:
    """The pictures of an unpacked package by their suffix, in the order of their paths; links are not followed."""
    for path in sorted(root.rglob("*")):
        if path.is_symlink() or not path.is_file():
            continue
        name = path.relative_to(root).as_posix()
        if path.suffix == ".rcc":
            content = path.read_bytes()
            for inner, member in sorted(read_rcc(content, f"{package}:{name}").items()):
                if _is_picture(inner):
                    yield Picture(package, version, inner, member)
        elif _is_picture(name):
            yield Picture(package, version, name, path.read_bytes)


def _is_picture(name: str) -> bool:
    return name.rpartition(".")[2].lower() in IMAGE_SUFFIXES


def read_rcc(content: bytes, source: str) -> dict[str, Callable[[], bytes]]:
    """The files of a Qt resource file by path, as functions that return their bytes.

    Behind the header are a tree of nodes (14 bytes each, 22 from version 2 on), names in UTF-16, and the data; Qt
    documents the format in its resource compiler. Raises DataError for a file that is none; reading a member raises it
    for zstd.
    """
    view = memoryview(content)
    files: dict[str, Callable[[], bytes]] = {}
    try:
        magic, version, tree, data, names = struct.unpack_from(">4s4I", view)
        if magic != b"qres":
            raise ValueError(f"it begins with {magic!r}, expected b'qres'")
        node_bytes = 14 if version < 2 else 22
        folders = [(0, "")]  # the number of its node, and its path; the root has no name
        while folders:
            number, prefix = folders.pop()
            count, first = struct.unpack_from(">II", view, tree + number * node_bytes + 6)
            for child in range(first, first + count):
                name_at, flags, _, offset = struct.unpack_from(">IHII", view, tree + child * node_bytes)
                (length,) = struct.unpack_from(">H", view, names + name_at)  # a hash of 4 bytes follows
                path = prefix + view[names + name_at + 6 :][: 2 * length].tobytes().decode("utf-16-be")
                if flags & _RCC_FOLDER:
                    folders.append((child, path + "/"))
                    continue
                (size,) = struct.unpack_from(">I", view, data + offset)
                files[path] = partial(_rcc_member, view[data + offset + 4 :][:size], flags, f"{source}:{path}")
    except (struct.error, ValueError) as error:
        raise DataError(f"{source}: not a readable Qt resource file ({error}); fetch the package again") from error
    return files


def _rcc_member(content: memoryview, flags: int, source: str) -> bytes:
    if flags & _RCC_ZSTD:
        raise DataError(f"{source}: compressed with zstd; expected zlib or no compression, as in Debian 12")
    return zlib.decompress(content[4:]) if flags & _RCC_ZLIB else content.tobytes()  # the size comes first
