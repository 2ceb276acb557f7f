"""Rotary positions in three axes (t, row, col) for a grid of patches with or without a CLS token.

A patch is at (0, row, col) and CLS at (1, 0, 0), so the t axis distinguishes the two kinds of token.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn


def grid_positions(grid_size: int, has_cls: bool) -> np.ndarray:
    """Coordinates (t, row, col) of each token, `[N, 3]` float64; CLS, if there is one, is token 0."""
    row, col = np.divmod(np.arange(grid_size**2), grid_size)
    patches = np.stack([np.zeros_like(row), row, col], axis=1).astype(np.float64)
    return np.concatenate([[[1.0, 0.0, 0.0]], patches]) if has_cls else patches


def axis_pairs(head_dim: int) -> tuple[int, int, int]:
    """How many of a head's `D/2` pairs rotate by (t, row, col): three eighths each for row and col, the rest for t."""
    pairs = head_dim // 2
    spatial = 3 * pairs // 8
    return pairs - 2 * spatial, spatial, spatial


def rope_tables(grid_size: int, has_cls: bool, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every token's angles, each `[N, D/2]` fp32.

    Pair i of an axis with n pairs rotates by `coordinate * theta ** (-i / n)` (Su et al. 2021, one axis at a time).
    Computed in NumPy, so that contexts that change PyTorch's default dtype or device do not affect the tables.
    """
    positions = grid_positions(grid_size, has_cls)
    angles = np.hstack(
        [
            positions[:, axis, None] * theta ** (-np.arange(pairs) / max(pairs, 1))
            for axis, pairs in enumerate(axis_pairs(head_dim))
        ]
    )
    return torch.from_numpy(np.cos(angles).astype(np.float32)), torch.from_numpy(np.sin(angles).astype(np.float32))


class RotaryTables(nn.Module):
    """Holds the tables on the model's device; they stay fp32 when the model is cast to a lower precision."""

    cos: Tensor  # [N, D/2]
    sin: Tensor  # [N, D/2]

    def __init__(self, grid_size: int, has_cls: bool, head_dim: int, theta: float) -> None:
        super().__init__()
        self._arguments = (grid_size, has_cls, head_dim, theta)
        cos, sin = rope_tables(*self._arguments)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(self) -> tuple[Tensor, Tensor]:
        return self.cos, self.sin

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        cos, sin = rope_tables(*self._arguments)  # `fn` moves and casts: follow its device, not its dtype
        self.cos, self.sin = cos.to(self.cos.device), sin.to(self.sin.device)
        return self
