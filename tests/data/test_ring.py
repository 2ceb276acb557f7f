"""The ring of buffers, and the order of the copies to a GPU that it feeds."""

from __future__ import annotations

import threading

import pytest
import torch

from blip3o_ds.data.reading import loader as loader_module
from blip3o_ds.data.reading import ring as ring_module
from blip3o_ds.data.reading.dataset import EmbeddingDataset
from blip3o_ds.data.reading.loader import EmbeddingLoader, _Upload, _Uploader
from blip3o_ds.data.reading.order import GlobalOrder
from blip3o_ds.data.reading.ring import Buffers, StepRing


@pytest.fixture
def dataset(dataset_dir):
    return EmbeddingDataset(dataset_dir(19))


def open_ring(dataset, **arguments):
    order = GlobalOrder(dataset.shard_sizes, 3, 2)
    return StepRing(dataset, order, **{"start": 0, "stride": 4, "rows": 4, "num_buffers": 3, "pin": False, **arguments})


def test_a_step_is_seen_ahead_only_when_all_of_it_is_there(dataset, monkeypatch):
    read, gate = dataset.read_into, threading.Event()

    def held_up(shard, index, out):
        key = read(shard, index, out)
        if (shard, index) == places[6]:
            gate.wait(10)
        return key

    places = GlobalOrder(dataset.shard_sizes, 3, 2).slice(0, 8)
    monkeypatch.setattr(dataset, "read_into", held_up)
    ring = open_ring(dataset)
    assert ring.get().places == places[:4]
    assert ring.peek() is None
    gate.set()
    step = ring.get()
    assert step.places == places[4:]
    assert all(step.keys)
    ring.close()


def test_a_step_that_failed_is_not_seen_ahead(dataset, monkeypatch):
    def fail(*_):
        raise ValueError("damaged")

    monkeypatch.setattr(dataset, "read_into", fail)
    ring = open_ring(dataset)
    with pytest.raises(ValueError, match="damaged"):
        ring.get()
    assert ring.peek() is None
    ring.close()


def test_the_first_error_of_a_step_is_the_one_that_is_raised(dataset, monkeypatch):
    places = GlobalOrder(dataset.shard_sizes, 3, 2).slice(0, 4)
    later_failed = threading.Event()
    read = dataset.read_into

    def fail_twice(shard, index, out):
        if (shard, index) == places[1]:
            later_failed.wait(10)
            raise ValueError("row 1")
        if (shard, index) == places[2]:
            later_failed.set()
            raise ValueError("row 2")
        return read(shard, index, out)

    monkeypatch.setattr(dataset, "read_into", fail_twice)
    monkeypatch.setattr(ring_module, "_READ_THREADS", 2)
    ring = open_ring(dataset)
    with pytest.raises(ValueError, match="row 1"):
        ring.get()
    ring.close()


def test_without_a_released_buffer_nothing_is_overwritten(dataset):
    ring = open_ring(dataset, num_buffers=2)
    steps = [ring.get(), ring.get()]
    kept = [step.buffers.tensors["eva"].clone() for step in steps]
    assert ring.peek() is None
    assert all(torch.equal(a, step.buffers.tensors["eva"]) for a, step in zip(kept, steps, strict=True))
    ring.release(steps[0])
    assert ring.get().buffers is steps[0].buffers
    ring.close()


class Inline:
    """Runs at once what an executor would run later."""

    def __init__(self, *_, **__):
        pass

    def submit(self, function, *arguments):
        function(*arguments)

    def shutdown(self, **_):
        pass


