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

from blip3o_ds.data.format.manifest import ChannelStats
from blip3o_ds.data.reading.dataset import EmbeddingDataset
from blip3o_ds.data.reading.source import load_manifest
from blip3o_ds.errors import DataError

_FIRST_KEYS = 10


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
        **{name: _describe(values) for name, values in sample.tensors.items()},
        "meta": dataset.meta(shard, index),
    }


def _summary(stats: ChannelStats) -> dict[str, float]:
    std = np.sqrt(stats.var)
    return {
        "mean": float(stats.mean.mean()),
        "std_min": float(std.min()),
        "std_median": float(np.median(std)),
        "std_max": float(std.max()),
        "rms_token_norm": math.sqrt(float((stats.var + np.square(stats.mean)).sum())),
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
