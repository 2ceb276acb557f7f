"""The planner against counted parameters and the arithmetic of ZeRO's paper."""

import pytest
import torch

from blip3o_ds.config import ModelConfig, get_blip3o_clip_config, get_memory_optimized_config
from blip3o_ds.errors import ConfigError
from blip3o_ds.model.dit import DiT
from blip3o_ds.planning.memory import count_parameters, estimate_memory, recommend_zero
from blip3o_kernels import use_kernels


@pytest.mark.parametrize("attention", ["full", "none"])
def test_parameters_are_those_of_the_model(attention):
    config = get_blip3o_clip_config("tiny", attention=attention)

    assert count_parameters(config) == sum(p.numel() for p in DiT(config).parameters())


# Bytes a parameter on one of 8 GPUs: bf16 weights, fp32 gradients, fp32 master + two moments (Rajbhandari et al. 2020,
# figure 1, with gradients accumulated in fp32).
@pytest.mark.parametrize(
    ("stage", "weights", "gradients", "optimizer"),
    [(0, 6, 4, 8), (1, 2, 4, 12 / 8), (2, 2, 4 / 8, 12 / 8), (3, 2 / 8, 4 / 8, 12 / 8)],
)
def test_each_zero_stage_divides_what_it_should(stage, weights, gradients, optimizer):
    config = get_blip3o_clip_config("tiny")
    count = count_parameters(config)

    memory = estimate_memory(config, zero_stage=stage, world_size=8, micro_batch_size=1, ema=False)

    found = (memory.weights / count, memory.gradients / count, memory.optimizer / count)
    assert found == pytest.approx((weights, gradients, optimizer), rel=1e-4)


def test_the_moving_average_costs_one_fp32_copy():
    config = get_blip3o_clip_config("tiny")
    with_it, without = (
        estimate_memory(config, zero_stage=2, world_size=4, micro_batch_size=1, ema=ema).optimizer
        for ema in (True, False)
    )

    assert with_it - without == pytest.approx(4 * count_parameters(config) / 4, rel=1e-4)


def test_activations_grow_with_the_batch_and_shrink_with_checkpointing():
    config = get_blip3o_clip_config("base")

    def activations(batch: int, checkpointing: bool) -> int:
        return estimate_memory(
            config,
            zero_stage=2,
            world_size=1,
            micro_batch_size=batch,
            activation_checkpointing=checkpointing,
        ).activations

    assert activations(64, False) == 2 * activations(32, False)
    assert activations(32, True) < activations(32, False) / 3


def test_a_smaller_gpu_gets_a_smaller_preset_and_too_small_a_one_an_error():
    assert get_memory_optimized_config(80, batch_size=32)[0] == "large"
    assert get_memory_optimized_config(6, batch_size=32)[0] in ("tiny", "small")
    with pytest.raises(ConfigError, match="lower the batch size"):
        get_memory_optimized_config(1, batch_size=512)


def test_zero_1_is_recommended_until_memory_runs_out_and_then_what_needs_less():
    config = get_blip3o_clip_config("large")

    def recommend(gpu_memory_gb: float) -> str | None:
        return recommend_zero(config, gpu_memory_gb=gpu_memory_gb, world_size=8, micro_batch_size=8)[0]

    _, needs = recommend_zero(config, gpu_memory_gb=80, world_size=8, micro_batch_size=8)
    assert recommend(80) == "zero1.json"
    assert recommend(needs["zero1.json"] - 0.01) == "zero2.json"
    assert recommend(needs["zero2.json"] - 0.01) == "zero3.json"
    assert recommend(1) is None


def saved_for_backward(config: ModelConfig, batch: int) -> int:
    """Bytes of all tensors that a forward pass through the kernels keeps, the parameters and inputs left out."""
    model = DiT(config).bfloat16()
    inputs = [torch.randn(batch, config.num_tokens, dim).bfloat16() for dim in (config.clip_dim, config.eva_dim)]
    known = {x.untyped_storage().data_ptr() for x in [*model.parameters(), *model.buffers(), *inputs]}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage()
        return x

    with use_kernels("triton"), torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        model(inputs[0], torch.rand(batch), inputs[1])
    return sum(storage.nbytes() for address, storage in kept.items() if address not in known)


@pytest.mark.parametrize("attention", ["full", "none"])
def test_a_layers_activations_are_what_the_kernels_keep(attention):
    def difference_of_two_layers(measure) -> int:
        shallow, deep = (
            ModelConfig(
                eva_dim=24,
                clip_dim=12,
                grid_size=8,
                hidden_size=64,
                num_layers=num_layers,
                num_heads=4,
                num_kv_heads=2,
                ffn_dim=128,
                attention=attention,
            )
            for num_layers in (1, 3)
        )
        return measure(deep) - measure(shallow)

    kept = difference_of_two_layers(lambda config: saved_for_backward(config, batch=2))
    planned = difference_of_two_layers(
        lambda config: estimate_memory(config, zero_stage=2, world_size=1, micro_batch_size=2).activations
    )

    assert planned == pytest.approx(kept, rel=0.02)
