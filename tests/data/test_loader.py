"""The loader: the same samples on every world size, exact resumption, errors that reach the caller."""

from __future__ import annotations

import os
import threading
import time

import pytest
import torch

from blip3o_ds.data.reading import ring
from blip3o_ds.data.reading.dataset import EmbeddingDataset
from blip3o_ds.data.reading.loader import EmbeddingLoader
from blip3o_ds.data.reading.order import GlobalOrder
from blip3o_ds.data.reading.shard import ShardReader
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
        for _ in range(7):  # more steps than there are buffers
            batches = list(loader.next_step())
            assert [batch["eva"].shape for batch in batches] == [(3, 4, 8)] * 2
            for batch in batches:
                for row, key in enumerate(batch.keys):
                    assert torch.equal(batch["eva"][row], source[key][0][1:].bfloat16())
                    assert torch.equal(batch["clip"][row], source[key][1][1:].bfloat16())


def test_a_step_s_batches_stay_as_they_are_until_the_next_step_is_asked_for(dataset_dir):
    with open_loader(EmbeddingDataset(dataset_dir(19)), micro=2, accumulation=2) as loader:
        for _ in range(6):
            batches = list(loader.next_step())
            before = [batch["eva"].clone() for batch in batches]
            time.sleep(0.02)  # the threads fill every buffer that they may
            assert all(map(torch.equal, before, (batch["eva"] for batch in batches)))


def test_the_buffers_are_used_again(dataset_dir):
    with open_loader(EmbeddingDataset(dataset_dir(10)), micro=1, prefetch=2) as loader:
        places = {next(loader.next_step())["eva"].data_ptr() for _ in range(20)}
    assert len(places) <= 4


@pytest.mark.parametrize("token_layout", ["cls_patch", "patch_only"])
def test_fp8_is_handed_out_as_stored_and_expands_to_what_reading_gives(dataset_dir, spec, token_layout):
    stored = dataset_dir(5, spec=spec.stored_as("fp8-e4m3"))
    dataset = EmbeddingDataset(stored, token_layout=token_layout)
    order = GlobalOrder(dataset.shard_sizes, 3, 2)
    with open_loader(dataset, micro=5) as loader:
        (batch,) = loader.next_step()
        assert batch["eva"].dtype == torch.float8_e4m3fn
        assert batch["eva_scale"].shape == batch["eva"].shape[:2]
        expanded = batch.decode()
    for row, place in enumerate(order.slice(0, 5)):
        sample = dataset.read(*place)
        assert torch.equal(expanded["eva"][row], sample["eva"])
        assert torch.equal(expanded["clip"][row], sample["clip"])


def test_a_shard_cut_short_while_it_is_read_is_an_error_that_names_it(dataset_dir):
    dst = dataset_dir(8)
    dataset = EmbeddingDataset(dst)
    for shard in range(2):
        dataset.read(shard, 0)  # both are open now
    os.truncate(dst / "shard_00001.tar", 4096)
    with (
        open_loader(dataset, micro=8) as loader,
        pytest.raises(DataError, match=r"shard_00001\.tar: sample image00\d: the file ends before the sample does"),
    ):
        loader.next_step()


def test_the_coming_samples_are_asked_for_ahead(dataset_dir, monkeypatch):
    dataset = EmbeddingDataset(dataset_dir(10))
    order = GlobalOrder(dataset.shard_sizes, 3, 2)
    asked = []
    monkeypatch.setattr(dataset, "will_need", lambda *place: asked.append(place) or True)
    monkeypatch.setattr(ring, "_READAHEAD_STEPS", 3)
    with open_loader(dataset, micro=2, prefetch=1) as loader:
        loader.next_step()
        time.sleep(0.2)
    # Three buffers: steps 0 to 2 are read, and three more are asked for.
    assert asked == order.slice(0, 12)


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
        time.sleep(0.2)  # the threads read ahead
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


def test_an_error_in_a_thread_reaches_the_caller_every_time(dataset_dir):
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
        time.sleep(0.3)
        return read(*arguments)

    monkeypatch.setattr(dataset, "read_into", slow_read)
    with open_loader(dataset, micro=1) as loader:
        loader.next_step()
        assert 0.05 < loader.wait_seconds < 30


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
