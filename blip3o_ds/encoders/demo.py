"""The demo dataset: crops of photographs that come with Python packages, encoded by the small pair.

Its splits are `train`, `heldout_crops` (unseen crops of the photographs in train) and `heldout_images` (photographs
that are not in train); which crop is in which split is a pure function of the sizes and the seed.
"""

from __future__ import annotations

import importlib.util
import logging
import random
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from blip3o_ds.encoders.extract import encode_images
from blip3o_ds.encoders.images import ImageRecord, decode_image
from blip3o_ds.encoders.registry import load_encoder
from blip3o_ds.errors import DataError
from blip3o_ds.files import atomic_write_json, read_json

logger = logging.getLogger(__name__)

CONDITION = "efficientnet-lite2-head"
TARGET = "efficientnet-lite0-last-block"
SPLITS = ("train", "heldout_crops", "heldout_images")
CROP_PIXELS = 512
SAMPLES_PER_SHARD = 64
VIEW_SEPARATOR = "_"  # between the name of a photograph and the number of a crop
_MIN_SCALE = 0.25  # of the short side of the photograph

# Folder in a package -> files. The two motorcycles show one scene from two viewpoints, so both are in one split.
SEEN = {
    "skimage/data": "astronaut.png brick.png cell.png chelsea.png clock_motion.png coins.png grass.png "
    "hubble_deep_field.jpg ihc.png moon.png motorcycle_left.png motorcycle_right.png retina.jpg",
    "sklearn/datasets/images": "china.jpg",
}
HELD_OUT = {
    "skimage/data": "camera.png coffee.png gravel.png rocket.jpg",
    "sklearn/datasets/images": "flower.jpg",
}
_DISTRIBUTIONS = {"skimage": "scikit-image", "sklearn": "scikit-learn"}


@dataclass(frozen=True)
class Crop:
    """A square of a photograph, `side` pixels wide; `number` counts the crops of the photograph."""

    image: str
    number: int
    left: int
    top: int
    side: int
    flip: bool

    @property
    def key(self) -> str:
        return f"{self.image}{VIEW_SEPARATOR}{self.number:04d}"

    @property
    def box(self) -> tuple[int, int, int, int]:  # left, top, right and bottom, as in PIL
        return (self.left, self.top, self.left + self.side, self.top + self.side)


def build_demo(
    dst: str | Path,
    *,
    train_crops: int = 480,
    heldout_crops: int = 64,
    heldout_image_crops: int = 60,
    seed: int = 0,
    device: str | torch.device | None = None,
) -> dict[str, Any]:
    """Write the datasets `dst/train`, `dst/heldout_crops` and `dst/heldout_images`.

    A call that was interrupted can be repeated, and continues. Returns for each split what `encode_images` returns, and
    `seconds` for all. Raises DataError or EncoderError for a missing package, and DataError for other arguments than
    `dst` was started with.
    """
    started = time.monotonic()
    dst = Path(dst)
    sizes = dict(zip(SPLITS, (train_crops, heldout_crops, heldout_image_crops), strict=True))
    seen, held_out = open_photographs(SEEN), open_photographs(HELD_OUT)
    photographs = seen | held_out
    arguments = {**sizes, "seed": seed}
    path = dst / "demo.json"  # refuses to mix the crops with those of other arguments
    if not path.exists():
        dst.mkdir(parents=True, exist_ok=True)
        atomic_write_json(path, arguments)
    require_same(dst, read_json(path), arguments)
    pixels = {name: image.size for name, image in photographs.items()}
    plan = plan_crops({name: pixels[name] for name in seen}, {name: pixels[name] for name in held_out}, sizes, seed)
    result = encode_crops(plan, photographs.__getitem__, dst, device)
    return {**result, "seconds": time.monotonic() - started}


def require_same(dst: Path, found: dict[str, Any], arguments: dict[str, Any]) -> None:
    """Raise DataError if `dst` was started with other arguments."""
    if found != arguments:
        raise DataError(f"{dst} holds a set made with {found}, not {arguments}; name another folder or empty it")


