"""What a dataset folder says about itself: the specification of its samples, its shards, its channel statistics.

All of it lives in `manifest.json`, written last, so a folder with a manifest is complete and one without is not.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from blip3o_ds.data.format.selection import Selection
from blip3o_ds.errors import DataError
from blip3o_ds.files import atomic_write_json

TokenLayout = Literal["patch_only", "cls_patch"]
StorageDType = Literal["bf16", "fp16", "fp32", "fp8-e4m3"]

FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"
_MAKERS = "`blip3o-ds data convert SRC DST`, `data extract IMAGES DST` or `data demo DST`"


@dataclass(frozen=True)
class DatasetSpec:
    """What every sample of a dataset looks like: `eva [num_tokens, eva_dim]` and `clip [num_tokens, clip_dim]`.

    `num_tokens` includes the CLS token of the layout `cls_patch`, which is token 0; the patches fill a square grid.
    """

    num_tokens: int
    token_layout: TokenLayout
    eva_dim: int
    clip_dim: int
    dtype: StorageDType
    condition_encoder: str
    target_encoder: str

    def __post_init__(self) -> None:
        if self.token_layout not in get_args(TokenLayout):
            raise DataError(_not_one_of("token_layout", self.token_layout, TokenLayout))
        if self.dtype not in get_args(StorageDType):
            raise DataError(_not_one_of("dtype", self.dtype, StorageDType))
        for name in ("num_tokens", "eva_dim", "clip_dim"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise DataError(f"{name} must be a positive integer, found {value!r}")
        patches = self.num_tokens - self.num_cls_tokens
        if patches < 1 or math.isqrt(patches) ** 2 != patches:
            raise DataError(
                f"num_tokens {self.num_tokens} with token_layout {self.token_layout} leaves {patches} patches, "
                "which fill no square grid; patch_only wants g*g tokens, cls_patch g*g+1"
            )

    @property
    def num_cls_tokens(self) -> int:
        return 1 if self.token_layout == "cls_patch" else 0

    @property
    def grid_size(self) -> int:
        """Patches along one side of the grid."""
        return math.isqrt(self.num_tokens - self.num_cls_tokens)

    def viewed_as(self, token_layout: TokenLayout | None) -> DatasetSpec:
        """This specification with its samples read as `token_layout`; a CLS token can be dropped, never invented."""
        if token_layout is None or token_layout == self.token_layout:
            return self
        if token_layout == "cls_patch":
            raise DataError(
                f"the samples hold {self.num_tokens} patch tokens and no CLS token, so they cannot be read as "
                "cls_patch; choose patch_only, or extract the embeddings again with the CLS token"
            )
        return replace(self, token_layout=token_layout, num_tokens=self.num_tokens - 1)

    def differences(self, other: DatasetSpec) -> str:
        """The fields in which two specifications differ, as `name: mine != other's`; empty when equal."""
        pairs = ((f.name, getattr(self, f.name), getattr(other, f.name)) for f in fields(self))
        return ", ".join(f"{name}: {mine!r} != {theirs!r}" for name, mine, theirs in pairs if mine != theirs)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_dict(content: Any, source: Path | str) -> DatasetSpec:
        """Read a specification out of JSON; `source` is the file that errors name."""
        kinds = {f.name: int if f.type == "int" else str for f in fields(DatasetSpec)}
        values = {name: _field(content, name, kind, source, "spec") for name, kind in kinds.items()}
        try:
            return DatasetSpec(**values)
        except DataError as error:
            raise DataError(f"{source}: spec: {error}") from error


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
    hold samples of the part, with the number of samples selected, and the statistics are of those samples alone.
    """

    spec: DatasetSpec
    shards: tuple[ShardInfo, ...]
    eva_stats: ChannelStats
    clip_stats: ChannelStats
    extra: dict[str, Any]
    selection: Selection | None = None

    @cached_property
    def num_samples(self) -> int:
        return sum(shard.num_samples for shard in self.shards)

    @staticmethod
    def load(dataset_dir: str | Path) -> Manifest:
        """Read and check `dataset_dir/manifest.json`; every fault is a DataError that names file and field."""
        path = Path(dataset_dir) / MANIFEST_NAME
        return Manifest.parse(_read(path), path)

    @staticmethod
    def parse(text: bytes, path: Path | str) -> Manifest:
        """Check the content of a manifest; `path` is the file or URL that errors name."""
        content = _parse_json(text, path)
        version = _field(content, "format_version", int, path)
        if version != FORMAT_VERSION:
            raise DataError(
                f"{path}: format_version is {version}, this version reads {FORMAT_VERSION}; "
                f"write the dataset again with {_MAKERS}, or use the version that wrote it"
            )
        spec = DatasetSpec.from_dict(_field(content, "spec", dict, path), path)
        stats = _field(content, "stats", dict, path)
        manifest = Manifest(
            spec=spec,
            shards=tuple(_read_shard_info(entry, path) for entry in _field(content, "shards", list, path)),
            eva_stats=_read_stats(stats, "eva", spec.eva_dim, path),
            clip_stats=_read_stats(stats, "clip", spec.clip_dim, path),
            extra=_field(content, "extra", dict, path),
            selection=_read_selection(content, path),
        )
        _check_counts(manifest, _field(content, "num_samples", int, path), path)
        return manifest

    def save(self, dataset_dir: str | Path) -> None:
        """Write `dataset_dir/manifest.json` in one step."""
        content = {
            "format_version": FORMAT_VERSION,
            "spec": self.spec.to_dict(),
            "num_samples": self.num_samples,
            "extra": self.extra,
            **({"selection": asdict(self.selection)} if self.selection else {}),
            "shards": [vars(shard) for shard in self.shards],
            "stats": {"eva": _stats_to_dict(self.eva_stats), "clip": _stats_to_dict(self.clip_stats)},
        }
        atomic_write_json(Path(dataset_dir) / MANIFEST_NAME, content)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise DataError(
            f"{path} is missing: this is no dataset folder, or writing it was interrupted; {_MAKERS} make one"
        ) from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error


