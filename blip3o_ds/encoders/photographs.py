"""Tells photographs from diagrams, clip art and screens by measurement, and finds pictures that show the same.

A photograph's neighbouring pixels are rarely equal, since a sensor has noise, and no few colours cover most of it.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

MIN_SHORT_SIDE = 128  # pixels: a quarter of what the encoders see
MAX_SHORT_SIDE = 768  # more would only slow the crops down
BACKGROUND = (128, 128, 128)  # behind what is transparent
# Of neighbouring pixels, the share that is equal. Photographs of blue skies or on plain ground reach 0.6 after JPEG
# compression, most diagrams, drawings and screens exceed it (not those that show a photograph). A cut-out has no sky or
# ground: among these, photographs end and drawings begin at 0.2.
MAX_FLAT, MAX_FLAT_CUTOUT = 0.6, 0.2
MAX_DOMINANT = 0.65  # share of the four most frequent of 32^3 colours: diagrams on white and stars on black exceed it

_OPAQUE = 250  # alpha of 255; less is the soft edge of a cut-out
_GRID = 16
_NEAR_BITS = 50  # of the 512 of a signature; measured: copies of a picture differ in up to 45, others in 56 and more


@dataclass(frozen=True)
class Photograph:
    """A decoded picture: RGB, upright, without transparency, its short side at most MAX_SHORT_SIDE pixels.

    `size` is the file's width and height, `refusal` says why it is not taken for a photograph, or is empty.
    """

    image: Image.Image
    size: tuple[int, int]
    refusal: str


def open_photograph(content: bytes) -> Photograph:
    """Decode an image file; what is transparent at the edges is cropped, the rest of it becomes grey."""
    with Image.open(io.BytesIO(content)) as file:
        size = file.size
        picture = ImageOps.exif_transpose(file)
    cutout = "A" in picture.getbands() or "transparency" in picture.info
    if cutout:
        picture = picture.convert("RGBA")
        picture = picture.crop(picture.getchannel("A").getbbox())
    if min(picture.size) < MIN_SHORT_SIDE:
        return Photograph(picture.convert("RGB"), size, f"smaller than {MIN_SHORT_SIDE} pixels")
    scale = MAX_SHORT_SIDE / min(picture.size)
    if scale < 1:
        width, height = (round(scale * side) for side in picture.size)
        picture = picture.convert("RGBA" if cutout else "RGB").resize((width, height), Image.Resampling.LANCZOS)
    opaque = np.ones(picture.size[::-1], bool)
    if cutout:
        opaque = np.asarray(picture.getchannel("A")) >= _OPAQUE
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, (*BACKGROUND, 255)), picture)
    image = picture.convert("RGB")
    cutout = cutout and not opaque.all()
    return Photograph(image, size, why_not_a_photograph(np.asarray(image), opaque, cutout))


def why_not_a_photograph(pixels: NDArray[np.uint8], opaque: NDArray[np.bool_], cutout: bool) -> str:
    """The measurement that speaks against it, or nothing; pixels [H, W, 3], of which only the opaque [H, W] count."""
    if opaque.mean() < 0.2:
        return f"{1 - opaque.mean():.0%} transparent"
    both = opaque[:, 1:] & opaque[:, :-1]
    flat = float((pixels[:, 1:] == pixels[:, :-1]).all(axis=-1)[both].mean())
    if flat > (MAX_FLAT_CUTOUT if cutout else MAX_FLAT):
        return f"{flat:.0%} of the neighbouring pixels are equal"
    red, green, blue = (pixels[opaque] >> 3).astype(np.intp).T
    counts = np.bincount((red << 10) | (green << 5) | blue)
    dominant = float(np.sort(counts)[-4:].sum() / counts.sum())
    return f"four colours cover {dominant:.0%}" if dominant > MAX_DOMINANT else ""


def signature(image: Image.Image) -> NDArray[np.int8]:
    """A difference hash [2, 512] of +1 and -1 of the picture and its mirror image, which scaling hardly changes."""
    grey = image.convert("L")
    return np.stack([_difference_hash(grey), _difference_hash(ImageOps.mirror(grey))])


def _difference_hash(grey: Image.Image) -> NDArray[np.int8]:
    across = np.asarray(grey.resize((_GRID + 1, _GRID), Image.Resampling.BOX)).astype(np.int16)
    down = np.asarray(grey.resize((_GRID, _GRID + 1), Image.Resampling.BOX)).astype(np.int16)
    brighter = np.concatenate([(np.diff(across, axis=1) > 0).ravel(), (np.diff(down, axis=0) > 0).ravel()])
    return np.where(brighter, 1, -1).astype(np.int8)


def same_pictures(signatures: Sequence[NDArray[np.int8]]) -> list[int]:
    """For each picture the smallest index of those that it is linked to by a chain of near-equal pictures."""
    hashes = np.stack(signatures).astype(np.float32)  # [pictures, 2, bits]
    bits = hashes.shape[-1]
    agreement = np.maximum(hashes[:, 0] @ hashes[:, 0].T, hashes[:, 0] @ hashes[:, 1].T)
    near = (bits - agreement) / 2 <= _NEAR_BITS
    group = list(range(len(hashes)))

    def find(index: int) -> int:
        while group[index] != index:
            index = group[index]
        return index

    for first, second in np.argwhere(np.triu(near | near.T, k=1)):
        low, high = sorted((find(first), find(second)))
        group[high] = low
    return [find(index) for index in range(len(hashes))]


def is_held_out(name: str) -> bool:
    """A tenth of all names, by their hash."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") % 10 == 0
