"""The training run, as one function that reads from top to bottom.

Everything that a step depends on is a pure function of the settings and the step's number, so a run that was killed
and resumed goes on exactly as if it had not been.
"""

from __future__ import annotations

import datetime
import json
import logging
import math
import platform
import subprocess
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import blip3o_ds
from blip3o_ds.config import RunConfig
from blip3o_ds.data.faults import FaultLog
from blip3o_ds.data.loader import EmbeddingLoader
from blip3o_ds.data.normalization import Normalizer
from blip3o_ds.data.order import GlobalOrder
from blip3o_ds.data.shards import EmbeddingDataset
from blip3o_ds.errors import CheckpointError, ConfigError, TrainingError
from blip3o_ds.evaluation.baselines import Baselines, fit_baselines
from blip3o_ds.evaluation.report import EvalResult, evaluate, format_table
from blip3o_ds.evaluation.runs import BASELINES, CHECKPOINTS, NORMALIZER, RUN_CONFIG, Checkpoint, find_checkpoint
from blip3o_ds.files import atomic_write_json
from blip3o_ds.flow.objective import FlowObjective
from blip3o_ds.model.dit import DiT
from blip3o_ds.training.checkpoint import load_checkpoint, save_checkpoint
from blip3o_ds.training.debug import DebugProbe
from blip3o_ds.training.ema import gather_weights
from blip3o_ds.training.engine import Engine, init_distributed
from blip3o_ds.training.meter import StepMeter
from blip3o_ds.training.telemetry import MetricsWriter, Progress, format_duration, setup_logging

logger = logging.getLogger(__name__)

# A run is resumed only if these are as they were: they decide what the remaining steps compute.
FIXED_ON_RESUME = (
    *("model", "flow", "data.train_dir", "data.normalization", "data.max_shards", "data.window_shards"),
    *("train.micro_batch_size", "train.gradient_accumulation_steps", "train.learning_rate", "train.min_lr_ratio"),
    *("train.warmup_steps", "train.weight_decay", "train.adam_beta1", "train.adam_beta2", "train.adam_eps"),
    *("train.max_grad_norm", "train.precision", "train.ema_decay", "train.seed", "train.overfit_test_size"),
    *("train.num_epochs", "train.max_steps"),
)


def train(config: RunConfig, resume: str | None = None) -> dict[str, Any]:
    """Train, evaluate, and return what `final_summary.json` holds; every rank calls it.

    Args:
        resume: a run folder, or `latest` for the newest one in `train.output_dir`; None starts a new run.

    Raises:
        ConfigError: the settings do not fit each other, the data, or the run that is resumed.
        DataError, CheckpointError: what is read is not what it should be.
        TrainingError: loss or gradient is not finite, with the last good checkpoint named.
    """
    with ExitStack() as stack:
        rank, world_size, device = init_distributed(config.train.timeout_seconds)
        setup_logging(rank)
        faults = FaultLog(config.data.on_bad_sample, config.data.on_bad_shard)
        dataset = open_train_data(config, faults)
        run_dir = prepare_run_dir(config, resume, rank)
        setup_logging(rank, run_dir / "clip_reproduction_training.log")
        faults.write_to(run_dir / "bad_samples.jsonl", rank)
        normalizer, baselines = prepare_statistics(config, dataset, run_dir, rank, device)
        splits = open_eval_data(config, dataset, faults)

        global_batch = config.train.micro_batch_size * config.train.gradient_accumulation_steps * world_size
        total_steps = count_steps(config, len(dataset), global_batch)
        model = build_model(config, baselines)
        num_parameters = model.num_parameters()
        engine = Engine(model, config.train, total_steps, device)
        flow = FlowObjective(config.flow)
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
        last_good = restore(engine, loader, run_dir, resume)
        start_step = last_good.step if last_good else 0
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
        last_saved = last_good.path if last_good else None
        skipped_in_a_row = 0
        began = time.monotonic()

        for step in range(start_step + 1, total_steps + 1):
            for batch in loader.next_step():
                batch = batch.expand()
                clip, eva = normalizer.clip(batch.clip), normalizer.eva(batch.eva)
                noise, t, drop = flow.sample_noise_and_time(
                    batch.positions, tuple(clip.shape[1:]), config.train.seed, device
                )
                result = flow.loss(engine, clip, eva, noise, t, drop)
                engine.backward(result.loss)
                meter.add(result, batch)
                if probe:
                    probe.add(result, t)
                learning_rate = engine.learning_rate
                if probe:
                    probe.before_step()
                report = engine.step()

            if report.applied:
                skipped_in_a_row = 0
            elif not report.lowered_loss_scale:
                skipped_in_a_row += 1
                stop_if_not_finite(skipped_in_a_row, config, step, last_saved)
            meter.finish_step(report, learning_rate)

            if step % config.train.log_every == 0 or step == total_steps:
                metrics = meter.reduce()
                if metrics is not None:
                    metrics |= probe.reduce() if probe else {}
                    writer.train(step, metrics)
                    progress.log(step, metrics)
            if (config.train.save_every and step % config.train.save_every == 0) or step == total_steps:
                last_saved = save_checkpoint(
                    engine,
                    run_dir / CHECKPOINTS,
                    step,
                    {"loader": loader.state_dict(), "total_steps": total_steps},
                    with_ema=config.train.ema_decay > 0,
                    keep_last=config.train.keep_last,
                )
                logger.info("checkpoint %s", last_saved)
            if config.train.eval_every and step % config.train.eval_every == 0 and step < total_steps:
                results = evaluate_now(config, engine, flow, normalizer, baselines, splits, config.eval.max_samples)
                record_evaluation(writer, step, results)
            meter.exclude_pause()

        train_seconds = time.monotonic() - began
        results = evaluate_now(config, engine, flow, normalizer, baselines, splits, None)
        record_evaluation(writer, total_steps, results)
        summary = {
            "run_dir": str(run_dir),
            "num_parameters": num_parameters,
            "steps": total_steps,
            "evaluation": {split: result.to_dict() for split, result in results.items()},
        }
        if config.train.overfit_test_size:
            summary["overfit_test"] = overfit_verdict(results["overfit"])
        if rank == 0:
            training = {
                "status": "finished",
                "steps": total_steps,
                "resumed_from_step": start_step,
                "seconds": train_seconds,
                "samples_seen": total_steps * global_batch,
                "skipped_steps": engine.deepspeed.skipped_steps,
                "last_metrics": meter.last,
                "checkpoint": str(last_saved),
            }
            atomic_write_json(run_dir / "training_summary.json", training)
            atomic_write_json(run_dir / "final_summary.json", summary)
        logger.info("trained %d steps in %s", total_steps - start_step, format_duration(train_seconds))
        dist.barrier()
        return summary


