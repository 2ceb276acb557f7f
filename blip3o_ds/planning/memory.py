"""How much GPU memory a training step needs, term by term, before it runs; all in bytes on one GPU.

Weights and optimizer states follow from the number of parameters and the ZeRO stage. Activations are what the fused
kernels keep for the backward pass.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import torch

from blip3o_ds.config import ModelConfig, get_blip3o_clip_config, preset_names
from blip3o_ds.errors import ConfigError
from blip3o_ds.model.dit import DiT

CONTEXT_BYTES = 1 << 30  # the CUDA context and the workspaces of cuBLAS and the communication library
FRAGMENTATION = 0.03  # share that the caching allocator loses between its blocks
# Larger buckets gain no bandwidth, and DeepSpeed's default (5e8 elements) takes more memory than a small model.
MAX_BUCKET_ELEMENTS = 200_000_000

FP32 = 4

# The files of ds_configs/ and their ZeRO stages, from the least communication to the most.
ZERO_FILES = {"zero1.json": 1, "zero2.json": 2, "zero3.json": 3, "zero2-offload.json": 2, "zero3-offload.json": 3}


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on one GPU at the peak of a training step, by what they hold."""

    weights: int  # in the dtype of the forward pass
    gradients: int  # as the backward pass writes them, and their fp32 accumulation
    optimizer: int  # fp32 master weights, Adam's moments, the moving average
    buckets: int  # communication buffers of the collectives
    activations: int  # kept for the backward pass, and the largest working set of a block
    batch: int  # embeddings, noise, prediction, and the loss's gradient
    overhead: int  # context and fragmentation

    @property
    def total(self) -> int:
        return sum(getattr(self, field.name) for field in fields(self))


def count_parameters(config: ModelConfig) -> int:
    """The exact number of parameters of the DiT, without allocating them."""
    with torch.device("meta"):
        return DiT(config).num_parameters()


def estimate_memory(
    config: ModelConfig,
    *,
    zero_stage: int,
    world_size: int,
    micro_batch_size: int,
    precision: Literal["bf16", "fp16", "fp32"] = "bf16",
    activation_checkpointing: bool = False,
    ema: bool = True,
) -> MemoryEstimate:
    """Peak memory of a training step with Adam and fp32 gradient accumulation (Rajbhandari et al. 2020)."""
    count = count_parameters(config)
    width = FP32 if precision == "fp32" else 2
    states = _weights_and_states(count, zero_stage, world_size, width, ema)
    activations = _activation_bytes(config, micro_batch_size, width, activation_checkpointing)
    # Clip and EVA; in fp32 clip, noise, x_t, predicted and target velocity, and the gradient of the prediction.
    channels = (config.clip_dim + config.eva_dim) * width + 6 * config.clip_dim * FP32
    batch = micro_batch_size * config.num_tokens * channels
    overhead = CONTEXT_BYTES + int(FRAGMENTATION * (sum(states) + activations + batch))
    return MemoryEstimate(*states, activations, batch, overhead)


def get_memory_optimized_config(
    available_memory_gb: float, training_mode: str = "patch_only", batch_size: int = 32
) -> tuple[str, ModelConfig, float]:
    """The preset with the most parameters whose training step fits on one GPU: `(model_size, config, memory_gb)`.

    The step is ZeRO-2 on one GPU in bf16 with a moving average; activations are recomputed only if it does not fit
    otherwise. Raises ConfigError if not even the smallest preset fits.
    """
    configs = [(name, get_blip3o_clip_config(name, training_mode)) for name in preset_names() if name != "demo"]
    configs.sort(key=lambda item: count_parameters(item[1]), reverse=True)
    for name, config in configs:
        need = _smallest_need(config, batch_size, available_memory_gb)
        if need <= available_memory_gb:
            return name, config, need
    raise ConfigError(
        f"no preset fits {available_memory_gb:g} GiB at batch size {batch_size}: the smallest, {name}, needs "
        f"{need:.1f} GiB; lower the batch size"
    )


def _smallest_need(config: ModelConfig, batch_size: int, available_gb: float) -> float:
    """GiB of a step on one GPU with ZeRO-2; with activation checkpointing if it does not fit without."""
    for checkpointing in (False, True):
        estimate = estimate_memory(
            config, zero_stage=2, world_size=1, micro_batch_size=batch_size, activation_checkpointing=checkpointing
        )
        if estimate.total / 2**30 <= available_gb:
            break
    return estimate.total / 2**30


def recommend_zero(config: ModelConfig, *, gpu_memory_gb: float, **step: Any) -> tuple[str | None, dict[str, float]]:
    """The file of `ds_configs/` with the least communication that fits (None: none does), and the GiB each needs.

    `step` is what `estimate_memory` takes besides. ZeRO-2 sends what ZeRO-1 does, but after every micro-batch. ZeRO-3
    sends half as much again, in small pieces. Offloading adds the CPU and the PCIe bus to every step.
    """
    needs = {}
    for name, stage in ZERO_FILES.items():
        estimate = estimate_memory(config, zero_stage=stage, **step)
        if "offload" in name:  # the fp32 states live on the CPU, at stage 3 the weights too
            estimate = replace(estimate, gradients=0, optimizer=0, weights=0 if stage == 3 else estimate.weights)
        needs[name] = estimate.total / 2**30
    return next((name for name, need in needs.items() if need <= gpu_memory_gb), None), needs


def _weights_and_states(count: int, stage: int, world_size: int, width: int, ema: bool) -> tuple[int, int, int, int]:
    """(weights, gradients, optimizer, buckets)."""
    kept = 3 + ema  # fp32 copies: master weights, two moments, the moving average
    if stage == 0:
        # The weights are fp32 and need no master copy; autocast keeps a cast copy of them during the step.
        cast = 0 if width == FP32 else count * width
        return count * FP32 + cast, count * FP32, (kept - 1) * count * FP32, 0
    share = -(-count // world_size)
    weights = (share if stage == 3 else count) * width
    accumulated = (count if stage == 1 else share) * FP32
    optimizer = kept * share * FP32
    bucket = min(count, MAX_BUCKET_ELEMENTS)
    buffers = 2 if stage > 1 else 1  # one bucket is reduced while the next is filled
    return weights, accumulated, optimizer, (buffers + 1) * bucket * width


def _activation_bytes(config: ModelConfig, micro_batch_size: int, width: int, checkpointing: bool) -> int:
    tokens = micro_batch_size * config.num_tokens
    W, F = config.hidden_size, config.ffn_dim
    kv = config.num_kv_heads * config.head_dim
    # Channels of a token that the backward pass of an operation reads; a tensor that two operations read counts once.
    attention = 6 * W + 3 * kv  # input, q k v, q k rotated, attention's output, the branch's output, the new residual
    feed_forward = 3 * W + 3 * F  # input, gate and up, their product, the branch's output, the new residual
    block = tokens * feed_forward * width
    if config.attention == "full":
        block += tokens * (2 * attention * width + 2 * config.num_heads * FP32)  # and the log-sum-exps
    gradients = tokens * (3 * W + 3 * F) * width  # alive at once in the widest part of a block's backward pass
    outside = tokens * 3 * W * width  # condition before and after its norm, the first residual
    if checkpointing:
        return config.num_layers * tokens * 2 * W * width + block + gradients + outside
    return config.num_layers * block + gradients + outside
