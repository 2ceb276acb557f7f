"""Evaluation by generation: the right noise, the right space, the same for any batch size and number of ranks."""

from __future__ import annotations

import hashlib
import json
import threading

import numpy as np
import pytest
import torch

from blip3o_ds.baselines.baselines import Baselines
from blip3o_ds.baselines.fit import fit_baselines
from blip3o_ds.config import EvalConfig, FlowConfig, SamplerConfig
from blip3o_ds.data.format.manifest import key_hashes
from blip3o_ds.data.normalization import Normalizer
from blip3o_ds.errors import Blip3oError
from blip3o_ds.evaluation.metrics import METRIC_NAMES, METRICS
from blip3o_ds.evaluation.report import (
    EvalResult,
    baseline_noise,
    evaluate,
    evaluation_noise,
    format_table,
    row_label,
)
from blip3o_ds.flow.flow import Flow
from blip3o_ds.flow.solvers import sample
from blip3o_ds.runs.pretrained import Pretrained
from tests.evaluation.conftest import CLIP, TOKENS, linear_pairs, random_model
from tests.flows import random_prior

READINGS = (
    "posterior_mean",
    "sampled",
    "linear_gaussian",
    "ridge_noise",
    "context_ridge",
    "ridge",
    "mean_embedding",
)
SAMPLER = SamplerConfig(steps=3)
RAW = Normalizer("minimal")
KEYS = [f"image_{number:03d}" for number in range(11)]  # of the images that are evaluated


@pytest.fixture
def setting(make_dataset, config):
    """A function that evaluates a model on 11 images, with baselines fitted on 30 others."""
    eva, clip, linear = linear_pairs(41, noise=0.5)
    train, held = make_dataset(eva[:30], clip[:30], "train"), make_dataset(eva[30:], clip[30:], "held")

    def run(
        model,
        normalizer=RAW,
        batch_size=4,
        prediction="sample",
        sampler=SAMPLER,
        max_samples=None,
        num_samples=3,
        **ranks,
    ) -> EvalResult:
        baselines = fit_baselines(train, normalizer)
        flow = Flow.from_config(FlowConfig(prediction=prediction), baselines.prior)
        pretrained = Pretrained(model, flow, normalizer, baselines, config, 0, "ema")
        settings = EvalConfig(sampler=sampler, batch_size=batch_size, max_samples=max_samples, num_samples=num_samples)
        return evaluate(pretrained, held, settings, **ranks)

    run.eva, run.clip, run.linear, run.train = eva, clip, linear, train
    run.flow = Flow.from_config(FlowConfig(prediction="sample"), fit_baselines(train, RAW).prior)
    return run


def model_that_knows(eva, clip):
    """Returns the true clip of each image, found by its condition."""

    def model(x, t, condition, drop):
        distance = torch.cdist(condition.flatten(1), eva.flatten(1))
        return clip[distance.argmin(dim=1)]

    return model


def test_a_model_that_returns_the_true_embeddings_is_perfect(setting):
    result = setting(model_that_knows(setting.eva, setting.clip))

    for reading in ("posterior_mean", "sampled"):
        metrics = result.readings[reading]
        for name in ("clip_similarity", "clip_similarity_centered", "excellent_quality", "norm_ratio", "retrieval_r1"):
            assert metrics[name] == pytest.approx(1, abs=1e-6)
        assert metrics["mse"] == pytest.approx(0, abs=1e-10)


def test_a_velocity_that_leads_to_the_true_embeddings_is_perfect(setting):
    knows = model_that_knows(setting.eva, setting.clip)

    def velocity(x, t, condition, drop):
        return (knows(x, t, condition, drop) - x) / (1 - t)[:, None, None]

    result = setting(velocity, prediction="velocity")

    assert result.readings["posterior_mean"]["mse"] == pytest.approx(0, abs=1e-10)
    assert result.readings["sampled"]["mse"] == pytest.approx(0, abs=1e-10)


def test_the_baselines_stand_beside_the_model_and_are_those_of_the_training_set(setting, config):
    result = setting(random_model(config))

    assert tuple(result.readings) == READINGS
    assert all(set(METRIC_NAMES) - set(metrics) <= {"coverage"} for metrics in result.readings.values())
    assert "coverage" in result.readings["sampled"]
    baselines = fit_baselines(setting.train, RAW)
    eva, clip = setting.eva[30:].double(), setting.clip[30:].double()
    ridge = (eva - baselines.prior.eva_mean) @ baselines.ridge_weight.double() + baselines.ridge_bias
    mean = setting.clip[:30].double().mean((0, 1))
    assert result.readings["ridge"]["mse"] == pytest.approx(float((ridge - clip).square().mean()), rel=1e-5)
    assert result.readings["mean_embedding"]["mse"] == pytest.approx(float((mean - clip).square().mean()), rel=1e-5)
    assert result.readings["ridge"]["mse"] < result.readings["mean_embedding"]["mse"]


