"""A Gaussian world whose answers are known: only samples of the right distribution have the best of every score."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from blip3o_ds.evaluation.metrics import MetricAccumulator
from blip3o_ds.evaluation.scores import frechet_distance, score_coverage, score_samples

K, IMAGES, N, D = 3, 3000, 4, 6
GENERATOR = torch.Generator().manual_seed(0)
MEAN = torch.randn(D, generator=GENERATOR)
FACTOR = torch.randn(D, D, generator=GENERATOR)  # of the covariance of a token given its image
DIRECTIONS = torch.linalg.eigh(FACTOR @ FACTOR.T).eigenvectors


def draw(count: int) -> torch.Tensor:
    """Tokens around zero, [count, IMAGES, N, D]."""
    return torch.randn(count, IMAGES, N, D, generator=GENERATOR) @ FACTOR.T


CENTRE = MEAN + 2 * torch.randn(IMAGES, 1, D, generator=GENERATOR)  # of each image: what its condition tells
TRUE = CENTRE + draw(1)[0]
SAMPLERS = {
    "right": CENTRE + draw(K),
    "collapsed": CENTRE.expand(K, IMAGES, N, D),
    "too narrow": CENTRE + 0.6 * draw(K),
    "too wide": CENTRE + 1.5 * draw(K),
    "shifted": CENTRE + 0.8 + draw(K),
    "without condition": MEAN + 2 * torch.randn(K, IMAGES, 1, D, generator=GENERATOR) + draw(K),
    "tokens of one draw": CENTRE + draw(K)[:, :, :1].expand(K, IMAGES, N, D),
}


@pytest.fixture(scope="module")
def metrics() -> dict[str, dict[str, float]]:
    found = {}
    for name, samples in SAMPLERS.items():
        accumulator = MetricAccumulator(MEAN, DIRECTIONS)
        accumulator.update(samples, TRUE, [""] * IMAGES)
        found[name] = accumulator.payload().compute()
    return found


def test_the_right_sampler_is_calibrated(metrics):
    right = metrics["right"]
    variance = float(FACTOR.square().sum())

    assert right["spread_skill"] == pytest.approx(1, abs=0.03)
    assert right["coverage"] == pytest.approx(1, abs=0.02)
    assert right["mean_error"] == pytest.approx(variance, rel=0.03)
    assert right["variance_ratio"] == pytest.approx(1, abs=0.03)
    assert right["frechet"] < 0.01 * variance
    assert right["frechet_pooled"] < 0.02 * variance


@pytest.mark.parametrize("score", ["energy_score", "energy_score_pooled", "energy_score_whole"])
def test_the_right_sampler_has_the_least_energy(metrics, score):
    energies = {name: found[score] for name, found in metrics.items()}
    if score == "energy_score":  # looks at one token at a time
        assert energies.pop("tokens of one draw") == pytest.approx(energies["right"], rel=0.01)
    ordered = sorted(energies, key=energies.__getitem__)

    assert ordered[0] == "right"
    assert energies[ordered[1]] > 1.01 * energies["right"]


def test_the_similarity_is_highest_for_the_collapsed_sampler_which_is_why_it_does_not_lead(metrics):
    assert max(metrics, key=lambda name: metrics[name]["clip_similarity"]) == "collapsed"


@pytest.mark.parametrize(
    ("sampler", "ratio"), [("collapsed", 0.0), ("too narrow", 0.6**2), ("too wide", 1.5**2), ("tokens of one draw", 1)]
)
def test_the_spread_is_the_samplers_variance_over_the_true_one(metrics, sampler, ratio):
    assert metrics[sampler]["spread_skill"] == pytest.approx(ratio, rel=0.04, abs=1e-9)


def test_coverage_tells_narrow_from_wide(metrics):
    narrow, right, wide = (metrics[name]["coverage"] for name in ("too narrow", "right", "too wide"))

    assert metrics["collapsed"]["coverage"] == 0
    assert narrow < 0.9 * right
    assert wide > 1.1 * right


def test_the_error_of_the_mean_does_not_depend_on_the_spread_or_the_number_of_samples(metrics):
    errors = [metrics[name]["mean_error"] for name in ("right", "collapsed", "too narrow", "too wide")]
    two = score_samples(SAMPLERS["right"][:2], TRUE)["mean_error"].mean()

    assert errors == pytest.approx([errors[1]] * 4, rel=0.03)
    assert float(two) == pytest.approx(errors[1], rel=0.03)
    assert metrics["shifted"]["mean_error"] == pytest.approx(errors[1] + D * 0.8**2, rel=0.04)


def test_the_energy_of_the_right_sampler_does_not_depend_on_the_number_of_samples(metrics):
    two = score_samples(SAMPLERS["right"][:2], TRUE)["energy"].mean()
    assert float(two) == pytest.approx(metrics["right"]["energy_score"], rel=0.02)


def test_the_energy_of_standard_normal_numbers_is_the_known_one():
    x = torch.randn(4, 20000, 1, 1, generator=torch.Generator().manual_seed(1))

    energy = score_samples(x[:3], x[3])["energy"].mean()

    assert float(energy) == pytest.approx(1 / math.sqrt(math.pi), rel=0.03)  # E|s-x| = 2 / sqrt(pi), half of it remains


@pytest.mark.parametrize("samples", [2, 3, 8])
def test_coverage_is_one_for_any_number_of_right_samples(samples):
    x = torch.randn(samples + 1, 20000, 1, 2, generator=torch.Generator().manual_seed(2))
    covered = score_coverage(x[1:], x[0], torch.eye(2, dtype=torch.float64)).mean()
    assert float(covered) == pytest.approx(1, abs=0.03)


def moments(seed: int, rank: int, size: int = 8) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    factor = random.normal(size=(size, rank))
    return random.normal(size=size), factor @ factor.T


def distance(first, second) -> float:
    means, covariances = (torch.from_numpy(np.stack(pair)) for pair in zip(first, second, strict=True))
    return float(frechet_distance(means, covariances))


@pytest.mark.parametrize("ranks", [(8, 8), (3, 8), (8, 3), (2, 3), (0, 8), (0, 0)])
def test_the_frechet_distance_follows_its_formula_also_for_singular_covariances(ranks):
    first, second = moments(1, ranks[0]), moments(2, ranks[1])

    product = np.linalg.eigvals(first[1] @ second[1]).real.clip(min=0)
    product[product < 1e-12] = 0
    expected = ((first[0] - second[0]) ** 2).sum() + np.trace(first[1] + second[1]) - 2 * np.sqrt(product).sum()
    assert distance(first, second) == pytest.approx(expected, rel=1e-9)
    assert distance(second, first) == pytest.approx(expected, rel=1e-7)


@pytest.mark.parametrize("rank", [8, 3])
def test_the_frechet_distance_of_a_distribution_from_itself_is_zero_and_from_a_shifted_one_the_shift(rank):
    mean, covariance = moments(3, rank)
    assert distance((mean, covariance), (mean, covariance)) == pytest.approx(0, abs=1e-6)
    assert distance((mean, covariance), (mean + 2, covariance)) == pytest.approx(8 * 4, abs=1e-6)
