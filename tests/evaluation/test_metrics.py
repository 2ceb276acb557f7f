"""Every metric against NumPy in float64, against formulas, and at its limits."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from blip3o_ds.errors import Blip3oError
from blip3o_ds.evaluation.metrics import METRIC_NAMES, Collected, MetricAccumulator

N, D = 5, 7
DIRECTIONS = torch.linalg.qr(torch.randn(D, 3, generator=torch.Generator().manual_seed(9), dtype=torch.float64)).Q


def pairs(count: int, seed: int = 0, samples: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Samples [3, count, 5, 7] and true embeddings that differ little in the first images and much in the last."""
    generator = torch.Generator().manual_seed(seed)
    mean = 2 + torch.randn(D, generator=generator)
    image = torch.randn(count, 1, D, generator=generator)
    target = mean + image + 0.5 * torch.randn(count, N, D, generator=generator)
    shared, own = (torch.randn(k, count, N, D, generator=generator) for k in (1, samples))
    return target + (shared + own) * torch.linspace(0.2, 4, count)[:, None, None], target, mean + 0.1


def names(count: int, first: int = 0) -> list[str]:
    return [f"image_{first + i}" for i in range(count)]


def collect(samples, target, mean, batch_size=100, directions=DIRECTIONS) -> Collected:
    accumulator = MetricAccumulator(mean, directions)
    for s, c in zip(samples.split(batch_size, dim=1), target.split(batch_size), strict=True):
        accumulator.update(s, c, names(len(c)))
    return accumulator.payload()


def compute(samples, target, mean, batch_size=100, directions=DIRECTIONS) -> dict[str, float]:
    return collect(samples, target, mean, batch_size, directions).compute()


def oracle(samples, target, mean) -> dict[str, float]:
    """All metrics by loops and formulas other than those of the code; those of a point estimate for one sample."""
    s, c, m = (x.numpy().astype(np.float64) for x in (samples, target, mean))
    return oracle_of_samples(s, c) | oracle_of_first(s[0], c, m)


def oracle_energy(samples, target) -> float:
    """Of K vectors [K, ...] and one: over all ordered pairs of different samples."""
    K = len(samples)
    near = np.mean([np.linalg.norm(s - target) for s in samples])
    apart = [np.linalg.norm(samples[i] - samples[j]) for i in range(K) for j in range(K) if i != j]
    return near - (np.mean(apart) / 2 if apart else 0)


def oracle_of_samples(s, c) -> dict[str, float]:
    K, B = s.shape[:2]
    variance = s.var(axis=0, ddof=1).sum(-1).mean() if K > 1 else 0.0  # of a token, summed over channels
    error = ((s.mean(0) - c) ** 2).sum(-1).mean() - variance / K
    inside = []
    for direction in DIRECTIONS.T.numpy():
        values, true = s @ direction, c @ direction
        rank = (values < true).sum(0)
        inside.append((rank > 0) & (rank < K))
    pooled = s.mean(2), c.mean(1)
    tokens = s.reshape(-1, D), c.reshape(-1, D)
    means, deviations = ([x.mean(0) for x in tokens], [x.std(0) for x in tokens])
    found = {
        "energy_score": np.mean([oracle_energy(s[:, b, n], c[b, n]) for b in range(B) for n in range(N)]),
        "energy_score_pooled": np.mean([oracle_energy(pooled[0][:, b], pooled[1][b]) for b in range(B)]),
        "energy_score_whole": np.mean([oracle_energy(s[:, b].reshape(K, -1), c[b].ravel()) for b in range(B)]),
        "spread_skill": variance / error,
        "mean_error": error,
        "frechet": oracle_frechet(*tokens),
        "frechet_pooled": oracle_frechet(pooled[0][0], pooled[1]),
        "frechet_diagonal": ((means[0] - means[1]) ** 2).sum() + ((deviations[0] - deviations[1]) ** 2).sum(),
        "variance_ratio": (deviations[0] ** 2).mean() / (deviations[1] ** 2).mean(),
    }
    return found | ({"coverage": np.mean(inside) / ((K - 1) / (K + 1))} if K > 1 else {})


def oracle_frechet(a, b) -> float:
    """Between normal distributions with the moments of the rows; the eigenvalues of C1 C2 are those of its root."""
    first, second = (np.cov(x.T, bias=True) for x in (a, b))
    root = np.sqrt(np.linalg.eigvals(first @ second).astype(complex)).real.sum()
    return ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(first) + np.trace(second) - 2 * root


