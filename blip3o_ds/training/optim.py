"""The optimizer and the learning rate's schedule, each chosen by name from a small table.

A new schedule is one function and one line of `SCHEDULES`; a new optimizer one of `OPTIMIZERS`, if it treats every
number of a parameter by itself, as Adam does. Muon, Shampoo and SOAP do not fit: they work on whole gradient matrices
(orthogonalising them, or multiplying them by factors of their rows and columns), while under ZeRO 1 to 3 a rank steps
flat slices of all parameters laid end to end, which cut through matrices.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from blip3o_ds.config import TrainConfig
from blip3o_ds.model.layers import Calibration
from blip3o_ds.settings import choose

# (progress after the warm-up, 0 to 1; `train.min_lr_ratio`) -> share of `train.learning_rate`
Schedule = Callable[[float, float], float]


def cosine(progress: float, floor: float) -> float:
    """Half a period of a cosine, from 1 down to `floor`."""
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))


def adamw(groups: list[dict[str, Any]], train: TrainConfig, fused: bool) -> torch.optim.Optimizer:
    """AdamW (Loshchilov & Hutter 2019)."""
    betas = (train.adam_beta1, train.adam_beta2)
    return torch.optim.AdamW(groups, lr=train.learning_rate, betas=betas, eps=train.adam_eps, fused=fused or None)


SCHEDULES: dict[str, Schedule] = {"cosine": cosine}
OPTIMIZERS = {"adamw": adamw}


def check_names(train: TrainConfig) -> None:
    """Raise a `ConfigError` unless the tables have the optimizer and the schedule."""
    choose(OPTIMIZERS, train.optimizer, "train.optimizer")
    choose(SCHEDULES, train.schedule, "train.schedule")


def build_optimizer(model: nn.Module, train: TrainConfig, fused: bool) -> torch.optim.Optimizer:
    """The optimizer of `train.optimizer`, with weight decay on matrices only."""
    calibrations = [module for module in model.modules() if isinstance(module, Calibration)]
    calibrated = {id(p) for module in calibrations for p in module.parameters()}
    others = [p for p in model.parameters() if id(p) not in calibrated]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in others if p.ndim >= 2], "weight_decay": train.weight_decay},
        {"params": [p for p in others if p.ndim < 2], "weight_decay": 0.0},  # norms, biases
    ]
    for module in calibrations:
        betas = (train.adam_beta1, Calibration.MEMORY)
        fast = {"weight_decay": 0.0, "lr": train.learning_rate * Calibration.RATE, "betas": betas}
        groups.append({"params": [module.gain], **fast, "bounds": Calibration.GAIN_BOUNDS})
        groups.append({"params": [module.narrowing], **fast, "bounds": Calibration.NARROWING_BOUNDS})
    optimizer = OPTIMIZERS[train.optimizer](groups, train, fused)
    optimizer.register_step_post_hook(keep_within_bounds)
    return optimizer


@torch.no_grad()
def keep_within_bounds(optimizer: torch.optim.Optimizer, _args: tuple, _kwargs: dict) -> None:
    """Clamp the weights of every group with `bounds`, after a step; under ZeRO they are the fp32 ones of this rank."""
    for group in optimizer.param_groups:
        if "bounds" in group:
            for weight in group["params"]:
                weight.clamp_(*group["bounds"])


def learning_rate_factor(step: int, train: TrainConfig, total_steps: int) -> float:
    """Share of `learning_rate` at a step: linear warm-up to 1, then the schedule of `train.schedule`."""
    warmup = min(train.warmup_steps, max(total_steps - 1, 0))
    if step < warmup:
        return (step + 1) / (warmup + 1)
    progress = min((step - warmup) / max(total_steps - warmup, 1), 1.0)
    return SCHEDULES[train.schedule](progress, train.min_lr_ratio)
