"""The order of samples: a permutation each epoch, the same for every world size."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blip3o_ds.data.reading.order import GlobalOrder
from blip3o_ds.errors import DataError

# GlobalOrder([3, 2, 4], seed=7, window_shards=2)
FIRST_EPOCH = [(1, 0), (2, 3), (2, 1), (1, 1), (2, 2), (2, 0), (0, 2), (0, 0), (0, 1)]
LATE_EPOCH = [(0, 1), (0, 2), (0, 0), (1, 0), (1, 1), (2, 2), (2, 1), (2, 3), (2, 0)]  # epoch 1000

orders = st.tuples(
    st.lists(st.integers(0, 9), min_size=1, max_size=12).filter(sum),
    st.integers(0, 2**64 - 1),
    st.integers(1, 14),
)


@given(orders, st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_every_epoch_holds_every_sample_once(order, epoch):
    sizes, seed, window = order
    total = sum(sizes)

    places = GlobalOrder(sizes, seed, window).slice(epoch * total, (epoch + 1) * total)

    assert sorted(places) == [(shard, i) for shard, size in enumerate(sizes) for i in range(size)]


@given(orders, st.lists(st.integers(0, 200), min_size=2, max_size=6))
@settings(max_examples=60, deadline=None)
def test_a_slice_does_not_depend_on_what_was_asked_before(order, bounds):
    used = GlobalOrder(*order)
    for start, stop in zip(bounds, reversed(bounds), strict=True):
        expected = [GlobalOrder(*order).locate(position) for position in range(start, stop)]
        assert used.slice(start, stop) == expected


@given(orders)
@settings(max_examples=40, deadline=None)
def test_samples_are_mixed_within_a_window_of_shards_only(order):
    sizes, seed, window = order
    shards = [shard for shard, _ in GlobalOrder(sizes, seed, window).slice(0, sum(sizes))]
    # Walking through the epoch, a shard that was left behind for `window` others never comes back.
    seen = list(dict.fromkeys(shards))
    for shard in seen:
        first, last = shards.index(shard), len(shards) - 1 - shards[::-1].index(shard)
        assert len(set(shards[first : last + 1])) <= window


def test_epochs_and_seeds_differ():
    sizes = [20] * 10
    first, second = GlobalOrder(sizes, 1).slice(0, 200), GlobalOrder(sizes, 1).slice(200, 400)
    assert first != second
    assert first != GlobalOrder(sizes, 2).slice(0, 200)


def test_every_place_in_the_epoch_is_equally_likely():
    sizes = [3, 3, 3, 3]
    counts = np.zeros(12)
    for seed in range(600):
        shard, index = GlobalOrder(sizes, seed, 2).locate(5)
        counts[3 * shard + index] += 1
    expected = 600 / 12
    assert ((counts - expected) ** 2 / expected).sum() < 31.3  # chi-square with 11 degrees of freedom, p = 0.001


def test_the_order_stays_what_it_was_when_runs_began():
    # Written down once: a change here would make every running training resume on other samples.
    order = GlobalOrder([3, 2, 4], seed=7, window_shards=2)
    assert order.slice(0, 9) == FIRST_EPOCH
    assert order.slice(9 * 1000, 9 * 1001) == LATE_EPOCH


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([], 0), "at least one sample"),
        (([0, 0], 0), "at least one sample"),
        (([3], -1), "seed"),
        (([3], 0, 0), "window_shards"),
    ],
)
def test_impossible_orders_are_refused(arguments, message):
    with pytest.raises(DataError, match=message):
        GlobalOrder(*arguments)


def test_only_two_windows_are_held():
    order = GlobalOrder([5] * 1000, seed=0, window_shards=4)
    order.slice(0, 2000)
    assert order._window.cache_info().currsize == 2
    assert len(order._window(0, 99)[0]) == 20