def encode_crops(
    plan: dict[str, list[Crop]],
    load: Callable[[str], Image.Image],
    dst: Path,
    device: str | torch.device | None,
) -> dict[str, Any]:
    """Write each split of the plan as the dataset `dst/<split>`; `load` opens a photograph by name, in any thread.

    Returns for each split what `encode_images` returns.
    """
    condition, target = load_encoder(CONDITION, device=device), load_encoder(TARGET, device=device)
    result: dict[str, Any] = {}
    for split, crops in plan.items():
        logger.info("%s: %d crops", split, len(crops))
        records = [
            ImageRecord(crop.key, crop.key, number / len(crops), partial(_load_crop, crop, load))
            for number, crop in enumerate(crops, start=1)
        ]
        result[split] = encode_images(
            records, dst / split, condition, target, samples_per_shard=SAMPLES_PER_SHARD, view_separator=VIEW_SEPARATOR
        )
    return result


def plan_crops(
    seen: dict[str, tuple[int, int]],
    held_out: dict[str, tuple[int, int]],
    sizes: dict[str, int],
    seed: int,
    min_pixels: int = 0,
) -> dict[str, list[Crop]]:
    """Choose the crops of every split from photographs given by name and (width, height).

    The photographs take turns. A crop is a pure function of (seed, photograph, number), numbers continue from `train`
    to `heldout_crops`, and no box is drawn twice, so keys are unique and the splits disjoint. A crop is at least
    `min_pixels` wide, unless its photograph is smaller.
    """
    drawn: dict[str, list[Crop]] = {name: [] for name in [*seen, *held_out]}

    plan: dict[str, list[Crop]] = {}
    for split, photographs in zip(SPLITS, (seen, seen, held_out), strict=True):
        plan[split] = []
        for name, size in islice(cycle(photographs.items()), sizes[split]):
            crop = _draw_crop(name, size, drawn[name], seed, min_pixels)
            drawn[name].append(crop)
            plan[split].append(crop)
    return plan


def _draw_crop(name: str, size: tuple[int, int], drawn: list[Crop], seed: int, min_pixels: int) -> Crop:
    # Python guarantees the sequence of random() for a seed, across versions and platforms.
    generator = random.Random(f"{seed}/{name}/{len(drawn)}")
    boxes = {crop.box for crop in drawn}
    width, height = size
    while True:
        short = min(width, height)
        smallest = max(_MIN_SCALE, min(1, min_pixels / short))
        side = round((smallest + (1 - smallest) * generator.random()) * short)
        left = int(generator.random() * (width - side + 1))
        top = int(generator.random() * (height - side + 1))
        crop = Crop(name, len(drawn), left, top, side, flip=generator.random() < 0.5)
        if crop.box not in boxes:
            return crop


def open_photographs(sources: dict[str, str]) -> dict[str, Image.Image]:
    return {path.stem: decode_image(path.read_bytes()) for path, _ in find_photographs(sources)}


def find_photographs(sources: dict[str, str]) -> list[tuple[Path, str]]:
    """The installed files of SEEN or HELD_OUT, each with its distribution; raises DataError for a missing one."""
    found = []
    for source, files in sources.items():
        package, _, folder = source.partition("/")
        distribution = _DISTRIBUTIONS[package]
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            raise DataError(f"the demo set needs the photographs in {distribution}: pip install 'blip3o-ds[demo]'")
        for file in files.split():
            path = Path(spec.origin).parent / folder / file
            if not path.exists():
                raise DataError(
                    f"{path}: this photograph is not in the installed {distribution}; "
                    "install the versions of constraints.txt"
                )
            found.append((path, distribution))
    return found


def _load_crop(crop: Crop, load: Callable[[str], Image.Image]) -> tuple[Image.Image, dict[str, Any]]:
    size = (CROP_PIXELS, CROP_PIXELS)
    square = load(crop.image).resize(size, Image.Resampling.BICUBIC, box=crop.box)
    if crop.flip:
        square = square.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return square, {"caption": crop.image.replace("_", " "), **asdict(crop)}
