"""The DiT: its size, its start, its gradients, and what it does and does not look at."""

import pytest
import torch
import torch.nn.functional as F

from blip3o_ds.config import ModelConfig, get_blip3o_clip_config
from blip3o_ds.model.dit import DiT

TINY = {
    "eva_dim": 10, "clip_dim": 6, "grid_size": 3, "hidden_size": 32, "num_layers": 2, "num_heads": 4,
    "num_kv_heads": 2, "ffn_dim": 40, "timestep_embed_dim": 16,
}  # fmt: skip


def build(**fields) -> DiT:
    torch.manual_seed(0)
    return DiT(ModelConfig(**{**TINY, **fields}))


def open_gates(model: DiT) -> DiT:
    """Give every parameter that starts at zero a value, as training does."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.3, generator=generator)
    return model


def batch(model: DiT, size: int = 3, seed: int = 0):
    c, generator = model.config, torch.Generator().manual_seed(seed)
    noisy = torch.randn(size, c.num_tokens, c.clip_dim, generator=generator)
    eva = torch.randn(size, c.num_tokens, c.eva_dim, generator=generator)
    return noisy, torch.rand(size, generator=generator), eva


@pytest.mark.parametrize(("preset", "millions"), [("tiny", 23), ("small", 54), ("base", 171), ("large", 410)])
def test_presets_have_the_stated_number_of_parameters(preset, millions):
    with torch.device("meta"):
        model = DiT(get_blip3o_clip_config(preset))
    assert model.num_parameters() == pytest.approx(millions * 1e6, rel=0.03)


def test_output_is_zero_at_initialisation():
    model = build()
    assert not model(*batch(model)).any()


def test_the_condition_reaches_the_output_when_all_branches_are_shut():
    """It is part of the residual stream: what is linear in EVA needs no attention."""
    model = build()
    torch.nn.init.normal_(model.clip_out.weight)
    noisy, t, eva = batch(model)
    expected = model.first_norm(model.clip_in(noisy) + model.condition(eva, None)) @ model.clip_out.weight.T

    torch.testing.assert_close(model(noisy, t, eva), expected, atol=1e-5, rtol=1e-5)
    other = eva.clone()
    other[:, 4] += 1
    moved = (model(noisy, t, other) - model(noisy, t, eva)).abs().amax(dim=(0, 2))
    assert moved.nonzero().flatten().tolist() == [4]  # each token's own


@pytest.mark.parametrize(
    "fields",
    [{"grid_size": 16, "token_layout": "cls_patch"}, {"grid_size": 16}, {"grid_size": 1}, {"grid_size": 5},
     {"num_kv_heads": 4}, {"num_kv_heads": 1}, {"cross_attention_rope": False}, {"hidden_size": 24}],
)  # fmt: skip
def test_any_grid_layout_and_heads_work(fields):
    model = open_gates(build(**fields))
    noisy, t, eva = batch(model, size=2)
    out = model(noisy, t, eva)
    assert out.shape == noisy.shape
    assert out.isfinite().all()
    assert noisy.shape[1] == model.config.grid_size**2 + (model.config.token_layout == "cls_patch")


def test_forward_is_the_papers_block_written_out():
    """Recompute in float64 with separate pre-norms: x + tanh(gate) * post(branch(pre(x) * (1 + scale)))."""
    model = open_gates(build(num_layers=2)).double()
    noisy, t, eva = (x.double() for x in batch(model))

    def norm(x, weight):
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight

    c = model.timestep(t)
    condition = model.condition(eva, None)
    x = model.clip_in(noisy) + condition
    pre_weight, pre_scale = model.first_norm.weight, model.first_modulation.linear(c)
    for block in model.blocks:
        branches = [
            (lambda y, b=block: b.self_attention(y, model.rope()), block.after_self_attention),
            (lambda y, b=block: b.cross_attention(y, condition, model.rope()), block.after_cross_attention),
            (block.ffn, block.after_ffn),
        ]
        modulation = block.modulation.linear(c).view(len(t), 6, -1)
        for i, (branch, norms) in enumerate(branches):
            y = branch(norm(x, pre_weight) * (1 + pre_scale[:, None]))
            x = x + torch.tanh(modulation[:, 2 * i, None]) * norm(y, norms.post_weight)
            pre_weight, pre_scale = norms.next_pre_weight, modulation[:, 2 * i + 1]
    out = F.linear(norm(x, pre_weight) * (1 + pre_scale[:, None]), model.clip_out.weight, model.clip_out.bias)
    expected = model.calibration(out, noisy, t, None)

    torch.testing.assert_close(model(noisy, t, eva), expected, atol=1e-4, rtol=1e-4)


def gradients(model: DiT, checkpointing: bool) -> dict[str, torch.Tensor]:
    model.activation_checkpointing = checkpointing
    model.zero_grad()
    model(*batch(model), torch.tensor([True, False, False])).square().sum().backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def test_activation_checkpointing_gives_the_same_gradients():
    model = open_gates(build())
    plain, checkpointed = gradients(model, False), gradients(model, True)
    assert all(torch.equal(plain[name], checkpointed[name]) for name in plain)


@pytest.mark.parametrize("layout", ["patch_only", "cls_patch"])
def test_every_parameter_gets_a_gradient_once_the_gates_are_open(layout):
    model = open_gates(build(token_layout=layout))
    assert [name for name, gradient in gradients(model, False).items() if not gradient.any()] == []


def test_no_parameter_is_used_outside_the_module_that_owns_it():
    """What ZeRO-3 needs: hide each module's parameters except during its own forward."""
    model = open_gates(build())
    inputs = (*batch(model), torch.tensor([True, False, False]))
    expected = model(*inputs)
    hidden = {p: p.data for m in model.modules() if m is not model for p in m.parameters(recurse=False)}

    def gather(module, _):
        for parameter in module.parameters(recurse=False):
            parameter.data = hidden[parameter]

    def release(module, *_):
        for parameter in module.parameters(recurse=False):
            parameter.data = torch.empty(0)

    for module in model.modules():
        module.register_forward_pre_hook(gather)
        module.register_forward_hook(release)
        release(module)
    assert torch.equal(model(*inputs), expected)


