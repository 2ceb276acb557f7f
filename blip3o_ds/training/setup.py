"""Everything that a run needs, opened in order and closed again whatever happens.

Each part is a collective of all ranks, so the order is the same on every rank.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from blip3o_ds.baselines.baselines import Baselines
from blip3o_ds.config import RunConfig
from blip3o_ds.data.normalization import Normalizer
from blip3o_ds.data.reading.bad_samples import BadSamples
from blip3o_ds.data.reading.dataset import EmbeddingDataset
from blip3o_ds.data.reading.loader import EmbeddingLoader
from blip3o_ds.data.reading.order import GlobalOrder
from blip3o_ds.errors import ConfigError
from blip3o_ds.flow.flow import Flow, check_flow
from blip3o_ds.model.dit import DiT
from blip3o_ds.progress import Progress
from blip3o_ds.runs.folder import BAD_SAMPLES, CHECKPOINTS, LOG
from blip3o_ds.training.anomalies import SpikeDetector
from blip3o_ds.training.checkpoint import CheckpointWriter, TrainState, load_checkpoint, newest_checkpoint
from blip3o_ds.training.datasets import ImageRoles, open_eval_data, open_train_data, prepare_statistics, with_dims_of
from blip3o_ds.training.engine import Engine
from blip3o_ds.training.launch import init_distributed
from blip3o_ds.training.meter import DebugProbe, StepMeter
from blip3o_ds.training.optim import check_names
from blip3o_ds.training.peers import SILENCE_SECONDS, PeerWatch
from blip3o_ds.training.preemption import StopSignal
from blip3o_ds.training.resume import keep_global_batch, prepare_run_dir, resumed_config, sole_trainer
from blip3o_ds.training.telemetry import MetricsWriter, setup_logging

logger = logging.getLogger(__name__)


@dataclass
class Run:
    """An open run: what the loop works with."""

    config: RunConfig
    folder: Path
    rank: int
    state: TrainState
    loader: EmbeddingLoader
    splits: dict[str, EmbeddingDataset]  # to evaluate on
    normalizer: Normalizer
    baselines: Baselines
    flow: Flow
    roles: ImageRoles
    engine: Engine
    saver: CheckpointWriter
    stop: StopSignal
    writer: MetricsWriter
    meter: StepMeter
    progress: Progress
    spikes: SpikeDetector


@contextmanager
def setup(config: RunConfig, resume: str | None) -> Iterator[Run]:
    """Join the other ranks and open a new run, or the one to resume at its newest checkpoint."""
    resumed = None
    if resume:
        config, resumed = resumed_config(config, resume)
    check_flow(config)
    check_names(config.train)
    with ExitStack() as stack:
        rank, world_size, device = init_distributed(config.train.timeout_seconds)
        setup_logging(rank)
        stack.enter_context(PeerWatch(min(SILENCE_SECONDS, config.train.timeout_seconds)))
        stop = stack.enter_context(StopSignal())

        bad_samples = BadSamples(config.data.on_bad_sample, config.data.on_bad_shard)
        dataset = open_train_data(config, bad_samples)
        config = with_dims_of(config, dataset)
        folder = prepare_run_dir(config, resumed, dataset.manifest.digest)
        stack.enter_context(sole_trainer(folder, min(2 * SILENCE_SECONDS, config.train.timeout_seconds / 2)))
        setup_logging(rank, folder / LOG)
        bad_samples.write_to(folder / BAD_SAMPLES, rank)
        if resume:
            config = keep_global_batch(config, folder, world_size)
        normalizer, baselines = prepare_statistics(config, dataset, folder, rank, device)
        flow = Flow.from_config(config.flow, baselines.prior.to(device))
        roles = ImageRoles.of_run(config, dataset, baselines.prior, device)
        splits = open_eval_data(config, dataset, bad_samples)

        total_steps = count_steps(config, len(dataset), config.train.global_batch(world_size))
        engine = Engine(build_model(config), config.train, total_steps, device)
        loader = stack.enter_context(_open_loader(config, dataset, rank, world_size, device))
        train, checkpoints = config.train, folder / CHECKPOINTS
        saver = CheckpointWriter(
            engine, checkpoints, with_ema=train.ema_decay > 0, keep_last=train.keep_last, keep_every=train.keep_every
        )
        stack.callback(saver.close)
        state = TrainState(total_steps)
        if resume:
            state = restore(state, engine, loader, saver, checkpoints)
        writer = MetricsWriter(folder, rank, state.step)
        stack.callback(writer.close)
        logger.info(
            "run %s: %.1f M parameters, %d samples, global batch %d = %d ranks x %d x %d accumulated, steps %d to %d, "
            "%s, ZeRO-%d, %s",
            *(folder, engine.num_parameters / 1e6, len(dataset), loader.samples_per_step, world_size),
            *(train.micro_batch_size, train.gradient_accumulation_steps, state.step, total_steps),
            *(train.precision, engine.zero_stage, device),
        )
        meter = StepMeter(config, loader, device, DebugProbe(engine) if train.debug_mode else None)
        progress = Progress("training", total_steps, "steps", state.step)
        yield Run(
            *(config, folder, rank, state, loader, splits, normalizer, baselines, flow, roles, engine, saver, stop),
            *(writer, meter, progress, SpikeDetector()),
        )


def count_steps(config: RunConfig, num_samples: int, global_batch: int) -> int:
    """Steps of the whole run; the last one of the last epoch is filled up from the next epoch's order."""
    if config.train.max_steps is not None:
        return config.train.max_steps
    epochs = 10 if config.train.num_epochs is None else config.train.num_epochs
    return math.ceil(epochs * num_samples / global_batch)


def build_model(config: RunConfig) -> DiT:
    """The DiT at its start, the same on every rank."""
    torch.manual_seed(config.train.seed)
    model = DiT(config.model)
    model.activation_checkpointing = config.train.activation_checkpointing
    return model


def restore(
    begin: TrainState, engine: Engine, loader: EmbeddingLoader, saver: CheckpointWriter, checkpoints: Path
) -> TrainState:
    """Load the newest whole checkpoint of a resumed run and return its state; `begin` where there is none yet.

    A `ConfigError` says that the run's length has changed, on which the schedule of the learning rate depends.
    """
    checkpoint = newest_checkpoint(checkpoints)
    if checkpoint is None:
        logger.warning("%s has no checkpoint yet: starting it from its beginning", checkpoints.parent)
        return begin
    state = TrainState.of(checkpoint)
    state.rollbacks = state.skipped_in_a_row = 0  # each start has its own budget
    if state.total_steps != begin.total_steps:
        raise ConfigError(
            f"{checkpoint.path} is of a run of {state.total_steps} steps, which would now take {begin.total_steps}, "
            "because the number of samples in data.train_dir has changed; resume with the data, data.max_shards and "
            "train.max_steps as they were"
        )
    load_checkpoint(engine, checkpoint)
    loader.load_state_dict(state.loader)
    saver.last = checkpoint
    logger.info("resumed from %s", checkpoint.path)
    return state


def _open_loader(
    config: RunConfig, dataset: EmbeddingDataset, rank: int, world_size: int, device: torch.device
) -> EmbeddingLoader:
    return EmbeddingLoader(
        dataset,
        GlobalOrder(dataset.shard_sizes, config.train.seed, config.data.window_shards),
        micro_batch_size=config.train.micro_batch_size,
        gradient_accumulation_steps=config.train.gradient_accumulation_steps,
        rank=rank,
        world_size=world_size,
        prefetch=config.data.prefetch_steps,
        device=device,
    )