def test_the_two_readings_are_one_step_from_noise_and_the_solvers(setting, config):
    model, flow = random_model(config), setting.flow
    result = setting(model)

    eva, clip = setting.eva[30:], setting.clip[30:].double()
    noise = evaluation_noise(KEYS, 0, (TOKENS, CLIP), SAMPLER.seed, "cpu")
    with torch.no_grad():
        one_step = model(noise, torch.zeros(11), eva).double()
    sampled = sample(model, flow, eva, noise, SAMPLER).double()
    assert result.readings["posterior_mean"]["mse"] == pytest.approx(float((one_step - clip).square().mean()), rel=1e-5)
    assert result.readings["sampled"]["mse"] == pytest.approx(float((sampled - clip).square().mean()), rel=1e-5)
    assert abs(result.readings["sampled"]["mse"] / result.readings["posterior_mean"]["mse"] - 1) > 1e-3


def test_each_sample_of_an_image_has_its_own_noise_and_the_scores_are_of_all(setting, config):
    model, flow = random_model(config), setting.flow

    result = setting(model, num_samples=4)

    draws = [evaluation_noise(KEYS, k, (TOKENS, CLIP), SAMPLER.seed, "cpu") for k in range(4)]
    assert len(torch.unique(torch.cat(draws).flatten(1), dim=0)) == 4 * 11
    samples = np.stack([sample(model, flow, setting.eva[30:], one, SAMPLER).double().numpy() for one in draws])
    clip = setting.clip[30:].double().numpy()
    near = np.linalg.norm(samples - clip, axis=-1).mean()
    apart = [np.linalg.norm(samples[i] - samples[j], axis=-1).mean() for i in range(4) for j in range(i)]
    assert result.samples_per_image == 4
    assert result.readings["sampled"]["energy_score"] == pytest.approx(near - np.mean(apart) / 2, rel=1e-5)
    assert result.readings["sampled"]["spread_skill"] > 0
    assert result.readings["posterior_mean"]["spread_skill"] == 0
    assert setting(model, num_samples=2).readings["sampled"]["mse"] == result.readings["sampled"]["mse"]


def test_a_baseline_that_samples_gets_noise_of_its_own_and_stands_in_the_table(setting, config, monkeypatch):
    seen = []

    def readings(self, eva, noise):
        seen.append(noise)
        return {"ridge_noise": self.predict_ridge(eva) + noise, "new_one": self.predict_mean(eva)[None]}

    monkeypatch.setattr(Baselines, "readings", readings)

    result = setting(random_model(config))

    noise = torch.cat(seen, dim=1)
    assert noise.shape == (3, 11, TOKENS, CLIP)
    for k in range(3):
        assert torch.equal(noise[k], baseline_noise(KEYS, k, (TOKENS, CLIP), SAMPLER.seed, "cpu"))
    assert tuple(result.readings) == ("posterior_mean", "sampled", "ridge_noise", "new_one")
    assert result.readings["ridge_noise"]["spread_skill"] > 0
    assert "coverage" in result.readings["ridge_noise"]
    labels = [line[:22].strip() for line in format_table({"held": result}).splitlines()[4:6]]
    assert labels == ["ridge + Gaussian noise", "new one"]


@pytest.mark.parametrize(("batch_size", "world_size"), [(3, 1), (4, 2), (2, 3), (1, 13)])
def test_batch_size_and_number_of_ranks_change_nothing(setting, config, batch_size, world_size):
    model = random_model(config)
    expected = setting(model, batch_size=11)
    barrier, sent, results = threading.Barrier(world_size), [None] * world_size, {}

    def run(rank):
        def gather(own):
            sent[rank] = own
            barrier.wait(60)
            values = list(sent)
            barrier.wait(60)
            return values

        results[rank] = setting(model, batch_size=batch_size, rank=rank, world_size=world_size, gather=gather)

    ranks = [threading.Thread(target=run, args=(rank,)) for rank in range(world_size)]  # the last two of 13 are idle
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    joined = results[world_size - 1]
    assert all(result == joined for result in results.values())

    assert joined.num_samples == expected.num_samples == 11
    for reading in READINGS:
        assert joined.readings[reading] == pytest.approx(expected.readings[reading], rel=1e-4, abs=1e-6)


