"""Batches for training and evaluation, read ahead by threads and copied ahead to the GPU.

A step's samples depend only on its position in the global order: every rank takes its slice of the same stretch, so
another world size sees the same samples, and the state to save is one number.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from blip3o_ds.data.format.codec import decode_all
from blip3o_ds.data.reading.dataset import EmbeddingDataset
from blip3o_ds.data.reading.order import GlobalOrder
from blip3o_ds.data.reading.ring import Step, StepRing
from blip3o_ds.errors import DataError


@dataclass(frozen=True, eq=False)
class Batch:
    """A micro-batch, its tensors [B, N, D] by name; `batch["eva"]` is one of them.

    As it is stored, so a tensor in fp8-e4m3 is float8_e4m3fn with its scales [B, N] beside it until `decode()`.
    """

    tensors: dict[str, Tensor]
    positions: Tensor  # [B] int64 on the CPU: place in the endless order (evaluation: sequential index)
    keys: list[str]

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def decode(self) -> Batch:
        """The same with fp8-e4m3 multiplied out to bf16, where the batch is: on a GPU, one pass."""
        return replace(self, tensors=decode_all(self.tensors))


class EmbeddingLoader:
    """This rank's micro-batches, one optimizer step at a time.

    A step takes the next G = micro_batch_size * gradient_accumulation_steps * world_size positions; rank r the
    r-th of `world_size` contiguous slices, cut into micro-batches in order. Use as a context manager or `close()`.

    On a CUDA `device` the batches arrive there, copied one ahead on a separate stream, and belong to the caller. On the
    CPU they are views of buffers that the next call of `next_step` lets be overwritten, so clone what you keep.

    A bad sample is an error, or is replaced as `Replacements` says; all ranks do the same steps either way. `positions`
    are those of the order, `keys` those of the samples that were read.
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
        device: torch.device | str = "cpu",
    ) -> None:
        sizes = micro_batch_size, gradient_accumulation_steps, world_size, prefetch
        if min(sizes) < 1:
            names = "micro_batch_size, gradient_accumulation_steps, world_size and prefetch"
            raise DataError(f"{names} must be at least 1, found {', '.join(map(str, sizes))}")
        if not 0 <= rank < world_size:
            raise DataError(f"rank must lie in [0, {world_size}), found {rank}")
        if order.num_samples != len(dataset):
            raise DataError(f"the order covers {order.num_samples} samples, the dataset has {len(dataset)}")
        self.wait_seconds = 0.0  # time that callers spent in next_step waiting for data
        self.samples_per_step = micro_batch_size * gradient_accumulation_steps * world_size
        self.dataset = dataset
        self._order = order
        self._micro_batch_size = micro_batch_size
        self._share = micro_batch_size * gradient_accumulation_steps
        self._rank = rank
        self._prefetch = prefetch
        self._uploader = _Uploader(device) if torch.device(device).type == "cuda" else None
        self._position = 0
        self._closed = False
        self._ring: StepRing | None = None
        self._handed_out: Step | None = None

    def next_step(self) -> Iterator[Batch]:
        """The next step's micro-batches; an error in a reading thread is raised here."""
        if self._closed:
            raise RuntimeError("the loader is closed")
        if self._ring is None:
            self._ring = StepRing(
                self.dataset,
                self._order,
                start=self._position + self._rank * self._share,
                stride=self.samples_per_step,
                rows=self._share,
                num_buffers=self._prefetch + 2,  # and one that is handed out, one that is being filled
                pin=self._uploader is not None,
            )
        if self._handed_out is not None:
            self._ring.release(self._handed_out)
            self._handed_out = None
        started = time.perf_counter()
        step = self._handed_out = self._ring.get()
        self.wait_seconds += time.perf_counter() - started
        self._position += self.samples_per_step
        if self._uploader is None:
            return iter(self._cut(step))
        return self._uploader.feed(step, self._cut, self._ring.peek)

    @property
    def num_replaced(self) -> int:
        """Reads so far, those ahead included, that were given another sample than the one at their place."""
        return self.dataset.bad_samples.num_replaced

    def state_dict(self) -> dict[str, int]:
        """Epoch and samples handed out so far, over all ranks and epochs; what was only read ahead does not count."""
        return {"epoch": self._position // self._order.num_samples, "samples_consumed": self._position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken, with any world size or batch size."""
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
        self._stop()
        self._closed = True

    def __enter__(self) -> EmbeddingLoader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _stop(self) -> None:
        if self._ring is not None:
            self._ring.close()
            self._ring = self._handed_out = None

    def _cut(self, step: Step) -> list[Batch]:
        batches = []
        for begin in range(0, self._share, self._micro_batch_size):
            end = begin + self._micro_batch_size
            tensors = {name: tensor[begin:end] for name, tensor in step.buffers.tensors.items()}
            positions = torch.arange(step.position + begin, step.position + end)
            batches.append(Batch(tensors, positions, step.keys[begin:end]))
        return batches


class _Upload(NamedTuple):
    step: Step
    number: int  # in its step
    batch: Batch  # on the GPU
    arrived: torch.cuda.Event


class _Uploader:
    """Copies micro-batches to the GPU on a separate stream."""

    def __init__(self, device: torch.device | str) -> None:
        self._device = torch.device(device)
        self._stream = torch.cuda.Stream(self._device)
        self._ahead: _Upload | None = None

    def feed(self, step: Step, cut: Callable[[Step], list[Batch]], peek: Callable[[], Step | None]) -> Iterator[Batch]:
        """The step's micro-batches on the GPU; while one is worked on, the next is copied, also of the next step."""
        batches = cut(step)
        for number, batch in enumerate(batches):
            upload = self._ahead
            if upload is None or (upload.step, upload.number) != (step, number):
                upload = self._upload(step, number, batch)
            self._ahead = None
            if number + 1 < len(batches):
                self._ahead = self._upload(step, number + 1, batches[number + 1])
            elif (following := peek()) is not None:
                self._ahead = self._upload(following, 0, cut(following)[0])
            yield self._received(upload)

    def _upload(self, step: Step, number: int, batch: Batch) -> _Upload:
        with torch.cuda.stream(self._stream):
            moved = {name: x.to(self._device, non_blocking=True) for name, x in batch.tensors.items()}
            arrived = torch.cuda.Event()
            arrived.record(self._stream)
        step.buffers.uploaded = arrived
        return _Upload(step, number, replace(batch, tensors=moved), arrived)

    def _received(self, upload: _Upload) -> Batch:
        stream = torch.cuda.current_stream(self._device)
        stream.wait_event(upload.arrived)
        for tensor in upload.batch.tensors.values():
            tensor.record_stream(stream)  # so that its memory is not given to the next copy while in use here
        return upload.batch


def spread_indices(total: int, max_samples: int | None) -> list[int]:
    """`max_samples` indices spread evenly over `range(total)`, ascending; all of them if there are no more."""
    if max_samples is None or max_samples >= total:
        return list(range(total))
    return [i * total // max_samples for i in range(max_samples)]


def read_batches(dataset: EmbeddingDataset, indices: Sequence[int], batch_size: int) -> Iterator[Batch]:
    """The samples at sequential `indices` in batches, the last one shorter; their `positions` are the indices."""
    for start in range(0, len(indices), batch_size):
        part = indices[start : start + batch_size]
        samples = [dataset.read(*dataset.place(index)) for index in part]
        yield Batch(
            tensors={name: torch.stack([sample[name] for sample in samples]) for name in dataset.spec.tensors},
            positions=torch.tensor(list(part), dtype=torch.int64),
            keys=[sample.key for sample in samples],
        )