def oracle_of_first(g, c, m) -> dict[str, float]:
    def cosine(a, b):
        return (a * b).sum(-1) / np.sqrt((a * a).sum(-1) * (b * b).sum(-1))

    similarity = cosine(g, c).mean(1)
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


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-7)])
@pytest.mark.parametrize("samples", [1, 2, 3, 5])
def test_every_metric_is_that_of_numpy_in_float64(samples, dtype, tolerance):
    generated, target, mean = (x.to(dtype) for x in pairs(40, samples, samples))

    found, expected = compute(generated, target, mean), oracle(generated, target, mean)

    assert set(METRIC_NAMES) - set(found) == ({"coverage"} if samples == 1 else set())
    assert found.pop("frechet_pooled") == pytest.approx(expected.pop("frechet_pooled"), rel=1e-5)  # kept in fp32
    assert found == pytest.approx(expected, rel=tolerance)
    shares = ("high_quality", "very_high_quality", "excellent_quality", "retrieval_r1", "retrieval_r5")
    assert all(0 < found[name] < 1 for name in shares)  # the comparison above compared something


def test_the_names_fixed_by_the_command_line_are_all_there():
    assert set(METRIC_NAMES) >= {
        *("clip_similarity", "clip_similarity_centered", "high_quality", "very_high_quality", "excellent_quality"),
        *("mse", "norm_ratio", "retrieval_r1", "retrieval_r5", "energy_score", "spread_skill", "frechet"),
    }
    assert METRIC_NAMES[0] == "energy_score"


def test_more_samples_change_no_metric_of_the_first():
    samples, target, mean = pairs(20)

    one, three = compute(samples[:1], target, mean), compute(samples, target, mean)

    of_all = {"energy_score", "energy_score_pooled", "energy_score_whole", "spread_skill", "mean_error", "coverage"}
    of_all |= {"frechet", "frechet_diagonal", "variance_ratio"}
    assert {name for name in METRIC_NAMES if one.get(name) != three[name]} == of_all


def test_a_point_estimate_has_the_distance_for_its_energy_and_no_spread():
    samples, target, mean = pairs(20, samples=1)

    found = compute(samples, target, mean)

    assert found["energy_score"] == pytest.approx(float((samples[0] - target).double().norm(dim=-1).mean()), rel=1e-6)
    assert found["spread_skill"] == 0
    assert found["mean_error"] == pytest.approx(D * found["mse"])
    assert "coverage" not in found


def test_what_too_few_images_or_no_directions_do_not_determine_is_left_out():
    samples, target, mean = pairs(D)

    found = compute(samples, target, mean, directions=None)

    assert set(METRIC_NAMES) - set(found) == {"coverage", "frechet_pooled"}


def test_a_spread_around_a_mean_without_error_is_no_ratio():
    _, target, mean = pairs(4)
    offset = torch.randn(target.shape, generator=torch.Generator().manual_seed(3))

    found = compute(torch.stack([target + offset, target - offset]), target, mean)

    assert found["mean_error"] < 0  # an estimate without bias can be
    assert "spread_skill" not in found


def test_the_true_embeddings_themselves_are_perfect():
    _, target, mean = pairs(12)

    found = compute(target[None], target, mean)

    zero = ("energy_score", "energy_score_pooled", "energy_score_whole", "spread_skill", "mean_error", "mse")
    assert [found.pop(name) for name in (*zero, "frechet_diagonal")] == [0] * (len(zero) + 1)
    assert [found.pop(name) for name in ("frechet", "frechet_pooled")] == pytest.approx([0, 0], abs=1e-9)
    assert list(found.values()) == pytest.approx([1.0] * len(found))


def test_the_training_mean_scores_high_raw_and_zero_centred_and_retrieves_nothing():
    _, target, mean = pairs(12)

    found = compute(mean.expand_as(target)[None], target, mean)

    assert found["clip_similarity"] > 0.7
    assert found["clip_similarity_centered"] == found["variance_ratio"] == 0
    assert found["retrieval_r1"] == found["retrieval_r5"] == 0


