"""Which samples an evaluation or a fit looks at, and reading them in batches.

A part of a dataset is spread evenly over it, not its head: shards are often sorted by where the images came from.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence

import torch

from blip3o_ds.data.reading.dataset import EmbeddingDataset
from blip3o_ds.data.reading.loader import Batch

PROGRESS_SECONDS = 10.0


def spread_indices(total: int, max_samples: int | None) -> list[int]:
    """`max_samples` indices spread evenly over `range(total)`, ascending; all of them where there are no more."""
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


class ProgressLog:
    """Says how far a long loop over images is, at most every `PROGRESS_SECONDS`."""

    def __init__(self, logger: logging.Logger, what: str, total: int) -> None:
        self._logger, self._what, self._total = logger, what, total
        self._began = self._spoke = time.monotonic()

    def at(self, done: int) -> None:
        """Call with the number of images that are done."""
        now = time.monotonic()
        if now - self._spoke < PROGRESS_SECONDS:
            return
        self._spoke = now
        left = (now - self._began) / max(done, 1) * (self._total - done)
        self._logger.info("%s: %d of %d images, about %.0f s left", self._what, done, self._total, left)
