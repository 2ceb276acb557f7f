"""Pickled embedding shards to a dataset: `convert`, one pickle in memory at a time; it recasts datasets as well.

The pickles are read without running them (see `pickles.py`). A conversion that was interrupted resumes when it is
repeated.
"""

from __future__ import annotations

import hashlib
import logging
import math
import re
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from blip3o_ds.data.format.manifest import MANIFEST_NAME, Manifest
from blip3o_ds.data.format.schema import DatasetSpec, StorageDType, TokenLayout
from blip3o_ds.data.format.writer import DatasetWriter
from blip3o_ds.data.reading.dataset import EmbeddingDataset
from blip3o_ds.data.reading.remote import is_remote
from blip3o_ds.data.tools.pickles import load_pickle
from blip3o_ds.errors import DataError
from blip3o_ds.progress import Progress

logger = logging.getLogger(__name__)

_EVA = "eva_blip3o_embeddings"
_CLIP = "clip_blip3o_embeddings"
_SOURCE_NAME = re.compile(r"embeddings_shard_(\d+)(?:_(patch_only|cls_patch))?\.pkl")
# The pair that these pickles are made with; other widths come from encoders that the pickle does not name.
_PUBLISHED_DIMS = (4096, 1024)


def convert(
    src: str | Path,
    dst: str | Path,
    *,
    token_layout: TokenLayout | None = None,
    dtype: StorageDType = "bf16",
    samples_per_shard: int = 512,
    view_separator: str | None = None,
) -> dict[str, Any]:
    """Convert pickled shards, or another dataset, to a dataset in `dst`; finishes what was interrupted.

    `src` is a dataset's folder or URL, one pickle or a folder of `embeddings_shard_00000_patch_only.pkl` (or
    `_cls_patch.pkl`) files, each a dict with `eva_blip3o_embeddings` [S, N, De], `clip_blip3o_embeddings` [S, N, Dc],
    `captions` and `keys`. `token_layout="patch_only"` drops the CLS token of data that have one; None keeps the layout.
    `view_separator` is stated where the source does not (see `DatasetSpec.image_of`).
    Returns counts, the specification, and under `cost` what the stored dtype does to each tensor (see
    `Distortion.to_dict`; samples found done are not measured again). Raises DataError that names file and field.
    """
    if is_dataset(src):
        return _recast(src, dst, token_layout, dtype, samples_per_shard, view_separator)
    sources = _find_sources(Path(src), token_layout)
    extra = {"converted_from": [path.name for path in sources]}
    seen: set[str] = set()
    with ExitStack() as stack:
        writer: DatasetWriter | None = None
        for path in Progress("convert", len(sources), "files").over(sources):
            shard = _read_shard(path, token_layout, dtype)
            spec = shard.spec.with_views(view_separator, path)
            if writer is None:
                writer = stack.enter_context(DatasetWriter(dst, spec, samples_per_shard, extra, resume=True))
                done = writer.done_keys()
            elif spec != writer.spec:
                raise DataError(
                    f"{path}: differs from {sources[0].name} ({spec.differences(writer.spec)}); all shards of a "
                    "dataset must agree, convert them apart"
                )
            _write_shard(writer, shard, seen, done)
            del shard  # before the next is read: one in memory at a time
        assert writer is not None  # there is at least one source
        _refuse_foreign(dst, done - seen)
    return {"source_files": len(sources), **_summary(dst, writer, len(done))}


def is_dataset(src: str | Path) -> bool:
    """Whether `src` is a dataset's folder or a URL, and not pickles."""
    return is_remote(src) or (Path(src) / MANIFEST_NAME).exists()