def test_a_part_is_spread_over_the_set_and_its_images_keep_their_noise(setting, config):
    model, flow = random_model(config), setting.flow

    result = setting(model, max_samples=3)

    indices = torch.tensor([0, 3, 7])
    noise = evaluation_noise(KEYS, 0, (TOKENS, CLIP), SAMPLER.seed, "cpu")[indices]
    sampled = sample(model, flow, setting.eva[30:][indices], noise, SAMPLER)
    error = (sampled - setting.clip[30:][indices]).double().square().mean()
    assert (result.num_samples, result.dataset_samples) == (3, 11)
    assert result.readings["sampled"]["mse"] == pytest.approx(float(error), rel=1e-5)


def test_the_noise_is_another_for_each_key_sample_and_seed_and_never_that_of_training():
    keys = [f"image_{number}" for number in range(50)]
    draws = (evaluation_noise, baseline_noise)
    drawn = [draw(keys, k, (4, 4), seed, "cpu") for draw in draws for k, seed in ((0, 0), (1, 0), (0, 1))]
    flow = Flow.from_config(FlowConfig(), random_prior(4, 5, 4))
    drawn.append(flow.draw(torch.arange(50), (4, 4), 0, "cpu")[0])
    # Nor where the hash of a key is the position of a training sample.
    hashes = torch.from_numpy(key_hashes(keys).astype(np.int64))
    drawn.append(flow.draw(hashes, (4, 4), 0, "cpu")[0])

    assert len(torch.unique(torch.cat(drawn).flatten(1), dim=0)) == 400


@pytest.mark.parametrize("draw", [evaluation_noise, baseline_noise])
def test_the_noise_of_an_image_does_not_depend_on_the_others(draw):
    keys = ["c", "a", "b"]
    together = draw(keys, 2, (4, 4), 9, "cpu")
    for key, noise in zip(keys, together, strict=True):
        assert torch.equal(draw([key], 2, (4, 4), 9, "cpu")[0], noise)


def test_the_noise_is_drawn_with_the_mixed_bits_of_seed_sample_and_key():
    def mixed(x: int) -> int:  # SplitMix64 in Python's integers
        x = (x + 0x9E3779B97F4A7C15) % 2**64
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) % 2**64
        return x ^ (x >> 31)

    for key, k, seed in (("image_7", 3, 5), ("é", 0, 0), ("a", 1, 2**40)):
        digest = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little")
        bits = mixed((mixed((mixed(seed) + 2**32 + k) % 2**64) + digest) % 2**64)
        expected = torch.empty(4, 6).normal_(generator=torch.Generator().manual_seed(bits))
        assert torch.equal(evaluation_noise([key], k, (4, 6), seed, "cpu")[0], expected)


def test_standardised_embeddings_are_compared_raw(setting):
    stats = setting.train.manifest
    normalizer = Normalizer.from_stats("standardize", stats.stats)
    knows = model_that_knows(*normalizer({"eva": setting.eva, "clip": setting.clip}).values())

    result = setting(knows, normalizer)

    assert result.space == "raw"
    assert result.samples_per_image == 3
    assert result.readings["sampled"]["mse"] == pytest.approx(0, abs=1e-9)
    raw = setting(model_that_knows(setting.eva, setting.clip))
    assert result.readings["mean_embedding"] == pytest.approx(raw.readings["mean_embedding"], rel=1e-4, abs=1e-6)


def test_coverage_is_along_the_directions_of_the_networks_space(setting, config):
    normalizer = Normalizer.from_stats("standardize", setting.train.manifest.stats)
    baselines = fit_baselines(setting.train, normalizer)
    model, flow = random_model(config), Flow.from_config(FlowConfig(prediction="sample"), baselines.prior)

    result = setting(model, normalizer)

    eva, clip = normalizer({"eva": setting.eva[30:], "clip": setting.clip[30:]}).values()
    directions = baselines.directions.numpy()
    noise = [evaluation_noise(KEYS, k, (TOKENS, CLIP), SAMPLER.seed, "cpu") for k in range(3)]
    values = np.stack([sample(model, flow, eva, one, SAMPLER).double().numpy() @ directions for one in noise])
    rank = (values < clip.double().numpy() @ directions).sum(0)
    assert 0 < result.readings["sampled"]["coverage"] < 2
    assert result.readings["sampled"]["coverage"] == pytest.approx(2 * ((rank > 0) & (rank < 3)).mean())


