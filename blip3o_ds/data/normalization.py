"""Between the space of the stored embeddings and the space that the network sees, one of three ways.

`minimal` leaves both sides raw, `full` gives every token unit length, `standardize` uses the per-channel statistics of
the training set; only the last can be inverted, the others generate in network space.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from blip3o_ds.data.format.schema import ChannelStats
from blip3o_ds.errors import CheckpointError, ConfigError, DataError
from blip3o_ds.files import atomic_write_json

Mode = Literal["minimal", "full", "standardize"]

_MODES = ("minimal", "full", "standardize")
_STATISTICS = ("eva_mean", "eva_std", "clip_mean", "clip_std")


class Normalizer:
    """Maps embeddings to network space and back; arithmetic in fp32, the result in the input's dtype.

    A channel that is constant in the training set (`std` zero) is centred and not scaled.
    """

    def __init__(
        self,
        mode: Mode,
        eva_mean: Tensor | None = None,
        eva_std: Tensor | None = None,
        clip_mean: Tensor | None = None,
        clip_std: Tensor | None = None,
    ) -> None:
        """Statistics are `[De]` and `[Dc]`, needed by `standardize` alone.

        Raises:
            ConfigError: the mode is unknown, or `standardize` lacks a statistic.
        """
        if mode not in _MODES:
            raise ConfigError(f"data.normalization = {mode!r}: expected one of {', '.join(_MODES)}")
        statistics = (eva_mean, eva_std, clip_mean, clip_std)
        absent = [name for name, value in zip(_STATISTICS, statistics, strict=True) if value is None]
        if mode == "standardize" and absent:
            raise ConfigError(f"data.normalization = standardize: no {', '.join(absent)}; read them from the manifest")
        self.mode = mode
        self.eva_mean, self.eva_std, self.clip_mean, self.clip_std = (
            None if value is None else value.float() for value in statistics
        )

    @classmethod
    def from_stats(cls, mode: Mode, eva_stats: ChannelStats, clip_stats: ChannelStats) -> Normalizer:
        """From a manifest's `eva_stats` and `clip_stats`."""
        if mode != "standardize":
            return cls(mode)
        sides = (torch.from_numpy(values) for s in (eva_stats, clip_stats) for values in (s.mean, s.var**0.5))
        return cls(mode, *sides)

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Normalizer:
        """Rebuild what `state_dict` described."""
        values = (state.get(name) for name in _STATISTICS)
        return cls(state["mode"], *(None if value is None else torch.tensor(value) for value in values))

    def state_dict(self) -> dict[str, Any]:
        """Plain JSON: the mode, and each statistic as a list of numbers or None."""
        values = {name: getattr(self, name) for name in _STATISTICS}
        lists = {name: None if value is None else value.tolist() for name, value in values.items()}
        return {"mode": self.mode, **lists}

    def save(self, path: str | Path) -> None:
        """Write `state_dict` as a JSON file."""
        atomic_write_json(path, self.state_dict())

    @classmethod
    def load(cls, path: str | Path) -> Normalizer:
        """Read what `save` wrote.

        Raises:
            CheckpointError: the file is missing, damaged, or holds something else.
        """
        try:
            return cls.from_state(json.loads(Path(path).read_text(encoding="utf-8")))
        except FileNotFoundError:
            raise CheckpointError(f"{path}: no such file; it belongs beside a run's checkpoints and exports") from None
        except (ValueError, KeyError, TypeError, ConfigError) as error:
            raise CheckpointError(f"{path}: not a normaliser's state ({error!r}); copy it again from the run") from None

    def eva(self, x: Tensor) -> Tensor:
        """`[..., De]` to network space."""
        return self._normalize("eva", x, self.eva_mean, self.eva_std)

    def clip(self, x: Tensor) -> Tensor:
        """`[..., Dc]` to network space."""
        return self._normalize("clip", x, self.clip_mean, self.clip_std)

    def clip_inverse(self, y: Tensor) -> Tensor:
        """Generated `[..., Dc]` back to the space of the stored embeddings; `full` keeps unit scale."""
        if self.mode != "standardize":
            return y
        mean, scale = _mean_and_scale("clip", y, self.clip_mean, self.clip_std)
        return (y.float() * scale + mean).to(y.dtype)

    def _normalize(self, side: str, x: Tensor, mean: Tensor | None, std: Tensor | None) -> Tensor:
        if self.mode == "minimal":
            return x
        if self.mode == "full":
            return F.normalize(x.float(), dim=-1).to(x.dtype)
        mean, scale = _mean_and_scale(side, x, mean, std)
        return ((x.float() - mean) / scale).to(x.dtype)


def _mean_and_scale(side: str, x: Tensor, mean: Tensor | None, std: Tensor | None) -> tuple[Tensor, Tensor]:
    assert mean is not None  # the constructor saw to it
    assert std is not None
    if x.shape[-1] != len(mean):
        raise DataError(f"{side}: {x.shape[-1]} channels, but the normalisation statistics have {len(mean)}")
    scale = torch.where(std > 0, std, torch.ones_like(std))
    return mean.to(x.device), scale.to(x.device)