def test_a_dropped_sample_does_not_see_its_condition():
    model = open_gates(build())
    noisy, t, eva = batch(model)
    other, drop = eva + torch.randn_like(eva), torch.tensor([True, False, True])
    a, b = model(noisy, t, eva, drop), model(noisy, t, other, drop)
    assert torch.equal(a[drop], b[drop])
    assert not torch.allclose(a[~drop], b[~drop])
    torch.testing.assert_close(a[~drop], model(noisy, t, eva)[~drop])


@pytest.mark.parametrize("rotary", [True, False])
def test_cross_attention_sees_where_a_condition_token_is_only_with_rope(rotary):
    model = open_gates(build(cross_attention_rope=rotary))
    noisy, t, eva = batch(model)
    x, timestep, condition = model.clip_in(noisy), model.timestep(t), model.condition(eva, None)

    def after_a_block(condition):
        return model.blocks[0](x, x, condition, timestep, model.rope())[0]

    unchanged = torch.allclose(after_a_block(condition), after_a_block(condition.flip(1)), atol=1e-5)
    assert unchanged != rotary


@pytest.mark.parametrize("layout", ["patch_only", "cls_patch"])
def test_without_attention_what_becomes_of_a_token_depends_on_no_other(layout):
    model = open_gates(build(attention="none", token_layout=layout))
    noisy, t, eva = batch(model)
    out = model(noisy, t, eva)

    for side in range(2):  # of the noisy embedding, and of the condition
        inputs = [noisy.clone(), eva.clone()]
        inputs[side][:, 4] += 1
        moved = (model(inputs[0], t, inputs[1]) - out).abs().amax(dim=(0, 2))
        assert moved.nonzero().flatten().tolist() == [4]
    order = torch.randperm(noisy.shape[1], generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(model(noisy[:, order], t, eva[:, order]), out[:, order])
    full = open_gates(build(token_layout=layout))
    assert ((full(inputs[0], t, inputs[1]) - full(noisy, t, eva)).abs().amax(dim=(0, 2)) > 0).all()


def test_without_attention_every_parameter_gets_a_gradient_that_checkpointing_does_not_change():
    model = open_gates(build(attention="none"))
    assert [name for name, gradient in gradients(model, False).items() if not gradient.any()] == []
    assert all(torch.equal(a, b) for a, b in zip(*(gradients(model, c).values() for c in (False, True)), strict=True))


def test_timesteps_are_told_apart_and_kept_in_fp32():
    model = open_gates(build()).bfloat16()
    noisy, _, eva = batch(model, size=1)
    a, b = (model(noisy, torch.tensor([t]), eva) for t in (0.9000, 0.9015))  # one number in bf16
    assert not torch.equal(a, b)


def test_a_bf16_model_takes_fp32_inputs_and_stays_near_the_fp32_one():
    model = open_gates(build())
    inputs = batch(model)
    exact = model(*inputs)
    low = model.bfloat16()(*inputs)
    assert low.dtype == torch.bfloat16
    assert F.cosine_similarity(low.float().flatten(), exact.flatten(), dim=0) > 0.999


def test_autocast_over_fp32_weights_trains():
    model = open_gates(build())
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(*batch(model), torch.tensor([True, False, False])).float().square().mean()
    loss.backward()
    assert all(p.grad.isfinite().all() and p.grad.dtype == torch.float32 for p in model.parameters())


def test_the_same_seed_builds_the_same_model():
    a, b = build().state_dict(), build().state_dict()
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(
    ("name", "index", "shape"), [("noisy_clip", 0, (3, 8, 6)), ("timesteps", 1, (2,)), ("eva", 2, (3, 9, 11))]
)
def test_an_input_of_another_shape_is_named(name, index, shape):
    model = build()
    inputs = list(batch(model))
    inputs[index] = torch.zeros(shape)
    with pytest.raises(ValueError, match=f"^{name}: expected shape"):
        model(*inputs)
