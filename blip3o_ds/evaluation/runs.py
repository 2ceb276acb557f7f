"""Where things lie in a run folder and in an export, and loading a model with all it needs from either.

A run keeps many checkpoints and every setting; an export is one set of weights that needs no DeepSpeed and no run.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from blip3o_ds.config import RunConfig, build_run_config
from blip3o_ds.data.normalization import Normalizer
from blip3o_ds.data.reading.dataset import EmbeddingDataset
from blip3o_ds.errors import CheckpointError, ConfigError, DataError
from blip3o_ds.evaluation.baselines import Baselines
from blip3o_ds.files import atomic_folder, atomic_write_json, sha256_file
from blip3o_ds.flow.build import build_flow
from blip3o_ds.flow.flow import Flow
from blip3o_ds.model.dit import CONFIG_NAME, DiT, read_pretrained_config

logger = logging.getLogger(__name__)

RUN_CONFIG = "experiment_config.json"
CHECKPOINTS = "checkpoints"
SEAL = "checkpoint.json"  # written last into a checkpoint; one without it was not finished
NORMALIZER = "normalizer.json"
BASELINES = "baselines.safetensors"

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Checkpoint:
    """A sealed checkpoint: its folder, its step, and the state that the trainer put in."""

    path: Path
    step: int
    world_size: int
    zero_stage: int
    state: dict[str, Any]


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to generate, with what belongs to it."""

    model: DiT
    flow: Flow
    normalizer: Normalizer
    baselines: Baselines
    config: RunConfig  # of an export: its sections model, flow and eval, the normalisation and the precision
    step: int
    weights: str  # ema, or model where the run kept no moving average

    def open_dataset(self, folder: str | Path) -> EmbeddingDataset:
        """The dataset in `folder` (or behind a URL), with the tokens that the model takes.

        Raises:
            DataError: it is no dataset, or its dims are not the model's.
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


def load_for_inference(path: str | Path, device: torch.device | str) -> LoadedModel:
    """Load a run folder's newest checkpoint or an export, in the run's precision on a GPU and in fp32 on the CPU.

    Raises:
        CheckpointError: the folder is neither, or a file is missing or damaged.
    """
    path, device = Path(path), torch.device(device)
    if (path / RUN_CONFIG).is_file():
        loaded = _load_run(path)
    elif (path / CONFIG_NAME).is_file():
        loaded = _load_export(path)
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
    """Write the folder `dst` that `load_for_inference` and `DiT.from_pretrained` read, from a run's checkpoint.

    The checkpoint is that of `step`, or the newest; the weights are the moving average where the run kept one. The
    folder appears whole or not at all.

    Raises:
        CheckpointError: the run has no such checkpoint.
        FileExistsError: `dst` already holds something.
    """
    run = Path(run)
    if not (run / RUN_CONFIG).is_file():
        raise CheckpointError(f"{run} is not a run folder: {RUN_CONFIG} is missing")
    with atomic_folder(dst) as folder:
        loaded = _load_run(run, step)
        settings = {
            "flow": loaded.config.flow.model_dump(mode="json"),
            "normalization": loaded.config.data.normalization,
            "eval": loaded.config.eval.model_dump(mode="json"),
            "precision": loaded.config.train.precision,
            "step": loaded.step,
            "weights": loaded.weights,
        }
        loaded.model.save_pretrained(folder, extra=settings)
        loaded.normalizer.save(folder / NORMALIZER)
        loaded.baselines.save(folder / BASELINES)


def find_checkpoint(folder: Path, step: int | None = None, files: Sequence[str] | None = None) -> Checkpoint | None:
    """The newest checkpoint whose files match their recorded sizes and checksums, or the one of `step`.

    All files are compared, or those named in `files` where no others will be read. Damaged checkpoints are passed
    over with a warning. None where there is none.

    Raises:
        CheckpointError: `step` was asked for and is missing or damaged.
    """
    paths = sorted(folder.glob("step_*"), reverse=True)
    wanted = [path for path in paths if step is None or path.name == f"step_{step:08d}"]
    if step is not None and not wanted:
        there = ", ".join(path.name for path in paths) or "none"
        raise CheckpointError(f"{folder}: there is no checkpoint of step {step}; found: {there}")
    for path in wanted:
        try:
            return _verified(path, files)
        except CheckpointError as error:
            if step is not None:
                raise
            logger.warning("checkpoint %s; trying the one before it", error)
    return None


def seal_checkpoint(folder: Path, checkpoint: Checkpoint, files: dict[str, dict[str, Any]]) -> None:
    """Write the record that makes `folder` a checkpoint: what `checkpoint` holds, and `bytes` and `sha256` by file."""
    content = {name: getattr(checkpoint, name) for name in ("step", "world_size", "zero_stage", "state")}
    content["files"] = files
    atomic_write_json(folder / SEAL, {**content, "sha256": _digest(content)})


def parse_run_config(path: Path, settings: Any) -> RunConfig:
    """Validate the settings that the file `path` holds; a `CheckpointError` names it."""
    if not isinstance(settings, dict):
        raise CheckpointError(f"{path}: expected the run's settings under `config`, found {settings!r}")
    try:
        return build_run_config(settings)
    except ConfigError as error:
        raise CheckpointError(f"{path}: its settings are not valid here: {error}") from None


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`; a `CheckpointError` if it holds something else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content


def _load_run(run: Path, step: int | None = None) -> LoadedModel:
    config = parse_run_config(run / RUN_CONFIG, read_json(run / RUN_CONFIG).get("config"))
    flow = build_flow(config)
    weights = "ema" if config.train.ema_decay > 0 else "model"
    name = f"{weights}.safetensors"
    checkpoint = find_checkpoint(run / CHECKPOINTS, step, [name])
    if checkpoint is None:
        raise CheckpointError(f"{run / CHECKPOINTS}: there is no whole checkpoint; a run writes its last at its end")
    model = DiT(config.model)
    try:
        model.load_state_dict(load_file(checkpoint.path / name))
    except RuntimeError as error:
        problem = " ".join(str(error).split())
        raise CheckpointError(
            f"{checkpoint.path / name} holds the weights of another model than {RUN_CONFIG} says: {problem}"
        ) from None
    return LoadedModel(
        model=model,
        flow=flow,
        normalizer=Normalizer.load(run / NORMALIZER),
        baselines=Baselines.load(run / BASELINES),
        config=config,
        step=checkpoint.step,
        weights=weights,
    )


def _load_export(folder: Path) -> LoadedModel:
    settings = read_pretrained_config(folder)
    absent = {"model", "flow", "eval", "normalization", "precision", "step", "weights"} - settings.keys()
    if absent:
        raise CheckpointError(f"{folder / CONFIG_NAME}: {', '.join(sorted(absent))} missing; export the model again")
    sections = {name: settings[name] for name in ("model", "flow", "eval")}
    sections["data"] = {"normalization": settings["normalization"]}
    sections["train"] = {"precision": settings["precision"]}
    config = parse_run_config(folder / CONFIG_NAME, sections)
    flow = build_flow(config)
    return LoadedModel(
        model=DiT.from_pretrained(folder),
        flow=flow,
        normalizer=Normalizer.load(folder / NORMALIZER),
        baselines=Baselines.load(folder / BASELINES),
        config=config,
        step=settings["step"],
        weights=settings["weights"],
    )


def _verified(path: Path, names: Sequence[str] | None) -> Checkpoint:
    try:
        seal = read_json(path / SEAL)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is damaged: {SEAL} is missing, it was not finished") from None
    if seal.pop("sha256", None) != _digest(seal):
        raise CheckpointError(f"{path} is damaged: {SEAL} is not as it was written")
    files = seal["files"]
    for name in files if names is None else names:
        file, recorded = path / name, files.get(name)
        if recorded is None or not file.is_file():
            raise CheckpointError(f"{path} is damaged: {name} is missing")
        size = file.stat().st_size
        if size != recorded["bytes"]:
            raise CheckpointError(f"{path} is damaged: {name} has {size} bytes, {recorded['bytes']} were written")
        if sha256_file(file) != recorded["sha256"]:
            raise CheckpointError(f"{path} is damaged: {name} has another checksum than when it was written")
    return Checkpoint(path, seal["step"], seal["world_size"], seal["zero_stage"], seal["state"])


def _digest(seal: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(seal, sort_keys=True).encode()).hexdigest()
