"""Two baselines that need no training: the mean embedding, and per-token ridge regression from EVA to CLIP.

Both are fitted in one pass over the training set, in float64, on normalised embeddings; a model that does not beat the
ridge has learnt nothing beyond it.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from blip3o_ds.data.format.schema import TokenLayout
from blip3o_ds.data.normalization import Normalizer
from blip3o_ds.data.reading.dataset import EmbeddingDataset
from blip3o_ds.data.reading.loader import read_batches, spread_indices
from blip3o_ds.errors import CheckpointError, DataError
from blip3o_ds.files import atomic_write_bytes
from blip3o_ds.progress import Progress

logger = logging.getLogger(__name__)

HELDOUT_EVERY = 10  # every tenth sample chooses the penalty
PENALTY_GRID = tuple(10.0 ** (exponent / 2) for exponent in range(-16, 7))  # relative to the mean eigenvalue
DEFAULT_PENALTY = 1e-2  # if there are too few samples to hold any out
FIT_BATCH = 8  # samples read and multiplied at once
MAX_FIT_SAMPLES = 2048  # of 256 tokens: 128 tokens per channel of 4096; more take time and change nothing
COST_SAMPLES = 64  # about 16,000 tokens, four times the channels of EVA-CLIP-8B
MAX_DIRECTIONS = 16
_TENSORS = ("eva_mean", "clip_mean", "ridge_weight")


@dataclass(frozen=True)
class Baselines:
    """The two baselines, fp32, for normalised embeddings."""

    eva_mean: Tensor  # [De]
    clip_mean: Tensor  # [Dc]
    ridge_weight: Tensor  # [Dc, De]
    ridge_lambda: float  # the penalty on the per-token covariance
    num_samples: int  # used for the fit
    dataset_samples: int  # in the dataset
    heldout_r2: float | None  # share of variance explained on the held-out tenth; None if nothing was held out

    def predict_mean(self, eva: Tensor) -> Tensor:
        """The mean embedding for every token: [B, N, De] -> [B, N, Dc] in fp32."""
        return self.clip_mean.expand(*eva.shape[:-1], -1)

    def predict_ridge(self, eva: Tensor) -> Tensor:
        """`(eva - eva_mean) @ ridge_weight.T + clip_mean`: [B, N, De] -> [B, N, Dc] in fp32."""
        return (eva.float() - self.eva_mean) @ self.ridge_weight.T + self.clip_mean

    def readings(self, eva: Tensor, noise: Tensor) -> dict[str, Tensor]:
        """What each baseline says of eva [B, N, De], by its name: samples [K, B, N, Dc], or one estimate [1, B, N, Dc].

        `noise` [K, B, N, Dc] is standard normal, for baselines that draw samples; these two do not.
        """
        return {"ridge": self.predict_ridge(eva)[None], "mean_embedding": self.predict_mean(eva)[None]}

    @property
    def directions(self) -> Tensor:
        """The directions of normalised clip tokens along which the ridge varies most, orthonormal [Dc, P], P <= 16."""
        weight = self.ridge_weight.double()
        return torch.linalg.eigh(weight @ weight.T).eigenvectors.flip(1)[:, :MAX_DIRECTIONS]

    def to(self, device: torch.device | str) -> Baselines:
        """The same on another device."""
        return replace(self, **{name: getattr(self, name).to(device) for name in _TENSORS})

    def save(self, path: str | Path) -> None:
        """Write one safetensors file, with the numbers of the fit in its metadata."""
        tensors = {name: getattr(self, name).detach().cpu().contiguous().clone() for name in _TENSORS}
        facts = ("ridge_lambda", "num_samples", "dataset_samples", "heldout_r2")
        metadata = {name: json.dumps(getattr(self, name)) for name in facts}
        atomic_write_bytes(path, safetensors.torch.save(tensors, metadata))

    @classmethod
    def load(cls, path: str | Path) -> Baselines:
        """Read what `save` wrote.

        Raises:
            CheckpointError: the file is missing, damaged, or holds something else.
        """
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                facts = {name: json.loads(text) for name, text in (file.metadata() or {}).items()}
                return cls(**{name: file.get_tensor(name) for name in _TENSORS}, **facts)
        except FileNotFoundError:
            raise CheckpointError(
                f"{path} is missing; a run writes it at its start, and an export has a copy"
            ) from None
        except (safetensors.SafetensorError, TypeError, ValueError) as error:
            raise CheckpointError(f"{path} does not hold the baselines of a run: {error}") from None


def fit_baselines(
    dataset: EmbeddingDataset,
    normalizer: Normalizer,
    max_samples: int = MAX_FIT_SAMPLES,
    device: torch.device | str = "cpu",
) -> Baselines:
    """Fit the mean and the ridge on the tokens of `dataset`, at most those of `max_samples` spread evenly over it.

    The ridge (Hoerl & Kennard 1970) minimises the mean of |clip - prediction|^2 over tokens plus lambda |weight|^2.
    Lambda is chosen from `PENALTY_GRID`, times the mean eigenvalue of the tokens' covariance, by the variance explained
    on every tenth sample, which is held out; the weights are then fitted to all samples. This takes one pass over the
    data, and memory for three matrices [De, De] in float64.

    Raises:
        DataError: the dataset is empty, or an embedding is not finite.
    """
    indices = spread_indices(len(dataset), max_samples)
    if not indices:
        raise DataError("the baselines need at least one training sample, the dataset has none")
    moments, heldout = _collect_moments(dataset, normalizer, indices, device)
    penalty, heldout_r2 = DEFAULT_PENALTY, None
    if heldout is not None:
        penalty, heldout_r2 = _choose_penalty(moments, heldout)
        moments.absorb(heldout)
    weight, ridge_lambda = _solve_ridge(moments, penalty)
    if heldout_r2 is not None:
        logger.info("ridge baseline: held-out R2 %.4f with lambda %.3g", heldout_r2, ridge_lambda)
    return Baselines(
        eva_mean=moments.x_mean.float().cpu(),
        clip_mean=moments.y_mean.float().cpu(),
        ridge_weight=weight.float().cpu(),
        ridge_lambda=ridge_lambda,
        num_samples=len(indices),
        dataset_samples=len(dataset),
        heldout_r2=heldout_r2,
    )


def ridge_cost(
    src: str | Path, dst: str | Path, token_layout: TokenLayout | None = None, max_samples: int = COST_SAMPLES
) -> dict[str, Any]:
    """Held-out R2 of the ridge fitted to each of two datasets of the same samples: `r2_source`, `r2_stored`.

    The fits use `max_samples` spread evenly over the datasets; R2 is None for fewer than ten. At the width of
    EVA-CLIP-8B a fit takes minutes on a few cores, seconds on a GPU.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    datasets = [EmbeddingDataset(path, token_layout=token_layout) for path in (src, dst)]
    fits = [fit_baselines(dataset, Normalizer("minimal"), max_samples, device) for dataset in datasets]
    return {"samples": fits[0].num_samples, "r2_source": fits[0].heldout_r2, "r2_stored": fits[1].heldout_r2}


