"""Exactly once: whatever the shards, the window, the ranks and the interruptions, every sample comes once an epoch.

The properties are those of a run as a whole, so they are asked of what the ranks read, put together; the order by
itself is tested in `test_order.py`.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from blip3o_ds.data.format.schema import DatasetSpec
from blip3o_ds.data.format.writer import DatasetWriter
from blip3o_ds.data.reading.dataset import EmbeddingDataset
from blip3o_ds.data.reading.loader import EmbeddingLoader
from blip3o_ds.data.reading.order import GlobalOrder
from blip3o_ds.training.setup import count_steps

WORLD_SIZES = (1, 2, 3, 8)
SPEC = DatasetSpec.pair(1, "patch_only", 2, 1, "fp32", "made-up-eva", "made-up-clip")

shard_sizes = st.lists(st.integers(1, 7), min_size=1, max_size=9)
seeds = st.integers(0, 2**64 - 1)
windows = st.integers(1, 11)

GLOBAL_BATCH = 24  # which 1, 2, 3 and 8 ranks share alike


class CountedDataset:
    """Stands for a dataset: instead of embeddings, a sample says which one it is."""

    def __init__(self, sizes: list[int]) -> None:
        self.spec, self.shard_sizes = SPEC, sizes

    def __len__(self) -> int:
        return sum(self.shard_sizes)

    def prefetch(self, shards) -> None:
        assert set(shards) <= set(range(len(self.shard_sizes)))

    def will_need(self, shard: int, index: int) -> bool:
        assert index < self.shard_sizes[shard]
        return False

    def read_into(self, shard: int, index: int, out) -> str:
        out["eva"][:] = torch.tensor([shard, index])
        return f"{shard}/{index}"


def every_sample(sizes):
    return [(shard, index) for shard, size in enumerate(sizes) for index in range(size)]


def read_steps(dataset, order, world, global_batch, steps, state=None, accumulation=1):
    """What a run on `world` ranks reads in each of its steps, in the global order, and the state that it ends in."""
    read, states = [[] for _ in range(steps)], []
    for rank in range(world):
        loader = EmbeddingLoader(
            dataset,
            GlobalOrder(dataset.shard_sizes, *order),
            micro_batch_size=global_batch // world // accumulation,
            gradient_accumulation_steps=accumulation,
            rank=rank,
            world_size=world,
        )
        with loader:
            if state is not None:
                loader.load_state_dict(state)
            for step in read:
                for batch in loader.next_step():
                    places = [tuple(map(int, key.split("/"))) for key in batch.keys]
                    assert batch["eva"][:, 0].tolist() == [list(map(float, place)) for place in places]
                    step += zip(batch.positions.tolist(), places, strict=True)
            states.append(loader.state_dict())
    assert all(found == states[0] for found in states)  # no rank is ahead of another
    return read, states[0]


def flat(steps):
    return [entry for step in steps for entry in step]


@given(shard_sizes, seeds, windows, st.integers(1, 40), st.sampled_from(WORLD_SIZES))
@settings(max_examples=300, deadline=None)
def test_the_slices_of_all_ranks_cover_every_epoch_once(sizes, seed, window, per_rank, world):
    total, stride = sum(sizes), per_rank * world
    orders = [GlobalOrder(sizes, seed, window) for _ in range(world)]  # every rank has its own
    steps = -(-2 * total // stride)

    visited = []
    for step in range(steps):
        for rank, order in enumerate(orders):
            start = step * stride + rank * per_rank
            visited += order.slice(start, start + per_rank)

    for epoch in range(2):
        assert sorted(visited[epoch * total : (epoch + 1) * total]) == every_sample(sizes)


@given(shard_sizes, seeds, windows, st.lists(st.integers(0, 150), min_size=1, max_size=5))
@settings(max_examples=100, deadline=None)
def test_an_order_that_starts_anywhere_goes_on_as_one_that_started_at_the_beginning(sizes, seed, window, starts):
    whole = GlobalOrder(sizes, seed, window).slice(0, 200)
    for start in starts:
        assert GlobalOrder(sizes, seed, window).slice(start, 200) == whole[start:]


@given(st.integers(1, 10**9), st.integers(1, 512), st.integers(1, 8), st.integers(1, 20), st.sampled_from(WORLD_SIZES))
@settings(max_examples=300, deadline=None)
def test_all_ranks_do_the_same_steps_and_those_see_every_epoch_whole(samples, micro, accumulation, epochs, world):
    train = SimpleNamespace(max_steps=None, num_epochs=epochs)
    global_batch = micro * accumulation * world
    steps = count_steps(SimpleNamespace(train=train), samples, global_batch)
    # A function of what all ranks know alike; the last step is the one that ends the last epoch.
    assert (steps - 1) * global_batch < epochs * samples <= steps * global_batch


@given(shard_sizes, seeds, windows)
@settings(max_examples=12, deadline=None)
def test_every_world_size_reads_the_same_samples_at_the_same_positions(sizes, seed, window):
    dataset = CountedDataset(sizes)
    expected = list(enumerate(GlobalOrder(sizes, seed, window).slice(0, 3 * GLOBAL_BATCH)))
    for world in WORLD_SIZES:
        steps, state = read_steps(dataset, (seed, window), world, GLOBAL_BATCH, 3)
        assert [len(step) for step in steps] == [GLOBAL_BATCH] * 3
        # A rank after the other, its part of each step: in the order of the positions.
        assert flat(steps) == expected
        assert state["samples_consumed"] == 3 * GLOBAL_BATCH


@given(
    shard_sizes,
    seeds,
    windows,
    st.lists(
        st.tuples(st.sampled_from(WORLD_SIZES), st.sampled_from((24, 48)), st.integers(0, 3), st.sampled_from((1, 3))),
        min_size=2,
        max_size=4,
    ),
)
@settings(max_examples=12, deadline=None)
def test_a_run_interrupted_anywhere_and_resumed_on_other_ranks_and_batches_misses_and_repeats_nothing(
    sizes, seed, window, parts
):
    dataset = CountedDataset(sizes)
    visited, state = [], None
    for world, global_batch, steps, accumulation in parts:
        read, state = read_steps(dataset, (seed, window), world, global_batch, steps, state, accumulation)
        visited += flat(read)

    assert visited == list(enumerate(GlobalOrder(sizes, seed, window).slice(0, len(visited))))
    epochs, _ = divmod(len(visited), len(dataset))
    times = Counter(place for _, place in visited[: epochs * len(dataset)])
    assert times == dict.fromkeys(every_sample(sizes), epochs) or epochs == 0


@given(st.integers(1, 23), st.integers(1, 5), seeds, windows, st.sampled_from([(1, 4), (2, 2), (3, 1)]))
@settings(max_examples=15, deadline=None)
def test_an_epoch_of_a_dataset_on_disk_holds_every_key_once(count, per_shard, seed, window, ranks):
    world, micro = ranks
    with tempfile.TemporaryDirectory() as folder:
        with DatasetWriter(Path(folder), SPEC, per_shard) as writer:
            for i in range(count):
                tensors = {"eva": torch.full((1, 2), float(i)), "clip": torch.full((1, 1), float(-i))}
                writer.write(f"key{i}", tensors, {})
        dataset = EmbeddingDataset(folder)
        keys = {}
        for rank in range(world):
            with EmbeddingLoader(
                dataset,
                GlobalOrder(dataset.shard_sizes, seed, window),
                micro_batch_size=micro,
                gradient_accumulation_steps=2,
                rank=rank,
                world_size=world,
            ) as loader:
                for _ in range(-(-2 * count // loader.samples_per_step)):
                    for batch in loader.next_step():
                        numbers = [int(key.removeprefix("key")) for key in batch.keys]
                        assert batch["eva"][:, 0, 1].tolist() == numbers
                        assert batch["clip"][:, 0, 0].neg().tolist() == numbers
                        keys.update(zip(batch.positions.tolist(), batch.keys, strict=True))
        dataset.close()
    for epoch in range(2):
        read = [keys[position] for position in range(epoch * count, (epoch + 1) * count)]
        assert sorted(read) == sorted(f"key{i}" for i in range(count))


@pytest.mark.parametrize("world", WORLD_SIZES)
def test_resuming_after_every_single_step_reads_what_an_uninterrupted_run_reads(world):
    dataset, order = CountedDataset([5, 1, 7, 2]), (3, 2)
    whole, _ = read_steps(dataset, order, 1, GLOBAL_BATCH, 4)
    state, visited = None, []
    for _ in range(4):
        steps, state = read_steps(dataset, order, world, GLOBAL_BATCH, 1, state)
        visited += steps
    assert visited == whole
