"""Loading a trained model with all that generation needs, from a run folder or from an export.

A run keeps many checkpoints and every setting; an export is one set of weights that needs neither DeepSpeed nor the
run.
"""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass
from pathlib import Path

import torch

from blip3o_ds.baselines.baselines import Baselines
from blip3o_ds.config import RunConfig
from blip3o_ds.data.normalization import Normalizer
from blip3o_ds.data.reading.dataset import EmbeddingDataset
from blip3o_ds.errors import CheckpointError, ConfigError, DataError
from blip3o_ds.files import atomic_folder
from blip3o_ds.flow.flow import Flow
from blip3o_ds.model.dit import CONFIG_NAME, DiT, read_pretrained_config
from blip3o_ds.runs.checkpoint import find_checkpoint
from blip3o_ds.runs.folder import BASELINES, CHECKPOINTS, NORMALIZER, RUN_CONFIG, parse_run_config, read_run_config

logger = logging.getLogger(__name__)

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Pretrained:
    """A model ready to generate, with what belongs to it."""

    model: DiT
    flow: Flow
    normalizer: Normalizer
    baselines: Baselines
    config: RunConfig  # of an export: only its sections model, flow and eval, the normalisation and the precision
    step: int
    weights: str  # ema, or model where the run kept no moving average
    device: torch.device | str = "cpu"  # that the model is on

    def open_dataset(self, folder: str | Path) -> EmbeddingDataset:
        """The dataset in `folder` (or behind a URL), with the tokens that the model takes.

        A `DataError` says that it is not a dataset, or that its dims are not the model's.
        """
        model, data = self.config.model, self.config.data
        dataset = EmbeddingDataset(
            folder, token_layout=model.token_layout, cache_dir=data.cache_dir, cache_gb=data.cache_gb
        )
        for name, found in dataset.spec.model_dims().items():
            expected = getattr(model, name)
            if found != expected:
                raise DataError(f"{folder}: {name} is {found}, but the model was trained with {expected}")
        return dataset

    def weights_sha256(self) -> str:
        """Hexadecimal SHA-256 of the names and values of what generates: the weights, as loaded, and the prior."""
        digest = hashlib.sha256()
        prior = {
            f"prior.{name}": x for name, x in self.flow.prediction.prior.tensors().items() if name != "fold_weights"
        }
        for name, tensor in sorted({**self.model.state_dict(), **prior}.items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        return digest.hexdigest()


def load_pretrained(path: str | Path, device: torch.device | str = "cpu") -> Pretrained:
    """Load a run folder's newest checkpoint or an export, in the run's precision on a GPU and in fp32 on the CPU.

    A `CheckpointError` says that the folder is neither, or which file is missing or damaged.
    """
    path, device = Path(path), torch.device(device)
    if (path / RUN_CONFIG).is_file():
        loaded = _load_run(path, device)
    elif (path / CONFIG_NAME).is_file():
        loaded = _load_export(path, device)
    else:
        raise CheckpointError(
            f"{path}: neither a run ({RUN_CONFIG}) nor an export ({CONFIG_NAME}) is there; give a folder "
            "clip_repro_YYYYMMDD_HHMMSS, or one that `blip3o-ds export` wrote"
        )
    dtype = torch.float32 if device.type == "cpu" else _DTYPES[loaded.config.train.precision]
    loaded.model.to(device, dtype).eval().requires_grad_(False)
    logger.info("loaded %s: step %d, %s weights, %s on %s", path, loaded.step, loaded.weights, dtype, device)
    return loaded


def export(run: str | Path, dst: str | Path, step: int | None = None) -> None:
    """Write the folder `dst` that `load_pretrained` and `DiT.from_pretrained` read, from a run's checkpoint.

    The checkpoint is that of `step`, or the newest; the weights are the moving average where the run kept one. The
    folder appears whole or not at all. It is a `CheckpointError` if the run has no such checkpoint, a `FileExistsError`
    if `dst` already holds something.
    """
    with atomic_folder(dst) as folder:
        loaded = _load_run(Path(run), torch.device("cpu"), step)
        config = loaded.config
        settings = {
            "flow": config.flow.model_dump(mode="json"),
            "normalization": config.data.normalization,
            "eval": config.eval.model_dump(mode="json"),
            "precision": config.train.precision,
            "step": loaded.step,
            "weights": loaded.weights,
        }
        loaded.model.save_pretrained(folder, extra=settings)
        loaded.normalizer.save(folder / NORMALIZER)
        loaded.baselines.without_folds().save(folder / BASELINES)


def _load_run(run: Path, device: torch.device, step: int | None = None) -> Pretrained:
    config, _ = read_run_config(run)
    weights = "ema" if config.train.ema_decay > 0 else "model"
    name = f"{weights}.safetensors"
    checkpoint = find_checkpoint(run / CHECKPOINTS, step, [name])
    if checkpoint is None:
        raise CheckpointError(f"{run / CHECKPOINTS}: there is no whole checkpoint; a run writes its last at its end")
    model = DiT(config.model)
    model.load_weights(checkpoint.path / name, RUN_CONFIG)
    return _assemble(run, model, config, checkpoint.step, weights, device)


def _load_export(folder: Path, device: torch.device) -> Pretrained:
    settings = read_pretrained_config(folder)
    absent = {"model", "flow", "eval", "normalization", "precision", "step", "weights"} - settings.keys()
    if absent:
        raise CheckpointError(f"{folder / CONFIG_NAME}: {', '.join(sorted(absent))} missing; export the model again")
    sections = {name: settings[name] for name in ("model", "flow", "eval")}
    sections |= {"data": {"normalization": settings["normalization"]}, "train": {"precision": settings["precision"]}}
    config = parse_run_config(folder / CONFIG_NAME, sections)
    return _assemble(folder, DiT.from_pretrained(folder), config, settings["step"], settings["weights"], device)


def _assemble(folder: Path, model: DiT, config: RunConfig, step: int, weights: str, device: torch.device) -> Pretrained:
    normalizer, baselines = Normalizer.load(folder / NORMALIZER), Baselines.load(folder / BASELINES)
    try:
        flow = Flow.from_config(config.flow, baselines.prior.to(device))
    except ConfigError as error:
        raise CheckpointError(f"{folder}: its settings are not valid here: {error}") from None
    return Pretrained(model, flow, normalizer, baselines, config, step, weights, device)
