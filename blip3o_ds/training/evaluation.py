"""Evaluation while training: generate on every split with the averaged weights, record it, and judge it.

Each rank holds a whole copy of the model while it lasts, which keeps generation free of ZeRO's gathers.
"""

from __future__ import annotations

import logging

import torch.distributed as dist

from blip3o_ds.evaluation.report import EvalResult, evaluate, format_table
from blip3o_ds.model.dit import DiT
from blip3o_ds.runs.pretrained import Pretrained
from blip3o_ds.training.ema import gather_weights
from blip3o_ds.training.peers import gather
from blip3o_ds.training.setup import Run

logger = logging.getLogger(__name__)

BEST_BY = "energy_score"  # of `sampled`, on the first split: the lower, the better


def evaluate_splits(run: Run, max_samples: int | None) -> dict[str, EvalResult]:
    """Generate with the EMA weights (or the current ones, without EMA) and compare.

    The training set, of an overfit test or in place of a held-out one, is guessed as new images are.
    """
    config, engine = run.config, run.engine
    model = DiT(config.model)
    ema = config.train.ema_decay > 0 and engine.has_stepped
    model.load_state_dict(gather_weights(engine.module, engine.optimizer, ema))
    model.to(engine.device, engine.dtype).eval()
    parts = (run.flow, run.normalizer, run.baselines, config, run.state.step)
    pretrained = Pretrained(model, *parts, weights="ema" if ema else "model", device=engine.device)
    settings = config.eval.model_copy(update={"max_samples": max_samples})
    place, num_folds = (dist.get_rank(), dist.get_world_size(), gather), run.baselines.prior.num_folds
    return {
        split: evaluate(pretrained, dataset, settings, *place, num_folds=num_folds * (dataset is run.loader.dataset))
        for split, dataset in run.splits.items()
    }


def record_evaluation(run: Run, results: dict[str, EvalResult]) -> None:
    """Write an evaluation to the metrics and show it as a table."""
    for split, result in results.items():
        for reading, metrics in result.readings.items():
            run.writer.evaluation(run.state.step, split, reading, metrics)
    logger.info("evaluation at step %d\n%s", run.state.step, format_table(results))


def is_best(run: Run, results: dict[str, EvalResult]) -> bool:
    """Whether no evaluation before was as good by `BEST_BY`; the state then remembers this one.

    A best by another metric, in a checkpoint of an older version, cannot be compared: this one takes its place.
    """
    score = next(iter(results.values())).readings["sampled"][BEST_BY]
    best = run.state.best
    if best is not None and best.get("metric") == BEST_BY and score >= best["score"]:
        return False
    run.state.best = {"step": run.state.step, "metric": BEST_BY, "score": score}
    return True