def open_train_data(config: RunConfig, faults: FaultLog) -> EmbeddingDataset:
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
        faults=faults,
    )
    check_dims(config, dataset, config.data.train_dir)
    wanted = config.train.overfit_test_size
    if wanted and len(dataset) < wanted:
        raise ConfigError(f"train.overfit_test_size = {wanted}, but {config.data.train_dir} has {len(dataset)} samples")
    return dataset


def check_dims(config: RunConfig, dataset: EmbeddingDataset, folder: str) -> None:
    """Raise a `ConfigError` unless the dataset's dims are the model's."""
    cls = dataset.spec.token_layout == "cls_patch"
    found = {
        "eva_dim": dataset.spec.eva_dim,
        "clip_dim": dataset.spec.clip_dim,
        "grid_size": math.isqrt(dataset.spec.num_tokens - cls),
    }
    wrong = {name: value for name, value in found.items() if getattr(config.model, name) != value}
    if wrong:
        stated = ", ".join(
            f"model.{name} = {getattr(config.model, name)} but the data has {v}" for name, v in wrong.items()
        )
        remedy = " ".join(f"--set model.{name}={v}" for name, v in wrong.items())
        raise ConfigError(f"{folder}: {stated}; for this data: {remedy}")


def open_eval_data(config: RunConfig, train_data: EmbeddingDataset, faults: FaultLog) -> dict[str, EmbeddingDataset]:
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
            faults=faults,
        )
        check_dims(config, splits[name], folder)
    if splits:
        return splits
    logger.warning("data.eval_dirs is empty: evaluation is on training samples and says nothing of unseen ones")
    return {"train": train_data}


def prepare_run_dir(config: RunConfig, resume: str | None, rank: int) -> Path:
    """Make `output_dir/clip_repro_YYYYMMDD_HHMMSS` with `experiment_config.json`, or find the run to resume."""
    if config.train.output_dir is None:
        raise ConfigError("train.output_dir is not set; give --output_dir DIR, where runs are kept")
    outcome: list[Any] = [None, None]
    if rank == 0:
        try:
            output_dir = Path(config.train.output_dir)
            outcome[0] = str(_resumed_run(config, output_dir, resume) if resume else _new_run(config, output_dir))
        except (ConfigError, CheckpointError, OSError) as error:
            outcome[1] = error  # raised on every rank, so that none waits for another
    dist.broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    return Path(outcome[0])


