"""What a very large dataset costs before the first sample is read: its manifest, and the order of its samples.

It is measured on a made-up manifest, without a shard, and printed as one JSON object.

    python scripts/bench_order.py [SHARDS SAMPLES_PER_SHARD]
"""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from blip3o_ds.data.format.manifest import MANIFEST_NAME, ChannelStats, Manifest, ShardInfo
from blip3o_ds.data.format.schema import DatasetSpec
from blip3o_ds.data.reading.dataset import EmbeddingDataset
from blip3o_ds.data.reading.order import GlobalOrder

_MIB = 1 << 20
_STEPS = 2_000

_T = TypeVar("_T")


def benchmark_order(
    num_shards: int, samples_per_shard: int, window_shards: int = 16, step: int = 256
) -> dict[str, Any]:
    """Time and memory of a synthetic manifest, and of the order over it, as JSON holds them.

    `*_seconds` are single runs; `microseconds_per_step` is the mean over 2,000 steps of `step` samples, with the mixing
    of windows; `*_mib` are traced allocations that remain (`_peak_`: at most), in runs that are not timed.
    """
    with tempfile.TemporaryDirectory() as folder:
        _manifest(num_shards, samples_per_shard).save(folder)
        file_mib = (Path(folder) / MANIFEST_NAME).stat().st_size / _MIB
        open_seconds, dataset = _timed(lambda: EmbeddingDataset(folder))
        sizes = dataset.shard_sizes
        del dataset
        open_mib, open_peak_mib = _traced(lambda: EmbeddingDataset(folder))
    order_seconds, order = _timed(lambda: GlobalOrder(sizes, 0, window_shards))
    first_seconds, _ = _timed(lambda: order.slice(0, step))
    middle = order.num_samples // 2
    steps_seconds, _ = _timed(lambda: _walk(order, middle, step))
    resume_seconds, _ = _timed(lambda: GlobalOrder(sizes, 0, window_shards).locate(7 * order.num_samples + middle))
    order_mib, order_peak_mib = _traced(lambda: _walked(sizes, window_shards, step))
    return {
        "shards": num_shards,
        "samples": order.num_samples,
        "manifest_file_mib": file_mib,
        "dataset_open_seconds": open_seconds,
        "dataset_mib": open_mib,
        "dataset_open_peak_mib": open_peak_mib,
        "order_seconds": order_seconds,
        "first_step_seconds": first_seconds,
        "microseconds_per_step": steps_seconds / _STEPS * 1e6,
        "samples_per_step": step,
        "resume_seconds": resume_seconds,
        "order_mib": order_mib,
        "order_peak_mib": order_peak_mib,
    }


def _manifest(num_shards: int, samples_per_shard: int) -> Manifest:
    spec = DatasetSpec.pair(256, "patch_only", 4096, 1024, "bf16", "eva-clip-8b", "clip-vit-l14")
    shard_bytes = samples_per_shard * (2 * spec.num_tokens * sum(t.dim for t in spec.tensors.values()) + 4096)
    shards = tuple(
        ShardInfo(f"shard_{i:05d}.tar", samples_per_shard, shard_bytes, hashlib.sha256(b"%d" % i).hexdigest())
        for i in range(num_shards)
    )
    tokens = num_shards * samples_per_shard * spec.num_tokens
    stats = {name: ChannelStats(np.zeros(t.dim), np.ones(t.dim), tokens) for name, t in spec.tensors.items()}
    return Manifest(spec, shards, stats, extra={})


def _walk(order: GlobalOrder, start: int, step: int) -> None:
    for number in range(_STEPS):
        order.slice(start + number * step, start + (number + 1) * step)


def _walked(sizes: list[int], window_shards: int, step: int) -> GlobalOrder:
    order = GlobalOrder(sizes, 0, window_shards)
    _walk(order, order.num_samples - step, step)  # over the end of an epoch
    return order


def _timed(run: Callable[[], _T]) -> tuple[float, _T]:
    started = time.perf_counter()
    result = run()
    return time.perf_counter() - started, result


def _traced(run: Callable[[], Any]) -> tuple[float, float]:
    """MiB that the result holds, and MiB at the most on the way."""
    tracemalloc.start()
    result = run()
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    del result
    return held / _MIB, peak / _MIB


if __name__ == "__main__":
    shards, samples = (int(text) for text in sys.argv[1:3]) if len(sys.argv) > 2 else (100_000, 1_000)
    sys.stdout.write(json.dumps(benchmark_order(shards, samples), indent=2) + "\n")
