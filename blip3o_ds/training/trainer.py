"""The training run, as one function that reads from top to bottom.

Everything that a step depends on is a pure function of the settings and the step's number, so a run that was killed
and resumed goes on exactly as if it had not been.
"""

from __future__ import annotations

import logging
import math
import os
import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from blip3o_ds.config import RunConfig
from blip3o_ds.data.normalization import Normalizer
from blip3o_ds.data.reading.bad_samples import BadSamples
from blip3o_ds.data.reading.dataset import EmbeddingDataset
from blip3o_ds.data.reading.loader import EmbeddingLoader
from blip3o_ds.data.reading.order import GlobalOrder
from blip3o_ds.errors import ConfigError, TrainingError
from blip3o_ds.evaluation.baselines import Baselines, fit_baselines
from blip3o_ds.evaluation.report import EvalResult, evaluate, format_table
from blip3o_ds.evaluation.runs import BASELINES, CHECKPOINTS, NORMALIZER, Checkpoint, find_checkpoint
from blip3o_ds.files import atomic_write_json
from blip3o_ds.flow.build import build_flow
from blip3o_ds.flow.flow import Flow
from blip3o_ds.model.dit import DiT
from blip3o_ds.training.checkpoint import CheckpointWriter, load_checkpoint
from blip3o_ds.training.debug import DebugProbe
from blip3o_ds.training.ema import gather_weights
from blip3o_ds.training.engine import Engine, init_distributed
from blip3o_ds.training.faults import BAD_BATCHES, SpikeDetector, record_bad_batch
from blip3o_ds.training.meter import StepMeter
from blip3o_ds.training.peers import SILENCE_SECONDS, PeerWatch
from blip3o_ds.training.preemption import StopSignal, requeue_or_explain
from blip3o_ds.training.run_folder import keep_global_batch, prepare_run_dir
from blip3o_ds.training.telemetry import MetricsWriter, Progress, format_duration, setup_logging

logger = logging.getLogger(__name__)


