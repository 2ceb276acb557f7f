"""The manifest of a dataset folder, `manifest.json`: the specification, the shards and every tensor's statistics.

It is written last, so a folder with a manifest is complete and one without is not.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from blip3o_ds.data.format.schema import MAKERS, DatasetSpec, check_choice, read_field, read_fields
from blip3o_ds.errors import DataError
from blip3o_ds.files import atomic_write_json, parse_json, read_json

SplitPart = Literal["train", "eval"]


@dataclass(frozen=True)
class Selection:
    """The samples of the dataset `of` whose image hashes below `fraction` (`eval`) or not below it (`train`).

    The image of a sample is that of `DatasetSpec.image_of`, so all views of an image are in one part.
    `of` is a folder or URL; a relative one is relative to the folder of the manifest that says so.
    """

    of: str
    fraction: float
    part: SplitPart

    def __post_init__(self) -> None:
        if not self.of or self.of.startswith("pipe:") or not self.of.isprintable():
            # A manifest is data, perhaps of somebody else's making, and a pipe is a command.
            raise DataError(f"of must be a folder or a URL, not a command, found {self.of[:80]!r}")
        check_choice("part", self.part, SplitPart)
        if not 0 < self.fraction < 1:
            raise DataError(f"fraction must lie between 0 and 1, found {self.fraction!r}")

    def rows(self, images: Sequence[str]) -> np.ndarray:
        """Indices of the samples selected, ascending, int64; `images` has the image of each sample."""
        held_out = key_hashes(images) < np.uint64(int(self.fraction * 2**64))
        return np.flatnonzero(held_out if self.part == "eval" else ~held_out)


def key_hashes(keys: Sequence[str]) -> np.ndarray:
    """A number in [0, 2**64) for every key, uint64: the first 8 bytes of its BLAKE2b digest, little-endian."""
    return _hashes(keys)


def folds_of(images: Sequence[str], folds: int) -> np.ndarray:
    """The fold of every image, in [0, folds), int64: for cross-validation that leaves whole images out.

    It depends on the image's name alone, and not on the side of a split that the image is on. Folds are equal on
    average, so with few images their sizes differ, and some may be empty. Raises DataError for `folds` below 1.
    """
    if folds < 1:
        raise DataError(f"folds must be at least 1, found {folds}")
    return (_hashes(images, b"fold") % np.uint64(folds)).astype(np.int64)


def _hashes(texts: Sequence[str], purpose: bytes = b"") -> np.ndarray:
    """uint64; those for another purpose are independent."""
    digests = (hashlib.blake2b(text.encode(), digest_size=8, person=purpose).digest() for text in texts)
    return np.frombuffer(b"".join(digests), dtype="<u8")


FORMAT_VERSIONS = (1, 2)  # that are read; `DatasetSpec.format_version` is the one that is written
MANIFEST_NAME = "manifest.json"
_SHARD_KINDS = {"name": str, "num_samples": int, "num_bytes": int, "sha256": str}
_SHARD_NAME = re.compile(r"[^.].*\.tar")
SHA256 = re.compile("[0-9a-f]{64}")
_SELECTION_KINDS = {"of": str, "fraction": float, "part": str}
_REMEDY = f"a dataset folder holds one; {MAKERS} make it, and finish one that was interrupted"


@dataclass(frozen=True)
class ShardInfo:
    """One shard in the manifest: file name, samples, bytes and the SHA-256 of the tar."""

    name: str
    num_samples: int
    num_bytes: int
    sha256: str


@dataclass(frozen=True, eq=False)
class ChannelStats:
    """Mean and variance of every channel over all tokens of all samples, of the values as stored."""

    mean: np.ndarray  # [D] float64
    var: np.ndarray  # [D] float64, divided by count
    count: int  # tokens


@dataclass(frozen=True, eq=False)
class Manifest:
    """The table of contents of a dataset folder.

    With a `selection` the folder holds no shards of its own: `shards` are those of the dataset `selection.of` that
    hold samples of the part, with the number of samples selected, and the statistics cover only those samples.
    """

    spec: DatasetSpec
    shards: tuple[ShardInfo, ...]
    stats: dict[str, ChannelStats]  # by tensor
    extra: dict[str, Any]
    selection: Selection | None = None

    @cached_property
    def num_samples(self) -> int:
        return sum(shard.num_samples for shard in self.shards)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of what a reader finds, samples and their order: the same wherever the dataset lies."""
        selected = self.selection and [self.selection.fraction, self.selection.part]
        content = [self.spec.to_dict(), [[info.sha256, info.num_samples] for info in self.shards], selected]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def rows(self, keys: Sequence[str]) -> Sequence[int]:
        """Indices into the `keys` of a shard of the samples that belong to the dataset: all, or those selected."""
        if self.selection is None:
            return range(len(keys))
        return self.selection.rows([self.spec.image_of(key) for key in keys]).tolist()

    @staticmethod
    def load(dataset_dir: str | Path) -> Manifest:
        """Read and check `dataset_dir/manifest.json`; every error is a DataError that names file and field."""
        path = Path(dataset_dir) / MANIFEST_NAME
        return Manifest._from_dict(read_json(path, DataError, _REMEDY), path)

    @staticmethod
    def parse(text: bytes, path: Path | str) -> Manifest:
        """Check the content of a manifest; `path` is the file or URL that errors name."""
        return Manifest._from_dict(parse_json(text, path, DataError, _REMEDY), path)

    @staticmethod
    def _from_dict(content: dict[str, Any], path: Path | str) -> Manifest:
        check_version(read_field(content, "format_version", int, path), path)
        spec = DatasetSpec.from_dict(read_field(content, "spec", dict, path), path)
        stats = read_field(content, "stats", dict, path)
        shards = tuple(_read_shard_info(entry, path) for entry in read_field(content, "shards", list, path))
        num_samples = read_field(content, "num_samples", int, path)
        if (found := sum(shard.num_samples for shard in shards)) != num_samples:
            raise DataError(f"{path}: num_samples is {num_samples}, but the shards' num_samples add up to {found}")
        return Manifest(
            spec=spec,
            shards=shards,
            stats={name: _read_stats(stats, name, num_samples, spec, path) for name in spec.tensors},
            extra=read_field(content, "extra", dict, path),
            selection=_read_selection(content, path),
        )

    def save(self, dataset_dir: str | Path) -> None:
        content = {
            "format_version": self.spec.format_version,
            "spec": self.spec.to_dict(),
            "num_samples": self.num_samples,
            "extra": self.extra,
            **({"selection": asdict(self.selection)} if self.selection else {}),
            "shards": [vars(shard) for shard in self.shards],
            "stats": {
                name: {"count": stats.count, "mean": stats.mean.tolist(), "var": stats.var.tolist()}
                for name, stats in self.stats.items()
            },
        }
        atomic_write_json(Path(dataset_dir) / MANIFEST_NAME, content)


