"""Small datasets for the tests of the data package: 5 tokens (2x2 patches and CLS), widths 8 and 4."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from blip3o_ds.data.format.schema import DatasetSpec
from blip3o_ds.data.format.writer import DatasetWriter
from tests.conftest import PROJECT

SPEC = DatasetSpec.pair(
    num_tokens=5,
    token_layout="cls_patch",
    eva_dim=8,
    clip_dim=4,
    dtype="bf16",
    condition_encoder="eva-clip-8b",
    target_encoder="clip-vit-l14",
)


def script(name: str) -> ModuleType:
    """The script `scripts/NAME.py` as a module."""
    spec = importlib.util.spec_from_file_location(name, PROJECT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def spec() -> DatasetSpec:
    return SPEC


@pytest.fixture
def samples() -> Callable[..., list[tuple[str, Tensor, Tensor, dict]]]:
    """`samples(count, spec)`: key, eva, clip and metadata of each, the same every time."""

    def make(count: int, spec: DatasetSpec = SPEC) -> list[tuple[str, Tensor, Tensor, dict]]:
        generator = torch.Generator().manual_seed(0)
        made = []
        for i in range(count):
            eva = 3 + torch.randn(spec.num_tokens, spec.tensors["eva"].dim, generator=generator)
            clip = torch.randn(spec.num_tokens, spec.tensors["clip"].dim, generator=generator)
            made.append((f"image{i:03d}", eva, clip, {"caption": f"a picture of {i} cats — né"}))
        return made

    return make


@pytest.fixture
def dataset_dir(tmp_path: Path, samples: Callable) -> Callable[..., Path]:
    """`dataset_dir(count, samples_per_shard, spec)`: a folder with a finished dataset."""

    def make(count: int, samples_per_shard: int = 4, spec: DatasetSpec = SPEC) -> Path:
        dst = tmp_path / "dataset"
        with DatasetWriter(dst, spec, samples_per_shard) as writer:
            for key, eva, clip, meta in samples(count, spec):
                writer.write(key, {"eva": eva, "clip": clip}, meta)
        return dst

    return make
