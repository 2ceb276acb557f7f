"""Small encoders and pictures for the tests of this folder: nothing is downloaded, nothing is slow."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from blip3o_ds.encoders.encoder import EncoderSpec, LoadOptions, PatchEncoder
from blip3o_ds.encoders.images import ImageRecord, image_parts

IMAGE_SIZE, GRID = 32, 4


class PatchProjection(nn.Module):
    """Every patch's pixels through one fixed random matrix, with the mean token as CLS where asked."""

    def __init__(self, spec: EncoderSpec, seed: int) -> None:
        super().__init__()
        self.grid, self.has_cls = spec.grid_size, spec.has_cls
        pixels = 3 * (spec.image_size // spec.grid_size) ** 2
        self.weight = torch.randn(pixels, spec.embed_dim, generator=torch.Generator().manual_seed(seed))

    def forward(self, images: Tensor) -> Tensor:
        patch = images.shape[-1] // self.grid
        patches = nn.functional.unfold(images, patch, stride=patch).transpose(1, 2)  # [B, N, 3*patch*patch]
        tokens = patches @ self.weight
        return torch.cat([tokens.mean(1, keepdim=True), tokens], dim=1) if self.has_cls else tokens


def tiny_spec(name: str, seed: int = 0, **changes: object) -> EncoderSpec:
    fields = {
        "name": name,
        "embed_dim": 6,
        "grid_size": GRID,
        "has_cls": True,
        "image_size": IMAGE_SIZE,
        "mean": (0.5, 0.5, 0.5),
        "std": (0.25, 0.25, 0.25),
        "weights": "none",
        "cuda_dtype": torch.float32,
        "load": lambda spec, options: PatchProjection(spec, seed),
    }
    return EncoderSpec(**(fields | changes))


def tiny_encoder(name: str, seed: int = 0, **changes: object) -> PatchEncoder:
    spec = tiny_spec(name, seed, **changes)
    options = LoadOptions(spec.weights, torch.device("cpu"), torch.float32)
    return PatchEncoder(spec, spec.load(spec, options), options)


def all_records(images: Path) -> list[ImageRecord]:
    return [record for part in image_parts(images, files_per_part=4) for record in part.records()]


@pytest.fixture
def make_spec() -> Callable[..., EncoderSpec]:
    return tiny_spec


@pytest.fixture
def make_encoder() -> Callable[..., PatchEncoder]:
    return tiny_encoder


@pytest.fixture
def condition() -> PatchEncoder:
    return tiny_encoder("tiny-condition", seed=1, embed_dim=10)


@pytest.fixture
def target() -> PatchEncoder:
    return tiny_encoder("tiny-target", seed=2)


@pytest.fixture
def make_png() -> Callable[..., bytes]:
    """A picture of noise as a PNG file."""

    def make(seed: int, width: int = 40, height: int = 36) -> bytes:
        pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "png")
        return buffer.getvalue()

    return make


@pytest.fixture
def write_folder(tmp_path: Path) -> Callable[[dict[str, bytes]], Path]:
    """Files by relative name, as a folder."""

    def write(files: dict[str, bytes], name: str = "images") -> Path:
        for file, content in files.items():
            path = tmp_path / name / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        return tmp_path / name

    return write


@pytest.fixture
def write_tar(tmp_path: Path) -> Callable[[str, dict[str, bytes]], Path]:
    """Files by member name, as a tar."""

    def write(name: str, files: dict[str, bytes]) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(path, "w") as archive:
            for file, content in files.items():
                member = tarfile.TarInfo(file)
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
        return path

    return write