def check_version(version: Any, path: Path | str) -> None:
    """Raise DataError unless this release reads files of the format `version`; `path` is the file."""
    if version not in FORMAT_VERSIONS:
        raise DataError(
            f"{path}: format_version is {version!r}, this release reads {' and '.join(map(str, FORMAT_VERSIONS))}; "
            f"write the dataset again with {MAKERS}, or use the release that wrote it"
        )


def _read_shard_info(entry: Any, path: Path | str) -> ShardInfo:
    info = ShardInfo(**read_fields(entry, _SHARD_KINDS, path, "shards[]"))
    name = info.name
    # Both become names of files here, and of the cache.
    if Path(name).name != name or not name.isprintable() or len(name) >= 200 or not _SHARD_NAME.fullmatch(name):
        raise DataError(f"{path}: shards[].name must be that of a .tar file, without a folder, found {name[:200]!r}")
    if not SHA256.fullmatch(info.sha256):
        raise DataError(f"{path}: shards[].sha256 must be 64 lower-case hexadecimal digits, found {info.sha256[:80]!r}")
    return info


def _read_selection(content: dict[str, Any], path: Path | str) -> Selection | None:
    if "selection" not in content:
        return None
    values = read_fields(content["selection"], _SELECTION_KINDS, path, "selection")
    try:
        return Selection(**values)
    except DataError as error:
        raise DataError(f"{path}: selection: {error}") from error


def _read_stats(
    content: dict[str, Any], name: str, num_samples: int, spec: DatasetSpec, path: Path | str
) -> ChannelStats:
    parent = f"stats.{name}"
    num_tokens, dim = spec.shape(name)
    stats = read_field(content, name, dict, path, "stats")
    mean, var = (_read_channels(stats, field, parent, dim, path) for field in ("mean", "var"))
    count = read_field(stats, "count", int, path, parent)
    if count != num_samples * num_tokens:
        raise DataError(
            f"{path}: {parent}.count is {count} tokens, but {num_samples} samples of {num_tokens} tokens make "
            f"{num_samples * num_tokens}"
        )
    return ChannelStats(mean, var, count)


def _read_channels(content: dict[str, Any], field: str, parent: str, dim: int, path: Path | str) -> np.ndarray:
    values = read_field(content, field, list, path, parent)
    try:
        channels = np.array(values, dtype=np.float64)
    except (TypeError, ValueError, OverflowError) as error:
        raise DataError(f"{path}: field {parent}.{field} must be a list of numbers ({error})") from error
    if channels.shape != (dim,):
        raise DataError(f"{path}: {parent}.{field} holds {channels.size} channels, the spec says {dim}")
    if not np.isfinite(channels).all() or (field == "var" and (channels < 0).any()):
        raise DataError(f"{path}: {parent}.{field} holds values that are not finite, or negative variances")
    return channels
