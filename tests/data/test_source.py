"""Where the shards of a split are looked for, from wherever its manifest was read."""

from __future__ import annotations

import numpy as np
import pytest

from blip3o_ds.data.format.manifest import ChannelStats, Manifest, Selection
from blip3o_ds.data.format.schema import DatasetSpec
from blip3o_ds.data.reading.dataset import shards_location
from blip3o_ds.errors import DataError


def split_of(location: str) -> Manifest:
    stats = ChannelStats(np.zeros(1), np.zeros(1), 0)
    spec = DatasetSpec.pair(1, "patch_only", 1, 1, "bf16", "a", "b")
    return Manifest(spec, (), {"eva": stats, "clip": stats}, {}, Selection(location, 0.5, "eval"))


@pytest.mark.parametrize(
    ("location", "of", "expected"),
    [
        ("/data/split/eval", "../../whole", "/data/whole"),
        ("/data/split/eval", "/other/whole", "/other/whole"),
        ("/data/split/eval", "s3://bucket/whole", "s3://bucket/whole"),
        ("https://host/sets/split/eval", "../../whole", "https://host/sets/whole"),
        ("s3://bucket/split/eval/", "../../whole", "s3://bucket/whole"),
    ],
)
def test_a_relative_parent_is_relative_to_the_split(location, of, expected):
    assert shards_location(location, split_of(of)) == expected


def test_a_pipe_cannot_follow_a_relative_parent():
    with pytest.raises(DataError, match=r"a relative path that a pipe cannot follow"):
        shards_location("pipe:cat /x/{name}", split_of("../whole"))
