"""The Python face of the package: open a trained model and a dataset, generate, and evaluate.

The run's own evaluation settings apply; settings of the sampler given as keyword arguments replace them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from blip3o_ds.config import EvalConfig, build_run_config
from blip3o_ds.data.format.schema import TokenLayout
from blip3o_ds.data.reading.dataset import EmbeddingDataset
from blip3o_ds.evaluation import report
from blip3o_ds.evaluation.generate import generate_batch
from blip3o_ds.evaluation.report import EvalResult
from blip3o_ds.model.dit import DiT
from blip3o_ds.runs.pretrained import Pretrained, load_pretrained

__all__ = ["DiT", "evaluate", "load_dataset", "load_pretrained", "sample"]


def load_dataset(folder: str | Path, token_layout: TokenLayout | None = None) -> EmbeddingDataset:
    """The dataset in `folder` or behind a URL; `token_layout="patch_only"` drops stored CLS tokens.

    Raises DataError if it is not a dataset, or has no CLS token for `cls_patch`.
    """
    return EmbeddingDataset(folder, token_layout=token_layout)


def sample(
    pretrained: Pretrained, eva: Tensor, keys: Sequence[str] | None = None, k: int = 0, **sampler: Any
) -> Tensor:
    """Generate a CLIP embedding for each EVA embedding: `[B, N, De]` -> `[B, N, Dc]` fp32, on the CPU.

    Both are in the space of the stored embeddings; with normalisation `full` the result has unit norm. The B `keys` (by
    default "0" to "B-1") choose the noise: the image with a key gets, as sample `k`, the same as in `blip3o-ds
    generate`. `sampler` is any of `steps`, `solver`, `guidance_scale` and `seed`; ConfigError for a value that is not
    valid.
    """
    keys = [str(number) for number in range(len(eva))] if keys is None else keys
    settings = _settings(pretrained, sampler=sampler)
    return generate_batch(pretrained, eva, [(key, k) for key in keys], settings.sampler).cpu()


def evaluate(
    pretrained: Pretrained,
    dataset: EmbeddingDataset,
    max_samples: int | None = None,
    num_samples: int | None = None,
    **sampler: Any,
) -> EvalResult:
    """Generate the embeddings of `dataset` and compare them with the true ones, next to baselines.

    The result holds `readings[reading][metric]`, and what they were computed from: `max_samples` images (all by
    default), spread evenly over the dataset, and `num_samples` samples of each (the run's setting by default).
    `sampler` is as in `sample`. Raises DataError for an empty dataset.
    """
    changes = {"max_samples": max_samples} | ({} if num_samples is None else {"num_samples": num_samples})
    return report.evaluate(pretrained, dataset, _settings(pretrained, sampler=sampler, **changes))


def _settings(pretrained: Pretrained, sampler: dict[str, Any], **changes: Any) -> EvalConfig:
    settings = pretrained.config.eval.model_dump() | changes
    settings["sampler"] |= sampler
    return build_run_config({"eval": settings}).eval