class _Moments:
    """Sums over tokens of x, y, x x^T, x y^T and y^2 in float64, around a fixed origin near the mean.

    The origin avoids cancellation when the mean is subtracted.
    """

    def __init__(self, x_origin: Tensor, y_origin: Tensor) -> None:
        self.x_origin, self.y_origin = x_origin, y_origin
        self.count = 0
        self.x, self.y = torch.zeros_like(x_origin), torch.zeros_like(y_origin)
        self.xx = x_origin.new_zeros(len(x_origin), len(x_origin))
        self.xy = x_origin.new_zeros(len(x_origin), len(y_origin))
        self.yy = y_origin.new_zeros(())

    def add(self, x: Tensor, y: Tensor) -> None:
        """Add tokens x [T, De] and y [T, Dc]."""
        x, y = x - self.x_origin, y - self.y_origin
        self.count += len(x)
        self.x += x.sum(dim=0)
        self.y += y.sum(dim=0)
        self.xx.addmm_(x.T, x)
        self.xy.addmm_(x.T, y)
        self.yy += y.square().sum()

    def absorb(self, other: _Moments) -> None:
        """Add the tokens of `other`, which has the same origin."""
        self.count += other.count
        for name in ("x", "y", "xx", "xy", "yy"):
            getattr(self, name).add_(getattr(other, name))

    @property
    def x_mean(self) -> Tensor:
        return self.x_origin + self.x / self.count

    @property
    def y_mean(self) -> Tensor:
        return self.y_origin + self.y / self.count

    def covariances(self, x_mean: Tensor, y_mean: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Means over tokens of (x-x_mean)(x-x_mean)^T, (x-x_mean)(y-y_mean)^T and |y-y_mean|^2."""
        dx, dy = x_mean - self.x_origin, y_mean - self.y_origin
        x, y = self.x / self.count, self.y / self.count
        xx = self.xx / self.count
        xx -= torch.outer(x, dx) + torch.outer(dx, x - dx)
        xy = self.xy / self.count
        xy -= torch.outer(x, dy) + torch.outer(dx, y - dy)
        yy = self.yy / self.count - 2 * (y @ dy) + dy @ dy
        return xx, xy, yy


def _collect_moments(
    dataset: EmbeddingDataset, normalizer: Normalizer, indices: list[int], device: torch.device | str
) -> tuple[_Moments, _Moments | None]:
    """Those of the samples that are kept, and of the held-out ones if there are any."""
    heldout_indices = indices[HELDOUT_EVERY - 1 :: HELDOUT_EVERY]
    kept_indices = [index for n, index in enumerate(indices) if n % HELDOUT_EVERY != HELDOUT_EVERY - 1]
    progress = Progress("fitting the ridge baseline", len(indices))
    done, origin = 0, None
    groups: dict[str, _Moments] = {}
    for name, group in (("kept", kept_indices), ("heldout", heldout_indices)):
        for x, y in _tokens(dataset, normalizer, group, device):
            origin = origin or (x.mean(dim=0), y.mean(dim=0))
            if name not in groups:
                groups[name] = _Moments(*origin)
            groups[name].add(x, y)
            done = min(done + FIT_BATCH, len(indices))
            progress.at(done)
    return groups["kept"], groups.get("heldout")


def _tokens(
    dataset: EmbeddingDataset, normalizer: Normalizer, indices: list[int], device: torch.device | str
) -> Iterator[tuple[Tensor, Tensor]]:
    for batch in read_batches(dataset, indices, FIT_BATCH):
        pair = normalizer({name: batch[name].float() for name in ("eva", "clip")})
        x, y = (tensor.flatten(0, 1).to(device).double() for tensor in pair.values())
        if not (x.isfinite().all() and y.isfinite().all()):
            raise DataError(
                f"samples {', '.join(batch.keys)}: one of their embeddings holds NaN or infinity; "
                "blip3o-ds data verify DIR names it"
            )
        yield x, y


def _choose_penalty(kept: _Moments, heldout: _Moments) -> tuple[float, float]:
    """The relative penalty with the smallest held-out error, and its R2; no second pass over the data.

    In the eigenvectors Q of the kept covariance, the solution for every penalty is diagonal, and its held-out error
    follows from the held-out covariances: |y|^2 - 2 <W, C_xy> + <W, C_xx W>.
    """
    x_mean, y_mean = kept.x_mean, kept.y_mean
    covariance, cross, _ = kept.covariances(x_mean, y_mean)
    eigenvalues, vectors = torch.linalg.eigh(covariance)
    scale = float(eigenvalues.mean())
    heldout_covariance, heldout_cross, heldout_square = heldout.covariances(x_mean, y_mean)
    cross, heldout_cross = vectors.T @ cross, vectors.T @ heldout_cross
    heldout_covariance = vectors.T @ heldout_covariance @ vectors
    if scale <= 0 or heldout_square <= 0:
        return DEFAULT_PENALTY, 0.0

    best = (DEFAULT_PENALTY, float("inf"))
    for penalty in PENALTY_GRID:
        weight = cross / (eigenvalues.clamp(min=0) + penalty * scale)[:, None]
        fit = -2 * (weight * heldout_cross).sum() + (weight * (heldout_covariance @ weight)).sum()
        error = float(heldout_square + fit)
        if error < best[1]:
            best = (penalty, error)
    return best[0], 1 - best[1] / float(heldout_square)


def _solve_ridge(moments: _Moments, penalty: float) -> tuple[Tensor, float]:
    """The weight [Dc, De], and the absolute lambda."""
    covariance, cross, _ = moments.covariances(moments.x_mean, moments.y_mean)
    scale = float(covariance.diagonal().mean())  # the mean eigenvalue
    if scale <= 0:
        return torch.zeros_like(cross.T), 0.0  # all tokens are equal: there is nothing to regress on
    ridge_lambda = penalty * scale
    covariance.diagonal().add_(ridge_lambda)
    factor = torch.linalg.cholesky(covariance)
    return torch.cholesky_solve(cross, factor).T, ridge_lambda
