"""Where the pictures come from, webdataset tars or a folder: records that read nothing until they are asked.

The source is cut into parts, and a part's records come in a fixed order with safe, unique keys, whoever reads it and
when; so many processes can share an extraction, and an interrupted one can tell what it has done.
"""

from __future__ import annotations

import io
import json
import os
import re
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path, PurePosixPath
from typing import Any

from PIL import Image, ImageOps

from blip3o_ds.errors import DataError

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
_TAR_BLOCK = 512


@dataclass(frozen=True)
class ImageRecord:
    """One picture that can be loaded later, in any thread.

    `source` names it in messages, `progress` is the share (0..1) of its part that ends with it, and
    `load` returns the decoded picture and its metadata, which always has a `caption`; `load` raises whatever
    is wrong.
    """

    key: str
    source: str
    progress: float
    load: Callable[[], tuple[Image.Image, dict[str, Any]]]


@dataclass(frozen=True)
class ImagePart:
    """A tar, or a stretch of a folder's files: what one process works through at a time.

    `size` is in bytes for tars and in pictures for files; `records` reads the part from its beginning.
    """

    name: str
    size: int
    records: Callable[[], Iterator[ImageRecord]]


def iterate_images(images: str | Path) -> Iterator[ImageRecord]:
    """The pictures of all parts of `images`, in order (see `image_parts`)."""
    parts = image_parts(images, files_per_part=1 << 62)
    return (record for part in parts for record in part.records())


def image_parts(images: str | Path, files_per_part: int) -> list[ImagePart]:
    """A tar, a folder of tars, or a folder of image files as parts; folders are read recursively.

    In a tar a sample is `<key>.jpg|jpeg|png|webp` with an optional `<key>.txt` (caption) and `<key>.json`
    (metadata) beside it, as webdataset has it; in a folder the caption and metadata have the picture's stem.
    Keys are the names, and for a folder of tars the tar's name and the picture's. Raises DataError for a path that
    holds neither, or both; reading a damaged tar raises it too.
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
    # Over all files, and before they are divided: a key must not depend on the part's size.
    keyed = [(keys.make(path.relative_to(folder).with_suffix("").as_posix()), path) for path in pictures]
    return [
        _folder_part(folder, keyed[start : start + files_per_part]) for start in range(0, len(keyed), files_per_part)
    ]


def _folder_part(folder: Path, keyed: list[tuple[str, Path]]) -> ImagePart:
    def records() -> Iterator[ImageRecord]:
        for number, (key, path) in enumerate(keyed, start=1):
            name = path.relative_to(folder).as_posix()
            yield ImageRecord(key, source=str(path), progress=number / len(keyed), load=_load_files(path, name))

    first, last = (keyed[i][1].relative_to(folder).as_posix() for i in (0, -1))
    return ImagePart(f"{first} to {last}", len(keyed), records)


def _load_files(path: Path, name: str) -> Callable[[], tuple[Image.Image, dict[str, Any]]]:
    def load() -> tuple[Image.Image, dict[str, Any]]:
        text, data = path.with_suffix(".txt"), path.with_suffix(".json")
        meta = _parse_meta(
            text.read_bytes() if text.exists() else None, data.read_bytes() if data.exists() else None, name
        )
        return decode_image(path.read_bytes()), meta

    return load


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
                load=_load_members(tar, members, suffix, f"{tar.name}/{sample}.{suffix}"),
            )

    return ImagePart(name, size, records)


def _container_keys(names: list[str]) -> list[str]:
    """For every tar what its keys begin with, so chosen that no two tars can make the same key."""
    keys = _KeyMaker()
    made = [keys.make(name.removesuffix(".tar")) for name in names]
    ordered = sorted(f"{key}_" for key in made)
    if any(second.startswith(first) for first, second in pairwise(ordered)):  # a_ + b_c = a_b_ + c
        return [f"tar{number:07d}" for number in range(len(names))]
    return made


@dataclass(frozen=True)
class _Member:
    """Where the content of a tar's member lies."""

    start: int
    size: int

    @property
    def end(self) -> int:
        return self.start + self.size


def _samples_of(tar: Path) -> Iterator[tuple[str, dict[str, _Member]]]:
    """The samples of a tar: neighbouring members that agree up to the first dot, by the rest of the name."""
    name, members = "", {}
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
                archive.members = []  # tarfile would keep every header of a large tar
                path = PurePosixPath(member.name)
                if member.isfile() and not path.name.startswith("."):
                    yield path, _Member(member.offset_data, member.size)
            _require_end(tar, archive.offset)
    except (tarfile.TarError, OSError) as error:
        raise DataError(f"{tar}: not a readable, uncompressed tar ({error}); repair or remove it") from error


def _require_end(tar: Path, offset: int) -> None:
    """tarfile takes a damaged header for the archive's end; after a true end come zeros or nothing."""
    with open(tar, "rb") as file:
        file.seek(offset)
        if any(file.read(_TAR_BLOCK)):
            raise DataError(f"{tar}: damaged at byte {offset}: expected a member or the end of the archive")


def _load_members(
    tar: Path, members: dict[str, _Member], suffix: str, name: str
) -> Callable[[], tuple[Image.Image, dict[str, Any]]]:
    def load() -> tuple[Image.Image, dict[str, Any]]:
        with open(tar, "rb") as file:
            wanted = {}
            for kind in (suffix, "txt", "json"):
                if kind in members:
                    file.seek(members[kind].start)
                    wanted[kind] = file.read(members[kind].size)
        return decode_image(wanted[suffix]), _parse_meta(wanted.get("txt"), wanted.get("json"), name)

    return load


def decode_image(content: bytes) -> Image.Image:
    """The picture in an encoded file, upright and in RGB."""
    with Image.open(io.BytesIO(content)) as image:
        return ImageOps.exif_transpose(image).convert("RGB")


def _parse_meta(text: bytes | None, data: bytes | None, source: str) -> dict[str, Any]:
    meta = {"source": source}
    if data is not None:
        # pandas and others write NaN for what is missing; JSON itself has no such word.
        content = json.loads(data, parse_constant=lambda name: None)
        if not isinstance(content, dict):
            raise ValueError(f"the .json beside it holds a {type(content).__name__}, expected an object")
        meta |= content
    if text is not None:
        meta["caption"] = text.decode("utf-8", errors="replace").strip()
    meta.setdefault("caption", "")
    return meta


class _KeyMaker:
    """Keys without dots or slashes, made unique by a number where that is needed."""

    def __init__(self) -> None:
        self._seen: set[str] = set()

    def make(self, name: str) -> str:
        key = re.sub(r"[^\w-]+", "_", name)
        unique, number = key, 2
        while unique in self._seen:
            unique, number = f"{key}_{number}", number + 1
        self._seen.add(unique)
        return unique
