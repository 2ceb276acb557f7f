"""What a dataset holds: `stats` from its manifest, `inspect` by a look at its samples.

Both return what JSON can hold.
"""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from blip3o_ds.data.format.manifest import ChannelStats, Manifest
from blip3o_ds.data.reading.dataset import EmbeddingDataset, load_manifest
from blip3o_ds.errors import DataError


def stats(dataset_dir: str | Path) -> dict[str, Any]:
    """Counts, sizes and statistics of a dataset, from its manifest only.

    Per tensor: `mean` over channels, `std_min`, `std_median`, `std_max` over channels, and `rms_token_norm`, the root
    of the mean squared L2 norm of a token.
    """
    manifest = load_manifest(dataset_dir)
    spec = manifest.spec
    return {
        "samples": manifest.num_samples,
        "tokens": manifest.num_samples * spec.num_tokens,
        "shards": len(manifest.shards),
        "bytes": sum(info.num_bytes for info in manifest.shards),
        **spec.to_dict(),
        **{name: _summary(stats) for name, stats in manifest.stats.items()},
        **_selection(manifest),
        "extra": manifest.extra,
    }


def inspect(dataset_dir: str | Path, key: str | None = None) -> dict[str, Any]:
    """The specification and first keys of a dataset; or, with `key`, that sample's shapes, norms and metadata."""
    dataset = EmbeddingDataset(dataset_dir)
    shards = dataset.manifest.shards
    if key is None:
        return {
            "spec": dataset.spec.to_dict(),
            **_selection(dataset.manifest),
            "samples": len(dataset),
            "shards": [asdict(info) for info in shards],
            "first_keys": dataset.keys(0)[:10],
        }
    for shard, info in enumerate(shards):
        if key in (keys := dataset.keys(shard)):
            index = keys.index(key)
            tensors = dataset.read(shard, index).tensors
            described = {name: _describe(values) for name, values in tensors.items()}
            return {"key": key, "shard": info.name, "index": index, **described, "meta": dataset.meta(shard, index)}
    raise DataError(f"{dataset.location}: no sample has the key {key!r}; its first key is {dataset.key(0, 0)!r}")


def _selection(manifest: Manifest) -> dict[str, Any]:
    return {"selection": asdict(manifest.selection)} if manifest.selection else {}


def _summary(stats: ChannelStats) -> dict[str, float]:
    std = np.sqrt(stats.var)
    return {
        "mean": float(stats.mean.mean()),
        "std_min": float(std.min()),
        "std_median": float(np.median(std)),
        "std_max": float(std.max()),
        "rms_token_norm": math.sqrt(float((stats.var + np.square(stats.mean)).sum())),
    }


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