def _new_run(config: RunConfig, output_dir: Path) -> Path:
    run_dir = output_dir / datetime.datetime.now().strftime("clip_repro_%Y%m%d_%H%M%S")
    run_dir.mkdir(parents=True)
    atomic_write_json(
        run_dir / RUN_CONFIG,
        {"config": config.model_dump(mode="json"), **describe_environment()},
    )
    return run_dir


def _resumed_run(config: RunConfig, output_dir: Path, resume: str) -> Path:
    if resume == "latest":
        runs = sorted(output_dir.glob("clip_repro_*"))
        if not runs:
            raise CheckpointError(f"{output_dir}: there is no run to resume; leave --resume out to start one")
        run_dir = runs[-1]
    else:
        run_dir = Path(resume)
    try:
        saved = json.loads((run_dir / RUN_CONFIG).read_text())["config"]
    except FileNotFoundError:
        raise CheckpointError(f"{run_dir}: not a run folder, {RUN_CONFIG} is missing") from None
    now = config.model_dump(mode="json")
    for name in FIXED_ON_RESUME:
        before, after = _lookup(saved, name), _lookup(now, name)
        if before != after:
            raise ConfigError(
                f"{name} was {before!r} when {run_dir} began and is {after!r} now; resume with the former"
            )
    return run_dir


def _lookup(settings: dict, dotted: str) -> Any:
    for part in dotted.split("."):
        settings = settings.get(part)
    return settings


def describe_environment() -> dict[str, Any]:
    """Versions, machine and git state, to stand beside a run's settings."""
    import deepspeed

    root = Path(blip3o_ds.__file__).parent
    git = subprocess.run(
        ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40"],
        capture_output=True,
        text=True,
        check=False,
    )
    return {
        "versions": {
            "blip3o_ds": blip3o_ds.__version__,
            "torch": torch.__version__,
            "deepspeed": deepspeed.__version__,
            "python": platform.python_version(),
        },
        "git": git.stdout.strip() or None,
        "machine": torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else platform.processor() or platform.machine(),
        "world_size": dist.get_world_size(),
        "threads_per_rank": torch.get_num_threads(),
    }


def prepare_statistics(
    config: RunConfig, dataset: EmbeddingDataset, run_dir: Path, rank: int, device: torch.device
) -> tuple[Normalizer, Baselines]:
    """The normaliser and the baselines of the training set, computed once by rank 0 and kept in the run folder."""
    baselines_file, normalizer_file = run_dir / BASELINES, run_dir / NORMALIZER
    if rank == 0 and not baselines_file.exists():
        stats = dataset.manifest.eva_stats, dataset.manifest.clip_stats
        normalizer = Normalizer.from_stats(config.data.normalization, *stats)
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


def restore(engine: Engine, loader: EmbeddingLoader, run_dir: Path, resume: str | None) -> Checkpoint | None:
    """Load the newest whole checkpoint of a resumed run; None means from the beginning."""
    if resume is None:
        return None
    found: list[Any] = [find_checkpoint(run_dir / CHECKPOINTS) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(found)
    checkpoint: Checkpoint | None = found[0]
    if checkpoint is None:
        logger.warning("%s has no checkpoint yet: starting it from its beginning", run_dir)
        return None
    load_checkpoint(engine, checkpoint)
    loader.load_state_dict(checkpoint.state["loader"])
    logger.info("resumed from %s", checkpoint.path)
    return checkpoint


def stop_if_not_finite(skipped_in_a_row: int, config: RunConfig, step: int, last_saved: Path | None) -> None:
    """Warn of a skipped step, or stop the run when there were too many in a row."""
    if skipped_in_a_row <= config.train.max_skipped_steps:
        logger.warning("step %d skipped: the gradient is not finite (%d in a row)", step, skipped_in_a_row)
        return
    saved = f"the last good checkpoint is {last_saved}" if last_saved else "no checkpoint was written yet"
    raise TrainingError(
        f"step {step}: loss or gradient is not finite, {skipped_in_a_row} steps in a row "
        f"(train.max_skipped_steps = {config.train.max_skipped_steps}); weights were not changed by them; {saved}. "
        "Lower train.learning_rate, or look for the cause with --debug_mode"
    )


def evaluate_now(
    config: RunConfig,
    engine: Engine,
    flow: FlowObjective,
    normalizer: Normalizer,
    baselines: Baselines,
    splits: dict[str, EmbeddingDataset],
    max_samples: int | None,
) -> dict[str, EvalResult]:
    """Generate on every split with the EMA weights (or the current ones, without EMA) and compare.

    Each rank holds a whole copy of the model while it lasts, which keeps generation free of ZeRO's gathers.
    """
    model = DiT(config.model)
    model.load_state_dict(gather_weights(engine.module, engine.optimizer, ema=config.train.ema_decay > 0))
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
