"""Batches for training and evaluation, read ahead by a thread.

A step's samples depend on its position in the global order alone: every rank takes its slice of the same stretch,
so another world size sees the same samples, and the state to save is one number.
"""

from __future__ import annotations

import logging
import os
import queue
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from blip3o_ds.data.order import GlobalOrder
from blip3o_ds.data.shards import EmbeddingDataset
from blip3o_ds.errors import DataError

logger = logging.getLogger(__name__)

_READ_THREADS = min(4, os.cpu_count() or 1)  # copies release the interpreter lock; four saturate a memory channel
_POLL_SECONDS = 0.05


@dataclass(frozen=True, eq=False)
class Batch:
    """A micro-batch on the CPU, in pinned memory where there is CUDA."""

    eva: Tensor  # [B, N, eva_dim]
    clip: Tensor  # [B, N, clip_dim]
    positions: Tensor  # [B] int64: place in the endless order (evaluation: sequential index)
    keys: list[str]


class EmbeddingLoader:
    """This rank's micro-batches, one optimizer step at a time.

    A step takes the next G = micro_batch_size * gradient_accumulation_steps * world_size positions; rank r the
    r-th of `world_size` contiguous slices, cut into micro-batches in order. Use as a context manager or `close()`.
    """

    def __init__(
        self,
        dataset: EmbeddingDataset,
        order: GlobalOrder,
        *,
        micro_batch_size: int,
        gradient_accumulation_steps: int,
        rank: int,
        world_size: int,
        prefetch: int = 2,
    ) -> None:
        sizes = {
            "micro_batch_size": micro_batch_size,
            "gradient_accumulation_steps": gradient_accumulation_steps,
            "world_size": world_size,
            "prefetch": prefetch,
        }
        for name, value in sizes.items():
            if value < 1:
                raise DataError(f"{name} must be at least 1, found {value}")
        if not 0 <= rank < world_size:
            raise DataError(f"rank must lie in [0, {world_size}), found {rank}")
        if order.num_samples != len(dataset):
            raise DataError(f"the order covers {order.num_samples} samples, the dataset has {len(dataset)}")
        self.wait_seconds = 0.0  # time that callers spent in next_step waiting for data
        self.samples_per_step = micro_batch_size * gradient_accumulation_steps * world_size
        self._dataset = dataset
        self._order = order
        self._micro_batch_size = micro_batch_size
        self._accumulation = gradient_accumulation_steps
        self._rank = rank
        self._prefetch = prefetch
        self._position = 0
        self._closed = False
        self._producer: _Producer | None = None

    def next_step(self) -> list[Batch]:
        """The next step's micro-batches; an error in the reading thread is raised here."""
        if self._closed:
            raise RuntimeError("the loader is closed")
        if self._producer is None:
            self._producer = _Producer(self._read_step, self._position, self.samples_per_step, self._prefetch)
        started = time.perf_counter()
        try:
            batches = self._producer.get()
        finally:
            self.wait_seconds += time.perf_counter() - started
        self._position += self.samples_per_step
        return batches

    def state_dict(self) -> dict[str, int]:
        """Epoch and samples handed out so far, over all ranks and epochs; what was only read ahead does not count."""
        return {"epoch": self._position // self._order.num_samples, "samples_consumed": self._position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken, with any world size or batch size."""
        position = int(state["samples_consumed"])
        epoch = position // self._order.num_samples
        if position < 0 or int(state["epoch"]) != epoch:
            raise DataError(
                f"the saved position is sample {position} in epoch {state['epoch']}, but a dataset of "
                f"{self._order.num_samples} samples is in epoch {epoch} there; resume with the dataset, max_shards "
                "and max_samples that the run began with"
            )
        self._stop()
        self._position = position

    def close(self) -> None:
        """Stop reading ahead and wait for the thread to end."""
        self._stop()
        self._closed = True

    def __enter__(self) -> EmbeddingLoader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _stop(self) -> None:
        if self._producer is not None:
            self._producer.close()
            self._producer = None

    def _read_step(self, position: int, pool: ThreadPoolExecutor) -> list[Batch]:
        share = self._micro_batch_size * self._accumulation
        start = position + self._rank * share
        self._dataset.prefetch(self._order.shards_near(start))
        places = self._order.slice(start, start + share)
        cuts = range(0, share, self._micro_batch_size)
        return [
            _read_batch(self._dataset, places[cut : cut + self._micro_batch_size], start + cut, pool) for cut in cuts
        ]


def iterate_batches(
    dataset: EmbeddingDataset, batch_size: int, start: int = 0, stop: int | None = None
) -> Iterator[Batch]:
    """Samples `start` to `stop` of the dataset in stored order, once; the last batch may be smaller."""
    if batch_size < 1:
        raise DataError(f"batch_size must be at least 1, found {batch_size}")
    stop = len(dataset) if stop is None else min(stop, len(dataset))
    places = [(shard, index) for shard, size in enumerate(dataset.shard_sizes) for index in range(size)]
    with ThreadPoolExecutor(_READ_THREADS) as pool:
        for begin in range(start, stop, batch_size):
            yield _read_batch(dataset, places[begin : min(begin + batch_size, stop)], begin, pool)


def _read_batch(
    dataset: EmbeddingDataset, places: list[tuple[int, int]], position: int, pool: ThreadPoolExecutor
) -> Batch:
    pin = torch.cuda.is_available()
    spec = dataset.spec
    eva = torch.empty(len(places), spec.num_tokens, spec.eva_dim, dtype=dataset.dtype, pin_memory=pin)
    clip = torch.empty(len(places), spec.num_tokens, spec.clip_dim, dtype=dataset.dtype, pin_memory=pin)

    def read(row: int) -> str:
        return dataset.read_into(*places[row], eva[row], clip[row])

    keys = list(pool.map(read, range(len(places))))
    return Batch(eva, clip, torch.arange(position, position + len(places)), keys)


class _Producer:
    """A thread that reads whole steps ahead into a bounded queue until it is closed or fails."""

    def __init__(self, read_step: Any, position: int, samples_per_step: int, prefetch: int) -> None:
        self._read_step = read_step
        self._samples_per_step = samples_per_step
        self._queue: queue.Queue[list[Batch] | BaseException] = queue.Queue(prefetch)
        self._stopping = threading.Event()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(position,), name="embedding-loader", daemon=True)
        self._thread.start()

    def get(self) -> list[Batch]:
        if self._failure is not None:
            raise self._failure
        item = self._queue.get()
        if isinstance(item, BaseException):
            self._failure = item
            raise item
        return item

    def close(self) -> None:
        self._stopping.set()
        self._thread.join()

    def _run(self, position: int) -> None:
        with ThreadPoolExecutor(_READ_THREADS, thread_name_prefix="embedding-reader") as pool:
            try:
                while not self._stopping.is_set():
                    self._put(self._read_step(position, pool))
                    position += self._samples_per_step
            except BaseException as error:
                self._put(error)

    def _put(self, item: list[Batch] | BaseException) -> None:
        while not self._stopping.is_set():
            try:
                self._queue.put(item, timeout=_POLL_SECONDS)
                return
            except queue.Full:
                continue
