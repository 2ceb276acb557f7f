"""The images to encode, from webdataset tars or a folder, as records that read nothing until they are loaded.

The source is divided into parts whose records have a fixed order and safe, unique keys, whoever reads them and when: so
processes can share an extraction, and a resumed one knows what is done.
"""

from __future__ import annotations

import io
import json
import os
import re
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path, PurePosixPath
from typing import Any

from PIL import Image, ImageOps

from blip3o_ds.errors import DataError

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
_TAR_BLOCK = 512


@dataclass(frozen=True)
class ImageRecord:
    """An image that can be loaded later, in any thread.

    `source` names it in messages, and `progress` is the share (0..1) of its part that ends with it. `load` returns the
    decoded image and its metadata, which always has a `caption`; it may raise any exception.
    """

    key: str
    source: str
    progress: float
    load: Callable[[], tuple[Image.Image, dict[str, Any]]]


@dataclass(frozen=True)
class ImagePart:
    """What one process encodes at a time: a tar, or consecutive files of a folder.

    `size` is in bytes for a tar and in images for files; `records` reads the part from its start.
    """

    name: str
    size: int
    records: Callable[[], Iterator[ImageRecord]]


def image_parts(images: str | Path, files_per_part: int) -> list[ImagePart]:
    """A tar, a folder of tars, or a folder of image files as parts; folders are read recursively.

    In a tar, as in webdataset, a sample is `<key>.jpg|jpeg|png|webp` with an optional `<key>.txt` (caption) and
    `<key>.json` (metadata); in a folder, caption and metadata have the name of the image with that suffix. A key is
    the name of the image, after the name of its tar in a folder of tars.

    Raises:
        DataError: the path holds neither tars nor images, or both; later, a damaged tar.
    """
    images = Path(images)
    if images.is_file() and images.suffix == ".tar":
        return [_tar_part(images, images.name, container="")]
    if not images.is_dir():
        raise DataError(f"{images}: expected a folder of images, a folder of tars, or one .tar; found none of them")
    files = _files_below(images)
    tars = [path for path in files if path.suffix == ".tar"]
    pictures = [path for path in files if path.suffix.lower().lstrip(".") in IMAGE_SUFFIXES]
    if tars and pictures:
        raise DataError(f"{images}: holds both tars ({tars[0].name}, …) and images ({pictures[0].name}, …); name one")
    if tars:
        names = [tar.relative_to(images).as_posix() for tar in tars]
        return [_tar_part(*part) for part in zip(tars, names, _container_keys(names), strict=True)]
    if pictures:
        return _folder_parts(images, pictures, files_per_part)
    raise DataError(f"{images}: no image found; expected .{', .'.join(IMAGE_SUFFIXES)} files or webdataset .tar files")


def _files_below(folder: Path) -> list[Path]:
    found = [Path(parent) / name for parent, _, names in os.walk(folder) for name in names if name[0] != "."]
    return sorted(found, key=lambda path: path.relative_to(folder).parts)


def _folder_parts(folder: Path, pictures: list[Path], files_per_part: int) -> list[ImagePart]:
    keys = _KeyMaker()
    # Before the files are divided, since a key must not depend on the size of the parts.
    keyed = [(keys.make(path.relative_to(folder).with_suffix("").as_posix()), path) for path in pictures]
    return [
        _folder_part(folder, keyed[start : start + files_per_part]) for start in range(0, len(keyed), files_per_part)
    ]


def _folder_part(folder: Path, keyed: list[tuple[str, Path]]) -> ImagePart:
    def records() -> Iterator[ImageRecord]:
        for number, (key, path) in enumerate(keyed, start=1):
            name = path.relative_to(folder).as_posix()
            yield ImageRecord(
                key, source=str(path), progress=number / len(keyed), load=partial(_load_files, path, name)
            )

    first, last = (keyed[i][1].relative_to(folder).as_posix() for i in (0, -1))
    return ImagePart(f"{first} to {last}", len(keyed), records)


def _load_files(path: Path, name: str) -> tuple[Image.Image, dict[str, Any]]:
    beside = (path.with_suffix(".txt"), path.with_suffix(".json"))
    text, data = (file.read_bytes() if file.exists() else None for file in beside)
    return decode_image(path.read_bytes()), _parse_meta(text, data, name)


