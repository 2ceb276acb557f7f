"""Exponential moving average of the weights, kept as one more state of the optimizer.

Beside Adam's moments it is fp32, follows the fp32 master weights, is sharded by ZeRO as they are, and is saved and
restored with them; nothing else has to know about it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

STATE_KEY = "ema"


def attach_ema(optimizer: torch.optim.Optimizer, decay: float) -> None:
    """Average the weights after every optimizer step: `ema <- d ema + (1-d) weight`, `d = min(decay, (1+n)/(10+n))`.

    The ramp over the steps `n` keeps a short run from being dominated by its first weights.
    """

    @torch.no_grad()
    def update(stepped: torch.optim.Optimizer, _args: tuple, _kwargs: dict) -> None:
        weights = [weight for group in stepped.param_groups for weight in group["params"]]
        for weight in weights:
            if weight.grad is None:
                continue
            state = stepped.state[weight]
            if STATE_KEY not in state:
                state[STATE_KEY] = weight.clone()
                continue
            step = state["step"].to(weight.device)
            keep = torch.clamp((1 + step) / (10 + step), max=decay)
            state[STATE_KEY].lerp_(weight, (1 - keep).to(weight.dtype))

    optimizer.register_step_post_hook(update)


def gather_weights(module: nn.Module, optimizer: torch.optim.Optimizer, ema: bool) -> dict[str, Tensor]:
    """The whole state dict of `module` in fp32 on the CPU of every rank: the EMA, or the fp32 master weights.

    Every rank must call it (a collective under ZeRO 1 to 3). `optimizer` is the engine's.
    """
    return {name: weight.cpu().clone() for name, weight in each_weight(module, optimizer, ema)}


def each_weight(module: nn.Module, optimizer: torch.optim.Optimizer, ema: bool) -> Iterator[tuple[str, Tensor]]:
    """The same one by one and on the device; every rank must take them all."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    link_states(optimizer)
    parameters = dict(module.named_parameters())
    for name, parameter in parameters.items():
        partitioned = hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping")
        if partitioned and ema:
            full = safe_get_full_optimizer_state(parameter, STATE_KEY)
        elif partitioned:
            full = safe_get_full_fp32_param(parameter)
        else:
            full = optimizer.state[parameter][STATE_KEY] if ema else parameter
        yield name, full.detach().float().contiguous()
    for name in sorted(module.state_dict().keys() - parameters.keys()):  # the persistent buffers, whole on every rank
        yield name, module.get_buffer(name).detach().float()


def link_states(optimizer: Any) -> None:
    """Let DeepSpeed's safe_get and safe_set functions find the states: ZeRO-1 and 2 link them too early, and once."""
    if hasattr(optimizer, "_lazy_init_hp_params_optimizer_state"):
        optimizer._hp_optimizer_states_linked = False
        optimizer._lazy_init_hp_params_optimizer_state()
