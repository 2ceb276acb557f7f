"""Where things lie in a run folder and in an export, and loading a model with all it needs from either.

A run keeps many checkpoints and every setting; an export is one set of weights that needs no DeepSpeed and no run.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from blip3o_ds.config import RunConfig, build_run_config
from blip3o_ds.data.normalization import Normalizer
from blip3o_ds.errors import CheckpointError, ConfigError
from blip3o_ds.evaluation.baselines import Baselines
from blip3o_ds.files import fsync_dir, sha256_file
from blip3o_ds.flow.objective import FlowObjective
from blip3o_ds.model.dit import CONFIG_NAME, DiT, read_pretrained_config

logger = logging.getLogger(__name__)

RUN_CONFIG = "experiment_config.json"
CHECKPOINTS = "checkpoints"
SEAL = "checkpoint.json"  # written last into a checkpoint; one without it was not finished
NORMALIZER = "normalizer.json"
BASELINES = "baselines.safetensors"

Weights = Literal["ema", "model"]
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to generate, with what belongs to it."""

    model: DiT
    flow: FlowObjective
    normalizer: Normalizer
    baselines: Baselines | None  # None where an export was made without them
    config: RunConfig  # of an export: its sections model, flow and eval, the normalisation and the precision
    step: int
    weights: Weights


def load_for_inference(
    path: str | Path,
    device: torch.device | str,
    dtype: torch.dtype | None = None,
    step: int | None = None,
    weights: Weights = "ema",
) -> LoadedModel:
    """Load a run folder's checkpoint or an export.

    Args:
        dtype: of the weights; None is the run's precision on a GPU, and fp32 on the CPU.
        step: of a run's checkpoint; None is the newest.
        weights: the moving average or the last weights. A run that kept no average gives its last ones.

    Raises:
        CheckpointError: the folder is neither, a file is missing or damaged, or it does not hold what is asked for.
    """
    path = Path(path)
    if (path / RUN_CONFIG).is_file():
        loaded = _load_run(path, step, weights)
    elif (path / CONFIG_NAME).is_file():
        loaded = _load_export(path, step)
    else:
        raise CheckpointError(
            f"{path}: neither a run ({RUN_CONFIG}) nor an export ({CONFIG_NAME}) is there; give a folder "
            "clip_repro_YYYYMMDD_HHMMSS, or one that `blip3o-ds export` wrote"
        )
    device = torch.device(device)
    if dtype is None:
        dtype = torch.float32 if device.type == "cpu" else _DTYPES[loaded.config.train.precision]
    loaded.model.to(device, dtype).eval().requires_grad_(False)
    logger.info("loaded %s: step %d, %s weights, %s on %s", path, loaded.step, loaded.weights, dtype, device)
    return loaded


def export(run: str | Path, dst: str | Path, step: int | None = None) -> Path:
    """Write the folder `dst` that `load_for_inference` and `DiT.from_pretrained` read, from a run's checkpoint.

    The weights are the moving average where the run kept one. The folder appears whole or not at all.

    Raises:
        CheckpointError: the run has no such checkpoint, or `dst` already holds something.
    """
    run, dst = Path(run), Path(dst)
    if dst.exists() and (not dst.is_dir() or any(dst.iterdir())):
        raise CheckpointError(f"{dst} already exists; remove it or export to another folder")
    if not (run / RUN_CONFIG).is_file():
        raise CheckpointError(f"{run} is not a run folder: {RUN_CONFIG} is missing")
    loaded = _load_run(run, step, "ema")
    settings = {
        "flow": loaded.config.flow.model_dump(mode="json"),
        "normalization": loaded.config.data.normalization,
        "eval": loaded.config.eval.model_dump(mode="json"),
        "precision": loaded.config.train.precision,
        "step": loaded.step,
        "weights": loaded.weights,
    }
    temporary = dst.with_name(f".{dst.name}.{os.getpid()}.tmp")
    temporary.mkdir(parents=True)
    try:
        loaded.model.save_pretrained(temporary, extra=settings)
        for name in (NORMALIZER, BASELINES):
            shutil.copyfile(run / name, temporary / name)
        _sync(temporary)
        os.replace(temporary, dst)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    fsync_dir(dst.parent)
    return dst


