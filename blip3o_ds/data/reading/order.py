"""The order in which samples are seen: a pure function of the seed, the epoch and the shards' sizes.

Shards are permuted, then samples within each window of consecutive permuted shards, so reads stay within a few open
files. Positions count samples over all epochs in a row, whatever the world size.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from blip3o_ds.errors import DataError

_CACHED_WINDOWS = 2  # a step may straddle two windows
_CACHED_EPOCHS = 2  # and two epochs, and so may the windows that are read next
_SHARD_STREAM = 0  # windows take streams 1, 2, ...


class GlobalOrder:
    """Finds the sample at a global position. Not for use by several threads at once.

    `shard_sizes` are samples per shard, `window_shards` is the number of shards whose samples are mixed.
    """

    def __init__(self, shard_sizes: Sequence[int], seed: int, window_shards: int = 16) -> None:
        if not 0 <= seed < 1 << 64:
            raise DataError(f"the order's seed must lie in [0, 2**64), found {seed}")
        if window_shards < 1:
            raise DataError(f"window_shards must be at least 1, found {window_shards}")
        self._sizes = np.asarray(shard_sizes, dtype=np.int64)
        if self._sizes.ndim != 1 or (self._sizes < 0).any() or self._sizes.sum() == 0:
            raise DataError("the order needs at least one sample, in shards of non-negative sizes")
        self.seed = seed
        self.window_shards = window_shards
        self.num_samples = int(self._sizes.sum())
        self._epoch = lru_cache(_CACHED_EPOCHS)(self._permute_epoch)
        self._window = lru_cache(_CACHED_WINDOWS)(self._permute_window)

    def locate(self, position: int) -> tuple[int, int]:
        """(shard, index in the shard) of the sample at a global position; `position // num_samples` is its epoch."""
        return self.slice(position, position + 1)[0]

    def slice(self, start: int, stop: int) -> list[tuple[int, int]]:
        """(shard, index) of the positions `start` to `stop`, which may span windows and epochs."""
        if start < 0:
            raise DataError(f"positions start at 0, found {start}")
        places: list[tuple[int, int]] = []
        while start < stop:
            epoch, within = divmod(start, self.num_samples)
            _, ends = self._epoch(epoch)
            window = int(np.searchsorted(ends, within, side="right"))
            begin = int(ends[window - 1]) if window else 0
            shards, indices = self._window(epoch, window)
            first, last = within - begin, min(within - begin + stop - start, len(shards))
            places += zip(shards[first:last].tolist(), indices[first:last].tolist(), strict=True)
            start += last - first
        return places

    def shards_near(self, position: int) -> list[int]:
        """The shards of the window at a global position and of the window after it: what is read now and next."""
        epoch, within = divmod(position, self.num_samples)
        shards, ends = self._epoch(epoch)
        window = int(np.searchsorted(ends, within, side="right"))
        near = shards[window * self.window_shards : (window + 2) * self.window_shards].tolist()
        if window + 1 == len(ends):
            near += self._epoch(epoch + 1)[0][: self.window_shards].tolist()
        return near

    def _permute_epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The shards of an epoch in order, and the position within the epoch at which each window ends."""
        shards = _permutation(self.seed, epoch, _SHARD_STREAM, len(self._sizes))
        starts = np.arange(0, len(shards), self.window_shards)
        return shards, np.cumsum(np.add.reduceat(self._sizes[shards], starts))

    def _permute_window(self, epoch: int, window: int) -> tuple[np.ndarray, np.ndarray]:
        """Shard and index of every sample of a window, mixed."""
        order, _ = self._epoch(epoch)
        members = order[window * self.window_shards : (window + 1) * self.window_shards]
        shards = np.repeat(members, self._sizes[members])
        indices = np.concatenate([np.arange(size) for size in self._sizes[members]])
        mixed = _permutation(self.seed, epoch, 1 + window, len(shards))
        return shards[mixed], indices[mixed]


def _permutation(seed: int, epoch: int, stream: int, size: int) -> np.ndarray:
    """A permutation of `range(size)`: the stable order of random keys.

    numpy guarantees the bits of Philox (Salmon et al. 2011) in all versions, but not `Generator.permutation`. The
    stream is a high word of the counter, so streams never overlap.
    """
    bits = np.random.Philox(key=np.array([seed, epoch], np.uint64), counter=np.array([0, 0, stream, 0], np.uint64))
    return np.argsort(bits.random_raw(size), kind="stable")
