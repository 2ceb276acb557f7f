"""Reading the files of a dataset behind a URL or a command, with retries and checks.

Every scheme goes through fsspec, and `pipe:` through a subprocess. Whatever fails on the way is tried again; what the
other side refuses is not.
"""

from __future__ import annotations

import asyncio
import logging
import os
import posixpath
import random
import re
import shlex
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import unquote, urlsplit

import fsspec  # type: ignore[import-untyped]  # it has no stubs

from blip3o_ds.errors import DataError
from blip3o_ds.files import HashingFile

logger = logging.getLogger(__name__)

ATTEMPTS = 6
TIMEOUT_SECONDS = 30.0  # without a byte
FIRST_PAUSE_SECONDS = 0.5  # before the second attempt; doubled each time, with jitter so that nodes spread out
TRUSTED_URLS = "BLIP3O_TRUSTED_URLS"  # URLs with spaces between them: datasets that manifests elsewhere may read from
_CHUNK_BYTES = 1 << 20
_PIPE = "pipe:"

_T = TypeVar("_T")


class TransferError(Exception):
    """What arrived is not what was sent; another attempt may succeed."""


def is_remote(location: str | Path) -> bool:
    """Whether a dataset's location is a URL or a pipe, and not a folder."""
    return isinstance(location, str) and ("://" in location or location.startswith(_PIPE))


def linked_location(base: str, of: str) -> str:
    """The folder or URL that the manifest read at `base` names as `of`.

    A manifest may be of a stranger's making, so it cannot send its reader to another host, or from a host to files of
    this machine: a relative path stays on the host of `base`, and a URL must have its scheme and host, or be below a
    URL that the user trusts (`TRUSTED_URLS`, an environment variable). Raises DataError otherwise.
    """
    if is_remote(of):
        host, trusted = _host(of), os.environ.get(TRUSTED_URLS, "").split()
        if (is_remote(base) and host == _host(base)) or any(_is_below(of, url) for url in trusted):
            return of
        raise DataError(
            f"{base}: its manifest reads samples from {of}, which is elsewhere; if you trust that dataset, set the "
            f"environment variable {TRUSTED_URLS}={_one_word(of)}"
        )
    if base.startswith(_PIPE):
        raise DataError(
            f"{base}: its manifest is a split of {of!r}, a relative path that a pipe cannot follow; name the dataset "
            f"by URL in selection.of, and in the environment variable {TRUSTED_URLS}"
        )
    if not is_remote(base):
        return os.path.normpath(os.path.join(base, of))
    path = urlsplit(base).path
    return f"{_host(base)}{posixpath.normpath(posixpath.join('/', path, of))}"  # above the root is the root


def _host(url: str) -> str:
    """`scheme://host`, the latter with credentials and port."""
    try:
        scheme, host = urlsplit(url)[:2]
    except ValueError as error:  # of a host in brackets
        raise DataError(f"{url}: not a URL ({error})") from None
    if not scheme:  # it holds a character that no scheme has
        raise DataError(f"{url}: not a URL")
    return f"{scheme}://{host}"


def _is_below(url: str, parent: str) -> bool:
    url, parent = _one_word(url), parent.rstrip("/")
    parts = urlsplit(url)
    climbs = ".." in unquote(parts.path).split("/") or parts.query or parts.fragment
    return url == parent or (url.startswith(parent + "/") and not climbs)


def _one_word(url: str) -> str:
    """As it stands in the environment variable."""
    return url.replace(" ", "%20")


class RemoteFolder:
    """The files below a URL, or behind a command: `pipe:curl -sf https://host/set/{name}`.

    A command's `{name}` stands for the file's name, quoted for the shell; it must fail with an exit status.
    """

    def __init__(self, location: str) -> None:
        if location.startswith(_PIPE):
            if "{name}" not in location:
                raise DataError(f"{location}: a pipe must say where the file's name goes, as {{name}}")
        elif "::" in re.sub(r"\[.*?\]", "", location):  # which may hold an IPv6 address
            raise DataError(f"{location}: chained file systems (`::`) can run code; give the URL of the dataset itself")
        self._location = location

    def url(self, name: str) -> str:
        if self._location.startswith(_PIPE):
            return self._location.replace("{name}", shlex.quote(name))
        return f"{self._location.rstrip('/')}/{name}"

    def read(self, name: str, check: Callable[[bytes], None] = lambda content: None) -> bytes:
        """A small file whole. `check` raises TransferError for content that another attempt may correct."""

        def attempt() -> bytes:
            content = b"".join(_chunks(self.url(name)))
            check(content)
            return content

        return _with_retries(self.url(name), attempt)

    def download(self, name: str, path: Path, num_bytes: int, sha256: str) -> None:
        """Write a file to `path` and sync it; raises DataError unless it has `num_bytes` and the SHA-256 `sha256`."""

        def attempt() -> None:
            with open(path, "r+b") as raw:
                file = HashingFile(raw)
                for chunk in _chunks(self.url(name)):
                    if file.num_bytes + len(chunk) > num_bytes:
                        raise TransferError(f"found more than the {num_bytes} bytes that the manifest says")
                    file.write(chunk)
                raw.flush()
                os.fsync(raw.fileno())
            if file.num_bytes != num_bytes:
                raise TransferError(f"found {file.num_bytes} bytes, the manifest says {num_bytes}")
            if file.sha256 != sha256:
                raise TransferError(f"found SHA-256 {file.sha256}, the manifest says {sha256}")

        _with_retries(self.url(name), attempt)


