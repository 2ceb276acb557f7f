"""What the samples of an overfit test themselves allow: pairs that contradict each other, and targets without content.

All is measured on the embeddings as they are stored.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from blip3o_ds.data.reading.loader import Batch, read_batches, spread_indices
from blip3o_ds.evaluation.report import evaluation_noise
from blip3o_ds.flow.solvers import posterior_mean

if TYPE_CHECKING:
    from blip3o_ds.training.setup import Run

ALIKE = 1e-3  # distance of two samples, relative to the longer one: below it they are equal
MAX_SAMPLES = 256  # that are held in memory, spread over the set


@dataclass(frozen=True)
class DataFacts:
    """What is known of the samples without the network."""

    samples: int  # that were read
    untrained: float  # `clip_similarity` of the posterior mean of a network that outputs zero, as it does at its start
    ceiling: float  # `clip_similarity` of the best guess that is the same for samples with equal EVA embeddings
    contradictions: int  # pairs with equal EVA embeddings and different CLIP ones
    example: tuple[str, ...]  # the keys of one of them
    zero_targets: float  # share of the CLIP tokens
    target_variation: float  # distance of the CLIP embeddings from their mean sample, relative to their norm

    def numbers(self) -> dict[str, float]:
        """All but the keys."""
        return {name: value for name, value in vars(self).items() if name != "example"}


def data_facts(run: Run) -> DataFacts:
    """Read the samples of a run's overfit test once."""
    dataset = run.splits["overfit"]
    eva, clip, keys, untrained = [], [], [], []
    for batch in read_batches(dataset, spread_indices(len(dataset), MAX_SAMPLES), run.config.eval.batch_size):
        eva.append(batch["eva"])
        clip.append(batch["clip"])
        keys += batch.keys
        untrained.append(cosine_similarity(_untrained(run, batch), batch["clip"].float(), dim=-1).mean(dim=1))
    return measure_data(torch.cat(eva), torch.cat(clip), keys, float(torch.cat(untrained).mean()))


def measure_data(eva: Tensor, clip: Tensor, keys: Sequence[str], untrained: float) -> DataFacts:
    """The facts of samples eva `[S, N, De]` and clip `[S, N, Dc]`, with their S keys."""
    same = equal_samples(eva)
    pairs = (same & ~equal_samples(clip)).triu(diagonal=1).nonzero().tolist()
    mean = clip.float().mean(dim=0) if len(clip) > 1 else clip.float().mean(dim=1)  # of one sample: its mean token
    square = sum(float(x.float().square().sum()) for x in clip)
    off = sum(float((x.float() - mean).square().sum()) for x in clip)
    best = [
        cosine_similarity(clip[same[row]].float().mean(dim=0), x.float(), dim=-1).mean() for row, x in enumerate(clip)
    ]
    return DataFacts(
        samples=len(clip),
        untrained=untrained,
        ceiling=float(torch.stack(best).mean()),
        contradictions=len(pairs),
        example=tuple(keys[place] for place in pairs[0]) if pairs else (),
        zero_targets=float((clip == 0).all(dim=-1).double().mean()),
        target_variation=math.sqrt(off / square) if square else 0.0,
    )


def equal_samples(x: Tensor) -> Tensor:
    """Which of the samples `[S, N, D]` are nearer to each other than `ALIKE` of their norm, bool `[S, S]`.

    The mean tokens are compared first: they are no further apart than the samples divided by sqrt(N), and smaller.
    """
    norms = torch.stack([row.double().norm() for row in x])
    pooled = torch.stack([row.double().mean(dim=0) for row in x])
    reach = ALIKE * torch.maximum(norms[:, None], norms[None])
    equal = torch.cdist(pooled, pooled, compute_mode="donot_use_mm_for_euclid_dist") * math.sqrt(x.shape[1]) <= reach
    for i, j in equal.triu(diagonal=1).nonzero().tolist():
        equal[i, j] = equal[j, i] = bool((x[i].double() - x[j].double()).norm() <= reach[i, j])
    return equal


@torch.no_grad()
def _untrained(run: Run, batch: Batch) -> Tensor:
    """The posterior mean `[B, N, Dc]` of a network whose output is zero, on the CPU."""
    device = run.engine.device
    eva, clip = run.normalizer({name: batch[name].to(device).float() for name in ("eva", "clip")}).values()
    noise = evaluation_noise(batch.keys, 0, (clip.shape[1], clip.shape[2]), run.config.eval.sampler.seed, device)
    folds = run.splits["overfit"].folds(batch.keys, run.baselines.prior.num_folds).tolist()
    output = posterior_mean(lambda x, *_: torch.zeros_like(x), run.flow, eva, noise, folds)
    return run.normalizer.inverse("clip", output).cpu()
