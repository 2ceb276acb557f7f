"""The optimizer's groups: which parameters decay, and at which rate each of them learns."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from blip3o_ds.config import TrainConfig
from blip3o_ds.model.dit import DiT
from blip3o_ds.model.layers import Calibration
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


def test_the_calibration_learns_faster_than_the_others_and_keeps_its_ratio_under_the_schedule():
    model = DiT(small_config(2).model)
    optimizer = build_optimizer(model, TRAIN, fused=False)
    rates = [3e-4, 3e-4, 3e-4 * Calibration.RATE, 3e-4 * Calibration.RATE]

    assert [group["params"] for group in optimizer.param_groups[2:]] == [
        [model.calibration.gain],
        [model.calibration.narrowing],
    ]
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx(rates)
    assert [group["betas"] for group in optimizer.param_groups] == [(0.9, 0.95)] * 2 + [(0.9, 0.999)] * 2

    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.25)

    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([rate / 4 for rate in rates])


def test_a_model_without_a_calibration_has_no_group_for_it():
    groups = build_optimizer(nn.Linear(3, 2), TRAIN, fused=False).param_groups
    assert [[p.ndim for p in group["params"]] for group in groups] == [[2], [1]]


def test_the_calibration_stays_between_its_bounds_and_comes_back_at_once():
    model = DiT(small_config(2).model)
    optimizer = build_optimizer(model, TRAIN, fused=False)
    for outward, steps in ((True, 50), (False, 3)):
        for _ in range(steps):
            optimizer.zero_grad()
            factor = -1 if outward else 100
            (factor * (model.calibration.gain.sum() - model.calibration.narrowing)).backward()
            optimizer.step()
        if outward:
            assert model.calibration.gain.tolist() == [1.0] * Calibration.KNOTS
            assert model.calibration.narrowing.item() == 0

    assert (model.calibration.gain < 1).all()
    assert model.calibration.narrowing > 0


@pytest.mark.parametrize("stage", range(4))
def test_under_every_zero_stage_the_gain_stays_between_its_bounds(trainee, stage):
    """The output falls short of its target by far, so without bounds the gain would rise by a rate a step."""
    found = trainee(stage, **{"train.learning_rate": 1e-3, "train.warmup_steps": 0})
    for number in range(10):
        found.step(number)

    weights = found.weights()
    assert 0.9 < weights["calibration.gain"].max() <= 1
    assert weights["calibration.narrowing"].item() >= 0
