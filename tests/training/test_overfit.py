"""The overfit test finds the cause in curves that are made to have it, and in samples that contradict each other."""

from __future__ import annotations

import json
import logging
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from blip3o_ds.baselines.fit import fit_baselines
from blip3o_ds.config import EvalConfig, FlowConfig, RunConfig, SamplerConfig, load_run_config
from blip3o_ds.data.normalization import Normalizer
from blip3o_ds.data.reading.dataset import EmbeddingDataset
from blip3o_ds.data.reading.loader import read_batches
from blip3o_ds.evaluation.report import evaluate
from blip3o_ds.flow.flow import Flow
from blip3o_ds.runs.pretrained import Pretrained
from blip3o_ds.training.overfit import OverfitVerdict, diagnose
from blip3o_ds.training.overfit_data import DataFacts, data_facts, measure_data
from tests.conftest import write_embeddings

FINE = DataFacts(20, untrained=0.4, ceiling=1.0, contradictions=0, example=(), zero_targets=0.0, target_variation=0.8)
STEPS, EVERY = 300, 10
STEP = np.arange(EVERY, STEPS + 1, EVERY)
COSINE = 2.5e-4 * (1 + np.cos(math.pi * STEP / STEPS))  # from 5e-4 to 0
NOISE = 0.02


def noisy(loss, seed=0, noise=NOISE):
    return loss * (1 + noise * np.random.default_rng(seed).standard_normal(len(STEP)))


def lines(loss, lr=COSINE, grad_norm=1.0) -> list[dict]:
    columns = np.broadcast_arrays(STEP, loss, lr, grad_norm)
    return [dict(zip(("step", "loss", "lr", "grad_norm"), row, strict=True)) for row in np.stack(columns, 1).tolist()]


def verdict(
    history, mean=0.6, sampled=None, norm=1.0, data=FINE, settings=("train.max_steps=300", "model.clip_dim=320")
) -> OverfitVerdict:
    samples = {"clip_similarity": mean if sampled is None else sampled, "norm_ratio": norm}
    result = SimpleNamespace(readings={"posterior_mean": {"clip_similarity": mean}, "sampled": samples})
    found = diagnose(history, result, data, load_run_config("demo", None, settings))
    json.dumps(found.evidence, allow_nan=False)  # the summary has no other numbers
    assert found.passed or (found.finding and found.advice)
    return found


FALLING = lines(noisy(np.exp(-STEP / 100)), lr=5e-4)
FLAT = 0.6 + 0.4 * np.exp(-STEP / 20)


@pytest.mark.parametrize(
    ("mean", "sampled", "passed"),
    [
        (0.95, 0.94, True),
        (0.97, 0.91, True),  # further apart, but both above
        (0.91, 0.895, True),  # near enough
        (0.95, 0.85, False),
        (0.9, 0.95, False),
        (0.85, 0.85, False),
    ],
)
def test_it_passes_above_0_9_if_the_samples_agree(mean, sampled, passed):
    found = verdict(FALLING, mean, sampled)

    assert (found.threshold, found.posterior_mean, found.sampled, found.passed) == (0.9, mean, sampled, passed)
    assert (found.cause is None, found.advice == "") == (passed, passed)


def test_passing_says_nothing_where_an_untrained_network_passes_too():
    found = verdict(FALLING, 0.96, data=DataFacts(**{**vars(FINE), "untrained": 0.92}))

    assert (found.passed, found.cause) == (True, None)
    assert "learnt nothing" in found.finding


def test_a_loss_that_is_not_finite_is_a_bug_whatever_else_there_is():
    loss = noisy(np.exp(-STEP / 100))
    loss[12] = math.nan
    found = verdict(lines(loss), data=DataFacts(**{**vars(FINE), "target_variation": 0.0}))

    assert (found.cause, found.evidence["lines_not_finite"]) == ("bug", 1)
    assert verdict(lines(STEP * math.nan)).cause == "bug"


def test_a_gradient_of_zero_is_a_bug():
    found = verdict(lines(noisy(np.ones(len(STEP))), grad_norm=np.where(STEP > 200, 0.0, 1.0)))

    assert (found.cause, found.evidence["grad_norm_least"]) == ("bug", 0)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("noise", [0.0, 0.02, 0.05])
def test_a_loss_that_never_moves_although_weights_are_updated_is_a_bug(seed, noise):
    found = verdict(lines(noisy(np.ones(len(STEP)), seed, noise)), mean=0.4)

    assert found.cause == "bug"
    assert "never moves" in found.finding


def test_a_loss_that_falls_without_any_effect_on_the_evaluation_is_a_bug():
    assert verdict(FALLING, mean=0.39).cause == "bug"
    assert verdict(FALLING, mean=0.41).cause != "bug"


def test_samples_that_contradict_each_other_are_the_cause_if_they_explain_the_miss():
    half = DataFacts(**{**vars(FINE), "ceiling": 0.85, "contradictions": 3, "example": ("a_1", "b_7")})

    found = verdict(FALLING, mean=0.8, data=half)

    assert found.cause == "data"
    assert "3 pairs" in found.finding
    assert "a_1 and b_7" in found.finding
    assert found.evidence["ceiling"] == 0.85
    assert verdict(FALLING, mean=0.7, data=half).cause == "time"  # 0.15 cannot be reached, but 0.2 is missing


