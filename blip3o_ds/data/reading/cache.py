"""The shards of remote datasets on this node: downloaded once, whichever process asks, and kept within a bound.

A shard is filed under its checksum, so datasets that share shards share their copies. Unlike fsspec's own caches, this
one has a bound that all processes of the node share, and spares the shards in use. It must be on a disk of this node.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import tempfile
import threading
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from blip3o_ds.data.format.index import ShardIndex, index_path
from blip3o_ds.data.format.manifest import ShardInfo
from blip3o_ds.data.reading.remote import RemoteFolder, TransferError
from blip3o_ds.errors import DataError
from blip3o_ds.files import FileLock, atomic_write_bytes, fsync_dir

logger = logging.getLogger(__name__)

_GIB = 1 << 30
_DOWNLOADS = 4  # at a time, in each process
_PREFETCH_SHARE = 0.9  # of the bound; the rest stays free for what is needed at once
_POLL_SECONDS = 0.2
_RETRY_SECONDS = 1.0  # between looks whether there is room to read ahead
_LOCKS = ("in_use.lock", "fetch.lock")
_SUBFOLDER = "blip3o-ds-shards"
_DIGITS = 32  # of a shard's SHA-256, for the name of its folder
_FOLDER_NAME = re.compile(f"[0-9a-f]{{{_DIGITS}}}")


class CacheFull(DataError):
    """No room within the bound: every shard in the cache is in use."""


class ShardLease(NamedTuple):
    """A shard on this machine; one in the cache is not evicted until `close`, or until nobody refers to this."""

    path: Path
    lock: FileLock | None = None

    def close(self) -> None:
        if self.lock is not None:
            self.lock.release()


class ShardCache:
    """A folder of at most `cache_gb` GiB of shards, shared by the processes of a node.

    `cache_dir` defaults to a folder of the user's in the system's temporary folder. When room is needed, the shards
    that were least recently asked for and that no process holds a lease on are removed; they are in a subfolder of
    their own, as the user may keep other things in `cache_dir`.
    """

    def __init__(self, cache_dir: str | Path | None, cache_gb: float) -> None:
        self._dir = Path(cache_dir or Path(tempfile.gettempdir()) / f"blip3o-ds-cache-{os.getuid()}") / _SUBFOLDER
        self._bound = int(cache_gb * _GIB)
        self._dir.mkdir(parents=True, exist_ok=True)

    def get(self, remote: RemoteFolder, info: ShardInfo, *, share: float = 1.0, wait_seconds: float = 0) -> ShardLease:
        """The shard with its index beside it, downloaded unless it is here.

        Uses `share` of the bound; waits `wait_seconds` for other shards to go out of use before it raises CacheFull.
        Raises DataError that names the URL for a download that fails for good.
        """
        folder = self._dir / info.sha256[:_DIGITS]
        folder.mkdir(exist_ok=True)
        path = folder / info.name
        lease = ShardLease(path, FileLock(folder / "in_use.lock", shared=True))
        if not _is_complete(path, info):
            with FileLock(folder / "fetch.lock"):
                if not _is_complete(path, info):  # another process may have been faster
                    self._fetch(remote, info, path, share, time.monotonic() + wait_seconds)
        os.utime(path)
        return lease

    def _fetch(self, remote: RemoteFolder, info: ShardInfo, path: Path, share: float, deadline: float) -> None:
        part, index_part = (path.with_name(f"{path.name}{suffix}") for suffix in (".part", ".idx.part"))
        try:
            self._reserve(part, info.num_bytes, share, deadline)
            index = remote.read(index_path(path).name, lambda content: _check_index(content, index_part, info))
            self._reserve(index_part, len(index), share, deadline)
            logger.info("downloading %s (%.2f GiB)", remote.url(info.name), info.num_bytes / _GIB)
            remote.download(info.name, part, info.num_bytes, info.sha256)
            atomic_write_bytes(index_path(path), index)
            os.replace(part, path)
            fsync_dir(path.parent)
        except OSError as error:
            raise DataError(
                f"{path}: cannot be written ({error}); give data.cache_dir a disk with more room, or lower "
                "data.cache_gb"
            ) from error
        finally:
            index_part.unlink(missing_ok=True)
            part.unlink(missing_ok=True)

    def _reserve(self, part: Path, num_bytes: int, share: float, deadline: float) -> None:
        """Make `part` with its final size, which counts against the bound from now on, after evicting for it."""
        bound = int(self._bound * share)
        while True:
            with FileLock(self._dir / "cache.lock"):
                in_use = self._make_room(bound - num_bytes)
                if in_use <= bound - num_bytes:
                    with open(part, "wb") as file:
                        file.truncate(num_bytes)
                    return
            if time.monotonic() >= deadline:
                raise CacheFull(
                    f"{self._dir}: {in_use / _GIB:.3g} GiB of shards are in use, and {part.stem} needs "
                    f"{num_bytes / _GIB:.3g} GiB of the {self._bound / _GIB:.3g} GiB that data.cache_gb allows; raise "
                    "it, or lower data.window_shards"
                )
            time.sleep(_POLL_SECONDS)

    def _make_room(self, wanted: int) -> int:
        """Remove shards that nobody uses, least recently used first, until `wanted` bytes remain; what does remain."""
        shards = [_files(folder) for folder in self._dir.iterdir() if _FOLDER_NAME.fullmatch(folder.name)]
        total = sum(map(_num_bytes, shards))
        for files in sorted(filter(None, shards), key=lambda files: max(found.st_mtime for found in files.values())):
            if total <= wanted:
                break
            folder = next(iter(files)).parent
            with contextlib.suppress(BlockingIOError), FileLock(folder / "in_use.lock", wait=False):
                for path in files:
                    path.unlink(missing_ok=True)
                logger.info("evicted %s (%.2f GiB)", folder, _num_bytes(files) / _GIB)
                total -= _num_bytes(files)
        return total


def _files(folder: Path) -> dict[Path, os.stat_result]:
    files = {}
    for path in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):  # a download that just ended
            if path.name not in _LOCKS:
                files[path] = path.stat()
    return files


def _num_bytes(files: dict[Path, os.stat_result]) -> int:
    return sum(found.st_size for found in files.values())


def _check_index(content: bytes, part: Path, info: ShardInfo) -> None:
    part.write_bytes(content)
    try:
        index = ShardIndex.load(part)
    except DataError as error:
        raise TransferError(f"damaged ({error})") from error
    if (index.sha256, index.num_bytes) != (info.sha256, info.num_bytes):
        raise TransferError(f"this is the index of another shard than the manifest's {info.name}")


def _is_complete(path: Path, info: ShardInfo) -> bool:
    try:
        return path.stat().st_size == info.num_bytes and index_path(path).exists()
    except FileNotFoundError:
        return False


class Prefetcher:
    """Threads that download the shards wanted now and next, in order, and hold a lease on each until it is not."""

    def __init__(self, cache: ShardCache, remote: RemoteFolder) -> None:
        self._cache = cache
        self._remote = remote
        self._wanted: dict[str, ShardInfo] = {}
        self._held: dict[str, ShardLease] = {}
        self._busy: set[str] = set()
        self._queue: deque[ShardInfo] = deque()
        self._changed = threading.Condition()
        self._threads: list[threading.Thread] = []
        self._closed = False

    def want(self, infos: Sequence[ShardInfo]) -> None:
        with self._changed:
            wanted = {info.sha256: info for info in infos}
            if self._closed or list(wanted) == list(self._wanted):
                return
            self._wanted = wanted
            for digest in self._held.keys() - wanted.keys():
                self._held.pop(digest).close()
            here = self._held.keys() | self._busy
            self._queue = deque(info for digest, info in wanted.items() if digest not in here)
            if self._queue and not self._threads:
                # Daemons: a program that ends does not wait for a download, and a part file is no shard.
                self._threads = [threading.Thread(target=self._run, daemon=True) for _ in range(_DOWNLOADS)]
                for thread in self._threads:
                    thread.start()
            self._changed.notify_all()

    def close(self) -> None:
        """End the downloads after the ones under way and give up the leases."""
        with self._changed:
            self._closed = True
            self._queue.clear()
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()
        for lease in self._held.values():
            lease.close()
        self._held.clear()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queue or self._closed)
                if self._closed:
                    return
                info = self._queue.popleft()
                self._busy.add(info.sha256)
            lease, is_full = None, False
            try:
                lease = self._cache.get(self._remote, info, share=_PREFETCH_SHARE)
            except CacheFull:
                is_full = True
            except DataError as error:
                logger.warning("reading ahead failed, and is tried again when the shard is needed: %s", error)
            with self._changed:
                self._busy.discard(info.sha256)
                wanted = info.sha256 in self._wanted and not self._closed
                if lease is not None and wanted:
                    self._held[info.sha256] = lease
                elif lease is not None:
                    lease.close()
                elif is_full and wanted:
                    self._queue.appendleft(info)
                    self._changed.wait(_RETRY_SECONDS)