def find_checkpoint_folder(run: str | Path, step: int | None = None) -> Path:
    """The folder of a run's finished checkpoint: of `step`, or the newest.

    Raises:
        CheckpointError: there is none; says which there are.
    """
    folder = Path(run) / CHECKPOINTS
    finished = sorted(path for path in folder.glob("step_*") if (path / SEAL).is_file())
    if not finished:
        raise CheckpointError(f"{folder}: there is no finished checkpoint; the run writes one every train.save_every")
    if step is None:
        return finished[-1]
    for path in finished:
        if path.name == f"step_{step:08d}":
            return path
    steps = ", ".join(str(int(path.name.removeprefix("step_"))) for path in finished)
    raise CheckpointError(f"{folder}: there is no finished checkpoint of step {step}; there are {steps}")


def _load_run(run: Path, step: int | None, weights: Weights) -> LoadedModel:
    config = _run_config(run / RUN_CONFIG, _read_json(run / RUN_CONFIG).get("config"))
    checkpoint = find_checkpoint_folder(run, step)
    if weights == "ema" and config.train.ema_decay == 0:
        logger.info("%s kept no moving average (train.ema_decay = 0); taking its last weights", run)
        weights = "model"
    model = DiT(config.model)
    _load_weights(model, checkpoint, f"{weights}.safetensors")
    return LoadedModel(
        model=model,
        flow=FlowObjective(config.flow),
        normalizer=Normalizer.load(run / NORMALIZER),
        baselines=Baselines.load(run / BASELINES),
        config=config,
        step=int(checkpoint.name.removeprefix("step_")),
        weights=weights,
    )


def _load_export(folder: Path, step: int | None) -> LoadedModel:
    settings = read_pretrained_config(folder)
    if step is not None and step != settings.get("step"):
        raise CheckpointError(f"{folder} is an export of step {settings.get('step')}, not of step {step}; give the run")
    sections = {name: settings.get(name) for name in ("model", "flow", "eval")}
    sections |= {
        "data": {"normalization": settings.get("normalization")},
        "train": {"precision": settings.get("precision")},
    }
    config = _run_config(folder / CONFIG_NAME, sections)
    return LoadedModel(
        model=DiT.from_pretrained(folder),
        flow=FlowObjective(config.flow),
        normalizer=Normalizer.load(folder / NORMALIZER),
        baselines=Baselines.load(folder / BASELINES) if (folder / BASELINES).exists() else None,
        config=config,
        step=settings["step"],
        weights=settings["weights"],
    )


def _load_weights(model: DiT, checkpoint: Path, name: str) -> None:
    path = checkpoint / name
    recorded = _read_json(checkpoint / SEAL).get("files", {}).get(name)
    if recorded is None or not path.is_file():
        raise CheckpointError(f"{path} is missing from the checkpoint; take another step")
    if recorded["sha256"] != sha256_file(path):
        raise CheckpointError(f"{path} is damaged: it is not the file that {SEAL} describes; take another step")
    try:
        found: dict[str, Tensor] = load_file(path)
        model.load_state_dict(found)
    except SafetensorError as error:
        raise CheckpointError(f"{path} is damaged: {error}") from None
    except RuntimeError as error:
        problem = " ".join(str(error).split())
        raise CheckpointError(f"{path} holds the weights of another model than {RUN_CONFIG} says: {problem}") from None


def _run_config(path: Path, settings: Any) -> RunConfig:
    if not isinstance(settings, dict):
        raise CheckpointError(f"{path}: expected the run's settings under `config`, found {settings!r}")
    try:
        return build_run_config(settings)
    except ConfigError as error:
        raise CheckpointError(f"{path}: its settings are not valid here: {error}") from None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content


def _sync(folder: Path) -> None:
    for path in folder.iterdir():
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    fsync_dir(folder)
