"""The optimizer's groups: which parameters decay, and at which rate each of them learns."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from blip3o_ds.config import TrainConfig
from blip3o_ds.model.dit import DiT
from blip3o_ds.model.layers import Gain
from blip3o_ds.training.optim import build_optimizer
from tests.training.conftest import small_config

TRAIN = TrainConfig(learning_rate=3e-4, weight_decay=0.05)


def test_every_parameter_is_in_one_group_and_matrices_alone_decay():
    model = DiT(small_config(2).model)
    groups = build_optimizer(model, TRAIN, fused=False).param_groups

    found = [id(p) for group in groups for p in group["params"]]
    assert sorted(found) == sorted(map(id, model.parameters()))
    for group in groups:
        for parameter in group["params"]:
            assert group["weight_decay"] == (0.05 if parameter.ndim == 2 else 0)


def test_the_gain_learns_faster_than_the_others_and_keeps_its_ratio_under_the_schedule():
    model = DiT(small_config(2).model)
    optimizer = build_optimizer(model, TRAIN, fused=False)
    *others, last = optimizer.param_groups

    assert last["params"] == [model.gain.value]
    assert last["lr"] == pytest.approx(3e-4 * Gain.RATE)
    assert last["weight_decay"] == 0
    assert [group["lr"] for group in others] == [3e-4, 3e-4]

    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.25)

    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.75e-4, 0.75e-4, 0.75e-4 * Gain.RATE])


def test_a_model_without_a_gain_has_no_group_for_it():
    groups = build_optimizer(nn.Linear(3, 2), TRAIN, fused=False).param_groups
    assert [[p.ndim for p in group["params"]] for group in groups] == [[2], [1]]


def test_the_gain_stays_between_its_bounds_and_comes_back_at_once():
    model = DiT(small_config(2).model)
    optimizer = build_optimizer(model, TRAIN, fused=False)
    for outward, steps in ((True, 50), (False, 3)):
        for _ in range(steps):
            optimizer.zero_grad()
            factor = -1 if outward else 100
            (factor * model.gain.value.sum()).backward()
            optimizer.step()
        if outward:
            assert model.gain.value.tolist() == [1.0] * Gain.KNOTS

    assert (model.gain.value < 1).all()
