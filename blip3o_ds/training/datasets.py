"""The datasets that a run reads, checked against its model, and the statistics of its training set.

Statistics are computed once, by rank 0, and kept in the run folder; a resumed run reads them there.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from blip3o_ds.baselines.baselines import Baselines
from blip3o_ds.baselines.fit import fit_baselines
from blip3o_ds.config import RunConfig
from blip3o_ds.data.normalization import Normalizer
from blip3o_ds.data.reading.bad_samples import BadSamples
from blip3o_ds.data.reading.dataset import EmbeddingDataset
from blip3o_ds.errors import ConfigError
from blip3o_ds.flow.prior import LinearGaussian
from blip3o_ds.runs.folder import BASELINES, NORMALIZER

logger = logging.getLogger(__name__)

HELD_PARTS = 10_000  # of a fold, in which the calibration share is counted


def open_train_data(config: RunConfig, bad_samples: BadSamples) -> EmbeddingDataset:
    """The training set as the run reads it; a `ConfigError` says what to set so that data and model fit."""
    folder, wanted = config.data.train_dir, config.train.overfit_test_size
    if folder is None:
        raise ConfigError("data.train_dir is not set; give --chunked_embeddings_dir DIR, a folder with a manifest.json")
    dataset = _open(config, folder, bad_samples, max_shards=config.data.max_shards, max_samples=wanted)
    if wanted and len(dataset) < wanted:
        raise ConfigError(f"train.overfit_test_size = {wanted}, but {folder} has {len(dataset)} samples")
    return dataset


def open_eval_data(
    config: RunConfig, train_data: EmbeddingDataset, bad_samples: BadSamples
) -> dict[str, EmbeddingDataset]:
    """The splits to evaluate on, by name; in an overfit test, or without a held-out set, the training samples."""
    if config.train.overfit_test_size:
        return {"overfit": train_data}
    splits: dict[str, EmbeddingDataset] = {}
    for folder in config.data.eval_dirs:
        name = Path(folder).name
        if name in splits:
            raise ConfigError(f"data.eval_dirs: two folders are named {name}, and metrics go by the name")
        splits[name] = _open(config, folder, bad_samples)
    if splits:
        return splits
    logger.warning("data.eval_dirs is empty: evaluation is on training samples and says nothing of unseen ones")
    return {"train": train_data}


def prepare_statistics(
    config: RunConfig, dataset: EmbeddingDataset, run_dir: Path, rank: int, device: torch.device
) -> tuple[Normalizer, Baselines]:
    """The normaliser and the baselines of the training set."""
    if rank == 0 and not (run_dir / BASELINES).exists():
        normalizer = Normalizer.from_stats(config.data.normalization, dataset.manifest.stats)
        normalizer.save(run_dir / NORMALIZER)
        threads = torch.get_num_threads()
        torch.set_num_threads(min(len(os.sched_getaffinity(0)), threads * dist.get_world_size()))  # the others wait
        try:
            fit_baselines(dataset, normalizer, device=device).save(run_dir / BASELINES)
        finally:
            torch.set_num_threads(threads)
    dist.barrier()
    return Normalizer.load(run_dir / NORMALIZER), Baselines.load(run_dir / BASELINES)


@dataclass(frozen=True)
class ImageRoles:
    """What a sample's image is used for: whether it is held out of training, and which map of the prior guesses it.

    The images held out teach the network's `Calibration` alone (`flow.calibration_share`). They are of the
    first fold and guessed by the map without it: to it and to the network they are new. Others of the fit are guessed
    by a map that has seen them. Maps that have not seen an image are wrong on each of a few photographs in their own
    way, and a network that learns that is wrong on new ones.
    """

    dataset: EmbeddingDataset
    num_folds: int
    calibration_share: float
    memorise: bool  # an overfit test: every image is to be learnt, by the network and not by the prior
    device: torch.device

    @classmethod
    def of_run(
        cls, config: RunConfig, dataset: EmbeddingDataset, prior: LinearGaussian, device: torch.device
    ) -> ImageRoles:
        """Those of the settings."""
        share, overfit = config.flow.calibration_share, bool(config.train.overfit_test_size)
        if share and not overfit and torch.equal(prior.fold_weights[0], prior.weight):
            logger.warning("no image is held out to teach how far the output is trusted: there are too few images")
            share = 0.0
        return cls(dataset, prior.num_folds, share, overfit, device)

    def __call__(self, keys: Sequence[str]) -> tuple[list[int], Tensor | None]:
        """The folds of `keys` (B), as `LinearGaussian.mean` takes them, and `held` as `DiT.forward` does."""
        fold = self.dataset.folds(keys, self.num_folds)
        if self.memorise:
            return fold.tolist(), None
        place = self.dataset.folds(keys, self.num_folds * HELD_PARTS) // self.num_folds  # within the fold
        held = (fold == 0) & (place < self.num_folds * HELD_PARTS * self.calibration_share)
        return np.where((fold == 0) & ~held, 1, 0).tolist(), torch.from_numpy(held).to(self.device)


def with_dims_of(config: RunConfig, dataset: EmbeddingDataset) -> RunConfig:
    """The settings with the dims of the model that were not given taken from the training set."""
    found = dataset.spec.model_dims()
    given = config.model.model_fields_set
    model = config.model.model_copy(update={name: v for name, v in found.items() if name not in given})
    return config.model_copy(update={"model": model})


def _open(config: RunConfig, folder: str, bad_samples: BadSamples, **part: Any) -> EmbeddingDataset:
    """A dataset in the token layout of the model; the dims of the model that were given must be those of the data."""
    given = config.model.model_dump(include=config.model.model_fields_set)
    dataset = EmbeddingDataset(
        folder,
        token_layout=config.model.token_layout,
        cache_dir=config.data.cache_dir,
        cache_gb=config.data.cache_gb,
        bad_samples=bad_samples,
        **part,
    )
    wrong = {k: v for k, v in dataset.spec.model_dims().items() if given.get(k, v) != v}
    if wrong:
        stated = ", ".join(f"model.{k} = {given[k]} but the data has {v}" for k, v in wrong.items())
        remedy = " ".join(f"--set model.{k}={v}" for k, v in wrong.items())
        raise ConfigError(f"{folder}: {stated}; for this data: {remedy}")
    return dataset