def _tar_part(tar: Path, name: str, container: str) -> ImagePart:
    size = tar.stat().st_size

    def records() -> Iterator[ImageRecord]:
        keys = _KeyMaker()
        for sample, members in _samples_of(tar):
            suffix = next((suffix for suffix in IMAGE_SUFFIXES if suffix in members), None)
            if suffix is None:
                continue
            key = keys.make(sample)
            yield ImageRecord(
                key=f"{container}_{key}" if container else key,
                source=f"{tar}:{sample}.{suffix}",
                progress=members[suffix].end / size,
                load=partial(_load_members, tar, members, suffix, f"{tar.name}/{sample}.{suffix}"),
            )

    return ImagePart(name, size, records)


def _container_keys(names: list[str]) -> list[str]:
    """The prefix of each tar's keys, chosen so that no two tars can make the same key."""
    keys = _KeyMaker()
    made = [keys.make(name.removesuffix(".tar")) for name in names]
    ordered = sorted(f"{key}_" for key in made)
    if any(second.startswith(first) for first, second in pairwise(ordered)):  # a_ + b_c = a_b_ + c
        return [f"tar{number:07d}" for number in range(len(names))]
    return made


@dataclass(frozen=True)
class _Member:
    """Where the content of a member is in its tar."""

    start: int
    size: int

    @property
    def end(self) -> int:
        return self.start + self.size


def _samples_of(tar: Path) -> Iterator[tuple[str, dict[str, _Member]]]:
    """The samples of a tar: consecutive members whose names are equal up to the first dot, by the rest of the name."""
    name = ""
    members: dict[str, _Member] = {}
    for path, member in _members_of(tar):
        stem, _, suffix = path.name.partition(".")
        prefix = (path.parent / stem).as_posix()
        if prefix != name and members:
            yield name, members
            members = {}
        name = prefix
        members[suffix.lower()] = member
    if members:
        yield name, members


def _members_of(tar: Path) -> Iterator[tuple[PurePosixPath, _Member]]:
    try:
        with tarfile.open(tar, "r:") as archive:
            for member in archive:
                archive.members = []  # type: ignore[attr-defined]  # or tarfile keeps every header of a large tar
                path = PurePosixPath(member.name)
                if member.isfile() and not path.name.startswith("."):
                    yield path, _Member(member.offset_data, member.size)
            _require_end(tar, archive.offset)
    except (tarfile.TarError, OSError) as error:
        raise DataError(f"{tar}: not a readable, uncompressed tar ({error}); repair or remove it") from error


def _require_end(tar: Path, offset: int) -> None:
    """Refuse a damaged header, which tarfile takes for the end of the archive; zeros or nothing follow the true end."""
    with open(tar, "rb") as file:
        file.seek(offset)
        if any(file.read(_TAR_BLOCK)):
            raise DataError(f"{tar}: damaged at byte {offset}: expected a member or the end of the archive")


def _load_members(tar: Path, members: dict[str, _Member], suffix: str, name: str) -> tuple[Image.Image, dict[str, Any]]:
    with open(tar, "rb") as file:
        wanted = {}
        for kind in (suffix, "txt", "json"):
            if kind in members:
                file.seek(members[kind].start)
                wanted[kind] = file.read(members[kind].size)
    return decode_image(wanted[suffix]), _parse_meta(wanted.get("txt"), wanted.get("json"), name)


def decode_image(content: bytes) -> Image.Image:
    """The image in an encoded file, upright and in RGB."""
    with Image.open(io.BytesIO(content)) as image:
        return ImageOps.exif_transpose(image).convert("RGB")


def _parse_meta(text: bytes | None, data: bytes | None, source: str) -> dict[str, Any]:
    meta: dict[str, Any] = {"source": source}
    if data is not None:
        # pandas and others write NaN for missing values, which JSON does not know.
        content = json.loads(data, parse_constant=lambda name: None)
        if not isinstance(content, dict):
            raise ValueError(f"the .json beside it holds a {type(content).__name__}, expected an object")
        meta |= content
    if text is not None:
        meta["caption"] = text.decode("utf-8", errors="replace").strip()
    meta.setdefault("caption", "")
    return meta


class _KeyMaker:
    """Makes keys without dots or slashes, unique by a number where needed."""

    def __init__(self) -> None:
        self._seen: set[str] = set()

    def make(self, name: str) -> str:
        key = re.sub(r"[^\w-]+", "_", name)
        unique, number = key, 2
        while unique in self._seen:
            unique, number = f"{key}_{number}", number + 1
        self._seen.add(unique)
        return unique