def _with_retries(url: str, attempt: Callable[[], _T]) -> _T:
    number, pause = 1, FIRST_PAUSE_SECONDS
    while True:
        try:
            return attempt()
        except (DataError, OSError):  # an OSError is our own disk's: another attempt would not help
            raise
        except Exception as error:  # each backend has its own kinds; the last one is raised as the cause
            message = str(error)
            if number == ATTEMPTS:
                raise DataError(
                    f"{url}: {message} (attempt {number} of {ATTEMPTS}); check the URL and the network, and that the "
                    "files there are those of the manifest beside them"
                ) from error
        logger.warning("%s: %s; trying again in about %.1f s", url, message, pause)
        time.sleep(pause * random.uniform(0.5, 1.5))
        number, pause = number + 1, 2 * pause


def _chunks(url: str) -> Iterator[bytes]:
    try:
        with _open(url) as stream:
            while chunk := stream.read(_CHUNK_BYTES):
                yield chunk
    except (FileNotFoundError, PermissionError, ImportError, TypeError, ValueError) as error:  # of the scheme, too
        raise DataError(
            f"{url}: {str(error) or type(error).__name__}; check the URL and the permissions (s3:// and gs:// need "
            "`pip install blip3o-ds[remote]`)"
        ) from error
    except asyncio.TimeoutError as error:
        raise TransferError(f"no byte for {TIMEOUT_SECONDS:g} s") from error
    except OSError as error:  # of the other side
        raise TransferError(str(error) or type(error).__name__) from error


def _open(url: str) -> AbstractContextManager[Any]:
    scheme = url.partition(":")[0]
    if scheme == "pipe":
        return _open_pipe(url.removeprefix(_PIPE))
    if scheme in ("http", "https"):
        return _open_http(url)
    files = fsspec.get_filesystem_class(scheme)
    return files(**files._get_kwargs_from_urls(url)).open(url, "rb")


@contextmanager
def _open_pipe(command: str) -> Iterator[Any]:
    with subprocess.Popen(command, shell=True, stdout=subprocess.PIPE) as process:
        try:
            yield process.stdout
        except BaseException:
            process.kill()  # nobody reads on
            raise
    if process.returncode:
        raise TransferError(f"the command ended with exit status {process.returncode}")


@contextmanager
def _open_http(url: str) -> Iterator[Any]:
    import aiohttp

    options = {
        "timeout": aiohttp.ClientTimeout(total=None, sock_connect=TIMEOUT_SECONDS, sock_read=TIMEOUT_SECONDS),
        "headers": {"Accept-Encoding": "identity"},
        "raise_for_status": True,
        "trust_env": True,  # for the proxies named there
    }
    files = fsspec.filesystem("http", block_size=0, client_kwargs=options)  # block_size 0: one stream
    try:
        with files.open(url, size=1) as stream:  # any size, or it would be asked for with another request
            yield stream
    except aiohttp.ClientResponseError as error:
        is_garbled = isinstance(error.__cause__, aiohttp.http.HttpProcessingError)
        is_passing = is_garbled or error.status >= 500 or error.status in (408, 425, 429)  # which say "later"
        raise (TransferError if is_passing else PermissionError)(
            f"HTTP status {error.status} {error.message}"
        ) from error
    except aiohttp.ClientPayloadError as error:
        length = stream.r.content_length  # None for a chunked body
        missing = "" if length is None else f"{length - stream.r.content.total_bytes} bytes "
        raise TransferError(f"the connection was closed {missing}before the end") from error