def test_where_samples_are_in_memory_only_some_steps_are_looked_at(dataset_dir, monkeypatch):
    monkeypatch.setattr(ring_module, "ThreadPoolExecutor", Inline)
    monkeypatch.setattr(ring_module, "_READAHEAD_STEPS", 1)
    dataset = EmbeddingDataset(dataset_dir(200))  # an epoch is longer than what is read here
    order = GlobalOrder(dataset.shard_sizes, 3, 2)
    step_of = {place: position // 4 for position, place in enumerate(order.slice(0, 200))}
    looked = []

    def will_need(*place):
        looked.append(step_of[place])
        return step_of[place] == 24  # the only one that is not in memory

    monkeypatch.setattr(dataset, "will_need", will_need)
    ring = open_ring(dataset)
    for _ in range(40):
        ring.release(ring.get())
    ring.close()
    once = [step for step in dict.fromkeys(looked) if step <= 40]
    assert once == [0, 1, 2, 3, 8, 16, 24, 25, 26, 27, 28, 32, 40]


class Later(Inline):
    """Runs nothing until it is told to."""

    def __init__(self, *_, **__):
        self.jobs = []

    def submit(self, function, *arguments):
        self.jobs.append((function, arguments))


def test_what_was_to_be_looked_at_is_dropped_when_the_steps_before_were_in_memory(dataset_dir, monkeypatch):
    monkeypatch.setattr(ring_module, "ThreadPoolExecutor", Later)
    dataset = EmbeddingDataset(dataset_dir(200))
    looked = []
    monkeypatch.setattr(dataset, "will_need", lambda *place: bool(looked.append(place)))
    ring = open_ring(dataset)
    ring.get()
    jobs = ring._adviser.jobs
    assert len(jobs) > 16  # a start asks for as many steps as are read ahead
    for function, arguments in jobs[:17]:
        function(*arguments)
    ring.close()
    assert len(looked) == 4 * len([0, 1, 2, 3, 8, 16])


class RecordedUploader(_Uploader):
    """Notes what would be copied to a GPU, and when it is used."""

    def __init__(self):
        self._ahead = None
        self.log = []

    def _upload(self, step, number, batch):
        self.log.append(f"copy {step.position}.{number}")
        return _Upload(step, number, batch, None)

    def _received(self, upload):
        self.log.append(f"use {upload.step.position}.{upload.number}")
        return upload.batch


def test_each_micro_batch_is_copied_once_and_while_the_one_before_it_is_used(dataset, monkeypatch):
    unpinned = lambda *given, **settings: StepRing(*given, **{**settings, "pin": False})  # noqa: E731
    monkeypatch.setattr(loader_module, "StepRing", unpinned)
    order = GlobalOrder(dataset.shard_sizes, 3, 2)
    uploader = RecordedUploader()
    with EmbeddingLoader(
        dataset, order, micro_batch_size=2, gradient_accumulation_steps=2, rank=0, world_size=1
    ) as loader:
        loader._uploader = uploader
        positions = []
        for _ in range(3):
            batches = loader.next_step()
            while loader._ring.peek() is None:  # the threads have a little time, as in training
                threading.Event().wait(0.01)
            positions += [position for batch in batches for position in batch.positions.tolist()]
        loader.load_state_dict({"epoch": 0, "samples_consumed": 2})  # what was copied ahead is of no use now
        positions += [position for batch in loader.next_step() for position in batch.positions.tolist()]

    assert positions == [*range(12), *range(2, 6)]
    before, after = uploader.log[:13], uploader.log[13:]
    assert before == [
        *("copy 0.0", "copy 0.1", "use 0.0", "copy 4.0", "use 0.1"),
        *("copy 4.1", "use 4.0", "copy 8.0", "use 4.1"),
        *("copy 8.1", "use 8.0", "copy 12.0", "use 8.1"),
    ]
    assert [entry for entry in after if not entry.startswith("copy 6")] == [
        "copy 2.0",
        "copy 2.1",
        "use 2.0",
        "use 2.1",
    ]


def test_buffers_hold_what_a_sample_s_file_holds(spec):
    buffers = Buffers(spec, 3)
    assert {name: tuple(tensor.shape) for name, tensor in buffers.tensors.items()} == {
        "eva": (3, 5, 8),
        "clip": (3, 5, 4),
    }
    buffers.rows[1]["eva"].fill_(7)
    assert buffers.tensors["eva"][1].eq(7).all()
