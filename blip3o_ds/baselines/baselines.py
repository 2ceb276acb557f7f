"""The baselines of a run: what they are, how they predict and sample, and the file that keeps them."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields, replace
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from blip3o_ds.errors import CheckpointError
from blip3o_ds.files import atomic_write_bytes
from blip3o_ds.flow.prior import LinearGaussian

_TENSORS = ("clip_mean", "directions", "ridge_weight", "ridge_bias", "ridge_noise")
_PRIOR = "prior."


@dataclass(frozen=True)
class Baselines:
    """Baselines fitted to the training set, fp32, for normalised embeddings.

    A model that does not beat the mean of `prior`, a ridge over a token's surroundings, has learnt nothing beyond it; a
    sampler has to beat the Gaussians.
    """

    clip_mean: Tensor  # [Dc]
    directions: Tensor  # [Dc, P] in which the training embeddings vary most, orthonormal
    ridge_weight: Tensor  # [De, Dc], of each token alone
    ridge_bias: Tensor  # [Dc]
    ridge_noise: Tensor  # [Dc, Dc]: standard normal rows times it have the covariance of the ridge's residuals
    prior: LinearGaussian
    num_samples: int  # used for the fit
    dataset_samples: int  # in the dataset
    ridge_r2: float | None  # share of variance explained on images left out; None if none could be
    prior_r2: float | None

    def predict_mean(self, eva: Tensor) -> Tensor:
        """The mean embedding for every token: [B, N, De] -> [B, N, Dc] in fp32."""
        return self.clip_mean.expand(*eva.shape[:-1], -1)

    def predict_ridge(self, eva: Tensor) -> Tensor:
        """The ridge of each token alone: [B, N, De] -> [B, N, Dc] in fp32."""
        return (eva.float() - self.prior.eva_mean) @ self.ridge_weight + self.ridge_bias

    def readings(self, eva: Tensor, noise: Tensor) -> dict[str, Tensor]:
        """What each baseline generates for eva `[B, N, De]`: `[K, B, N, Dc]` from noise of that shape.

        A point estimate is `[1, B, N, Dc]`.
        """
        ridge, mean = self.predict_ridge(eva), self.prior.mean(eva)
        return {
            "linear_gaussian": self.prior.sample(mean, noise),
            "ridge_noise": ridge + noise @ self.ridge_noise,
            "context_ridge": mean[None],
            "ridge": ridge[None],
            "mean_embedding": self.predict_mean(eva)[None],
        }

    def to(self, device: torch.device | str) -> Baselines:
        """The same on another device."""
        moved = {name: getattr(self, name).to(device) for name in _TENSORS}
        return replace(self, prior=self.prior.to(device), **moved)

    def without_folds(self) -> Baselines:
        """The same without the maps of the folds, which only a run needs, and which are most of it."""
        return replace(self, prior=replace(self.prior, fold_weights=self.prior.fold_weights[:0]))

    def save(self, path: str | Path) -> None:
        """Write one safetensors file, with the numbers of the fit in its metadata."""
        tensors = {name: getattr(self, name) for name in _TENSORS}
        tensors |= {_PRIOR + name: value for name, value in self.prior.tensors().items()}
        tensors = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
        facts = ("num_samples", "dataset_samples", "ridge_r2", "prior_r2")
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
                prior = {field.name: file.get_tensor(_PRIOR + field.name) for field in fields(LinearGaussian)}
                tensors = {name: file.get_tensor(name) for name in _TENSORS}
                return cls(prior=LinearGaussian(**prior), **tensors, **facts)
        except FileNotFoundError:
            raise CheckpointError(
                f"{path} is missing; a run writes it at its start, and an export has a copy"
            ) from None
        except (safetensors.SafetensorError, TypeError, ValueError) as error:
            raise CheckpointError(f"{path} does not hold the baselines of a run: {error}") from None
