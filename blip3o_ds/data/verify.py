"""Looking at a dataset without training on it: `verify` reads every byte, `stats` and `inspect` only what they show.

`verify` goes by the tar itself, walked with `tarfile`, and so checks the index as well as the data. All results can be
written as JSON.
"""

from __future__ import annotations

import json
import math
import tarfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from blip3o_ds.data.codec import decode, has_nonfinite, parse_header, stored_tensors
from blip3o_ds.data.index import ShardIndex, index_path
from blip3o_ds.data.moments import ChannelMoments
from blip3o_ds.data.remote import is_remote
from blip3o_ds.data.schema import ChannelStats, DatasetSpec, Manifest, ShardInfo
from blip3o_ds.data.shards import EmbeddingDataset
from blip3o_ds.data.source import load_manifest, open_source, shards_location
from blip3o_ds.data.writer import shard_paths
from blip3o_ds.errors import DataError
from blip3o_ds.files import sha256_file

_SIDES = ("eva", "clip")
_FIRST_KEYS = 10


@dataclass
class VerifyReport:
    """What `verify` found; `problems` is empty for a sound dataset. Counts are of what could be read."""

    problems: list[str] = field(default_factory=list)
    num_shards: int = 0
    num_samples: int = 0
    num_bytes: int = 0

    @property
    def ok(self) -> bool:
        return not self.problems

    def to_dict(self) -> dict[str, Any]:
        return {"ok": self.ok, **asdict(self)}


def verify(dataset_dir: str | Path) -> VerifyReport:
    """Check a dataset whole: checksums, sizes, index against tar, shapes, values, keys and statistics.

    Goes on after a problem, so the report lists all of them, each with its file and key.
    """
    report = VerifyReport()
    try:
        manifest = load_manifest(dataset_dir)
        source = open_source(shards_location(dataset_dir, manifest))
    except DataError as error:
        report.problems.append(str(error))
        return report
    seen: dict[str, str] = {}
    moments = _no_moments(manifest.spec)
    for info in manifest.shards:
        try:
            file = source.open(info)
        except DataError as error:  # of a URL
            report.problems.append(str(error))
            continue
        _verify_shard(file.path, info, manifest, report, seen, moments)
    report.problems += _unlisted(dataset_dir, manifest)
    if report.ok:  # a missing or damaged sample would show here once more
        for side, stats in (("eva", manifest.eva_stats), ("clip", manifest.clip_stats)):
            _compare_stats(f"{dataset_dir}: manifest statistics of {side}", stats, moments[side], report)
    return report


def stats(dataset_dir: str | Path) -> dict[str, Any]:
    """Counts, sizes and statistics of a dataset, from its manifest alone.

    Per side: `mean` over channels, `std_min`, `std_median`, `std_max` over channels, and `rms_token_norm`, the root of
    the mean squared L2 norm of a token.
    """
    manifest = load_manifest(dataset_dir)
    spec = manifest.spec
    return {
        "samples": manifest.num_samples,
        "tokens": manifest.num_samples * spec.num_tokens,
        "shards": len(manifest.shards),
        "bytes": sum(info.num_bytes for info in manifest.shards),
        **spec.to_dict(),
        "eva": _summary(manifest.eva_stats),
        "clip": _summary(manifest.clip_stats),
        **({"selection": asdict(manifest.selection)} if manifest.selection else {}),
        "extra": manifest.extra,
    }


def inspect(dataset_dir: str | Path, key: str | None = None) -> dict[str, Any]:
    """The specification and first keys of a dataset; or, with `key`, that sample's shapes, norms and metadata."""
    dataset = EmbeddingDataset(dataset_dir)
    if key is None:
        return {
            "spec": dataset.spec.to_dict(),
            **({"selection": asdict(dataset.manifest.selection)} if dataset.manifest.selection else {}),
            "samples": len(dataset),
            "shards": [asdict(info) for info in dataset.manifest.shards],
            "first_keys": [dataset.key(0, i) for i in range(min(_FIRST_KEYS, dataset.shard_sizes[0]))],
        }
    shard, index = _find(dataset, key)
    sample = dataset.read(shard, index)
    return {
        "key": key,
        "shard": dataset.manifest.shards[shard].name,
        "index": index,
        "eva": _describe(sample.eva),
        "clip": _describe(sample.clip),
        "meta": dataset.meta(shard, index),
    }


