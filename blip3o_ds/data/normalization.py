"""Between the space of the stored embeddings and the space that the network sees, one of three ways.

`minimal` means raw embeddings, no normalisation; `full` gives every token unit length; only `standardize`, by the
per-channel statistics of the training set, has an inverse.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from blip3o_ds.data.format.manifest import ChannelStats
from blip3o_ds.errors import CheckpointError, ConfigError, DataError
from blip3o_ds.files import atomic_write_json, read_json

Mode = Literal["minimal", "full", "standardize"]

# The file names both statistics of the usual pair in every mode, and leaves them null where they are not used.
_UNUSED = dict.fromkeys(("eva_mean", "eva_std", "clip_mean", "clip_std"))


class Normalizer:
    """Maps embeddings to network space and back; arithmetic in fp32, the result in the input's dtype.

    A channel that is constant in the training set (`std` zero) is centred and not scaled.
    """

    def __init__(self, mode: Mode, stats: Mapping[str, tuple[Tensor, Tensor]] | None = None) -> None:
        """`stats` are each tensor's mean and standard deviation, [D]; ConfigError if `standardize` lacks them."""
        if mode not in get_args(Mode):
            raise ConfigError(f"data.normalization = {mode!r}: expected one of {', '.join(get_args(Mode))}")
        if mode == "standardize" and not stats:
            raise ConfigError("data.normalization = standardize: no mean and std; read them from the manifest")
        self.mode = mode
        self._stats = {name: (mean.float(), std.float()) for name, (mean, std) in (stats or {}).items()}

    @classmethod
    def from_stats(cls, mode: Mode, stats: Mapping[str, ChannelStats]) -> Normalizer:
        """From a manifest's `stats`."""
        used = stats if mode == "standardize" else {}
        return cls(mode, {name: (torch.from_numpy(s.mean), torch.from_numpy(s.var**0.5)) for name, s in used.items()})

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Normalizer:
        """Rebuild what `state_dict` described."""
        names = [key.removesuffix("_mean") for key, value in state.items() if key.endswith("_mean") and value]
        stats = {name: (torch.tensor(state[f"{name}_mean"]), torch.tensor(state[f"{name}_std"])) for name in names}
        return cls(state["mode"], stats)

    def state_dict(self) -> dict[str, Any]:
        """Plain JSON: the mode, and each tensor's statistics as lists of numbers, `NAME_mean` and `NAME_std`."""
        state: dict[str, Any] = {"mode": self.mode}
        for name, (mean, std) in self._stats.items():
            state |= {f"{name}_mean": mean.tolist(), f"{name}_std": std.tolist()}
        return state if self._stats else {**state, **_UNUSED}

    def save(self, path: str | Path) -> None:
        atomic_write_json(path, self.state_dict())

    @classmethod
    def load(cls, path: str | Path) -> Normalizer:
        """Read what `save` wrote; raises CheckpointError for a file that is missing or holds something else."""
        state = read_json(path, CheckpointError, "copy it again from the run or the export that it belongs to")
        try:
            return cls.from_state(state)
        except (ValueError, KeyError, TypeError, AttributeError, ConfigError) as error:
            raise CheckpointError(f"{path}: not a normaliser's state ({error!r}); copy it again from the run") from None

    def __call__(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Every tensor, [..., D], in network space."""
        return {name: self._normalize(name, x) for name, x in tensors.items()}

    def inverse(self, name: str, y: Tensor) -> Tensor:
        """A generated tensor, [..., D], in the space of the stored embeddings; `full` keeps unit scale."""
        if self.mode != "standardize":
            return y
        mean, std = self._mean_and_std(name, y)
        return (y.float() * std + mean).to(y.dtype)

    def scale(self, name: str, y: Tensor) -> Tensor:
        """By how much `inverse` stretches each channel of y, [..., D]: [D]."""
        return (
            torch.ones(y.shape[-1], device=y.device) if self.mode != "standardize" else self._mean_and_std(name, y)[1]
        )

    def _normalize(self, name: str, x: Tensor) -> Tensor:
        if self.mode == "minimal":
            return x
        if self.mode == "full":
            return F.normalize(x.float(), dim=-1).to(x.dtype)
        mean, std = self._mean_and_std(name, x)
        return ((x.float() - mean) / std).to(x.dtype)

    def _mean_and_std(self, name: str, x: Tensor) -> tuple[Tensor, Tensor]:
        if name not in self._stats:
            raise DataError(f"{name}: no normalisation statistics; there are some for {', '.join(self._stats)}")
        mean, std = self._stats[name]
        if x.shape[-1] != len(mean):
            raise DataError(f"{name}: {x.shape[-1]} channels, but the normalisation statistics have {len(mean)}")
        return mean.to(x.device), torch.where(std > 0, std, torch.ones_like(std)).to(x.device)
