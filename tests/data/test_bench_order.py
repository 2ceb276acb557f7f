"""What a large set costs at start-up and in each step, on a manifest whose shards do not exist."""

from __future__ import annotations

import json
from timeit import timeit

from blip3o_ds.data.reading.order import GlobalOrder
from tests.data.conftest import script

benchmark_order = script("bench_order").benchmark_order


def test_opening_and_ordering_a_large_set_needs_the_manifest_alone_and_memory_for_a_window():
    # The benchmark's folder holds a manifest and no shard, so opening would fail if it looked at one.
    result = benchmark_order(num_shards=20_000, samples_per_shard=1_000)

    assert json.loads(json.dumps(result))["samples"] == 20_000_000
    table = 20_000 * 8 * (1 + 2) + 20_000 // 16 * 8 * 2  # sizes, two epochs' shards, their windows' ends, in bytes
    windows = 2 * 2 * 16 * 1_000 * 8  # shard and index of the samples of two windows
    assert result["order_mib"] < 1.2 * (table + windows) / 2**20
    assert result["order_peak_mib"] < result["order_mib"] + 5 * windows / 2**20
    assert result["dataset_open_peak_mib"] < 40


def test_a_step_costs_the_same_however_many_shards_there_are():
    def seconds(num_shards: int) -> float:
        order = GlobalOrder([100] * num_shards, seed=0)
        middle = order.num_samples // 2
        return timeit(
            lambda: [order.slice(start, start + 256) for start in range(middle, middle + 51_200, 256)], number=1
        )

    # The least of several runs, taken in turn, is what it costs where nobody else has the processor.
    few, many = map(min, zip(*[(seconds(100), seconds(10_000)) for _ in range(5)], strict=True))
    assert many < 10 * few
