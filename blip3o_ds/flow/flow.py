"""The flow from noise to CLIP embeddings: path, prediction, timesteps and loss weight, composed by the settings.

Each part is chosen by name from its table when the flow is built; nothing after that knows the names.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from blip3o_ds.config import FlowConfig, RunConfig
from blip3o_ds.errors import ConfigError
from blip3o_ds.flow.path import PATHS, Path
from blip3o_ds.flow.prediction import LOSS_WEIGHTS, PREDICTIONS, LossWeight, Model, Prediction
from blip3o_ds.flow.solvers import SOLVERS
from blip3o_ds.flow.timesteps import TIMESTEP_LAWS, Timesteps
from blip3o_ds.settings import choose
from blip3o_kernels import FlowLoss, flow_matching_loss

_TIME, _DROP, _NOISE = range(3)  # independent streams of random numbers of one sample
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
    def from_config(cls, config: FlowConfig) -> Flow:
        """The flow that the settings name; ConfigError if a name is in no table."""
        path = choose(PATHS, config.path, "flow.path")()
        prediction = choose(PREDICTIONS, config.prediction, "flow.prediction")(path)
        law = choose(TIMESTEP_LAWS, config.timestep_law, "flow.timestep_law")(config)
        loss_weight = choose(LOSS_WEIGHTS, config.loss_weight, "flow.loss_weight")(config)
        return cls(path, prediction, Timesteps(law, config.timestep_shift), loss_weight, config.cond_dropout)

    def draw(
        self, positions: Tensor, shape: tuple[int, int], seed: int, device: torch.device | str
    ) -> tuple[Tensor, Tensor, Tensor]:
        """noise `[B, N, Dc]` fp32, t `[B]` fp32 in [0, 1] and drop `[B]` bool, on `device`.

        Each row is a function of the seed and its position in the endless order, `[B]` int64; `shape` is `(N, Dc)`.
        """
        t = self.timesteps.draw(uniforms(seed, positions, _TIME)).to(device=device, dtype=torch.float32)
        drop = torch.from_numpy(uniforms(seed, positions, _DROP) < self.cond_dropout).to(device)
        return normals(seed, positions, _NOISE, shape, device), t, drop

    def loss(self, model: Model, clip: Tensor, eva: Tensor, noise: Tensor, t: Tensor, drop: Tensor) -> FlowLoss:
        """Squared error in what the loss weight compares, fp32; `.loss` of the result is the scalar to minimise.

        clip and noise are `[B, N, Dc]`, eva `[B, N, De]`, t `[B]`, drop `[B]` bool.
        """
        clip, noise = clip.float(), noise.float()
        x_t = self.path.point(clip, noise, t)
        output = self.prediction.output(model, x_t, t, eva, drop)
        target = self.prediction.target(clip, noise, t)
        return flow_matching_loss(*self.loss_weight(self.prediction, output, target, x_t, t))

    def clean(self, model: Model, x_t: Tensor, t: Tensor, eva: Tensor, drop: Tensor) -> Tensor:
        """The model's estimate of the clean embedding at x_t, `[B, N, Dc]` fp32; t is `[B]`."""
        return self.prediction.clean(self.prediction.output(model, x_t, t, eva, drop), x_t, t)

    def sampling_velocity(self, model: Model, x_t: Tensor, time: float, eva: Tensor, drop: Tensor) -> Tensor:
        """The velocity that a solver follows at x_t, `[B, N, Dc]` fp32: exact, with no floor, for time < 1.

        The floor belongs to the loss: here it would stop short of the data and leave noise in every sample.
        """
        t = torch.full((len(x_t),), time, device=x_t.device)
        clean = self.clean(model, x_t, t, eva, drop)
        return self.path.velocity_from_clean(clean, x_t, torch.tensor(time, dtype=torch.float64))


def build_flow(config: RunConfig) -> Flow:
    """The flow of a run; a ConfigError names a setting that is unknown or does not fit, and what is valid."""
    flow = Flow.from_config(config.flow)
    choose(SOLVERS, config.eval.sampler.solver, "eval.sampler.solver")
    if config.model.linear_skip != "none" and not flow.prediction.outputs_clean:
        raise ConfigError(
            f"model.linear_skip = {config.model.linear_skip} maps EVA to the clean embedding, and flow.prediction = "
            f"{config.flow.prediction} does not output it; set flow.prediction to sample or model.linear_skip to none"
        )
    return flow


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
