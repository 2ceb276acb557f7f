"""A model with weights that are not zero, and a run folder as training leaves it, made without training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from blip3o_ds.baselines.fit import fit_baselines
from blip3o_ds.config import RunConfig, build_run_config
from blip3o_ds.data.format.schema import DatasetSpec
from blip3o_ds.data.format.writer import DatasetWriter
from blip3o_ds.data.normalization import Normalizer
from blip3o_ds.data.reading.dataset import EmbeddingDataset
from blip3o_ds.files import atomic_write_json, sha256_file
from blip3o_ds.model.dit import DiT
from blip3o_ds.runs.checkpoint import SEAL, Checkpoint, seal_checkpoint
from blip3o_ds.runs.folder import BASELINES, CHECKPOINTS, NORMALIZER, RUN_CONFIG

EVA, CLIP, TOKENS = 6, 4, 9
MODEL = {"eva_dim": EVA, "clip_dim": CLIP, "grid_size": 3, "hidden_size": 16, "num_layers": 1, "num_heads": 2,
         "num_kv_heads": 1, "ffn_dim": 24}  # fmt: skip


def random_model(config: RunConfig, seed: int = 0) -> DiT:
    torch.manual_seed(seed)
    model = DiT(config.model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model.eval()


@pytest.fixture
def config() -> RunConfig:
    return build_run_config({"model": MODEL, "eval": {"sampler": {"steps": 3}, "batch_size": 4}})


@pytest.fixture
def make_dataset(tmp_path: Path) -> Callable[..., EmbeddingDataset]:
    """`make_dataset(eva, clip)`: tensors [n, 9, 6] and [n, 9, 4] as a dataset of fp32 shards of 4."""

    def make(eva: Tensor, clip: Tensor, name: str = "data", keys: Sequence[str] | None = None) -> EmbeddingDataset:
        spec = DatasetSpec.pair(eva.shape[1], "patch_only", eva.shape[2], clip.shape[2], "fp32", "made-up", "made-up")
        with DatasetWriter(tmp_path / name, spec, samples_per_shard=4) as writer:
            for i in range(len(eva)):
                key = f"image_{i:03d}" if keys is None else keys[i]
                writer.write(key, {"eva": eva[i], "clip": clip[i]}, {"caption": f"caption {i}"})
        return EmbeddingDataset(tmp_path / name)

    return make


def linear_pairs(count: int, noise: float, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """EVA [count, 9, 6] with correlated channels, CLIP = EVA @ map + 2 + noise, and the map [6, 4]."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(EVA, EVA, generator=generator)
    eva = torch.randn(count, TOKENS, EVA, generator=generator) @ mixing + 1
    linear = torch.randn(EVA, CLIP, generator=generator)
    clip = eva @ linear + 2 + noise * torch.randn(count, TOKENS, CLIP, generator=generator)
    return eva, clip, linear


@pytest.fixture
def run_dir(tmp_path: Path, config: RunConfig, make_dataset: Callable) -> Path:
    """A run folder with finished checkpoints of steps 5 and 10, whose `ema` and `model` weights all differ."""
    folder = tmp_path / "clip_repro_20260101_000000"
    folder.mkdir()
    atomic_write_json(folder / RUN_CONFIG, {"config": config.model_dump(mode="json")})
    normalizer = Normalizer("minimal")
    normalizer.save(folder / NORMALIZER)
    eva, clip, _ = linear_pairs(12, noise=0.5)
    fit_baselines(make_dataset(eva, clip, "train"), normalizer).save(folder / BASELINES)
    for step in (5, 10):
        checkpoint = folder / CHECKPOINTS / f"step_{step:08d}"
        checkpoint.mkdir(parents=True)
        for offset, name in enumerate(("model", "ema")):
            save_file(random_model(config, step + offset).state_dict(), checkpoint / f"{name}.safetensors")
        seal(checkpoint, step)
    return folder


def seal(checkpoint: Path, step: int) -> None:
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
        for path in checkpoint.iterdir()
        if path.name != SEAL
    }
    seal_checkpoint(checkpoint, Checkpoint(checkpoint, step, 1, 2, {"a": 1}), files)