def _parse_json(text: bytes, path: Path | str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not JSON ({error}); write the dataset again with {_MAKERS}") from error


def _field(content: Any, name: str, kind: type, path: Path | str, parent: str = "") -> Any:
    label = f"{parent}.{name}" if parent else name
    if not isinstance(content, dict):
        raise DataError(f"{path}: {parent or 'the file'} must be a JSON object, found {type(content).__name__}")
    if name not in content:
        raise DataError(f"{path}: field {label} is missing; write the dataset again with {_MAKERS}")
    value = content[name]
    if not isinstance(value, kind) or (kind is int and (isinstance(value, bool) or not 0 <= value < 1 << 63)):
        expected = "non-negative integer" if kind is int else kind.__name__
        raise DataError(f"{path}: field {label} must be a {expected}, found {str(value)[:80]!r}")
    return value


def _read_shard_info(entry: Any, path: Path | str) -> ShardInfo:
    kinds = {"name": str, "num_samples": int, "num_bytes": int, "sha256": str}
    info = ShardInfo(**{name: _field(entry, name, kind, path, "shards[]") for name, kind in kinds.items()})
    if not _is_file_name(info.name):
        raise DataError(f"{path}: shards[].name must be a file name without a folder, found {info.name!r}")
    return info


def _is_file_name(name: str) -> bool:
    return Path(name).name == name and name.isprintable() and name not in ("", "..") and len(name) < 200


def _read_selection(content: dict[str, Any], path: Path | str) -> Selection | None:
    if "selection" not in content:
        return None
    entry = _field(content, "selection", dict, path)
    kinds = {"of": str, "fraction": float, "part": str}
    values = {name: _field(entry, name, kind, path, "selection") for name, kind in kinds.items()}
    try:
        return Selection(**values)
    except DataError as error:
        raise DataError(f"{path}: selection: {error}") from error


def _read_stats(stats: dict[str, Any], side: str, dim: int, path: Path | str) -> ChannelStats:
    content = _field(stats, side, dict, path, "stats")
    count = _field(content, "count", int, path, f"stats.{side}")
    mean = _read_channels(content, "mean", side, dim, path)
    var = _read_channels(content, "var", side, dim, path)
    return ChannelStats(mean=mean, var=var, count=count)


def _read_channels(content: dict[str, Any], name: str, side: str, dim: int, path: Path | str) -> np.ndarray:
    values = _field(content, name, list, path, f"stats.{side}")
    try:
        channels = np.array(values, dtype=np.float64)
    except (TypeError, ValueError, OverflowError) as error:
        raise DataError(f"{path}: field stats.{side}.{name} must be a list of numbers ({error})") from error
    if channels.shape != (dim,):
        raise DataError(f"{path}: stats.{side}.{name} holds {channels.size} channels, spec.{side}_dim is {dim}")
    if not np.isfinite(channels).all() or (name == "var" and (channels < 0).any()):
        raise DataError(f"{path}: stats.{side}.{name} holds values that are not finite, or negative variances")
    return channels


def _check_counts(manifest: Manifest, num_samples: int, path: Path | str) -> None:
    if manifest.num_samples != num_samples:
        raise DataError(
            f"{path}: num_samples is {num_samples}, but the shards' num_samples add up to {manifest.num_samples}"
        )
    expected = num_samples * manifest.spec.num_tokens
    for side, stats in (("eva", manifest.eva_stats), ("clip", manifest.clip_stats)):
        if stats.count != expected:
            raise DataError(
                f"{path}: stats.{side}.count is {stats.count} tokens, but {num_samples} samples of "
                f"{manifest.spec.num_tokens} tokens make {expected}"
            )


def _stats_to_dict(stats: ChannelStats) -> dict[str, Any]:
    return {"count": stats.count, "mean": stats.mean.tolist(), "var": stats.var.tolist()}


def _not_one_of(name: str, value: object, choices: Any) -> str:
    return f"{name} must be one of {', '.join(get_args(choices))}, found {value!r}"