def test_targets_that_are_zero_or_constant_are_the_cause():
    zero = verdict(FALLING, mean=0.5, data=DataFacts(**{**vars(FINE), "ceiling": 0.6, "zero_targets": 0.4}))
    constant = verdict(FALLING, data=DataFacts(**{**vars(FINE), "target_variation": 1e-5}))

    assert (zero.cause, constant.cause) == ("data", "data")
    assert "40.0%" in zero.finding
    assert "constant" in constant.finding


@pytest.mark.parametrize(
    ("loss", "grad_norm"),
    [
        (np.where(STEP < 100, np.exp(-STEP / 100), np.exp(STEP / 100 - 2)), 1.0),  # falls, then rises again
        (0.5 + 0.1 * np.sin(STEP / 20), 1.0),  # jumps
        (np.exp(-STEP / 5000), np.exp(STEP / 100)),  # gradients grow
    ],
    ids=["rises", "jumps", "gradients"],
)
def test_a_loss_that_rises_or_jumps_means_too_high_a_learning_rate(loss, grad_norm):
    found = verdict(lines(noisy(loss), grad_norm=grad_norm), settings=("train.learning_rate=6e-3",))

    assert (found.cause, found.advice) == ("learning_rate_too_high", "--learning_rate 2.0e-03, a third of it")


def test_a_loss_that_hardly_falls_at_a_tiny_rate_means_too_low_a_learning_rate():
    found = verdict(lines(noisy(np.exp(-STEP / 3000)), lr=1e-6), mean=0.41)

    assert found.cause == "learning_rate_too_low"
    assert found.evidence["lr_travel"] == pytest.approx(3e-4)
    assert verdict(lines(noisy(np.exp(-STEP / 50)), lr=1e-5)).cause == "time"  # small, but it works


def test_a_loss_that_still_falls_means_time_and_says_how_much():
    found = verdict(lines(np.exp(-STEP / 100), lr=5e-4), mean=0.6)

    error = (1 - 0.6**2) / (1 - 0.9**2)  # of the posterior mean now, over the one at the threshold
    assert found.evidence["steps_to_threshold"] == pytest.approx(100 * math.log(error))
    assert (found.cause, found.advice) == ("time", "--set train.max_steps=450")


def test_a_schedule_that_has_ended_does_not_make_a_falling_loss_flat():
    travel = np.cumsum(COSINE * EVERY)
    loss = np.exp(-20 * travel)
    assert np.log(loss[-5] / loss[-1]) < 0.01

    found = verdict(lines(noisy(loss, noise=0.001)))

    assert found.cause == "time"
    pace = 20 * travel[-1] / STEPS  # a step, at the mean learning rate
    assert -found.evidence["loss_trend"] == pytest.approx(pace, rel=0.1)


def test_the_length_is_given_as_the_run_states_it():
    assert verdict(FALLING, settings=("train.num_epochs=40", "train.max_steps=null")).advice.startswith("--num_epochs ")


def test_a_few_steps_or_lines_mean_time():
    few_lines, few_steps = lines(np.exp(-STEP / 100))[:3], lines(np.full(len(STEP), 0.9))[:5]
    for number, line in enumerate(few_steps, start=1):
        line["step"] = number

    assert "too few" in verdict(few_lines).finding
    assert [verdict(history).cause for history in (few_lines, few_lines[:1], few_steps)] == ["time"] * 3


@pytest.mark.parametrize("seed", range(5))
def test_a_flat_loss_with_healthy_gradients_means_capacity(seed):
    narrow = verdict(lines(noisy(FLAT, seed)))
    wide = verdict(lines(noisy(FLAT, seed)), settings=("model.clip_dim=200",))

    assert (narrow.cause, narrow.advice) == ("capacity", "--set model.hidden_size=320")
    assert (wide.cause, wide.advice) == ("capacity", "more layers: --set model.num_layers=4")
    assert "hidden_size 256 for embeddings 320 wide" in narrow.finding
    assert narrow.evidence["num_parameters"] > 1e6


def test_samples_that_miss_what_the_mean_reaches_are_judged_by_their_own_distance():
    found = verdict(lines(np.exp(-STEP / 100), lr=5e-4), mean=0.95, sampled=0.7)

    assert found.evidence["steps_to_threshold"] == pytest.approx(100 * math.log((1 - 0.7**2) / (1 - 0.9**2)))


def test_noisy_samples_of_a_narrow_network_that_knows_the_mean_mean_capacity():
    found = verdict(FALLING, mean=0.94, sampled=0.75, norm=1.33)

    assert (found.cause, found.advice) == ("capacity", "--set model.hidden_size=320")
    assert "1.33 times" in found.finding
    wide = verdict(FALLING, mean=0.94, sampled=0.75, norm=1.33, settings=("model.clip_dim=200",))
    clean = verdict(FALLING, mean=0.94, sampled=0.75, norm=1.05)
    early = verdict(FALLING, mean=0.85, sampled=0.75, norm=1.33)
    assert [other.cause for other in (wide, clean, early)] == ["time"] * 3


