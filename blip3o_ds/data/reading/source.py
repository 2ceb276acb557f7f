"""Where a dataset's files are: in a folder, behind a URL and read through the node's cache, or in a split's parent.

A shard is requested by its entry in the manifest and returned as a path on this machine.
"""

from __future__ import annotations

import os
import posixpath
from collections.abc import Sequence
from pathlib import Path

from blip3o_ds.data.format.manifest import MANIFEST_NAME, Manifest, ShardInfo
from blip3o_ds.data.reading.cache import Prefetcher, ShardCache, ShardLease
from blip3o_ds.data.reading.remote import RemoteFolder, is_remote
from blip3o_ds.errors import DataError


class ShardFiles:
    """The shards in a folder, or at a URL and kept in at most `cache_gb` GiB of `cache_dir` (see `ShardCache`)."""

    def __init__(self, location: str | Path, cache_dir: str | Path | None = None, cache_gb: float = 100.0) -> None:
        self._folder = Path(location)
        self._remote: RemoteFolder | None = None
        if is_remote(location):
            self._remote = RemoteFolder(str(location))
            self._cache = ShardCache(cache_dir, cache_gb)
            self._prefetcher = Prefetcher(self._cache, self._remote)

    def open(self, info: ShardInfo, wait_seconds: float = 0) -> ShardLease:
        """The shard as a local file with its index beside it, fetched first by `ShardCache.get` if it is at a URL."""
        if self._remote is None:
            return ShardLease(self._folder / info.name)
        return self._cache.get(self._remote, info, wait_seconds=wait_seconds)

    def keep(self, infos: Sequence[ShardInfo]) -> None:
        """These shards are read now and next: fetch and hold them in the background, and release all others."""
        if self._remote is not None:
            self._prefetcher.want(infos)

    def close(self) -> None:
        if self._remote is not None:
            self._prefetcher.close()


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
