"""What storing an embedding in another dtype changes: relative error and cosine of its tokens.

What it does to a ridge regression, which needs condition and target together, is in `baselines.py`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Distortion:
    """Compares tokens as they were given with the same tokens as they are read."""

    def __init__(self) -> None:
        self._tokens = 0
        self._errors = self._cosines = 0.0  # sums
        self._largest_error, self._smallest_cosine = 0.0, 1.0

    def add(self, given: Tensor, stored: Tensor) -> None:
        """Count tokens `given` [N, D] that are read back as `stored` [N, D]."""
        if given.dtype == stored.dtype and torch.equal(given, stored):  # much the faster, and often so
            self._tokens += len(given)
            self._cosines += len(given)
            return
        x, y = given.float(), stored.float()
        # Squares of the largest and the smallest floats leave fp32's range, so each token is divided by its largest.
        largest = x.abs().amax(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
        x, y = x / largest, y / largest
        x_norm, y_norm = x.norm(dim=-1), y.norm(dim=-1)  # x_norm is at least 1, or 0 for a token of zeros
        zeros = x_norm == 0
        errors = torch.where(zeros, y_norm, (x - y).norm(dim=-1) / x_norm)
        cosines = torch.where(zeros & (y_norm == 0), 1.0, (x * y).sum(dim=-1) / (x_norm * y_norm).clamp_min(1e-12))
        self._tokens += len(x)
        self._errors += float(errors.double().sum())
        self._cosines += float(cosines.double().sum())
        self._largest_error = max(self._largest_error, float(errors.max()))
        self._smallest_cosine = min(self._smallest_cosine, float(cosines.min()))

    def to_dict(self) -> dict[str, Any]:
        """The `tokens` counted, and mean and worst of |given - stored| / |given| and of the cosine, None for no tokens.

        The cosine is computed in fp32, so it is exact to about 1e-7.
        """
        if self._tokens == 0:
            return {"tokens": 0, "relative_error": None, "relative_error_max": None, "cosine": None, "cosine_min": None}
        return {
            "tokens": self._tokens,
            "relative_error": self._errors / self._tokens,
            "relative_error_max": self._largest_error,
            "cosine": self._cosines / self._tokens,
            "cosine_min": self._smallest_cosine,
        }