def train(config: RunConfig, resume: str | None = None) -> dict[str, Any]:
    """Train, evaluate, and return what `final_summary.json` holds; every rank calls it.

    After SIGUSR1 or SIGTERM it ends early, with a checkpoint of its last step, and returns no `evaluation`.

    Args:
        resume: a run folder, or `latest` for the newest one in `train.output_dir`; None starts a new run.

    Raises:
        ConfigError: the settings do not fit each other, the data, or the run that is resumed.
        DataError, CheckpointError: what is read is not what it should be.
        TrainingError: loss or gradient is not finite, with the last good checkpoint named; or another rank is gone.
    """
    flow = build_flow(config)
    with ExitStack() as stack:
        rank, world_size, device = init_distributed(config.train.timeout_seconds)
        setup_logging(rank)
        stack.enter_context(PeerWatch(min(SILENCE_SECONDS, config.train.timeout_seconds)))
        stop = stack.enter_context(StopSignal())
        bad_samples = BadSamples(config.data.on_bad_sample, config.data.on_bad_shard)
        dataset = open_train_data(config, bad_samples)
        run_dir = prepare_run_dir(config, resume, rank)
        setup_logging(rank, run_dir / "clip_reproduction_training.log")
        bad_samples.write_to(run_dir / "bad_samples.jsonl", rank)
        if resume:
            config = keep_global_batch(config, run_dir, world_size)
        normalizer, baselines = prepare_statistics(config, dataset, run_dir, rank, device)
        splits = open_eval_data(config, dataset, bad_samples)

        global_batch = config.train.micro_batch_size * config.train.gradient_accumulation_steps * world_size
        total_steps = count_steps(config, len(dataset), global_batch)
        model = build_model(config, baselines)
        num_parameters = model.num_parameters()
        engine = Engine(model, config.train, total_steps, device)
        order = GlobalOrder(dataset.shard_sizes, config.train.seed, config.data.window_shards)
        loader = stack.enter_context(
            EmbeddingLoader(
                dataset,
                order,
                micro_batch_size=config.train.micro_batch_size,
                gradient_accumulation_steps=config.train.gradient_accumulation_steps,
                rank=rank,
                world_size=world_size,
                prefetch=config.data.prefetch_steps,
                device=device,
            )
        )
        saver = CheckpointWriter(
            engine,
            run_dir / CHECKPOINTS,
            with_ema=config.train.ema_decay > 0,
            keep_last=config.train.keep_last,
            keep_every=config.train.keep_every,
        )
        stack.callback(saver.close)
        saver.last = restore(engine, loader, run_dir, total_steps) if resume else None
        start_step = saver.last.step if saver.last else 0
        best = saver.last.state["best"] if saver.last else None
        writer = MetricsWriter(run_dir, rank, start_step)
        stack.callback(writer.close)
        logger.info(
            "run %s: %.1f M parameters, %d samples, global batch %d = %d ranks x %d x %d accumulated, steps %d to %d, "
            "%s, ZeRO-%d, %s",
            run_dir,
            num_parameters / 1e6,
            len(dataset),
            global_batch,
            world_size,
            config.train.micro_batch_size,
            config.train.gradient_accumulation_steps,
            start_step,
            total_steps,
            config.train.precision,
            engine.zero_stage,
            device,
        )
        meter = StepMeter(config, loader, device)
        probe = DebugProbe(engine) if config.train.debug_mode else None
        progress = Progress(total_steps, start_step)
        spikes = SpikeDetector()
        evaluate_splits = partial(evaluate_now, config, engine, flow, normalizer, baselines, splits)
        skipped_in_a_row = rollbacks = 0
        received = None
        began = time.monotonic()

        step = start_step
        while step < total_steps and received is None:
            step += 1
            keys, losses = [], []
            for stored in loader.next_step():
                batch = stored.decode()
                keys += batch.keys
                tensors = normalizer({name: batch[name] for name in ("eva", "clip")})
                eva, clip = tensors["eva"], tensors["clip"]
                noise, t, drop = flow.draw(batch.positions, tuple(clip.shape[1:]), config.train.seed, device)
                result = flow.loss(engine, clip, eva, noise, t, drop)
                losses.append(result.mse.detach())
                meter.add(result, batch)
                engine.backward(result.loss)
                if probe:
                    probe.add(result, t)
                learning_rate = engine.learning_rate
                if probe:
                    probe.before_step()
                report = engine.step()
            meter.finish_step(report, learning_rate)

            if report.applied:
                skipped_in_a_row = 0
            elif not report.lowered_loss_scale:
                skipped_in_a_row += 1
                logger.warning("step %d skipped: the gradient is not finite (%d in a row)", step, skipped_in_a_row)
                record_bad_batch(run_dir, step, keys, losses)
                if skipped_in_a_row > config.train.max_skipped_steps:
                    checkpoint = roll_back(engine, saver, run_dir, config, step, rollbacks)
                    step, best = checkpoint.step, checkpoint.state["best"]
                    rollbacks, skipped_in_a_row = rollbacks + 1, 0
                    writer.rewind(step)
                    progress = Progress(total_steps, step)
                    meter.reset()
                    meter.exclude_pause()
                    continue

            if step % config.train.log_every == 0 or step == total_steps:
                metrics = meter.reduce()
                if metrics is not None:
                    metrics |= probe.reduce() if probe else {}
                    metrics["loss_z_score"] = spikes.score(metrics["loss"])
                    if spikes.is_spike(metrics["loss_z_score"]):
                        logger.warning(
                            "step %d: the loss spikes: %.4f, z = %.1f", step, metrics["loss"], metrics["loss_z_score"]
                        )
                    writer.train(step, metrics)
                    progress.log(step, metrics)
            received = stop.agreed()
            save_now = is_due(step, config.train.save_every) or step == total_steps or received is not None
            if is_due(step, config.train.eval_every) and step < total_steps and received is None:
                results = evaluate_splits(config.eval.max_samples)
                record_evaluation(writer, step, results)
                if best is None or score(results) > best["score"]:
                    best, save_now = {"step": step, "score": score(results)}, True
            if save_now:
                state = {"loader": loader.state_dict(), "total_steps": total_steps, "best": best}
                saver.save(step, state, pinned_step=best and best["step"])
            meter.exclude_pause()

        last_saved = saver.finish()
        training = {
            "status": "finished" if received is None else f"stopped by {received.name}",
            "steps": step,
            "resumed_from_step": start_step,
            "seconds": time.monotonic() - began,
            "samples_seen": loader.state_dict()["samples_consumed"],
            "skipped_steps": engine.deepspeed.skipped_steps,
            "rollbacks": rollbacks,
            "last_metrics": meter.last,
            "checkpoint": str(last_saved.path),
        }
        logger.info("trained %d steps in %s", step - start_step, format_duration(training["seconds"]))
        summary = {"run_dir": str(run_dir), "num_parameters": num_parameters, "steps": step}
        if received is None:
            results = evaluate_splits(None)
            record_evaluation(writer, total_steps, results)
            summary["evaluation"] = {split: result.to_dict() for split, result in results.items()}
            if config.train.overfit_test_size:
                summary["overfit_test"] = overfit_verdict(results["overfit"])
        if rank == 0:
            atomic_write_json(run_dir / "training_summary.json", training)
            if received is None:
                atomic_write_json(run_dir / "final_summary.json", summary)
        dist.barrier()
        if rank == 0 and received is not None:
            logger.info("stopped by %s after step %d of %d, saved", received.name, step, total_steps)
            requeue_or_explain(run_dir, received, os.environ)
        return summary