def _recast(
    src: str | Path,
    dst: str | Path,
    token_layout: TokenLayout | None,
    dtype: StorageDType,
    samples_per_shard: int,
    view_separator: str | None,
) -> dict[str, Any]:
    dataset = EmbeddingDataset(src, token_layout=token_layout)
    if Path(dst).resolve() == Path(src).resolve():
        raise DataError(f"{dst}: source and destination are the same folder; give another destination")
    extra = {**dataset.manifest.extra, "recast_from": dataset.manifest.spec.dtypes}
    spec = dataset.spec.stored_as(dtype).with_views(view_separator, src)
    with DatasetWriter(dst, spec, samples_per_shard, extra, resume=True) as writer:
        done = writer.done_keys()
        seen: set[str] = set()
        for shard, size in enumerate(Progress("convert", len(dataset.shard_sizes), "shards").over(dataset.shard_sizes)):
            for index in range(size):
                key = dataset.key(shard, index)
                seen.add(key)
                if key not in done:
                    writer.write(key, dataset.read(shard, index).tensors, dataset.meta(shard, index))
        _refuse_foreign(dst, done - seen)
    return {"source_dtype": dataset.spec.dtypes, **_summary(dst, writer, len(done))}


def _refuse_foreign(dst: str | Path, keys: set[str]) -> None:
    if keys:
        raise DataError(
            f"{dst}: holds {len(keys)} samples that are not in the source, such as {min(keys)!r}; it belongs to "
            "another conversion, give an empty folder"
        )


def _summary(dst: str | Path, writer: DatasetWriter, found_done: int) -> dict[str, Any]:
    manifest = Manifest.load(dst)
    return {
        "samples": manifest.num_samples,
        "samples_found_done": found_done,
        "shards": len(manifest.shards),
        "bytes": sum(info.num_bytes for info in manifest.shards),
        "spec": manifest.spec.to_dict(),
        "cost": writer.cost(),
    }


@dataclass(frozen=True)
class _PickledShard:
    """One pickle, checked: tensors [S, N, D] in the layout asked for, and lists with an entry per sample."""

    path: Path
    spec: DatasetSpec
    eva: Tensor
    clip: Tensor
    keys: list[str]
    fields: dict[str, list]  # the metadata


def _find_sources(src: Path, token_layout: TokenLayout | None) -> list[Path]:
    if src.is_file():
        return [src]
    if not src.is_dir():
        raise DataError(f"{src}: not found; give a pickled shard or a folder of them")
    found = {path: match for path in src.iterdir() if (match := _SOURCE_NAME.fullmatch(path.name))}
    if not found:
        raise DataError(f"{src}: holds no file named like embeddings_shard_00000_patch_only.pkl; give their folder")
    layouts = {match[2] for match in found.values()}
    if len(layouts) > 1:
        # The same images in both layouts: each sample would come twice.
        if token_layout not in layouts:
            raise DataError(f"{src}: holds shards of several layouts; say which with token_layout (--training_mode)")
        found = {path: match for path, match in found.items() if match[2] == token_layout}
    return sorted(found, key=lambda path: (int(found[path][1]), path.name))


def _write_shard(writer: DatasetWriter, shard: _PickledShard, seen: set[str], done: set[str]) -> None:
    for i, original in enumerate(shard.keys):
        key = _safe_key(original)
        if key in seen:
            raise DataError(f"{shard.path}: field 'keys': {original!r} comes twice")
        seen.add(key)
        if key in done:
            continue
        for field, values in ((_EVA, shard.eva[i]), (_CLIP, shard.clip[i])):
            if not torch.isfinite(values).all():
                raise DataError(f"{shard.path}: field {field!r}: sample {key!r} (number {i}) holds NaN or infinity")
        meta = {name: values[i] for name, values in shard.fields.items()}
        if key != original:
            meta["original_key"] = original
        try:
            writer.write(key, {"eva": shard.eva[i], "clip": shard.clip[i]}, meta)
        except DataError as error:
            raise DataError(f"{shard.path}: {error}") from error


