"""Reading the files of a dataset behind a URL, with retries and checks.

`http(s)://` is read with the standard library, `pipe:` through webdataset, every other scheme (`s3://`, `gs://`, …)
through fsspec. Whatever fails on the way is tried again; what the other side refuses is not.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import logging
import os
import random
import shlex
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, TypeVar

from blip3o_ds.errors import DataError

logger = logging.getLogger(__name__)

ATTEMPTS = 6
TIMEOUT_SECONDS = 30.0  # without a byte
FIRST_PAUSE_SECONDS = 0.5  # before the second attempt; doubled each time, with jitter so that nodes spread out
_CHUNK_BYTES = 1 << 20
_BUSY_STATUS = (408, 425, 429)  # HTTP's ways of saying "later", besides 5xx
_PIPE = "pipe:"

_T = TypeVar("_T")


class TransferError(Exception):
    """What arrived is not what was sent; another attempt may do better."""


def is_remote(location: str | Path) -> bool:
    """Whether a dataset's location is a URL or a pipe, and not a folder."""
    return isinstance(location, str) and ("://" in location or location.startswith(_PIPE))


class RemoteFolder:
    """The files below a URL, or behind a command: `pipe:curl -sf https://host/set/{name}`.

    A command's `{name}` stands for the file's name, quoted for the shell; it must fail with an exit status.
    """

    def __init__(self, location: str) -> None:
        if location.startswith(_PIPE) and "{name}" not in location:
            raise DataError(f"{location}: a pipe must say where the file's name goes, as {{name}}")
        self._location = location

    def url(self, name: str) -> str:
        if self._location.startswith(_PIPE):
            return self._location.replace("{name}", shlex.quote(name))
        return f"{self._location.rstrip('/')}/{name}"

    def read(self, name: str, check: Callable[[bytes], None] = lambda content: None) -> bytes:
        """A small file whole. `check` raises TransferError for content that another attempt may mend."""

        def attempt() -> bytes:
            content = b"".join(_chunks(self.url(name)))
            check(content)
            return content

        return _with_retries(self.url(name), attempt)

    def download(self, name: str, path: Path, num_bytes: int, sha256: str) -> None:
        """Write a file of `num_bytes` to `path` and sync it; raises DataError unless its SHA-256 is `sha256`."""

        def attempt() -> None:
            digest, found = hashlib.sha256(), 0
            with open(path, "r+b") as file:
                for chunk in _chunks(self.url(name)):
                    found += len(chunk)
                    if found > num_bytes:
                        break
                    digest.update(chunk)
                    _write(file, chunk)
                file.flush()
                os.fsync(file.fileno())
            if found != num_bytes:
                more = "more than " if found > num_bytes else ""
                raise TransferError(f"found {more}{min(found, num_bytes)} bytes, the manifest says {num_bytes}")
            if digest.hexdigest() != sha256:
                raise TransferError(f"found SHA-256 {digest.hexdigest()}, the manifest says {sha256}")

        _with_retries(self.url(name), attempt)


def _with_retries(url: str, attempt: Callable[[], _T]) -> _T:
    pause = FIRST_PAUSE_SECONDS
    for number in range(1, ATTEMPTS + 1):
        try:
            return attempt()
        except DataError:
            raise
        except Exception as error:  # each backend has its own kinds; the last one is raised as the cause
            if number == ATTEMPTS:
                raise DataError(
                    f"{url}: {error} (attempt {number} of {ATTEMPTS}); check the URL and the network, and that the "
                    "files there are those of the manifest beside them"
                ) from error
            logger.warning("%s: %s; trying again in about %.1f s", url, error, pause)
            time.sleep(pause * random.uniform(0.5, 1.5))
            pause *= 2
    raise AssertionError("unreachable")


def _chunks(url: str) -> Iterator[bytes]:
    with contextlib.closing(_open(url)) as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            yield chunk
        # http.client ends a body that was cut as if it were whole.
        if isinstance(stream, http.client.HTTPResponse) and stream.length:
            raise TransferError(f"the connection was closed {stream.length} bytes before the end")


def _open(url: str) -> BinaryIO | http.client.HTTPResponse:
    if url.startswith(("http://", "https://")):
        return _open_http(url)
    if url.startswith(_PIPE):
        from webdataset.gopen import gopen

        return gopen(url)
    return _open_fsspec(url)


def _open_http(url: str) -> http.client.HTTPResponse:
    request = urllib.request.Request(url, headers={"User-Agent": "blip3o-ds", "Accept-Encoding": "identity"})
    try:
        return urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code >= 500 or error.code in _BUSY_STATUS:
            raise TransferError(f"HTTP status {error.code} {error.reason}") from error
        raise DataError(f"{url}: HTTP status {error.code} {error.reason}; check the URL and the permissions") from error


def _open_fsspec(url: str) -> BinaryIO:
    import fsspec

    try:
        files, path = fsspec.core.url_to_fs(url)
        return files.open(path, "rb")
    except ImportError as error:
        raise DataError(f"{url}: {error}; `pip install blip3o-ds[remote]` brings what s3:// and gs:// need") from error
    except (FileNotFoundError, PermissionError, ValueError) as error:  # ValueError: no such scheme
        raise DataError(f"{url}: {error or type(error).__name__}; check the URL and the permissions") from error


def _write(file: BinaryIO, chunk: bytes) -> None:
    try:
        file.write(chunk)
    except OSError as error:  # our own disk: another attempt would not help
        raise DataError(
            f"{file.name}: writing failed ({error.strerror}); give data.cache_dir a disk with more room, or lower "
            "data.cache_gb"
        ) from error
