"""The demo dataset: crops of photographs that come with Python packages, encoded by the small pair.

Its splits are `train`, `heldout_crops` (unseen crops of the photographs in train) and `heldout_images` (photographs
that are not in train); which crop is in which split is a pure function of the sizes and the seed.
"""

from __future__ import annotations

import importlib.util
import logging
import random
import time
from dataclasses import asdict, dataclass
from functools import partial
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
_MIN_SCALE = 0.25  # of the short side of the photograph

# Package, folder in it, files. The two motorcycles show one scene from two viewpoints, so both are in one split.
SEEN = (
    ("skimage", "data", "astronaut.png brick.png cell.png chelsea.png clock_motion.png coins.png grass.png"),
    (
        "skimage",
        "data",
        "hubble_deep_field.jpg ihc.png moon.png motorcycle_left.png motorcycle_right.png retina.jpg",
    ),
    ("sklearn", "datasets/images", "china.jpg"),
)
HELD_OUT = (
    ("skimage", "data", "camera.png coffee.png gravel.png rocket.jpg"),
    ("sklearn", "datasets/images", "flower.jpg"),
)
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
        return f"{self.image}_{self.number:04d}"

    @property
    def box(self) -> tuple[int, int, int, int]:
        """Left, top, right and bottom, as in PIL."""
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
    `seconds` for all.

    Raises:
        DataError: the packages with the photographs are missing, or `dst` was started with other arguments.
        EncoderError: the packages with the weights are missing.
    """
    started = time.monotonic()
    dst = Path(dst)
    sizes = dict(zip(SPLITS, (train_crops, heldout_crops, heldout_image_crops), strict=True))
    seen, held_out = open_photographs(SEEN), open_photographs(HELD_OUT)
    _claim(dst, {**sizes, "seed": seed})
    plan = plan_crops(
        {name: image.size for name, image in seen.items()},
        {name: image.size for name, image in held_out.items()},
        sizes,
        seed,
    )
    condition, target = load_encoder(CONDITION, device=device), load_encoder(TARGET, device=device)
    result: dict[str, Any] = {}
    for split, crops in plan.items():
        logger.info("demo set, %s: %d crops", split, len(crops))
        records = _records(crops, seen | held_out)
        result[split] = encode_images(records, dst / split, condition, target, samples_per_shard=SAMPLES_PER_SHARD)
    return {**result, "seconds": time.monotonic() - started}


def plan_crops(
    seen: dict[str, tuple[int, int]], held_out: dict[str, tuple[int, int]], sizes: dict[str, int], seed: int
) -> dict[str, list[Crop]]:
    """Choose the crops of every split from photographs given by name and (width, height).

    The photographs take turns. A crop is a pure function of (seed, photograph, number), numbers continue from `train`
    to `heldout_crops`, and no box is drawn twice, so keys are unique and the splits disjoint.
    """
    drawn: dict[str, list[Crop]] = {name: [] for name in [*seen, *held_out]}

    def draw(photographs: dict[str, tuple[int, int]], count: int) -> list[Crop]:
        names = list(photographs)
        crops = []
        for turn in range(count):
            name = names[turn % len(names)]
            crops.append(_draw_crop(name, photographs[name], drawn[name], seed))
            drawn[name].append(crops[-1])
        return crops

    return {
        "train": draw(seen, sizes["train"]),
        "heldout_crops": draw(seen, sizes["heldout_crops"]),
        "heldout_images": draw(held_out, sizes["heldout_images"]),
    }


def _draw_crop(name: str, size: tuple[int, int], drawn: list[Crop], seed: int) -> Crop:
    # Python guarantees the sequence of random() for a seed, across versions and platforms.
    generator = random.Random(f"{seed}/{name}/{len(drawn)}")
    boxes = {crop.box for crop in drawn}
    width, height = size
    while True:
        scale = _MIN_SCALE + (1 - _MIN_SCALE) * generator.random()
        side = round(scale * min(width, height))
        left = int(generator.random() * (width - side + 1))
        top = int(generator.random() * (height - side + 1))
        crop = Crop(name, len(drawn), left, top, side, flip=generator.random() < 0.5)
        if crop.box not in boxes:
            return crop


def open_photographs(sources: tuple[tuple[str, str, str], ...]) -> dict[str, Image.Image]:
    photographs = {}
    for package, folder, files in sources:
        root = _package_folder(package) / folder
        for file in files.split():
            path = root / file
            if not path.exists():
                raise DataError(
                    f"{path}: this photograph is not in the installed {_DISTRIBUTIONS[package]}; "
                    "install the versions of constraints.txt"
                )
            photographs[path.stem] = decode_image(path.read_bytes())
    return photographs


def _package_folder(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise DataError(
            f"the demo set needs the photographs in {_DISTRIBUTIONS[package]}: pip install 'blip3o-ds[demo]'"
        )
    return Path(spec.submodule_search_locations[0])


def _claim(dst: Path, arguments: dict[str, int]) -> None:
    """Record the arguments in `dst`, or refuse to mix its crops with those of other arguments."""
    path = dst / "demo.json"
    if not path.exists():
        dst.mkdir(parents=True, exist_ok=True)
        atomic_write_json(path, arguments)
    elif (found := read_json(path)) != arguments:
        raise DataError(f"{dst} holds a demo set made with {found}, not {arguments}; name another folder or empty it")


def _records(crops: list[Crop], photographs: dict[str, Image.Image]) -> list[ImageRecord]:
    return [
        ImageRecord(crop.key, crop.key, number / len(crops), partial(_load_crop, crop, photographs[crop.image]))
        for number, crop in enumerate(crops, start=1)
    ]


def _load_crop(crop: Crop, photograph: Image.Image) -> tuple[Image.Image, dict[str, Any]]:
    square = photograph.resize((CROP_PIXELS, CROP_PIXELS), Image.Resampling.BICUBIC, box=crop.box)
    if crop.flip:
        square = square.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return square, {"caption": crop.image.replace("_", " "), **asdict(crop)}
