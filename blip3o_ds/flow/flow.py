"""The flow from noise to CLIP embeddings: path, prediction, timesteps and loss weight, composed by the settings.

Each part is chosen by name from its table when the flow is built; nothing after that knows the names.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from blip3o_ds.config import FlowConfig, RunConfig
from blip3o_ds.flow.path import PATHS, Path
from blip3o_ds.flow.prediction import LOSS_WEIGHTS, PREDICTIONS, LossWeight, Model, Prediction
from blip3o_ds.flow.prior import LinearGaussian
from blip3o_ds.flow.solvers import SOLVERS, check_guidance
from blip3o_ds.flow.timesteps import TIMESTEP_LAWS, Timesteps
from blip3o_ds.settings import choose
from blip3o_kernels import FlowLoss, flow_matching_loss

_TIME, _DROP, _NOISE = range(3)  # independent streams of random numbers of one sample
_LAST_TIME = 1 - 2.0**-24  # the largest below 1 in fp32: at 1 nothing is left open, and a loss relative to it is NaN
# The noise of what a model, or a baseline, generates: stream k from here on is that of an image's sample k.
EVALUATION_STREAM, BASELINE_STREAM = 1 << 32, 1 << 33


@dataclass(frozen=True)
class Flow:
    """Draws noise and timesteps, scores a network, and says where its output leads."""

    path: Path
    prediction: Prediction
    timesteps: Timesteps
    loss_weight: LossWeight
    cond_dropout: float

    @classmethod
    def from_config(cls, config: FlowConfig, prior: LinearGaussian) -> Flow:
        """The flow that the settings name; ConfigError if a name is in no table."""
        path = choose(PATHS, config.path, "flow.path")()
        prediction = choose(PREDICTIONS, config.prediction, "flow.prediction")(path, prior)
        laws = choose(TIMESTEP_LAWS, config.timestep_law, "flow.timestep_law")(config, path, prior)
        loss_weight = choose(LOSS_WEIGHTS, config.loss_weight, "flow.loss_weight")(config)
        timesteps = Timesteps(*laws, config.timestep_shift, config.noise_share)
        return cls(path, prediction, timesteps, loss_weight, config.cond_dropout)

    def draw(
        self, positions: Tensor, shape: tuple[int, int], seed: int, device: torch.device | str
    ) -> tuple[Tensor, Tensor, Tensor]:
        """noise `[B, N, Dc]` fp32, t `[B]` fp32 in [0, 1) and drop `[B]` bool, on `device`.

        Each row is a function of the seed and its position in the endless order, `[B]` int64; `shape` is `(N, Dc)`.
        The times of successive positions are spread evenly, whatever the batch and the number of ranks.
        """
        t = self.timesteps.draw(spread_uniforms(seed, positions, _TIME)).clamp_max(_LAST_TIME)
        drop = torch.from_numpy(uniforms(seed, positions, _DROP) < self.cond_dropout).to(device)
        return normals(seed, positions, _NOISE, shape, device), t.to(device=device, dtype=torch.float32), drop

    def loss(
        self,
        model: Model,
        clip: Tensor,
        eva: Tensor,
        noise: Tensor,
        t: Tensor,
        drop: Tensor,
        folds: Sequence[int] | None = None,
        held: Tensor | None = None,
    ) -> FlowLoss:
        """Squared error in what the loss weight compares, fp32; `.loss` of the result is the scalar to minimise.

        clip and noise are `[B, N, Dc]`, eva `[B, N, De]`, t `[B]`, drop and `held` `[B]` bool; `folds` `[B]` as
        `LinearGaussian.mean` takes them, `held` as `DiT.forward`.
        """
        clip, noise = clip.float(), noise.float()
        point, target = self.prediction.training_pair(clip, noise, t, self.prediction.guess(eva, folds))
        output = self.prediction.output(model, point, eva, drop, held)
        return flow_matching_loss(*self.loss_weight(self.prediction, output, target, point))


def check_flow(config: RunConfig) -> None:
    """ConfigError, with what is valid, for a part of the flow or a solver in no table, or guidance without dropout."""
    flow = config.flow
    choose(PATHS, flow.path, "flow.path")
    choose(PREDICTIONS, flow.prediction, "flow.prediction")
    choose(TIMESTEP_LAWS, flow.timestep_law, "flow.timestep_law")
    choose(LOSS_WEIGHTS, flow.loss_weight, "flow.loss_weight")
    choose(SOLVERS, config.eval.sampler.solver, "eval.sampler.solver")
    check_guidance(config.eval.sampler, flow.cond_dropout)


def spread_uniforms(seed: int, positions: Tensor, stream: int) -> np.ndarray:
    """As `uniforms`, but successive positions fill (0, 1) evenly: multiples of the golden ratio, modulo 1.

    Any stretch of G positions has a discrepancy of about log(G) / G (Weyl 1916), so a batch's loss varies less.
    """
    steps = positions.detach().cpu().numpy().astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    start = _hashes(seed, torch.zeros(1, dtype=torch.int64), stream)
    return (((start + steps) >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52


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
