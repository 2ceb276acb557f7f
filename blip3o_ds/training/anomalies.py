"""When numbers go wrong: which samples were in a batch that gave no finite gradient, and losses out of the ordinary."""

from __future__ import annotations

import json
import statistics
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor


def record_bad_batch(path: Path, step: int, keys: Sequence[str], losses: Sequence[Tensor]) -> None:
    """Append a step that was skipped to the file `path`, as a line of JSON.

    Every rank must call it, with its samples' keys and its micro-batches' losses `[B]`. A line holds `step`, `keys`
    (all samples of the step, over all ranks) and `not_finite` (those whose own loss is not; empty where only the
    gradient is not).
    """
    finite = [bool(value) for loss in losses for value in loss.isfinite().tolist()]
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, list(zip(keys, finite, strict=True)))
    samples = [sample for rank in gathered for sample in rank]
    if dist.get_rank() == 0:
        not_finite = [key for key, is_finite in samples if not is_finite]
        line = {"step": step, "keys": [key for key, _ in samples], "not_finite": not_finite}
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


class SpikeDetector:
    """How far a loss lies above the ones before it, in robust standard deviations.

    The scale is 1.4826 times the median absolute deviation (that of a normal distribution), of the last `window`
    losses; before half of them are there, nothing is out of the ordinary.
    """

    def __init__(self, window: int = 64, threshold: float = 6.0) -> None:
        self._window = window
        self._losses: deque[float] = deque(maxlen=window)
        self._threshold = threshold

    def score(self, loss: float) -> float:
        """The robust z-score of `loss`, which from then on counts among the ones before."""
        score = 0.0
        if len(self._losses) >= self._window // 2:
            median = statistics.median(self._losses)
            deviation = statistics.median(abs(value - median) for value in self._losses)
            score = (loss - median) / max(1.4826 * deviation, 1e-3 * abs(median), 1e-12)
        self._losses.append(loss)
        return score

    def is_spike(self, score: float) -> bool:
        return score > self._threshold
