"""The training loop: what happens in a step and between two steps, in the order in which it happens.

A step depends only on the settings and the state, so a run that was killed and resumed continues as if it had not been.
"""

from __future__ import annotations

import logging
import os
import signal
import time
from typing import Any

import torch.distributed as dist

from blip3o_ds.config import RunConfig
from blip3o_ds.errors import CheckpointError
from blip3o_ds.files import atomic_write_json, read_json
from blip3o_ds.progress import format_duration
from blip3o_ds.runs.folder import FINAL_SUMMARY, TRAINING_SUMMARY, read_run_config
from blip3o_ds.training.anomalies import skip_or_roll_back
from blip3o_ds.training.evaluation import evaluate_splits, is_best, record_evaluation
from blip3o_ds.training.overfit import overfit_verdict
from blip3o_ds.training.peers import on_rank_zero
from blip3o_ds.training.preemption import requeue_or_explain
from blip3o_ds.training.setup import Run, setup

logger = logging.getLogger(__name__)


def train(config: RunConfig, resume: str | None = None) -> dict[str, Any]:
    """Train, evaluate, and return what `final_summary.json` holds; every rank calls it.

    After SIGUSR1 or SIGTERM it ends early, with a checkpoint of its last step, and returns no `evaluation`. To `resume`
    are a run folder, or `latest` for the newest one in `train.output_dir`; None starts a new run.

    Raises:
        ConfigError: the settings do not fit each other, the data, or the run that is resumed.
        DataError, CheckpointError: what is read is not what it should be.
        TrainingError: loss or gradient is not finite, with the last good checkpoint named; or another rank is gone.
    """
    with setup(config, resume) as run:
        config, engine, meter = run.config, run.engine, run.meter
        began, first_step, total_steps = time.monotonic(), run.state.step, run.state.total_steps
        if (finished := finished_summary(run)) is not None:
            return finished
        stopped_by = None

        while run.state.step < total_steps and stopped_by is None:
            run.state.step += 1
            keys, losses = [], []
            for stored in run.loader.next_step():
                batch = stored.decode()
                tensors = run.normalizer({name: batch[name] for name in ("eva", "clip")})
                eva, clip = tensors["eva"], tensors["clip"]
                noise, t, drop = run.flow.draw(
                    batch.positions, (clip.shape[1], clip.shape[2]), config.train.seed, engine.device
                )
                result = run.flow.loss(engine, clip, eva, noise, t, drop, *run.roles(batch.keys))
                meter.add(batch, result, t)
                engine.backward(result.loss)
                keys += batch.keys
                losses.append(result.mse.detach())
            if meter.probe:
                meter.probe.read_gradients()
            report = engine.finish_step()
            meter.finish_step(report)

            if report.applied:
                run.state.skipped_in_a_row = 0
            elif not report.lowered_loss_scale and skip_or_roll_back(run, keys, losses):
                meter.exclude_pause()
                continue

            step = run.state.step
            if step % config.train.log_every == 0 or step == total_steps:
                log_metrics(run)
            stopped_by = run.stop.agreed()
            last = step == total_steps or stopped_by is not None
            save_now = last or is_due(step, config.train.save_every)
            if is_due(step, config.train.eval_every) and not last:
                results = evaluate_splits(run, config.eval.max_samples)
                record_evaluation(run, results)
                save_now |= is_best(run, results)
            if save_now:
                run.state.loader = run.loader.state_dict()
                run.saver.save(step, run.state.to_json(), run.state.best["step"] if run.state.best else None)
            meter.exclude_pause()

        return conclude(run, first_step, began, stopped_by)


def finished_summary(run: Run) -> dict[str, Any] | None:
    """What a run that is at its end already wrote there, or None; the same on every rank.

    None, too, if it is to be evaluated in another way. One that is not at its end has no such file from here on: an
    earlier one is of weights that were lost.
    """

    def read() -> dict[str, Any] | None:
        path = run.folder / FINAL_SUMMARY
        saved = read_run_config(run.folder)[0]
        asked_anew = (saved.eval, saved.data.eval_dirs) != (run.config.eval, run.config.data.eval_dirs)
        if run.state.step < run.state.total_steps:
            path.unlink(missing_ok=True)
        if asked_anew or not path.exists():
            return None
        logger.info("%s is finished; `blip3o-ds eval %s` evaluates it again", run.folder, run.folder)
        return read_json(path, CheckpointError, "remove it, and resume the run to evaluate it again")

    return on_rank_zero(read)


def is_due(step: int, every: int) -> bool:
    """Whether something done `every` so many steps (0: never) is done at this one."""
    return every > 0 and step % every == 0


def log_metrics(run: Run) -> None:
    """Write the metrics since the last line to file and console; nothing if every step since was skipped."""
    metrics = run.meter.reduce()
    if metrics is None:
        return
    step, score = run.state.step, run.spikes.score(metrics["loss"])
    metrics["loss_z_score"] = score
    if run.spikes.is_spike(score):
        logger.warning("step %d: the loss spikes: %.4f, z = %.1f", step, metrics["loss"], score)
    run.writer.train(step, metrics)
    logger.info(
        "step %d/%d  loss %.4f  cos %.3f  grad %.2f  lr %.2e  %.1f samples/s  wait %.1f%%  ETA %s",
        *(step, run.state.total_steps, metrics["loss"], metrics["velocity_similarity"], metrics["grad_norm"]),
        *(metrics["lr"], metrics["samples_per_second"], 100 * metrics["data_wait_fraction"]),
        format_duration(run.progress.seconds_left(step)),
    )


def conclude(run: Run, first_step: int, began: float, stopped_by: signal.Signals | None) -> dict[str, Any]:
    """Wait for the last checkpoint, evaluate on everything unless the run was stopped, and write the summaries."""
    step, last_saved = run.state.step, run.saver.finish()
    seconds = time.monotonic() - began
    training = {
        "status": "finished" if stopped_by is None else f"stopped by {stopped_by.name}",
        "steps": step,
        "resumed_from_step": first_step,
        "seconds": seconds,
        "samples_seen": run.loader.state_dict()["samples_consumed"],
        "skipped_steps": run.engine.skipped_steps,
        "rollbacks": run.state.rollbacks,
        "last_metrics": run.meter.last,
        "checkpoint": str(last_saved.path) if last_saved else None,
    }
    logger.info("trained %d steps in %s", step - first_step, format_duration(seconds))
    summary: dict[str, Any] = {"run_dir": str(run.folder), "num_parameters": run.engine.num_parameters, "steps": step}
    if stopped_by is None:
        results = evaluate_splits(run, None)
        record_evaluation(run, results)
        summary["evaluation"] = {split: result.to_dict() for split, result in results.items()}
        if run.config.train.overfit_test_size:
            summary["overfit_test"] = overfit_verdict(run, results["overfit"])
    if run.rank == 0:
        atomic_write_json(run.folder / TRAINING_SUMMARY, training)
        if stopped_by is None:
            atomic_write_json(run.folder / FINAL_SUMMARY, summary)
    dist.barrier()
    if run.rank == 0 and stopped_by is not None:
        logger.info("stopped by %s after step %d of %d, saved", stopped_by.name, step, run.state.total_steps)
        requeue_or_explain(run.folder, stopped_by, os.environ)
    return summary
