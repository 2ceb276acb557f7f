"""The index beside a shard, `shard_00000.tar.idx`: where each sample lies in the tar, and the shard's statistics.

It is a safetensors file of int64 offsets, so opening it parses nothing per sample. It is written after the tar, so a
shard without one is incomplete.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from blip3o_ds.data.format.codec import stored_tensors
from blip3o_ds.data.format.manifest import SHA256, check_version
from blip3o_ds.data.format.moments import ChannelMoments, merge_moments, no_moments
from blip3o_ds.data.format.schema import DatasetSpec
from blip3o_ds.data.format.tar import Member
from blip3o_ds.errors import DataError
from blip3o_ds.files import atomic_write_bytes, reading

# All metadata is one entry: safetensors writes several in no fixed order, and equal content must give equal bytes.
_METADATA_KEY = "blip3o_ds_index"
_METADATA = ("format_version", "num_samples", "num_bytes", "sha256", "spec", "digest")
MEMBERS = ("tensors_offset", "tensors_size", "meta_offset", "meta_size")


def index_path(tar: str | Path) -> Path:
    return Path(tar).with_name(f"{Path(tar).name}.idx")


def check_tar_size(path: Path, num_bytes: int) -> None:
    """Raise DataError unless the tar at `path` is there and has `num_bytes`."""
    with reading(path, DataError, "copy the dataset again, whole, or write it again"):
        found = path.stat().st_size
    if found != num_bytes:
        raise DataError(
            f"{path} has {found} bytes, expected {num_bytes}: it is truncated or was replaced; copy it again"
        )


@dataclass(frozen=True, eq=False)
class ShardIndex:
    """Where the samples of one shard lie; all arrays are int64 [S], all offsets count from the start of the tar."""

    spec: DatasetSpec
    keys: list[str]
    num_bytes: int  # of the tar
    sha256: str  # of the tar
    members: dict[str, np.ndarray]  # tensors_offset, tensors_size, meta_offset, meta_size: the two files' contents
    tensors: dict[str, np.ndarray]  # the data of each tensor of a sample, by its name
    moments: dict[str, ChannelMoments]  # by tensor

    def save(self, path: Path) -> None:
        keys = [key.encode() for key in self.keys]
        arrays: dict[str, np.ndarray] = {
            "key_bytes": np.frombuffer(b"".join(keys), dtype=np.uint8),
            "key_offsets": np.cumsum([0, *map(len, keys)], dtype=np.int64),
            **self.members,
            **{f"tensor.{name}": offsets for name, offsets in self.tensors.items()},
        }
        for name, moments in self.moments.items():
            arrays[f"{name}_count"] = np.array([moments.count], dtype=np.int64)
            arrays[f"{name}_mean"] = moments.mean
            arrays[f"{name}_m2"] = moments.m2
        metadata = {
            "format_version": self.spec.format_version,
            "num_samples": len(self.keys),
            "num_bytes": self.num_bytes,
            "sha256": self.sha256,
            "spec": self.spec.to_dict(),
        }
        metadata["digest"] = _digest(metadata, arrays)
        text = json.dumps(metadata, sort_keys=True)
        atomic_write_bytes(path, safetensors.numpy.save(arrays, {_METADATA_KEY: text}))

    @staticmethod
    def load(path: Path) -> ShardIndex:
        """Read and check an index; every error is a DataError that names the file and the field."""
        metadata, arrays = _read(path)
        check_version(metadata.get("format_version"), path)
        if unknown := sorted(set(metadata) - set(_METADATA)):
            raise DataError(f"{path}: field {unknown[0]!r} is unknown; copy or write this shard again")
        # The first indexes had no digest.
        if metadata.get("digest", found := _digest(metadata, arrays)) != found:
            raise DataError(f"{path}: its content does not match its digest; copy or write this shard again")
        spec = DatasetSpec.from_dict(metadata.get("spec"), path)
        try:
            key_bytes = arrays["key_bytes"].tobytes()
            index = ShardIndex(
                spec=spec,
                keys=[key_bytes[start:stop].decode() for start, stop in pairwise(arrays["key_offsets"].tolist())],
                num_bytes=int(metadata["num_bytes"]),
                sha256=str(metadata["sha256"]),
                members={name: arrays[name] for name in MEMBERS},
                tensors={tensor.name: arrays[f"tensor.{tensor.name}"] for tensor in stored_tensors(spec)},
                moments={
                    name: ChannelMoments(int(arrays[f"{name}_count"][0]), arrays[f"{name}_mean"], arrays[f"{name}_m2"])
                    for name in spec.tensors
                },
            )
        except KeyError as error:
            raise DataError(f"{path}: field {error} is missing; write this shard again") from error
        except (TypeError, ValueError, IndexError, OverflowError) as error:
            raise DataError(f"{path}: damaged ({error}); write this shard again") from error
        _check(index, metadata.get("num_samples"), path)
        return index


class IndexBuilder:
    """Collects what an index says of a shard, sample by sample."""

    def __init__(self, spec: DatasetSpec) -> None:
        self.keys: list[str] = []
        self.offsets: dict[str, list[int]] = {name: [] for name in (*MEMBERS, *(t.name for t in stored_tensors(spec)))}
        self.moments = no_moments(spec)  # of the samples whose moments are known
        self._spec = spec.without_views()

    def add(self, member: Member, tensors: Mapping[str, int], moments: Mapping[str, ChannelMoments] | None) -> None:
        """Add a sample and the offsets of `tensors` in its safetensors file; -1 stands for one that is missing."""
        found = {
            "tensors_offset": member.tensors_offset,
            "tensors_size": len(member.tensors),
            "meta_offset": member.meta_offset,
            "meta_size": len(member.meta),
            **{name: member.tensors_offset + offset for name, offset in tensors.items()},
        }
        self.keys.append(member.key)
        for name, offsets in self.offsets.items():
            offsets.append(found.get(name, -1))
        if moments is not None:
            self.moments = merge_moments(self.moments, moments)

    def build(self, num_bytes: int, sha256: str) -> ShardIndex:
        arrays = {name: np.array(offsets, dtype=np.int64) for name, offsets in self.offsets.items()}
        members = {name: arrays.pop(name) for name in MEMBERS}
        return ShardIndex(self._spec, self.keys, num_bytes, sha256, members, arrays, self.moments)


def _read(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    with reading(path, DataError, "its shard is incomplete: copy or write it again"):
        # Not by safetensors' memory map: a file that is truncated under a map kills the process.
        content = path.read_bytes()
    try:
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        metadata = json.loads(header["__metadata__"][_METADATA_KEY])
        if not isinstance(metadata, dict):
            raise ValueError(f"its metadata is a {type(metadata).__name__}")
        return metadata, safetensors.numpy.load(content)
    except (KeyError, TypeError, ValueError, RecursionError, safetensors.SafetensorError) as error:
        raise DataError(f"{path} is not a shard index ({error}); copy or write this shard again") from error


def _digest(metadata: dict[str, Any], arrays: dict[str, np.ndarray]) -> str:
    rest = {name: value for name, value in metadata.items() if name != "digest"}
    digest = hashlib.sha256(json.dumps(rest, sort_keys=True).encode())
    for name in sorted(arrays):
        digest.update(f"{name} {arrays[name].dtype} {arrays[name].shape}".encode())
        digest.update(arrays[name].tobytes())
    return digest.hexdigest()


def _check(index: ShardIndex, num_samples: Any, path: Path) -> None:
    count = len(index.keys)
    if count == 0 or count != num_samples:
        raise DataError(f"{path}: num_samples is {num_samples}, but the index lists {count} keys")
    if len(set(index.keys)) != count:
        twice = next(key for key, times in Counter(index.keys).items() if times > 1)
        raise DataError(f"{path}: key {twice!r} comes twice; `blip3o-ds data repair` leaves the second sample out")
    if not SHA256.fullmatch(index.sha256):
        raise DataError(f"{path}: sha256 must be 64 lower-case hexadecimal digits, found {index.sha256[:80]!r}")
    if not 0 < index.num_bytes < 1 << 63:
        raise DataError(f"{path}: num_bytes is {index.num_bytes}, which no file has")
    for name, values in {**index.members, **index.tensors}.items():
        if values.dtype != np.int64 or values.shape != (count,):
            raise DataError(f"{path}: {name} must be int64 [{count}], found {values.dtype} {values.shape}")
        if values.min() < 0 or values.max() > index.num_bytes:
            raise DataError(f"{path}: {name} points outside the shard's {index.num_bytes} bytes")
    for kind in ("tensors", "meta"):
        ends = index.members[f"{kind}_offset"], index.num_bytes - index.members[f"{kind}_size"]
        if (ends[0] > ends[1]).any():
            raise DataError(f"{path}: {kind}_size reaches outside the shard's {index.num_bytes} bytes")
    for tensor in stored_tensors(index.spec):
        if int(index.tensors[tensor.name].max()) + tensor.num_bytes > index.num_bytes:
            raise DataError(f"{path}: {tensor.name} ends outside the shard's {index.num_bytes} bytes")
    for name, moments in index.moments.items():
        num_tokens, dim = index.spec.shape(name)
        tokens = count * num_tokens
        if moments.count != tokens or moments.mean.shape != (dim,) or moments.m2.shape != (dim,):
            raise DataError(
                f"{path}: the statistics of {name} cover {moments.count} tokens of {moments.mean.size} channels, "
                f"expected {tokens} of {dim}"
            )
        for values in (moments.mean, moments.m2):
            if values.dtype != np.float64 or not np.isfinite(values).all():
                raise DataError(f"{path}: the statistics of {name} are not finite float64 numbers")