def _read_shard(path: Path, token_layout: TokenLayout | None, dtype: StorageDType) -> _PickledShard:
    content = load_pickle(path)
    if not isinstance(content, dict):
        raise DataError(f"{path}: expected a pickled dict, found {type(content).__name__}")
    eva, clip = _embeddings(content, _EVA, path), _embeddings(content, _CLIP, path)
    if eva.shape[:2] != clip.shape[:2]:
        raise DataError(
            f"{path}: field {_EVA!r} is {list(eva.shape)} and {_CLIP!r} {list(clip.shape)}; the first two sizes "
            "(samples, tokens) must agree"
        )
    count, num_tokens, eva_dim = eva.shape
    dims = (eva_dim, clip.shape[2])
    layout: TokenLayout = "patch_only" if math.isqrt(num_tokens) ** 2 == num_tokens else "cls_patch"
    encoders = ("eva-clip-8b", "clip-vit-l14") if dims == _PUBLISHED_DIMS else ("unknown", "unknown")
    try:
        spec = DatasetSpec.pair(num_tokens, layout, *dims, dtype, *encoders).viewed_as(token_layout)
    except DataError as error:
        raise DataError(f"{path}: field {_EVA!r}: {error}") from error
    num_dropped = num_tokens - spec.num_tokens
    keys = _listed(content, "keys", count, path) or [f"{path.stem}_{i:06d}" for i in range(count)]
    fields = _per_sample_fields(content, count, path)
    if captions := _listed(content, "captions", count, path):
        fields["caption"] = captions
    return _PickledShard(path, spec, eva[:, num_dropped:], clip[:, num_dropped:], list(map(str, keys)), fields)


def _embeddings(content: dict, field: str, path: Path) -> Tensor:
    if field not in content:
        raise DataError(f"{path}: field {field!r} is missing; found {', '.join(map(str, content))}")
    values = content[field]
    if isinstance(values, np.ndarray):
        # Big-endian arrays are native after this; all others stay as they are.
        values = torch.from_numpy(np.array(values, dtype=values.dtype.newbyteorder("="), copy=None, subok=False))
    if not isinstance(values, Tensor):
        raise DataError(f"{path}: field {field!r} must be a tensor or an array, found {type(values).__name__}")
    if values.ndim != 3 or 0 in values.shape or not values.is_floating_point():
        raise DataError(
            f"{path}: field {field!r} must be floating point [samples, tokens, channels], found {values.dtype} "
            f"{list(values.shape)}"
        )
    return values.detach()


def _listed(content: dict, field: str, count: int, path: Path) -> list | None:
    values = content.get(field)
    if values is None:
        logger.info("%s: no field %r", path, field)
        return None
    if isinstance(values, np.ndarray):
        values = values.tolist()
    if not isinstance(values, list | tuple):
        raise DataError(f"{path}: field {field!r} must be a list, found {type(values).__name__}")
    if len(values) != count:
        raise DataError(f"{path}: field {field!r} has {len(values)} entries for {count} samples")
    return list(values)


def _per_sample_fields(content: dict, count: int, path: Path) -> dict[str, list]:
    """Other lists with one plain value a sample; they go to the sample's JSON, everything else is left out."""
    kept, left_out = {}, []
    for name, values in content.items():
        if name in (_EVA, _CLIP, "keys", "captions"):
            continue
        if isinstance(values, list) and len(values) == count and all(map(_is_plain, values)):
            kept[str(name)] = values
        else:
            left_out.append(str(name))
    if left_out:
        logger.info("%s: left out fields %s, which hold no plain value for each sample", path, ", ".join(left_out))
    return kept


def _is_plain(value: object) -> bool:
    return isinstance(value, str | int | None) or (isinstance(value, float) and math.isfinite(value))


def _safe_key(original: str) -> str:
    """`original` if webdataset can hold it; otherwise without unsafe characters, and with a hash to keep it unique."""
    safe = "".join(character if character.isprintable() and character not in "./" else "_" for character in original)
    if safe == original and original:
        return original
    return f"{safe}-{hashlib.sha256(original.encode(errors='surrogatepass')).hexdigest()[:8]}"
