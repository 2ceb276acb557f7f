"""The random numbers of a sample, each a function of (seed, position, stream) alone.

So neither the number of ranks nor the micro-batch changes what a sample draws.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def uniforms(seed: int, positions: Tensor, stream: int) -> np.ndarray:
    """One float64 for each position `[B]`, strictly between 0 and 1."""
    return ((_hashes(seed, positions, stream) >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52


def normals(seed: int, positions: Tensor, stream: int, shape: tuple[int, int], device: torch.device | str) -> Tensor:
    """Standard normal numbers `[B, *shape]` fp32 on `device`; they also depend on the kind of device."""
    noise = torch.empty(len(positions), *shape, device=device)
    generator = torch.Generator(device)
    for row, row_seed in zip(noise, _hashes(seed, positions, stream), strict=True):
        row.normal_(generator=generator.manual_seed(int(row_seed)))
    return noise


def _hashes(seed: int, positions: Tensor, stream: int) -> np.ndarray:
    """64 mixed bits of (seed, stream, position); every argument is mixed before the next is added."""
    rows = positions.detach().cpu().numpy().astype(np.uint64)
    mixed = _splitmix64(np.full(1, seed % 2**64, dtype=np.uint64))
    mixed = _splitmix64(mixed + np.uint64(stream))
    return _splitmix64(mixed + rows)


def _splitmix64(x: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele et al. 2014) on uint64, arithmetic modulo 2**64."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
