"""Where the pictures come from, webdataset tars or a folder: records that read nothing until they are asked.

Records come in a fixed order with safe, unique keys, so that an interrupted extraction can tell what it has
done.
"""

from __future__ import annotations

import io
import json
import os
import re
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from PIL import Image, ImageOps

from blip3o_ds.errors import DataError

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
_TAR_BLOCK = 512


@dataclass(frozen=True)
class ImageRecord:
    """One picture that can be loaded later, in any thread.

    `source` names it in messages, `progress` is the share (0..1) of the whole source that ends with it, and
    `load` returns the decoded picture and its metadata, which always has a `caption`; `load` raises whatever
    is wrong.
    """

    key: str
    source: str
    progress: float
    load: Callable[[], tuple[Image.Image, dict[str, Any]]]


def iterate_images(images: str | Path) -> Iterator[ImageRecord]:
    """The pictures of a tar, of a folder of tars, or of a folder of image files, folders read recursively.

    In a tar a sample is `<key>.jpg|jpeg|png|webp` with an optional `<key>.txt` (caption) and `<key>.json`
    (metadata) beside it, as webdataset has it; in a folder the caption and metadata have the picture's stem.
    Raises DataError for a path that holds neither, or both, and for a damaged tar.
    """
    images = Path(images)
    if images.is_file() and images.suffix == ".tar":
        return _from_tars([images])
    if not images.is_dir():
        raise DataError(f"{images}: expected a folder of images, a folder of tars, or one .tar; found none of them")
    files = _files_below(images)
    tars = [path for path in files if path.suffix == ".tar"]
    pictures = [path for path in files if path.suffix.lower().lstrip(".") in IMAGE_SUFFIXES]
    if tars and pictures:
        raise DataError(f"{images}: holds both tars ({tars[0].name}, …) and images ({pictures[0].name}, …); name one")
    if tars:
        return _from_tars(tars)
    if pictures:
        return _from_folder(images, pictures)
    raise DataError(f"{images}: no image found; expected .{', .'.join(IMAGE_SUFFIXES)} files or webdataset .tar files")


def _files_below(folder: Path) -> list[Path]:
    found = [Path(parent) / name for parent, _, names in os.walk(folder) for name in names if name[0] != "."]
    return sorted(found, key=lambda path: path.relative_to(folder).parts)


def _from_folder(folder: Path, pictures: list[Path]) -> Iterator[ImageRecord]:
    keys = _KeyMaker()
    for number, path in enumerate(pictures, start=1):
        name = path.relative_to(folder)
        yield ImageRecord(
            key=keys.make(name.with_suffix("").as_posix()),
            source=str(path),
            progress=number / len(pictures),
            load=_load_files(path, name.as_posix()),
        )


def _load_files(path: Path, name: str) -> Callable[[], tuple[Image.Image, dict[str, Any]]]:
    def load() -> tuple[Image.Image, dict[str, Any]]:
        text, data = path.with_suffix(".txt"), path.with_suffix(".json")
        meta = _parse_meta(
            text.read_bytes() if text.exists() else None, data.read_bytes() if data.exists() else None, name
        )
        return decode_image(path.read_bytes()), meta

    return load


def _from_tars(tars: list[Path]) -> Iterator[ImageRecord]:
    keys = _KeyMaker()
    total = sum(tar.stat().st_size for tar in tars)
    before = 0  # bytes of the tars already read
    for tar in tars:
        for name, members in _samples_of(tar):
            suffix = next((suffix for suffix in IMAGE_SUFFIXES if suffix in members), None)
            if suffix is None:
                continue
            yield ImageRecord(
                key=keys.make(name, container=tar.stem),
                source=f"{tar}:{name}.{suffix}",
                progress=(before + members[suffix].end) / total,
                load=_load_members(tar, members, suffix, f"{tar.name}/{name}.{suffix}"),
            )
        before += tar.stat().st_size


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
    """Keys without dots or slashes, made unique by the tar's name and, where that is not enough, a number."""

    def __init__(self) -> None:
        self._seen: set[str] = set()

    def make(self, name: str, container: str = "") -> str:
        key = re.sub(r"[^\w-]+", "_", name)
        if key in self._seen and container:
            key = re.sub(r"[^\w-]+", "_", container) + "_" + key
        unique, number = key, 2
        while unique in self._seen:
            unique, number = f"{key}_{number}", number + 1
        self._seen.add(unique)
        return unique
