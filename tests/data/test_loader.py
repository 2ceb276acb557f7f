"""The loader: the same samples on every world size, exact resumption, errors that reach the caller."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from blip3o_ds.data.loader import EmbeddingLoader, iterate_batches
from blip3o_ds.data.order import GlobalOrder
from blip3o_ds.data.shards import EmbeddingDataset, ShardReader
from blip3o_ds.errors import DataError


def open_loader(dataset, *, micro=2, accumulation=1, rank=0, world=1, prefetch=2, seed=3):
    order = GlobalOrder(dataset.shard_sizes, seed, window_shards=2)
    return EmbeddingLoader(
        dataset,
        order,
        micro_batch_size=micro,
        gradient_accumulation_steps=accumulation,
        rank=rank,
        world_size=world,
        prefetch=prefetch,
    )


def positions_and_keys(loader, steps):
    return [
        (position, key)
        for _ in range(steps)
        for batch in loader.next_step()
        for position, key in zip(batch.positions.tolist(), batch.keys, strict=True)
    ]


@pytest.mark.parametrize(("world", "micro", "accumulation"), [(1, 24, 1), (2, 4, 3), (3, 8, 1), (8, 1, 3)])
def test_a_global_step_takes_the_same_samples_on_any_world_size(dataset_dir, world, micro, accumulation):
    dataset = EmbeddingDataset(dataset_dir(19))
    order = GlobalOrder(dataset.shard_sizes, 3, 2)
    expected = [(position, f"image{4 * s + i:03d}") for position, (s, i) in enumerate(order.slice(0, 72))]

    steps = [[] for _ in range(3)]
    for rank in range(world):
        with open_loader(dataset, micro=micro, accumulation=accumulation, rank=rank, world=world) as loader:
            for step in steps:
                step += positions_and_keys(loader, 1)

    assert [entry for step in steps for entry in step] == expected


def test_batches_hold_the_samples_that_their_keys_name(dataset_dir, samples):
    dataset = EmbeddingDataset(dataset_dir(9), token_layout="patch_only")
    source = {key: (eva, clip) for key, eva, clip, _ in samples(9)}
    with open_loader(dataset, micro=3, accumulation=2) as loader:
        batches = loader.next_step() + loader.next_step()
    assert [batch.eva.shape for batch in batches] == [(3, 4, 8)] * 4
    for batch in batches:
        for row, key in enumerate(batch.keys):
            assert torch.equal(batch.eva[row], source[key][0][1:].bfloat16())
            assert torch.equal(batch.clip[row], source[key][1][1:].bfloat16())


@pytest.mark.parametrize("world", [1, 2, 4])
def test_resume_continues_the_same_sample_order_on_another_world_size(dataset_dir, world):
    dataset = EmbeddingDataset(dataset_dir(10))
    with open_loader(dataset, micro=4) as loader:
        uninterrupted = positions_and_keys(loader, 6)
    with open_loader(dataset, micro=2, rank=1, world=2) as loader:
        positions_and_keys(loader, 3)
        state = loader.state_dict()

    resumed = []
    for rank in range(world):
        with open_loader(dataset, micro=4 // world, rank=rank, world=world) as loader:
            loader.load_state_dict(state)
            resumed += positions_and_keys(loader, 3)

    assert state == {"epoch": 1, "samples_consumed": 12}
    assert sorted(resumed) == uninterrupted[12:]


def test_the_state_counts_what_was_handed_out_not_what_was_read_ahead(dataset_dir):
    with open_loader(EmbeddingDataset(dataset_dir(10)), prefetch=3) as loader:
        loader.next_step()
        time.sleep(0.2)  # the thread fills its queue
        assert loader.state_dict() == {"epoch": 0, "samples_consumed": 2}


def test_loading_a_state_after_reading_began_starts_over_from_there(dataset_dir):
    with open_loader(EmbeddingDataset(dataset_dir(10))) as loader:
        first = positions_and_keys(loader, 2)
        loader.load_state_dict({"epoch": 0, "samples_consumed": 0})
        assert positions_and_keys(loader, 2) == first


def test_a_state_of_a_dataset_of_another_size_is_refused(dataset_dir):
    with (
        open_loader(EmbeddingDataset(dataset_dir(10))) as loader,
        pytest.raises(DataError, match=r"sample 12 in epoch 3.*10 samples is in epoch 1"),
    ):
        loader.load_state_dict({"epoch": 3, "samples_consumed": 12})


def test_an_error_in_the_thread_reaches_the_caller_every_time(dataset_dir):
    dst = dataset_dir(8)
    path = dst / "shard_00001.tar"
    content = bytearray(path.read_bytes())
    start = int(ShardReader(path).index.tensors["eva"][2])
    content[start : start + 2] = b"\x80\xff"  # minus infinity in bf16
    path.write_bytes(content)
    with open_loader(EmbeddingDataset(dst), micro=8) as loader:
        for _ in range(2):
            with pytest.raises(DataError, match=r"shard_00001\.tar: sample image006: eva holds NaN or infinity"):
                loader.next_step()
        assert loader.state_dict()["samples_consumed"] == 0


def test_closing_ends_the_threads(dataset_dir):
    before = threading.active_count()
    loader = open_loader(EmbeddingDataset(dataset_dir(10)))
    loader.next_step()
    assert threading.active_count() > before
    loader.close()
    loader.close()
    assert threading.active_count() == before
    with pytest.raises(RuntimeError, match="closed"):
        loader.next_step()


def test_the_time_spent_waiting_for_data_is_counted(dataset_dir, monkeypatch):
    dataset = EmbeddingDataset(dataset_dir(8))
    read = dataset.read_into

    def slow_read(*arguments):
        time.sleep(0.05)
        return read(*arguments)

    monkeypatch.setattr(dataset, "read_into", slow_read)
    with open_loader(dataset, micro=1) as loader:
        loader.next_step()
        assert 0.04 < loader.wait_seconds < 5


@pytest.mark.parametrize("arguments", [{"micro": 0}, {"accumulation": 0}, {"rank": 2, "world": 2}, {"prefetch": 0}])
def test_impossible_settings_are_refused(dataset_dir, arguments):
    with pytest.raises(DataError, match="found"):
        open_loader(EmbeddingDataset(dataset_dir(4)), **arguments)


def test_an_order_of_another_dataset_is_refused(dataset_dir):
    with pytest.raises(DataError, match="the order covers 5 samples, the dataset has 4"):
        EmbeddingLoader(
            EmbeddingDataset(dataset_dir(4)),
            GlobalOrder([5], 0),
            micro_batch_size=1,
            gradient_accumulation_steps=1,
            rank=0,
            world_size=1,
        )


@pytest.mark.parametrize(("start", "stop"), [(0, None), (3, 8), (9, 99), (5, 5)])
def test_evaluation_goes_through_the_samples_in_stored_order_once(dataset_dir, samples, start, stop):
    batches = list(iterate_batches(EmbeddingDataset(dataset_dir(10)), 4, start, stop))
    expected = samples(10)[start:stop]
    assert [key for batch in batches for key in batch.keys] == [key for key, *_ in expected]
    assert [p for batch in batches for p in batch.positions.tolist()] == list(range(start, start + len(expected)))
    if expected:
        found = torch.cat([batch.clip for batch in batches])
        assert torch.equal(found, torch.stack([clip for _, _, clip, _ in expected]).bfloat16())
