"""Reads chosen samples in batches, for an evaluation or a fit.

A subset is spread evenly over the dataset, since shards are often sorted by the source of the images.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from blip3o_ds.data.reading.dataset import EmbeddingDataset
from blip3o_ds.data.reading.loader import Batch


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
