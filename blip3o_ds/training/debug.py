"""What `--debug_mode` adds to the metrics: gradient norms by block and the loss by timestep.

It gathers whole gradients before every step, which costs time and memory; it is not meant for long runs.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from blip3o_ds.training.engine import Engine
from blip3o_kernels import FlowLoss

NUM_BINS = 10


class DebugProbe:
    """Collects gradient norms by block (of the last step) and mean losses by ten bins of t since the last line."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._gradient_norms: dict[str, float] = {}
        self._bins = torch.zeros(2, NUM_BINS, dtype=torch.float64)  # sums, counts

    def add(self, result: FlowLoss, t: Tensor) -> None:
        """Add a micro-batch's losses to their bins, except those that are not finite."""
        mse = result.mse.detach().double().cpu()
        finite = mse.isfinite()
        index = (t * NUM_BINS).long().clamp(max=NUM_BINS - 1).cpu()[finite]
        self._bins[0].index_add_(0, index, mse[finite])
        self._bins[1].index_add_(0, index, torch.ones(len(index), dtype=torch.float64))

    def read_gradients(self) -> None:
        """Between the last backward pass of a step and its update."""
        from deepspeed.utils import safe_get_full_grad

        squares: dict[str, float] = {}
        for name, parameter in self._engine.module.named_parameters():
            gradient = safe_get_full_grad(parameter)
            if gradient is not None:
                square = gradient.float().square().sum().item()
                squares[_block(name)] = squares.get(_block(name), 0.0) + square
        self._gradient_norms = {f"grad_norm/{block}": square**0.5 for block, square in squares.items()}

    def reduce(self) -> dict[str, float]:
        """The metrics since the last call; a collective."""
        bins = self._bins.to(self._engine.device, copy=True)
        dist.all_reduce(bins)
        self._bins.zero_()
        metrics = dict(self._gradient_norms)
        for i, (total, count) in enumerate(bins.T.tolist()):
            if count:
                metrics[f"loss_by_t/{i / NUM_BINS:.1f}"] = total / count
        return metrics


def _block(parameter_name: str) -> str:
    parts = parameter_name.split(".")
    return ".".join(parts[:2]) if parts[0] == "blocks" else parts[0]