def test_the_verdict_is_logged_in_three_lines(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("blip3o_ds"), "propagate", True)
    with caplog.at_level(logging.INFO, "blip3o_ds"):
        verdict(lines(noisy(FLAT)), mean=0.61, sampled=0.59).log()
        verdict(FALLING, mean=0.95).log()

    first, second, third, passed = (record.getMessage() for record in caplog.records)
    assert "0.610 (posterior mean), 0.590 (sampled), 0.400 (untrained); threshold 0.9 NOT reached" in first
    assert second.startswith("overfit test: capacity: the loss is flat")
    assert third == "overfit test: to do: --set model.hidden_size=320"
    assert passed.endswith("threshold 0.9 reached")


def test_the_ceiling_is_the_best_that_a_function_of_eva_can_do():
    generator = torch.Generator().manual_seed(0)
    eva, clip = (torch.randn(5, 9, dim, generator=generator) for dim in (12, 8))
    eva[3] = eva[1] * (1 + 1e-4)  # nearly equal
    eva[4] = eva[2] * (1 + 1e-2)  # not so nearly

    facts = measure_data(eva, clip, list("abcde"), untrained=0.3)

    middle = (clip[1] + clip[3]).numpy() / 2
    cosines = [
        (middle * x).sum(-1) / np.linalg.norm(middle, axis=-1) / np.linalg.norm(x, axis=-1)
        for x in (clip[1].numpy(), clip[3].numpy())
    ]
    assert facts.ceiling == pytest.approx((3 + cosines[0].mean() + cosines[1].mean()) / 5, abs=1e-6)
    assert (facts.contradictions, facts.example, facts.untrained, facts.samples) == (1, ("b", "d"), 0.3, 5)

    clip[3] = clip[1]
    assert measure_data(eva, clip, list("abcde"), 0.3).contradictions == 0  # copies, which can be learnt


def test_zero_and_constant_targets_are_counted():
    eva, clip = torch.randn(4, 9, 12), torch.ones(4, 9, 8)
    constant = measure_data(eva, clip, list("abcd"), 0.0)
    clip[0, :3] = 0
    zero = measure_data(eva, clip, list("abcd"), 0.0)

    assert (constant.target_variation, constant.zero_targets) == (0, 0)
    assert zero.zero_targets == pytest.approx(3 / 36)
    assert zero.ceiling == pytest.approx(33 / 36)
    assert measure_data(eva[:1], clip[1:2], ["a"], 0.0).target_variation == 0  # of a single sample: its tokens


@pytest.fixture
def run(tmp_path):
    """The parts of a run on 12 samples that need no network."""
    dataset = EmbeddingDataset(write_embeddings(tmp_path / "data", 12))
    normalizer = Normalizer("minimal")
    baselines = fit_baselines(dataset, normalizer)
    return SimpleNamespace(
        splits={"overfit": dataset},
        normalizer=normalizer,
        baselines=baselines,
        flow=Flow.from_config(FlowConfig(), baselines.prior),
        engine=SimpleNamespace(device=torch.device("cpu")),
        config=RunConfig(eval=EvalConfig(batch_size=5)),
    )


def guessed_without_themselves(run):
    """All samples of the run, and the prior's guess of each as training has it."""
    (batch,) = read_batches(run.splits["overfit"], range(12), 12)
    folds = run.splits["overfit"].folds(batch.keys, run.baselines.prior.num_folds).tolist()
    return batch, run.baselines.prior.mean(batch["eva"], folds)


def test_an_untrained_network_is_the_priors_guess_without_the_image(run):
    facts = data_facts(run)

    batch, guess = guessed_without_themselves(run)
    guess, clip = guess.double(), batch["clip"].double()
    cosine = (guess * clip).sum(-1) / guess.norm(dim=-1) / clip.norm(dim=-1)
    assert facts.untrained == pytest.approx(float(cosine.mean()), abs=1e-5)
    assert (facts.samples, facts.ceiling) == (12, pytest.approx(1, abs=1e-6))


def test_what_was_memorised_is_perfect_only_with_the_guess_that_training_had(run):
    prior = run.baselines.prior
    batch, guess = guessed_without_themselves(run)
    known = prior.tokens.T @ (prior.to_modes(batch["clip"] - guess) / prior.rms)  # the output at t = 0 in training
    eva = prior.standard_eva(batch["eva"])

    def memorised(x, t, condition, drop):
        return known[torch.cdist(condition.flatten(1), eva.flatten(1)).argmin(dim=1)]

    model = Pretrained(memorised, run.flow, run.normalizer, run.baselines, run.config, 0, "ema")
    settings = EvalConfig(batch_size=5, sampler=SamplerConfig(steps=1))
    mean, as_new = (
        evaluate(model, run.splits["overfit"], settings, num_folds=folds).readings["posterior_mean"]["mse"]
        for folds in (prior.num_folds, 0)
    )

    assert mean < 1e-10
    assert as_new > 0.01
