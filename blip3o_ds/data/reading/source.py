"""Where a dataset's files are: a folder, a URL read through the node's cache, or a split of either.

A shard is asked for by its entry in the manifest and comes back as a path on this machine.
"""

from __future__ import annotations

import os
import posixpath
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from blip3o_ds.data.format.manifest import MANIFEST_NAME, Manifest, ShardInfo
from blip3o_ds.data.reading.cache import ShardCache, ShardLease
from blip3o_ds.data.reading.remote import RemoteFolder, is_remote
from blip3o_ds.errors import DataError


@dataclass(frozen=True)
class ShardFile:
    """A tar on this machine; while `lease` is held, the cache keeps it."""

    path: Path
    lease: ShardLease | None = None


class Source(Protocol):
    """The shards of one dataset."""

    def open(self, info: ShardInfo, wait_seconds: float = 0) -> ShardFile:
        """The shard as a local file with its index beside it, fetched first where it is far away.

        Raises CacheFull when `wait_seconds` pass and the cache still has no room for it.
        """

    def keep(self, infos: Sequence[ShardInfo]) -> None:
        """These shards are read now and next: fetch and hold them in the background, let go of all others."""

    def close(self) -> None:
        """End the background work and let go of every shard that `keep` named."""


class Folder:
    """Shards in a folder of a file system; nothing has to be fetched."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def open(self, info: ShardInfo, wait_seconds: float = 0) -> ShardFile:
        return ShardFile(self._path / info.name)

    def keep(self, infos: Sequence[ShardInfo]) -> None:
        pass

    def close(self) -> None:
        pass


class CachedSource:
    """Shards at a URL, each downloaded once on this node."""

    def __init__(self, remote: RemoteFolder, cache: ShardCache) -> None:
        self._remote = remote
        self._cache = cache

    def open(self, info: ShardInfo, wait_seconds: float = 0) -> ShardFile:
        lease = self._cache.get(self._remote, info, wait_seconds=wait_seconds)
        return ShardFile(lease.path, lease)

    def keep(self, infos: Sequence[ShardInfo]) -> None:
        self._cache.keep(self._remote, infos)

    def close(self) -> None:
        self._cache.close()


def open_source(location: str | Path, cache_dir: str | Path | None = None, cache_gb: float = 100.0) -> Source:
    """The shards in a folder or at a URL; a URL's are kept in at most `cache_gb` GiB of `cache_dir`."""
    if is_remote(location):
        return CachedSource(RemoteFolder(str(location)), ShardCache(cache_dir, cache_gb))
    return Folder(Path(location))


def load_manifest(location: str | Path) -> Manifest:
    """The manifest in a folder or at a URL; raises DataError that names the file or URL and the field."""
    if not is_remote(location):
        return Manifest.load(location)
    remote = RemoteFolder(str(location))
    return Manifest.parse(remote.read(MANIFEST_NAME), remote.url(MANIFEST_NAME))


def shards_location(location: str | Path, manifest: Manifest) -> str:
    """The folder or URL that holds the shards of the dataset at `location`: itself, or what it is a split of."""
    if manifest.selection is None:
        return str(location)
    base, of = str(location), manifest.selection.of
    if is_remote(of) or os.path.isabs(of):
        return of
    if base.startswith("pipe:"):
        raise DataError(
            f"{base}: its manifest is a split of {of!r}, a relative path that a pipe cannot follow; name the dataset "
            "by URL in selection.of"
        )
    if is_remote(base):
        scheme, _, rest = base.partition("://")
        return f"{scheme}://{posixpath.normpath(posixpath.join(rest, of))}"
    return os.path.normpath(os.path.join(base, of))
