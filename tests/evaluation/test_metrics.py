"""Every metric against NumPy in float64, against formulas, and at its limits."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from blip3o_ds.errors import Blip3oError
from blip3o_ds.evaluation.metrics import METRIC_NAMES, Collected, MetricAccumulator

N, D = 5, 7


def pairs(count: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Generated and true embeddings [count, 5, 7] that differ little in the first images and much in the last."""
    generator = torch.Generator().manual_seed(seed)
    mean = 2 + torch.randn(D, generator=generator)
    image = torch.randn(count, 1, D, generator=generator)
    target = mean + image + 0.5 * torch.randn(count, N, D, generator=generator)
    error = torch.randn(count, N, D, generator=generator) * torch.linspace(0.3, 6, count)[:, None, None]
    return target + error, target, mean + 0.1


def compute(generated, target, mean, batch_size=100) -> dict[str, float]:
    accumulator = MetricAccumulator(mean)
    for g, c in zip(generated.split(batch_size), target.split(batch_size), strict=True):
        accumulator.update(g, c)
    return accumulator.payload().compute()


def oracle(generated, target, mean) -> dict[str, float]:
    g, c, m = (x.numpy().astype(np.float64) for x in (generated, target, mean))

    def cosine(a, b):
        return (a * b).sum(-1) / np.sqrt((a * a).sum(-1) * (b * b).sum(-1))

    similarity = cosine(g, c).mean(1)
    tokens_g, tokens_c = g.reshape(-1, D), c.reshape(-1, D)
    return {
        "clip_similarity": similarity.mean(),
        "clip_similarity_centered": cosine(g - m, c - m).mean(),
        "high_quality": (similarity > 0.7).mean(),
        "very_high_quality": (similarity > 0.8).mean(),
        "excellent_quality": (similarity > 0.9).mean(),
        "mse": ((g - c) ** 2).mean(),
        "norm_ratio": np.sqrt((g * g).sum(-1)).mean() / np.sqrt((c * c).sum(-1)).mean(),
        "retrieval_r1": brute_force_retrieval(g, c, m, 1),
        "retrieval_r5": brute_force_retrieval(g, c, m, 5),
        "frechet_diagonal": ((tokens_g.mean(0) - tokens_c.mean(0)) ** 2).sum()
        + ((tokens_g.std(0) - tokens_c.std(0)) ** 2).sum(),
        "variance_ratio": tokens_g.var(0).mean() / tokens_c.var(0).mean(),
    }


def brute_force_retrieval(g, c, m, k) -> float:
    found = 0
    for i in range(len(g)):
        query = g[i].mean(0) - m
        scores = []
        for j in range(len(c)):
            candidate = c[j].mean(0) - m
            scores.append((query @ candidate / np.linalg.norm(query) / np.linalg.norm(candidate), j))
        found += i in [j for _, j in sorted(scores, reverse=True)[:k]]
    return found / len(g)


@pytest.mark.parametrize("seed", range(4))
def test_every_metric_is_that_of_numpy_in_float64(seed):
    generated, target, mean = pairs(40, seed)

    found, expected = compute(generated, target, mean), oracle(generated, target, mean)

    assert tuple(found) == METRIC_NAMES
    assert found == pytest.approx(expected, rel=1e-9)
    shares = ("high_quality", "very_high_quality", "excellent_quality", "retrieval_r1", "retrieval_r5")
    assert all(0 < found[name] < 1 for name in shares)  # the comparison above compared something


def test_the_names_fixed_by_the_command_line_are_all_there():
    assert METRIC_NAMES[:9] == (
        *("clip_similarity", "clip_similarity_centered", "high_quality", "very_high_quality", "excellent_quality"),
        *("mse", "norm_ratio", "retrieval_r1", "retrieval_r5"),
    )


def test_the_true_embeddings_themselves_are_perfect():
    _, target, mean = pairs(12)

    found = compute(target, target, mean)

    ones = [name for name in METRIC_NAMES if name not in ("mse", "frechet_diagonal")]
    assert [found[name] for name in ones] == pytest.approx([1.0] * len(ones))
    assert found["mse"] == found["frechet_diagonal"] == 0


