"""Which samples are looked at, and that they come in order."""

from __future__ import annotations

import pytest
import torch

from blip3o_ds.data.reading.loader import read_batches, spread_indices
from tests.evaluation.conftest import linear_pairs


@pytest.mark.parametrize(("total", "wanted"), [(10, 3), (10, 9), (1000, 7), (5, 1)])
def test_a_part_is_spread_evenly_over_the_whole(total, wanted):
    indices = spread_indices(total, wanted)
    assert len(indices) == wanted
    assert indices[0] == 0
    gaps = [b - a for a, b in zip(indices, [*indices[1:], total], strict=True)]
    assert max(gaps) - min(gaps) <= 1


@pytest.mark.parametrize("wanted", [None, 4, 9])
def test_all_are_taken_where_there_are_no_more(wanted):
    assert spread_indices(4, wanted) == [0, 1, 2, 3]


def test_batches_hold_the_samples_asked_for_in_their_order(make_dataset):
    eva, clip, _ = linear_pairs(11, noise=0.1)  # shards of 4, 4 and 3
    dataset = make_dataset(eva, clip)
    assert [dataset.place(i) for i in range(11)] == [(s, i) for s, n in enumerate((4, 4, 3)) for i in range(n)]

    batches = list(read_batches(dataset, [9, 0, 4, 3, 10], 2))

    assert [batch.positions.tolist() for batch in batches] == [[9, 0], [4, 3], [10]]
    assert [key for batch in batches for key in batch.keys] == [f"image_{i:03d}" for i in (9, 0, 4, 3, 10)]
    assert torch.equal(torch.cat([batch["eva"] for batch in batches]), eva[[9, 0, 4, 3, 10]])
    assert torch.equal(torch.cat([batch["clip"] for batch in batches]), clip[[9, 0, 4, 3, 10]])
