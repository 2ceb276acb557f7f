"""Threads that read a rank's samples ahead, into a ring of buffers that are reused.

Each thread takes the next row that no other has, also of the next step, so none waits for another; a step is handed out
when all of its rows are there, in order.
"""

from __future__ import annotations

import logging
import os
import threading
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from blip3o_ds.data.format.codec import SampleMemory, StoredTensor, stored_tensors
from blip3o_ds.data.format.schema import DatasetSpec
from blip3o_ds.data.reading.bad_samples import SLOW_READ_SECONDS
from blip3o_ds.data.reading.dataset import EmbeddingDataset
from blip3o_ds.data.reading.order import GlobalOrder
from blip3o_ds.errors import DataError

logger = logging.getLogger(__name__)

_READ_THREADS = min(4, os.cpu_count() or 1)  # reading releases the interpreter lock; four saturate a memory channel
_READAHEAD_BYTES = 512 << 20  # of this rank's next samples that the system is asked to have in memory
_READAHEAD_STEPS = 64  # at most, where samples are small
# Looking whether samples are in memory costs the readers time: after _SURE_AFTER steps in a row that were, only one
# step of _LOOK_EVERY is looked at, until one is not in memory.
_SURE_AFTER = 4
_LOOK_EVERY = 8


class Buffers:
    """Memory for `rows` samples as they are stored: for each of the spec's tensors one of [rows, ...]."""

    def __init__(self, spec: DatasetSpec, rows: int, pin: bool = False) -> None:
        self.tensors: dict[str, Tensor] = {tensor.name: _memory(rows, tensor, pin) for tensor in stored_tensors(spec)}
        self.rows = [SampleMemory({name: x[row] for name, x in self.tensors.items()}) for row in range(rows)]
        self.uploaded: torch.cuda.Event | None = None  # recorded after the last copy out of them to the GPU


def _memory(rows: int, tensor: StoredTensor, pin: bool) -> Tensor:
    if pin:
        return torch.empty(rows, *tensor.shape, dtype=tensor.dtype, pin_memory=True)
    # NumPy's, which asks for huge pages where PyTorch does not: reading into them is a twentieth faster.
    memory = torch.from_numpy(np.empty(rows * tensor.num_bytes, dtype=np.uint8))
    return memory.view(tensor.dtype).view(rows, *tensor.shape)


@dataclass(eq=False)
class Step:
    """One step's samples of this rank."""

    position: int  # of the first row, in the global order
    places: list[tuple[int, int]]  # (shard, index) of each row
    buffers: Buffers
    keys: list[str]
    taken: int = 0  # rows that a thread has begun
    left: int = 0  # rows not yet there
    errors: dict[int, Exception] = field(default_factory=dict)  # by row


