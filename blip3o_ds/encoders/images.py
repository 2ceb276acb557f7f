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
from itertools import groupby, pairwise
from pathlib import Path, PurePosixPath
from typing import Any

from PIL import Image, ImageOps

from blip3o_ds.errors import DataError

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")


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
    the name of the image, after the name of its tar in a folder of tars. Raises DataError for a path that holds
    neither tars nor images, or both; later, for a damaged tar.
    """
    images = Path(images)
    if images.is_file() and images.suffix == ".tar":
        return [_tar_part(images, images.name, container="")]
    if not images.is_dir():
        raise DataError(f"{images}: expected a folder of images, a folder of tars, or one .tar; found none of them")
    names = sorted(
        (Path(parent) / name).relative_to(images)
        for parent, _, found in os.walk(images)
        for name in found
        if name[0] != "."
    )
    tars = [name for name in names if name.suffix == ".tar"]
    pictures = [name for name in names if name.suffix.lower().lstrip(".") in IMAGE_SUFFIXES]
    if tars and pictures:
        raise DataError(f"{images}: holds both tars ({tars[0].name}, …) and images ({pictures[0].name}, …); name one")
    if tars:
        containers = zip(tars, _container_keys([tar.as_posix() for tar in tars]), strict=True)
        return [_tar_part(images / tar, tar.as_posix(), container) for tar, container in containers]
    if pictures:
        return _folder_parts(images, [picture.as_posix() for picture in pictures], files_per_part)
    raise DataError(f"{images}: no image found; expected .{', .'.join(IMAGE_SUFFIXES)} files or webdataset .tar files")


def _folder_parts(folder: Path, names: list[str], files_per_part: int) -> list[ImagePart]:
    keys = KeyMaker()
    # Before the files are divided, since a key must not depend on the size of the parts.
    keyed = [(keys.make(os.path.splitext(name)[0]), name) for name in names]
    parts = [keyed[start : start + files_per_part] for start in range(0, len(keyed), files_per_part)]
    return [
        ImagePart(f"{part[0][1]} to {part[-1][1]}", len(part), partial(_folder_records, folder, part)) for part in parts
    ]


def _folder_records(folder: Path, keyed: list[tuple[str, str]]) -> Iterator[ImageRecord]:
    for number, (key, name) in enumerate(keyed, start=1):
        path = folder / name
        yield ImageRecord(key, str(path), number / len(keyed), partial(_load_files, path, name))


def _load_files(path: Path, name: str) -> tuple[Image.Image, dict[str, Any]]:
    beside = (path.with_suffix(".txt"), path.with_suffix(".json"))
    text, data = (file.read_bytes() if file.exists() else None for file in beside)
    return decode_image(path.read_bytes()), _parse_meta(text, data, name)


def _tar_part(tar: Path, name: str, container: str) -> ImagePart:
    size = tar.stat().st_size

    def records() -> Iterator[ImageRecord]:
        keys = KeyMaker()
        for sample, members in _samples_of(tar):
            suffix = next((suffix for suffix in IMAGE_SUFFIXES if suffix in members), None)
            if suffix is None:
                continue
            key = keys.make(sample)
            yield ImageRecord(
                key=f"{container}_{key}" if container else key,
                source=f"{tar}:{sample}.{suffix}",
                progress=(members[suffix].offset_data + members[suffix].size) / size,
                load=partial(_load_members, tar, members, suffix, f"{tar.name}/{sample}.{suffix}"),
            )

    return ImagePart(name, size, records)


def _container_keys(names: list[str]) -> list[str]:
    """The prefix of each tar's keys, chosen so that no two tars can make the same key."""
    keys = KeyMaker()
    made = [keys.make(name.removesuffix(".tar")) for name in names]
    ordered = sorted(f"{key}_" for key in made)
    if any(second.startswith(first) for first, second in pairwise(ordered)):  # a_ + b_c = a_b_ + c
        return [f"tar{number:07d}" for number in range(len(names))]
    return made


def _samples_of(tar: Path) -> Iterator[tuple[str, dict[str, tarfile.TarInfo]]]:
    """The samples of a tar: consecutive members whose names are equal up to the first dot, by the rest of the name."""
    for name, members in groupby(_members_of(tar), key=lambda member: _split(member)[0]):
        yield name, {_split(member)[1]: member for member in members}


def _split(member: tarfile.TarInfo) -> tuple[str, str]:
    path = PurePosixPath(member.name)
    stem, _, suffix = path.name.partition(".")
    return (path.parent / stem).as_posix(), suffix.lower()


def _members_of(tar: Path) -> Iterator[tarfile.TarInfo]:
    try:
        with open(tar, "rb") as file, tarfile.open(fileobj=file, mode="r:") as archive:
            for member in archive:
                archive.members = []  # type: ignore[attr-defined]  # or tarfile keeps every header of a large tar
                if member.isfile() and not PurePosixPath(member.name).name.startswith("."):
                    yield member
            # tarfile takes a damaged header for the end of the archive; zeros or nothing follow the true end.
            file.seek(archive.offset)
            if any(file.read(tarfile.BLOCKSIZE)):
                raise DataError(f"{tar}: damaged at byte {archive.offset}: expected a member or the end of the archive")
    except (tarfile.TarError, OSError) as error:
        raise DataError(f"{tar}: not a readable, uncompressed tar ({error}); repair or remove it") from error


def _load_members(
    tar: Path, members: dict[str, tarfile.TarInfo], suffix: str, name: str
) -> tuple[Image.Image, dict[str, Any]]:
    wanted: dict[str, bytes] = {}
    with open(tar, "rb") as file:
        for kind in members.keys() & {suffix, "txt", "json"}:
            file.seek(members[kind].offset_data)
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


class KeyMaker:
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