def open_train_data(config: RunConfig, bad_samples: BadSamples) -> EmbeddingDataset:
    """The training set as the run reads it.

    Raises:
        ConfigError: no folder is given, or the model's dims are not the data's; says what to set.
        DataError: the folder is not a dataset.
    """
    if config.data.train_dir is None:
        raise ConfigError("data.train_dir is not set; give --chunked_embeddings_dir DIR, a folder with a manifest.json")
    dataset = EmbeddingDataset(
        config.data.train_dir,
        max_shards=config.data.max_shards,
        max_samples=config.train.overfit_test_size,
        token_layout=config.model.token_layout,
        cache_dir=config.data.cache_dir,
        cache_gb=config.data.cache_gb,
        bad_samples=bad_samples,
    )
    check_dims(config, dataset, config.data.train_dir)
    wanted = config.train.overfit_test_size
    if wanted and len(dataset) < wanted:
        raise ConfigError(f"train.overfit_test_size = {wanted}, but {config.data.train_dir} has {len(dataset)} samples")
    return dataset


def check_dims(config: RunConfig, dataset: EmbeddingDataset, folder: str) -> None:
    """Raise a `ConfigError` unless the dataset's dims are the model's."""
    wrong = {name: value for name, value in dataset.spec.model_dims().items() if getattr(config.model, name) != value}
    if wrong:
        stated = ", ".join(
            f"model.{name} = {getattr(config.model, name)} but the data has {v}" for name, v in wrong.items()
        )
        remedy = " ".join(f"--set model.{name}={v}" for name, v in wrong.items())
        raise ConfigError(f"{folder}: {stated}; for this data: {remedy}")


def open_eval_data(
    config: RunConfig, train_data: EmbeddingDataset, bad_samples: BadSamples
) -> dict[str, EmbeddingDataset]:
    """The splits to evaluate on, by name; in an overfit test, or with no held-out set, the training samples."""
    if config.train.overfit_test_size:
        return {"overfit": train_data}
    splits = {}
    for folder in config.data.eval_dirs:
        name = Path(folder).name
        if name in splits:
            raise ConfigError(f"data.eval_dirs: two folders are named {name}, and metrics go by the name")
        splits[name] = EmbeddingDataset(
            folder,
            token_layout=config.model.token_layout,
            cache_dir=config.data.cache_dir,
            cache_gb=config.data.cache_gb,
            bad_samples=bad_samples,
        )
        check_dims(config, splits[name], folder)
    if splits:
        return splits
    logger.warning("data.eval_dirs is empty: evaluation is on training samples and says nothing of unseen ones")
    return {"train": train_data}


def prepare_statistics(
    config: RunConfig, dataset: EmbeddingDataset, run_dir: Path, rank: int, device: torch.device
) -> tuple[Normalizer, Baselines]:
    """The normaliser and the baselines of the training set, computed once by rank 0 and kept in the run folder."""
    baselines_file, normalizer_file = run_dir / BASELINES, run_dir / NORMALIZER
    if rank == 0 and not baselines_file.exists():
        normalizer = Normalizer.from_stats(config.data.normalization, dataset.manifest.stats)
        normalizer.save(normalizer_file)
        fit_baselines(dataset, normalizer, device=device).save(baselines_file)
    dist.barrier()
    return Normalizer.load(normalizer_file), Baselines.load(baselines_file)


def count_steps(config: RunConfig, num_samples: int, global_batch: int) -> int:
    """Steps of the whole run; the last one of the last epoch is filled up from the next epoch's order."""
    if config.train.max_steps is not None:
        return config.train.max_steps
    epochs = 10 if config.train.num_epochs is None else config.train.num_epochs
    return math.ceil(epochs * num_samples / global_batch)


def build_model(config: RunConfig, baselines: Baselines) -> DiT:
    """The DiT at its start, the same on every rank."""
    torch.manual_seed(config.train.seed)
    model = DiT(config.model)
    model.gradient_checkpointing = config.train.activation_checkpointing
    if config.model.linear_skip == "ridge":
        model.set_linear_skip(baselines.ridge_weight, baselines.eva_mean, baselines.clip_mean)
    return model