def _verify_shard(
    path: Path,
    info: ShardInfo,
    manifest: Manifest,
    report: VerifyReport,
    seen: dict[str, str],
    moments: dict[str, ChannelMoments],
) -> None:
    problems, spec = report.problems, manifest.spec
    if not path.is_file():
        problems.append(f"{path}: listed in the manifest, but missing; copy the dataset again")
        return
    size = path.stat().st_size
    if size != info.num_bytes:
        problems.append(f"{path}: {size} bytes, the manifest says {info.num_bytes}; copy or write it again")
    elif sha256_file(path) != info.sha256:
        problems.append(f"{path}: its SHA-256 is not the manifest's; copy or write it again")
    report.num_shards += 1
    report.num_bytes += size
    index = _verify_index(path, info, manifest, problems)
    found = _no_moments(spec)  # of the whole shard, as its index has them; `moments` are of the samples selected
    keys = []
    try:
        for number, member in enumerate(_walk(path)):
            keys.append(member.key)
            if member.key in seen:
                problems.append(f"{path}: key {member.key!r} appears in {seen[member.key]} as well")
            seen[member.key] = path.name
            of_sample = _verify_sample(path, member, number, spec, index, problems)
            found = {side: found[side].merge(of_sample[side]) for side in _SIDES}
            if manifest.selection is None or manifest.selection.rows([member.key]).size:
                moments.update({side: moments[side].merge(of_sample[side]) for side in _SIDES})
    except (tarfile.TarError, EOFError, DataError) as error:
        problems.append(f"{path}: the tar cannot be read after {len(keys)} samples ({error})")
    selected = range(len(keys)) if manifest.selection is None else manifest.selection.rows(keys)
    report.num_samples += len(selected)
    if len(selected) != info.num_samples:
        problems.append(f"{path}: holds {len(selected)} samples, the manifest says {info.num_samples}")
    if index is not None and keys != list(index.keys):
        problems.append(f"{path}: its keys are not those of its index; write the shard again")
    for side in _SIDES:
        if index is not None and found[side].count == getattr(index, f"{side}_moments").count:
            stored: ChannelMoments = getattr(index, f"{side}_moments")
            _compare_stats(f"{index_path(path)}: statistics of {side}", stored.to_stats(), found[side], report)


def _no_moments(spec: DatasetSpec) -> dict[str, ChannelMoments]:
    return {"eva": ChannelMoments.empty(spec.eva_dim), "clip": ChannelMoments.empty(spec.clip_dim)}


def _unlisted(location: str | Path, manifest: Manifest) -> list[str]:
    if is_remote(location) or manifest.selection is not None:
        return []
    listed = {info.name for info in manifest.shards}
    return [
        f"{path}: not listed in the manifest; remove it, or repeat the command that wrote it"
        for path in shard_paths(Path(location))
        if path.name not in listed
    ]


def _verify_index(path: Path, info: ShardInfo, manifest: Manifest, problems: list[str]) -> ShardIndex | None:
    try:
        index = ShardIndex.load(index_path(path))
    except DataError as error:
        problems.append(str(error))
        return None
    selected = index.keys if manifest.selection is None else manifest.selection.rows(index.keys)
    if ShardInfo(info.name, len(selected), index.num_bytes, index.sha256) != info:
        problems.append(f"{index_path(path)}: its sample count, size or checksum is not the manifest's")
    if index.spec != manifest.spec:
        problems.append(
            f"{index_path(path)}: its spec differs from the manifest's ({index.spec.differences(manifest.spec)})"
        )
        return None
    return index


@dataclass(frozen=True)
class _Member:
    """A sample as the tar holds it: content of its two files, and where they start."""

    key: str
    tensors: bytes
    tensors_offset: int
    meta: bytes
    meta_offset: int