def test_the_training_mean_scores_high_raw_and_zero_centred_and_retrieves_nothing():
    _, target, mean = pairs(12)

    found = compute(mean.expand_as(target), target, mean)

    assert found["clip_similarity"] > 0.7
    assert found["clip_similarity_centered"] == found["variance_ratio"] == 0
    assert found["retrieval_r1"] == found["retrieval_r5"] == 0


def test_the_frechet_distance_of_shifted_and_stretched_tokens_follows_its_formula():
    generator = torch.Generator().manual_seed(1)
    target = torch.randn(50, N, D, generator=generator, dtype=torch.float64)
    stretch, shift = torch.linspace(0.5, 2, D, dtype=torch.float64), torch.arange(D) / 10

    found = compute(target * stretch + shift, target, torch.zeros(D))

    std = target.flatten(0, 1).std(dim=0, correction=0)
    mean = target.mean(dim=(0, 1))
    expected = ((mean * (stretch - 1) + shift) ** 2 + (std * (stretch - 1)) ** 2).sum()
    assert found["frechet_diagonal"] == pytest.approx(float(expected), rel=1e-9)
    expected_ratio = (std.square() * stretch.square()).mean() / std.square().mean()
    assert found["variance_ratio"] == pytest.approx(float(expected_ratio), rel=1e-9)


def test_doubling_every_embedding_doubles_the_norm_and_nothing_of_the_direction():
    _, target, mean = pairs(8)

    found = compute(2 * target, target, mean)

    assert found["norm_ratio"] == pytest.approx(2)
    assert found["clip_similarity"] == pytest.approx(1)


def test_the_slices_of_several_ranks_join_into_the_metrics_of_one():
    generated, target, mean = pairs(23)
    ranks = []
    for rank in range(3):
        accumulator = MetricAccumulator(mean)
        accumulator.update(generated[rank::3], target[rank::3])
        ranks.append(accumulator.payload())
    ranks.append(MetricAccumulator(mean).payload())  # a rank that got no image

    joined = Collected.join(ranks).compute()

    assert joined == pytest.approx(compute(generated, target, mean), rel=1e-12)


def test_the_size_of_a_batch_changes_nothing():
    generated, target, mean = pairs(10)
    assert compute(generated, target, mean, 3) == pytest.approx(compute(generated, target, mean), rel=1e-12)


def test_retrieval_is_the_same_in_chunks(monkeypatch):
    generated, target, mean = pairs(23)
    whole = compute(generated, target, mean)
    monkeypatch.setattr("blip3o_ds.evaluation.metrics.RETRIEVAL_CHUNK", 4)
    assert compute(generated, target, mean) == whole


def test_a_variance_beside_a_large_mean_keeps_its_digits():
    generated, target, mean = pairs(10)
    far = torch.full((D,), 1000.0)
    generated, target, mean = ((x + far).double() for x in (generated, target, mean))
    assert compute(generated, target, mean) == pytest.approx(oracle(generated, target, mean), rel=1e-6)


def test_a_zero_vector_has_no_direction_and_no_ratio():
    _, target, mean = pairs(3)

    found = compute(target, torch.zeros_like(target), mean)

    assert found["clip_similarity"] == found["norm_ratio"] == found["variance_ratio"] == 0
    assert all(math.isfinite(value) for value in found.values())


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("side", ["generated", "true"])
def test_an_embedding_that_is_not_finite_names_its_image(value, side):
    generated, target, mean = pairs(3)
    (generated if side == "generated" else target)[2, 1, 0] = value
    with pytest.raises(Blip3oError, match=f"image 42: its {side} embedding"):
        MetricAccumulator(mean).update(generated, target, torch.tensor([7, 8, 42]))


def test_other_shapes_are_refused():
    generated, target, mean = pairs(3)
    with pytest.raises(ValueError, match=r"\[3, 4, 7\] and \[3, 5, 7\]"):
        MetricAccumulator(mean).update(generated[:, :4], target)
    with pytest.raises(ValueError, match=r"\[B, N, 6\]"):
        MetricAccumulator(mean[:6]).update(generated, target)


def test_no_image_is_an_error():
    with pytest.raises(Blip3oError, match="no image"):
        MetricAccumulator(torch.zeros(D)).payload().compute()
