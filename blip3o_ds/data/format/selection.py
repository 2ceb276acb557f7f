"""Splits that copy nothing: a part of another dataset's samples, chosen by a hash of each sample's key.

A sample's part depends only on its key and the fraction, so it stays the same when samples are appended, and the
held-out samples of a smaller fraction are among those of a larger one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from blip3o_ds.data.format.schema import check_choice
from blip3o_ds.errors import DataError

SplitPart = Literal["train", "eval"]


@dataclass(frozen=True)
class Selection:
    """The samples of the dataset `of` whose key hashes below `fraction` (`eval`) or not below it (`train`).

    `of` is a folder or URL; a relative one is relative to the folder of the manifest that says so.
    """

    of: str
    fraction: float
    part: SplitPart

    def __post_init__(self) -> None:
        if not self.of or self.of.startswith("pipe:") or not self.of.isprintable():
            # A manifest is data, perhaps of somebody else's making, and a pipe is a command.
            raise DataError(f"of must be a folder or a URL, not a command, found {self.of[:80]!r}")
        check_choice("part", self.part, SplitPart)
        if not 0 < self.fraction < 1:
            raise DataError(f"fraction must lie between 0 and 1, found {self.fraction!r}")

    def rows(self, keys: Sequence[str]) -> np.ndarray:
        """Indices into `keys` of the samples selected, ascending, int64."""
        held_out = key_hashes(keys) < np.uint64(int(self.fraction * 2**64))
        return np.flatnonzero(held_out if self.part == "eval" else ~held_out)


def key_hashes(keys: Sequence[str]) -> np.ndarray:
    """A number in [0, 2**64) for every key, uint64: the first 8 bytes of its BLAKE2b digest, little-endian."""
    digests = b"".join(hashlib.blake2b(key.encode(), digest_size=8).digest() for key in keys)
    return np.frombuffer(digests, dtype="<u8")