def _walk(path: Path) -> Iterator[_Member]:
    with tarfile.open(path, "r:") as tar:
        members = iter(tar)
        for first in members:
            second = next(members, None)
            key, _, suffix = first.name.partition(".")
            if suffix != "safetensors" or second is None or second.name != f"{key}.json":
                raise DataError(
                    f"{first.name} is followed by {second.name if second else 'nothing'}; every <key>.safetensors "
                    "must be followed by its <key>.json"
                )
            tensors, meta = tar.extractfile(first), tar.extractfile(second)
            if tensors is None or meta is None:
                raise DataError(f"{first.name} or {second.name} is not a regular file")
            yield _Member(key, tensors.read(), first.offset_data, meta.read(), second.offset_data)


def _verify_sample(
    path: Path,
    member: _Member,
    number: int,
    spec: DatasetSpec,
    index: ShardIndex | None,
    problems: list[str],
) -> dict[str, ChannelMoments]:
    """Add what is wrong with a sample to `problems`; the moments of its sides that are sound."""
    where = f"{path}: sample {member.key!r}"
    found = _no_moments(spec)
    try:
        json.loads(member.meta)
    except ValueError as error:
        problems.append(f"{where}: its .json is damaged ({error})")
    try:
        _, offsets = parse_header(member.tensors, spec, where)
        tensors = safetensors.torch.load(member.tensors)
    except DataError as error:
        problems.append(str(error))
        return found
    except safetensors.SafetensorError as error:
        problems.append(f"{where}: its .safetensors is damaged ({error})")
        return found
    if index is not None and number < len(index.keys) and not _index_agrees(index, number, member, offsets):
        problems.append(f"{where}: the index points elsewhere; write the shard again")
    for side in _SIDES:
        values = decode(tensors[side], tensors.get(f"{side}_scale"))
        if has_nonfinite(values):
            problems.append(f"{where}: {side} holds NaN or infinity")
        else:
            found[side] = ChannelMoments.of(values.double().numpy())
    return found


def _index_agrees(index: ShardIndex, i: int, member: _Member, offsets: dict[str, int]) -> bool:
    expected = {
        "tensors_offset": member.tensors_offset,
        "tensors_size": len(member.tensors),
        "meta_offset": member.meta_offset,
        "meta_size": len(member.meta),
    }
    return all(index.members[name][i] == value for name, value in expected.items()) and all(
        index.tensors[tensor.name][i] == member.tensors_offset + offsets[tensor.name]
        for tensor in stored_tensors(index.spec)
    )


def _compare_stats(label: str, stored: ChannelStats, found: ChannelMoments, report: VerifyReport) -> None:
    recomputed = found.to_stats()
    scale = np.sqrt(recomputed.var + np.square(recomputed.mean))  # of a channel's values
    mean_off = np.abs(stored.mean - recomputed.mean) > 1e-6 * scale
    var_off = np.abs(stored.var - recomputed.var) > 1e-6 * np.square(scale)
    if stored.count != recomputed.count or mean_off.any() or var_off.any():
        report.problems.append(f"{label} differ from those of the data in {int((mean_off | var_off).sum())} channels")


def _summary(side: ChannelStats) -> dict[str, float]:
    std = np.sqrt(side.var)
    return {
        "mean": float(side.mean.mean()),
        "std_min": float(std.min()),
        "std_median": float(np.median(std)),
        "std_max": float(std.max()),
        "rms_token_norm": math.sqrt(float((side.var + np.square(side.mean)).sum())),
    }


def _find(dataset: EmbeddingDataset, key: str) -> tuple[int, int]:
    for shard in range(len(dataset.manifest.shards)):
        keys = dataset.keys(shard)
        if key in keys:
            return shard, keys.index(key)
    raise DataError(f"{dataset.location}: no sample has the key {key!r}; its first key is {dataset.key(0, 0)!r}")


def _describe(values: Tensor) -> dict[str, Any]:
    norms = torch.linalg.vector_norm(values.double(), dim=-1)
    return {
        "shape": list(values.shape),
        "dtype": str(values.dtype).removeprefix("torch."),
        "mean": float(values.double().mean()),
        "std": float(values.double().std(correction=0)),
        "token_norm_min": float(norms.min()),
        "token_norm_mean": float(norms.mean()),
        "token_norm_max": float(norms.max()),
    }
