"""Ridge regression from streamed sums, with images left out fold by fold.

A sample's error counts only under a map that has not seen its image: crops of one photograph are alike, so an error
within the sample, or on other crops of it, is far too small, and so is the penalty that it suggests.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

FIRST_PENALTY = 1e-1  # relative to the mean eigenvalue of the features' covariance; where the search begins
PENALTY_STEP = 10**0.5
PENALTY_STEPS = -14, 6  # down to rounding; up to 100 mean eigenvalues, which leave nothing of the map
ROUNDING = 1e-6  # of products in fp32, relative to the mean square of what is multiplied


@dataclass
class Sums:
    """Sums over tokens of x, y, x x^T, x y^T and y y^T, float64; x are features [F], y targets [Dc], near zero."""

    count: int
    x: Tensor
    y: Tensor
    xx: Tensor
    xy: Tensor
    yy: Tensor

    @classmethod
    def zeros(cls, num_features: int, num_targets: int, device: torch.device | str) -> Sums:
        F, D = num_features, num_targets
        shapes = ((F,), (D,), (F, F), (F, D), (D, D))
        return cls(0, *(torch.zeros(shape, dtype=torch.float64, device=device) for shape in shapes))

    def add(self, x: Tensor, y: Tensor) -> None:
        """Add tokens x [T, F] and y [T, Dc], fp32; products within the call are in fp32."""
        self.count += len(x)
        self.x += x.sum(dim=0, dtype=torch.float64)
        self.y += y.sum(dim=0, dtype=torch.float64)
        self.xx += x.T @ x
        self.xy += x.T @ y
        self.yy += y.T @ y

    def without(self, other: Sums) -> Sums:
        rest = (getattr(self, name) - getattr(other, name) for name in ("x", "y", "xx", "xy", "yy"))
        return Sums(self.count - other.count, *rest)

    def first(self, num_features: int) -> Sums:
        """The sums of the first features alone."""
        F = num_features
        return Sums(self.count, self.x[:F], self.y, self.xx[:F, :F], self.xy[:F], self.yy)

    @staticmethod
    def total(parts: Sequence[Sums]) -> Sums:
        names = ("count", "x", "y", "xx", "xy", "yy")
        return Sums(*(sum(getattr(part, name) for part in parts[1:]) + getattr(parts[0], name) for name in names))


@dataclass(frozen=True)
class LinearMap:
    """`y = x @ weight + bias`, float64."""

    weight: Tensor  # [F, Dc]
    bias: Tensor  # [Dc]

    def residual(self, sums: Sums) -> Tensor:
        """The sum over tokens of (y - prediction)(y - prediction)^T, [Dc, Dc], of the tokens in `sums`."""
        W, b = self.weight, self.bias
        fitted = W.T @ sums.xy + torch.outer(b, sums.y)  # sum of prediction y^T
        mixed = torch.outer(W.T @ sums.x, b)
        square = W.T @ sums.xx @ W + mixed + mixed.T + sums.count * torch.outer(b, b)
        return sums.yy - fitted - fitted.T + square

    def error(self, sums: Sums) -> float:
        """The trace of `residual`, without the whole matrix."""
        W, b = self.weight, self.bias
        square = (W * (sums.xx @ W)).sum() + 2 * (W.T @ sums.x) @ b + sums.count * b @ b
        return float(sums.yy.trace() - 2 * ((W * sums.xy).sum() + b @ sums.y) + square)


@dataclass(frozen=True)
class RidgeFit:
    """A ridge (Hoerl & Kennard 1970) and what is known of its error on new images."""

    whole: LinearMap  # fitted to all samples
    folds: list[LinearMap]  # each fitted without its fold
    penalty: float  # added to the covariance of the features
    r2: float | None  # share of variance explained on images left out; None if none could be
    covariance: Tensor  # [Dc, Dc] of the residuals of images left out, around zero


def fit_ridge(folds: Sequence[Sums]) -> RidgeFit:
    """Fit to all folds and without each of them; the penalty has the least error on images left out.

    With samples in a single fold nothing can be left out: the penalty is `FIRST_PENALTY`, and errors are in the sample.
    """
    total = Sums.total(folds)
    full = [number for number, fold in enumerate(folds) if fold.count]
    if len(full) < 2:
        whole = _solve(total, FIRST_PENALTY)
        return RidgeFit(whole, [whole] * len(folds), _absolute(total, FIRST_PENALTY), None, _mean(whole, total))
    rests = {number: total.without(folds[number]) for number in full}

    def error(step: int) -> float:
        return sum(_solve(rest, _penalty(step)).error(folds[number]) for number, rest in rests.items())

    step, least = _descend(error)
    maps = {number: _solve(rest, _penalty(step)) for number, rest in rests.items()}
    whole = _solve(total, _penalty(step))
    variance = total.yy.trace() - total.y @ total.y / total.count
    covariance = torch.stack([maps[number].residual(folds[number]) for number in full]).sum(dim=0) / total.count
    return RidgeFit(
        whole=whole,
        folds=[maps.get(number, whole) for number in range(len(folds))],
        penalty=_absolute(total, _penalty(step)),
        r2=float(1 - least / variance) if variance > 0 else 0.0,
        covariance=covariance,
    )


def _descend(error: Callable[[int], float]) -> tuple[int, float]:
    """The step with the least error, going down from 0: the error has one minimum."""
    best, least = 0, error(0)
    for direction in (1, -1):
        while PENALTY_STEPS[0] <= best + direction <= PENALTY_STEPS[1] and (found := error(best + direction)) < least:
            best, least = best + direction, found
        if best:
            break
    return best, least


def _penalty(step: int) -> float:
    return FIRST_PENALTY * PENALTY_STEP**step


def _absolute(sums: Sums, penalty: float) -> float:
    """A relative penalty times the mean eigenvalue; where all features are constant, times their mean square."""
    square = sums.xx.diagonal() / sums.count
    variance = float((square - (sums.x / sums.count).square()).mean())
    constant = variance <= ROUNDING * float(square.mean())
    return penalty * (float(square.mean()) or 1.0 if constant else variance)


def _solve(sums: Sums, penalty: float) -> LinearMap:
    x, y = sums.x / sums.count, sums.y / sums.count
    covariance = sums.xx / sums.count - torch.outer(x, x)
    added = _absolute(sums, penalty)
    covariance.diagonal().add_(added)
    trace = float(covariance.trace())
    factor, failed = torch.linalg.cholesky_ex(covariance)
    while failed and added < trace:  # so small a penalty drowns in the rounding of the sums
        covariance.diagonal().add_(9 * added)
        added *= 10
        factor, failed = torch.linalg.cholesky_ex(covariance)
    cross = sums.xy / sums.count - torch.outer(x, y)
    weight = torch.cholesky_solve(cross, factor)
    return LinearMap(weight, y - x @ weight)


def _mean(found: LinearMap, sums: Sums) -> Tensor:
    return found.residual(sums) / sums.count