class StepRing:
    """Reads steps ahead: step n is the `rows` positions from `start + n * stride` of the order.

    At most `num_buffers` steps are in memory, those handed out and not yet released among them. The order must not be
    used by anyone else until `close()`.
    """

    def __init__(
        self,
        dataset: EmbeddingDataset,
        order: GlobalOrder,
        *,
        start: int,
        stride: int,
        rows: int,
        num_buffers: int,
        pin: bool,
    ) -> None:
        self._dataset = dataset
        self._order = order
        self._stride = stride
        self._rows = rows
        self._begun = self._planned = start  # positions of the next step to begin, and to plan
        self._plans: deque[list[tuple[int, int]]] = deque()  # of the next steps
        sample_bytes = sum(tensor.num_bytes for tensor in stored_tensors(dataset.spec))
        self._plans_ahead = min(_READAHEAD_STEPS, max(1, _READAHEAD_BYTES // (rows * sample_bytes)))
        self._steps_in_memory = 0  # in a row, of those looked at
        self._near: list[int] = []
        self._free = deque(Buffers(dataset.spec, rows, pin) for _ in range(num_buffers))
        self._steps: deque[Step] = deque()  # begun and not yet handed out
        self._failure: BaseException | None = None
        self._stopping = False
        lock = threading.Lock()
        self._room = threading.Condition(lock)  # readers wait for a free buffer
        self._ready = threading.Condition(lock)  # the caller waits for a step
        self._adviser = ThreadPoolExecutor(1, thread_name_prefix="embedding-readahead")
        self._readers = [
            threading.Thread(target=self._read, name=f"embedding-reader-{number}", daemon=True)
            for number in range(min(_READ_THREADS, rows * num_buffers))
        ]
        for reader in self._readers:
            reader.start()

    def get(self) -> Step:
        """Wait for the next step. Raises, at every call, the error of the step's first row that has one."""
        with self._ready:
            while self._failure is None and not (self._steps and self._steps[0].left == 0):
                if not self._ready.wait(SLOW_READ_SECONDS):
                    self._report_slow()
            if self._failure is not None:
                raise self._failure
            if errors := self._steps[0].errors:
                raise errors[min(errors)]
            return self._steps.popleft()

    def peek(self) -> Step | None:
        """The next step if it is there already."""
        with self._ready:
            step = self._steps[0] if self._steps else None
            return step if step is not None and step.left == 0 and not step.errors else None

    def release(self, step: Step) -> None:
        """Return the step's buffers, to be overwritten once the copies out of them to the GPU are done."""
        with self._room:
            self._free.append(step.buffers)
            self._room.notify_all()

    def close(self) -> None:
        with self._room:
            self._stopping = True
            self._room.notify_all()
        for reader in self._readers:
            reader.join()
        self._adviser.shutdown(cancel_futures=True)

    def _report_slow(self) -> None:
        """Warn of the shards that the next step waits for; a read that never ends shows nowhere else."""
        if not self._steps:
            return
        step = self._steps[0]
        for row in range(step.taken):
            if not step.keys[row] and row not in step.errors:
                shard, _ = step.places[row]
                self._dataset.bad_samples.slow(self._dataset.manifest.shards[shard].name, SLOW_READ_SECONDS)

    def _read(self) -> None:
        step: Step | None = None
        try:
            while (task := self._take(done=step)) is not None:
                step, row = task
                try:
                    step.keys[row] = self._dataset.read_into(*step.places[row], step.buffers.rows[row])
                except Exception as error:
                    step.errors[row] = error
        except BaseException as error:
            with self._ready:
                self._failure = error
                self._ready.notify_all()

    def _take(self, done: Step | None) -> tuple[Step, int] | None:
        """Count a row of `done` as read; returns the next row to read, in a new step if need be, or None at the end."""
        with self._room:
            if done is not None:
                done.left -= 1
                if done.left == 0:
                    self._ready.notify_all()
            while not self._stopping:
                last = self._steps[-1] if self._steps else None
                if last is None or last.taken == self._rows:
                    if not self._free:
                        self._room.wait()
                        continue
                    last = self._begin()
                last.taken += 1
                return last, last.taken - 1
            return None

    def _begin(self) -> Step:
        near = self._order.shards_near(self._begun)
        if near != self._near:
            self._dataset.prefetch(near)
            self._near = near
        while len(self._plans) <= self._plans_ahead:
            self._plans.append(self._order.slice(self._planned, self._planned + self._rows))
            if self._looks_at(self._planned):
                self._adviser.submit(self._advise, self._planned, self._plans[-1])
            self._planned += self._stride
        buffers = self._free.popleft()  # the one that has been free for longest
        if buffers.uploaded is not None:
            buffers.uploaded.synchronize()
        step = Step(self._begun, self._plans.popleft(), buffers, [""] * self._rows, left=self._rows)
        self._steps.append(step)
        self._begun += self._stride
        return step

    def _looks_at(self, position: int) -> bool:
        """Whether to look if the samples of the step at this position are in memory, and ask for the others."""
        return self._steps_in_memory < _SURE_AFTER or position // self._stride % _LOOK_EVERY == 0

    def _advise(self, position: int, places: list[tuple[int, int]]) -> None:
        if not self._looks_at(position):  # no longer, since it was submitted
            return
        asked = False
        for shard, index in places:
            if self._stopping:
                return
            try:
                asked |= self._dataset.will_need(shard, index)
            except (DataError, OSError) as error:
                # The thread that reads this sample will raise it.
                logger.debug("no readahead of sample %d of shard %d: %s", index, shard, error)
                return
        self._steps_in_memory = 0 if asked else self._steps_in_memory + 1