def test_the_diagonal_frechet_distance_of_shifted_and_stretched_tokens_follows_its_formula():
    generator = torch.Generator().manual_seed(1)
    target = torch.randn(50, N, D, generator=generator, dtype=torch.float64)
    stretch, shift = torch.linspace(0.5, 2, D, dtype=torch.float64), torch.arange(D) / 10

    found = compute((target * stretch + shift)[None], target, torch.zeros(D))

    std = target.flatten(0, 1).std(dim=0, correction=0)
    mean = target.mean(dim=(0, 1))
    expected = ((mean * (stretch - 1) + shift) ** 2 + (std * (stretch - 1)) ** 2).sum()
    assert found["frechet_diagonal"] == pytest.approx(float(expected), rel=1e-9)
    expected_ratio = (std.square() * stretch.square()).mean() / std.square().mean()
    assert found["variance_ratio"] == pytest.approx(float(expected_ratio), rel=1e-9)


def test_doubling_every_embedding_doubles_the_norm_and_nothing_of_the_direction():
    _, target, mean = pairs(8)

    found = compute(2 * target[None], target, mean)

    assert found["norm_ratio"] == pytest.approx(2)
    assert found["clip_similarity"] == pytest.approx(1)


def test_the_slices_of_several_ranks_join_into_the_metrics_of_one():
    generated, target, mean = pairs(23)
    ranks = [collect(generated[:, rank::3], target[rank::3], mean) for rank in range(3)]
    ranks.append(MetricAccumulator(mean).payload())  # a rank that got no image

    joined = Collected.join(ranks).compute()

    assert joined == pytest.approx(compute(generated, target, mean), rel=1e-10)


def test_the_size_of_a_batch_changes_nothing():
    generated, target, mean = pairs(10)
    assert compute(generated, target, mean, 3) == pytest.approx(compute(generated, target, mean), rel=1e-10)


def test_retrieval_is_the_same_in_chunks(monkeypatch):
    generated, target, mean = pairs(23)
    whole = compute(generated, target, mean)
    monkeypatch.setattr("blip3o_ds.evaluation.metrics.RETRIEVAL_CHUNK", 4)
    assert compute(generated, target, mean) == whole


def test_what_was_collected_does_not_change_afterwards():
    samples, target, mean = pairs(10)
    accumulator = MetricAccumulator(mean)
    accumulator.update(samples[:, :5], target[:5], names(5))
    before = accumulator.payload()
    computed = before.compute()

    accumulator.update(samples[:, 5:], target[5:], names(5, 5))

    assert Collected.join([before]).compute() == computed


def test_a_variance_beside_a_large_mean_keeps_its_digits():
    generated, target, mean = pairs(10)
    far = torch.full((D,), 1000.0)
    generated, target, mean = ((x + far).double() for x in (generated, target, mean))
    assert compute(generated, target, mean) == pytest.approx(oracle(generated, target, mean), rel=1e-6, abs=1e-9)


def test_a_zero_vector_has_no_direction_and_no_ratio():
    _, target, mean = pairs(3)

    found = compute(target[None], torch.zeros_like(target), mean)

    assert found["clip_similarity"] == found["norm_ratio"] == found["variance_ratio"] == 0
    assert all(math.isfinite(value) for value in found.values())


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("side", ["generated", "true"])
def test_an_embedding_that_is_not_finite_names_its_image(value, side):
    generated, target, mean = pairs(3)
    (generated[1] if side == "generated" else target)[2, 1, 0] = value
    with pytest.raises(Blip3oError, match=f"image cat: its {side} embedding"):
        MetricAccumulator(mean).update(generated, target, ["ant", "bee", "cat"])


def test_other_shapes_are_refused():
    generated, target, mean = pairs(3)
    with pytest.raises(ValueError, match=r"\[3, 3, 4, 7\] and \[3, 5, 7\]"):
        MetricAccumulator(mean).update(generated[:, :, :4], target, names(3))
    with pytest.raises(ValueError, match=r"\[B, N, 6\]"):
        MetricAccumulator(mean[:6]).update(generated, target, names(3))
    with pytest.raises(ValueError, match=r"\[K, B, N, 7\]"):
        MetricAccumulator(mean).update(generated[0], target, names(3))


def test_no_image_is_an_error():
    with pytest.raises(Blip3oError, match="no image"):
        MetricAccumulator(torch.zeros(D)).payload().compute()
