"""A training curve in a few numbers: where the loss began and ended, how it moved, and what the learning rate allowed.

They are read from the lines that a run writes into its `metrics.jsonl`, each the mean of several steps.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

WINDOWS = 10  # parts of the run over which the loss is averaged
STILL, STILL_AT_MOST = 0.02, 0.1  # a loss that changes by a smaller share, beyond its noise, has not moved
RISE = 0.3  # of an average over the least before it, beyond the noise
JUMP, MANY_JUMPS = 0.05, 3  # of an average over the one before it; a smaller one, or one within the noise, is none
FIT_LINES = 4  # at least, for a trend
SIGNIFICANT, CERTAIN = 2.0, 3.0  # standard errors


@dataclass(frozen=True)
class Curve:
    """A training curve in numbers; averages are over tenths of the run."""

    lines: int  # of metrics, that are finite
    steps: int
    loss_start: float  # the first average
    loss_end: float  # the last one
    loss_noise: float  # relative standard error of an average
    loss_rise: float  # of an average over the smallest before it, at most; a share of that
    loss_jumps: int  # averages above the one before by more than `JUMP` and the noise
    loss_change: float | None  # log(last / first) of a line fitted to log(loss); None, as those below: too few lines
    loss_change_error: float | None  # its standard error
    loss_trend: float | None  # relative change per step at the mean learning rate, over the last third of `lr_travel`
    loss_trend_error: float | None
    grad_norm_end: float  # median of the last third of the lines
    grad_norm_least: float
    grad_norm_growth: float  # the last third's median over the first's
    lr_peak: float
    lr_travel: float  # sum of the learning rate over the steps: AdamW moves a weight hardly further than that

    @classmethod
    def of(cls, history: Sequence[Mapping[str, float]]) -> Curve:
        """The curve of training lines with `step`, `loss`, `grad_norm` and `lr`, all finite; there is at least one."""
        step, loss, grad, rate = (
            np.array([line[name] for line in history], dtype=float) for name in ("step", "loss", "grad_norm", "lr")
        )
        loss = np.maximum(loss, 1e-12)
        count = min(WINDOWS, len(loss))
        means = np.log([part.mean() for part in np.array_split(loss, count)])
        noise = line_noise(loss) / math.sqrt(len(loss) / count)
        jump = max(math.log1p(JUMP), CERTAIN * math.sqrt(2) * noise)
        travel = np.cumsum(rate * np.diff(step, prepend=0))
        # Time by the learning rate: where the schedule has lowered it, a loss that falls slowly is not a flat one.
        time = travel / max(travel[-1] / step[-1], 1e-30)
        begin = min(int(np.searchsorted(time, time[-1] * 2 / 3)), max(len(loss) - FIT_LINES, 0))
        change, change_error = relative_trend(time, loss)
        trend, trend_error = relative_trend(time[begin:], loss[begin:])
        length = float(time[-1] - time[0])
        third = math.ceil(len(grad) / 3)
        grad_start, grad_end = float(np.median(grad[:third])), float(np.median(grad[-third:]))
        return cls(
            lines=len(history),
            steps=int(step[-1]),
            loss_start=math.exp(means[0]),
            loss_end=math.exp(means[-1]),
            loss_noise=noise,
            loss_rise=math.expm1((means - np.minimum.accumulate(means)).max()),
            loss_jumps=int((np.diff(means) > jump).sum()),
            loss_change=None if change is None else change * length,
            loss_change_error=None if change_error is None else change_error * length,
            loss_trend=trend,
            loss_trend_error=trend_error,
            grad_norm_end=grad_end,
            grad_norm_least=float(grad.min()),
            grad_norm_growth=grad_end / max(grad_start, 1e-12),
            lr_peak=float(rate.max()),
            lr_travel=float(travel[-1]),
        )

    @property
    def rises(self) -> bool:
        """Whether the loss goes up during the run, by more than noise."""
        rise = math.log1p(self.loss_rise) > math.log1p(RISE) + CERTAIN * self.loss_noise
        return rise or self.loss_jumps >= MANY_JUMPS

    @property
    def is_still(self) -> bool:
        """Whether the loss neither falls nor rises over the run, by more than noise."""
        if self.loss_change is None or self.loss_change_error is None or self.rises:
            return False
        return abs(self.loss_change) < min(STILL + SIGNIFICANT * self.loss_change_error, STILL_AT_MOST)


def line_noise(loss: np.ndarray) -> float:
    """Relative standard deviation of the noise of a line, from how far lines are off the middle of their neighbours."""
    if len(loss) < 3:
        return 0.0
    return 1.4826 * float(np.median(np.abs(np.diff(np.log(loss), n=2)))) / math.sqrt(6)


def relative_trend(time: np.ndarray, loss: np.ndarray) -> tuple[float, float] | tuple[None, None]:
    """Slope of log(loss) and its standard error, by least squares; None of fewer than `FIT_LINES` different times."""
    x, y = time - time.mean(), np.log(loss)
    square = float(x @ x)
    if len(time) < FIT_LINES or square == 0:
        return None, None
    slope = float(x @ y) / square
    residual = y - y.mean() - slope * x
    return slope, math.sqrt(float(residual @ residual) / (len(x) - 2) / square)