def restore(engine: Engine, loader: EmbeddingLoader, run_dir: Path, total_steps: int) -> Checkpoint | None:
    """Load the newest whole checkpoint of a resumed run; None means from the beginning.

    Raises:
        ConfigError: the run's length is no longer `total_steps`, and the schedule of the learning rate goes by it.
    """
    checkpoint = newest_checkpoint(run_dir)
    if checkpoint is None:
        logger.warning("%s has no checkpoint yet: starting it from its beginning", run_dir)
        return None
    planned = checkpoint.state["total_steps"]
    if planned != total_steps:
        raise ConfigError(
            f"{checkpoint.path} is of a run of {planned} steps, which would now take {total_steps}, for data.train_dir "
            "has not as many samples as it had; resume with the data, data.max_shards and train.max_steps as they were"
        )
    load_checkpoint(engine, checkpoint)
    loader.load_state_dict(checkpoint.state["loader"])
    logger.info("resumed from %s", checkpoint.path)
    return checkpoint


def newest_checkpoint(run_dir: Path) -> Checkpoint | None:
    """The newest checkpoint whose files are whole, the same on every rank."""
    found: list[Any] = [find_checkpoint(run_dir / CHECKPOINTS) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(found)
    return found[0]


def roll_back(
    engine: Engine, saver: CheckpointWriter, run_dir: Path, config: RunConfig, step: int, rollbacks: int
) -> Checkpoint:
    """Go back to the last checkpoint and return it; the data goes on behind the batches that failed.

    Going through the same samples again would end in the same place, since a step is a function of its samples.

    Raises:
        TrainingError: there is no checkpoint, or the run has gone back `train.max_rollbacks` times already.
    """
    saver.finish()
    checkpoint = newest_checkpoint(run_dir)
    if checkpoint is None or rollbacks >= config.train.max_rollbacks:
        saved = f"the last good checkpoint is {checkpoint.path}" if checkpoint else "no checkpoint was written yet"
        raise TrainingError(
            f"step {step}: loss or gradient is not finite, more than train.max_skipped_steps = "
            f"{config.train.max_skipped_steps} steps in a row, after {rollbacks} of train.max_rollbacks = "
            f"{config.train.max_rollbacks} returns to a checkpoint; {saved}, the samples are in "
            f"{run_dir / BAD_BATCHES}. Lower train.learning_rate, or look for the cause with --debug_mode"
        )
    load_checkpoint(engine, checkpoint)
    logger.warning("back to %s, with the samples after step %d's", checkpoint.path, step)
    return checkpoint


def is_due(step: int, every: int) -> bool:
    """Whether something done `every` so many steps (0: never) is done at this one."""
    return every > 0 and step % every == 0


def score(results: dict[str, EvalResult]) -> float:
    """What the best checkpoint is best in: `clip_similarity_centered` of the posterior mean, on the first split."""
    return next(iter(results.values())).readings["posterior_mean"]["clip_similarity_centered"]


def evaluate_now(
    config: RunConfig,
    engine: Engine,
    flow: Flow,
    normalizer: Normalizer,
    baselines: Baselines,
    splits: dict[str, EmbeddingDataset],
    max_samples: int | None,
) -> dict[str, EvalResult]:
    """Generate on every split with the EMA weights (or the current ones, without EMA) and compare.

    Each rank holds a whole copy of the model while it lasts, which keeps generation free of ZeRO's gathers.
    """
    model = DiT(config.model)
    ema = config.train.ema_decay > 0 and engine.has_stepped
    model.load_state_dict(gather_weights(engine.module, engine.optimizer, ema))
    model.to(engine.device, engine.dtype).eval()
    results = {}
    for split, dataset in splits.items():
        results[split] = evaluate(
            model,
            flow,
            normalizer,
            baselines,
            dataset,
            config.eval.sampler,
            batch_size=config.eval.batch_size,
            device=engine.device,
            rank=dist.get_rank(),
            world_size=dist.get_world_size(),
            gather=_gather,
            max_samples=max_samples,
        )
    return results


def _gather(payload: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    payloads: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(payloads, payload)
    return payloads


def record_evaluation(writer: MetricsWriter, step: int, results: dict[str, EvalResult]) -> None:
    """Write an evaluation to the metrics and show it as a table."""
    for split, result in results.items():
        for reading, metrics in result.readings.items():
            writer.evaluation(step, split, reading, metrics)
    logger.info("evaluation at step %d\n%s", step, format_table(results))


def overfit_verdict(result: EvalResult) -> dict[str, Any]:
    """Whether the network learnt the few samples it was given: mean token cosine above 0.8."""
    similarity = {reading: result.readings[reading]["clip_similarity"] for reading in ("posterior_mean", "sampled")}
    verdict = {"threshold": 0.8, **similarity, "passed": similarity["posterior_mean"] > 0.8}
    logger.info(
        "overfit test: clip_similarity %.3f (posterior mean), %.3f (sampled), threshold 0.8: %s",
        similarity["posterior_mean"],
        similarity["sampled"],
        "passed" if verdict["passed"] else "FAILED",
    )
    return verdict