def test_unit_norm_embeddings_are_compared_as_such(setting):
    normalizer = Normalizer("full")
    clip = setting.clip.numpy() / np.linalg.norm(setting.clip, axis=-1, keepdims=True)

    result = setting(model_that_knows(normalizer({"eva": setting.eva})["eva"], 2 * torch.from_numpy(clip)), normalizer)

    assert result.space == "unit_norm"
    assert result.readings["sampled"]["norm_ratio"] == pytest.approx(2, abs=1e-5)
    assert result.readings["sampled"]["mse"] == pytest.approx((clip[30:] ** 2).mean(), rel=1e-5)


def test_a_regression_is_a_point_its_samples_are_its_posterior_mean_and_have_no_spread(setting, config):
    result = setting(random_model(config), prediction="regression")

    sampled = result.readings["sampled"]
    assert sampled["spread_skill"] == 0
    for name, value in result.readings["posterior_mean"].items():
        assert sampled[name] == pytest.approx(value, rel=1e-6), name
    assert sampled["mse"] != pytest.approx(result.readings["context_ridge"]["mse"], rel=1e-3)  # the network counts


def test_guidance_reaches_the_sampler(setting, config):
    plain, guided = (
        setting(random_model(config), sampler=SamplerConfig(steps=3, guidance_scale=scale)) for scale in (1.0, 3.0)
    )
    assert plain.readings["posterior_mean"] == guided.readings["posterior_mean"]
    assert plain.readings["sampled"] != guided.readings["sampled"]


def test_a_model_that_diverged_is_an_error_that_names_the_reading(setting):
    with pytest.raises(Blip3oError, match="image image_000: its posterior_mean embedding holds NaN"):
        setting(lambda x, t, eva, drop: torch.full_like(x, float("nan")))


def test_a_result_goes_through_json_and_back(setting, config):
    result = setting(random_model(config))
    assert EvalResult.from_dict(json.loads(json.dumps(result.to_dict()))) == result


def test_the_table_shows_every_reading_and_figure(setting, config):
    result = setting(random_model(config), max_samples=3)

    text = format_table({"heldout": result})

    assert "heldout (3 images of 11, 3 samples each, raw embeddings)" in text
    assert max(map(len, text.splitlines())) <= 150
    head, *rows = text.split("\n\n")[0].splitlines()[1:]
    shown_metrics = {name: metric.column for name, metric in METRICS.items() if metric.column}
    assert head.split() == list(shown_metrics.values())
    assert head.split()[:4] == ["energy", "spread", "error", "frechet"]
    labels = (
        "DiT posterior mean",
        "DiT sampled (3 steps euler)",
        "linear-Gaussian sampled",
        "ridge + Gaussian noise",
        "ridge of 3x3 tokens",
        "ridge from EVA",
        "mean embedding",
    )
    for row, label, metrics in zip(rows, labels, result.readings.values(), strict=True):
        assert row.startswith(label)
        shown = row[len("DiT sampled (3 steps euler)") :].split()
        for cell, name in zip(shown, shown_metrics, strict=True):
            assert name in metrics or cell == "-"
            assert cell == "-" or float(cell) == pytest.approx(metrics[name], abs=5.1e-4, rel=0.05)


def test_the_legend_says_first_how_to_read_the_scores_and_names_every_column(setting, config):
    text = format_table({"heldout": setting(random_model(config), max_samples=3)})

    first, *names = text.split("\n\n")[1].splitlines()
    assert first.startswith("energy: lower is better")
    assert "spread: 1 is calibrated, 0 is a point" in first
    for name, metric in METRICS.items():
        assert (f"{metric.column}: {name}" in " ".join(names)) == (metric.column is not None)


def test_a_result_of_an_older_version_is_read(setting, config):
    content = setting(random_model(config)).to_dict()
    del content["samples_per_image"]
    for metrics in content["readings"].values():
        del metrics["energy_score"]

    old = EvalResult.from_dict(content)

    assert old.samples_per_image == 1
    assert "1 sample each" in format_table({"old": old})


def test_a_reading_without_a_label_is_named_in_words():
    assert row_label("some_new_reading", SAMPLER) == "some new reading"
    assert row_label("linear_gaussian", SAMPLER) == "linear-Gaussian sampled"
