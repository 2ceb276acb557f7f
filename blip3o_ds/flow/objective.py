"""Rectified flow from noise to CLIP embeddings: the path, the timestep law, the targets and the loss.

Time 0 is noise and time 1 is data. A model is any callable `(x_t, t, eva, drop) -> [B, N, Dc]`.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from blip3o_ds.config import FlowConfig
from blip3o_kernels import FlowLoss, flow_matching_loss

Model = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]

_TIME, _DROP, _NOISE = range(3)  # independent streams of random numbers of one sample


class RectifiedPath:
    """The straight path `x_t = (1-t) noise + t clip` (Liu et al. 2023, Lipman et al. 2023); t is `[B]`."""

    @staticmethod
    def point(clip: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t, `[B, N, D]`."""
        t = per_sample(t)
        return (1 - t) * noise + t * clip

    @staticmethod
    def velocity(clip: Tensor, noise: Tensor) -> Tensor:
        """dx_t/dt, the same at every t."""
        return clip - noise

    @staticmethod
    def time_to_data(t: Tensor, floor: float) -> Tensor:
        """`max(1-t, floor)`, `[B, 1, 1]`."""
        return (1 - per_sample(t)).clamp_min(floor)


class FlowObjective:
    """Draws timesteps and noise, and scores a model's output as a velocity.

    With `prediction: sample` the model outputs the clean embedding x̂ (Li & He 2025, arXiv 2511.13720); its velocity is
    `(x̂ - x_t) / max(1-t, min_time_to_data)`.
    """

    def __init__(self, config: FlowConfig) -> None:
        self.config = config

    def sample_noise_and_time(
        self, positions: Tensor, shape: tuple[int, int], seed: int, device: torch.device | str
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The random numbers of a batch, each row a function of (seed, position) alone.

        So neither the world size nor the micro-batch changes what a sample draws. Noise additionally depends on the
        kind of device, whose generator makes it.

        Args:
            positions: `[B]` int64, place of each sample in the endless order.
            shape: `(N, Dc)` of one sample.
            seed: another seed gives independent draws, for evaluation.

        Returns:
            noise `[B, N, Dc]` fp32, t `[B]` fp32 in [0, 1], drop `[B]` bool, on `device`.
        """
        rows = positions.detach().cpu().numpy().astype(np.uint64)
        t = self.timestep_law(_uniforms(seed, rows, _TIME)).to(device=device, dtype=torch.float32)
        drop = torch.from_numpy(_uniforms(seed, rows, _DROP) < self.config.cond_dropout).to(device)
        noise = torch.empty(len(rows), *shape, device=device)
        generator = torch.Generator(device)
        for row, row_seed in zip(noise, _hashes(seed, rows, _NOISE), strict=True):
            row.normal_(generator=generator.manual_seed(int(row_seed)))
        return noise, t, drop

    def timestep_law(self, uniforms: np.ndarray) -> Tensor:
        """Timesteps `[B]` float64 from uniform numbers in (0, 1), through the law's inverse CDF and the shift.

        The logit-normal law and the shift are those of Esser et al. 2024.
        """
        t = torch.from_numpy(uniforms)
        if self.config.timestep_law == "logit_normal":
            t = torch.sigmoid(self.config.logit_mean + self.config.logit_std * torch.special.ndtri(t))
        return shift_timesteps(t, self.config.timestep_shift)

    def loss(self, model: Model, clip: Tensor, eva: Tensor, noise: Tensor, t: Tensor, drop: Tensor) -> FlowLoss:
        """Squared error of the velocity, fp32; `.loss` of the result is the scalar to minimise.

        With `prediction: sample` the target velocity has the same floor under 1-t as the prediction's: it is
        `clip - noise` wherever `1-t >= min_time_to_data`, and beyond it the optimum is still the clean embedding.

        Args:
            clip: `[B, N, Dc]`.  eva: `[B, N, De]`.  noise: `[B, N, Dc]`.  t: `[B]`.  drop: `[B]` bool.
        """
        clip, noise = clip.float(), noise.float()
        x_t = RectifiedPath.point(clip, noise, t)
        output = model(x_t, t, eva, drop)
        if self.config.prediction == "velocity":
            return flow_matching_loss(output, RectifiedPath.velocity(clip, noise))
        return flow_matching_loss(self.velocity(output, x_t, t), self.velocity(clip, x_t, t))

    def velocity(self, output: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The velocity `[B, N, Dc]` fp32 that the loss sees, from the model's output at x_t."""
        if self.config.prediction == "velocity":
            return output.float()
        return (output.float() - x_t) / RectifiedPath.time_to_data(t, self.config.min_time_to_data)

    def denoise(self, output: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The clean embedding `[B, N, Dc]` fp32 that the model's output at x_t amounts to."""
        if self.config.prediction == "sample":
            return output.float()
        return x_t + (1 - per_sample(t)) * output.float()


def shift_timesteps(t: Tensor, shift: float) -> Tensor:
    """Move timesteps towards noise for `shift > 1`: `σ' = sσ / (1 + (s-1)σ)` on `σ = 1-t` (Esser et al. 2024)."""
    sigma = 1 - t
    return 1 - shift * sigma / (1 + (shift - 1) * sigma)


def per_sample(t: Tensor) -> Tensor:
    """`[B]` as `[B, 1, 1]`."""
    return t[:, None, None]


def _uniforms(seed: int, rows: np.ndarray, stream: int) -> np.ndarray:
    """One float64 per row, strictly between 0 and 1."""
    return ((_hashes(seed, rows, stream) >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52


def _hashes(seed: int, rows: np.ndarray, stream: int) -> np.ndarray:
    """64 mixed bits of (seed, row, stream); every argument is mixed before the next is added."""
    mixed = _splitmix64(np.full(1, seed % 2**64, dtype=np.uint64))
    mixed = _splitmix64(mixed + np.uint64(stream))
    return _splitmix64(mixed + rows)


def _splitmix64(x: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele et al. 2014) on uint64, arithmetic modulo 2**64."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
