"""Mean and variance of every channel, in one pass over data that does not fit in memory.

Sums of squared deviations are merged pairwise in float64 (Chan, Golub & LeVeque 1983), which stays accurate where the
mean is large against the deviation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from blip3o_ds.data.format.manifest import ChannelStats
from blip3o_ds.data.format.schema import DatasetSpec

_BLOCK_CHANNELS = 256  # at a time in float64, which for a sample of 256 tokens stay in the processor's cache


@dataclass(frozen=True, eq=False)
class ChannelMoments:
    """Count, mean and sum of squared deviations from the mean, per channel."""

    count: int
    mean: np.ndarray  # [D] float64
    m2: np.ndarray  # [D] float64

    @staticmethod
    def empty(dim: int) -> ChannelMoments:
        return ChannelMoments(0, np.zeros(dim), np.zeros(dim))

    @staticmethod
    def of(tokens: np.ndarray) -> ChannelMoments:
        """The moments of `tokens` [N, D]."""
        dim = tokens.shape[1]
        mean, m2 = np.empty(dim), np.empty(dim)
        for start in range(0, dim, _BLOCK_CHANNELS):
            block = slice(start, start + _BLOCK_CHANNELS)
            values = tokens[:, block].astype(np.float64)
            mean[block] = values.mean(axis=0)
            values -= mean[block]
            m2[block] = np.einsum("nd,nd->d", values, values)
        return ChannelMoments(len(tokens), mean, m2)

    def merge(self, other: ChannelMoments) -> ChannelMoments:
        if self.count == 0 or other.count == 0:
            return other if self.count == 0 else self
        count = self.count + other.count
        delta = other.mean - self.mean
        mean = self.mean + delta * (other.count / count)
        m2 = self.m2 + other.m2 + delta * delta * (self.count * other.count / count)
        return ChannelMoments(count, mean, m2)

    def without(self, other: ChannelMoments) -> ChannelMoments:
        """The moments of the rest when `other`, a part of this, is taken out: the inverse of `merge`."""
        count = self.count - other.count
        if count == 0 or other.count == 0:
            return ChannelMoments.empty(len(self.mean)) if count == 0 else self
        mean = self.mean + (self.mean - other.mean) * (other.count / count)
        delta = other.mean - mean
        m2 = self.m2 - other.m2 - delta * delta * (count * other.count / self.count)
        return ChannelMoments(count, mean, np.maximum(m2, 0))  # rounding must not make a variance negative

    def to_stats(self) -> ChannelStats:
        return ChannelStats(self.mean, self.m2 / max(self.count, 1), self.count)


def no_moments(spec: DatasetSpec) -> dict[str, ChannelMoments]:
    return {name: ChannelMoments.empty(tensor.dim) for name, tensor in spec.tensors.items()}


def sample_moments(tensors: Mapping[str, Tensor]) -> dict[str, ChannelMoments]:
    return {name: ChannelMoments.of(values.float().numpy()) for name, values in tensors.items()}


def merge_moments(left: Mapping[str, ChannelMoments], right: Mapping[str, ChannelMoments]) -> dict[str, ChannelMoments]:
    """Each tensor's moments over both sets of samples."""
    return {name: moments.merge(right[name]) for name, moments in left.items()}


def moments_of_stats(stats: Mapping[str, ChannelStats]) -> dict[str, ChannelMoments]:
    return {name: ChannelMoments(s.count, s.mean, s.var * s.count) for name, s in stats.items()}


def stats_of_moments(moments: Mapping[str, ChannelMoments]) -> dict[str, ChannelStats]:
    return {name: of_tensor.to_stats() for name, of_tensor in moments.items()}
