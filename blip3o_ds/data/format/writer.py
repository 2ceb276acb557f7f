"""Writing a dataset: samples into webdataset tars, an index after each tar, the manifest after all of them.

The same samples make the same bytes, so a run that was interrupted and resumed ends with what an uninterrupted one
would have written.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
import tarfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from blip3o_ds.data.format.codec import Distortion, decode_all, encode, has_nonfinite, parse_header
from blip3o_ds.data.format.index import IndexBuilder, ShardIndex, check_tar_size, index_path
from blip3o_ds.data.format.manifest import MANIFEST_NAME, Manifest, ShardInfo
from blip3o_ds.data.format.moments import merge_moments, no_moments, sample_moments, stats_of_moments
from blip3o_ds.data.format.schema import SCALE_SUFFIX, DatasetSpec
from blip3o_ds.data.format.tar import Member
from blip3o_ds.errors import DataError
from blip3o_ds.files import FileLock, HashingFile, atomic_write

logger = logging.getLogger(__name__)

_SHARD_NAME = re.compile(r"shard_(\d{5,})\.tar")
_LOCK_NAME = ".writer.lock"
_LEFTOVER_NAME = re.compile(r"\.(shard_\d{5,}\.tar(\.idx)?|manifest\.json)\.\d+\.tmp")


class BusyFolder(DataError):
    """Another process is writing into a dataset's folder."""


@contextlib.contextmanager
def sole_writer(folder: Path) -> Iterator[None]:
    """Keep other writers of this project out of a dataset's folder; raises BusyFolder where one is in it.

    The lock file stays. Where there are no locks, or no folder, nobody is kept out.
    """
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(FileLock(folder / _LOCK_NAME, wait=False))
        except BlockingIOError:
            raise BusyFolder(f"{folder}: another process is writing; wait until it ends, or end it") from None
        except OSError as error:  # a missing folder is reported where it is read or written
            logger.debug("%s: no lock: %s", folder, error)
        yield


class DatasetWriter:
    """A context manager that writes samples into shards of `samples_per_shard` and, on a clean exit, the manifest.

    When an exception ends it, the complete shards stay and the unfinished one is removed; with `resume`, another one
    continues after them. One process at a time writes into a folder.
    """

    def __init__(
        self,
        dst: str | Path,
        spec: DatasetSpec,
        samples_per_shard: int = 512,
        extra: dict[str, Any] | None = None,
        *,
        resume: bool = False,
    ) -> None:
        """Without `resume`, `dst` must hold no shards; with it, DataError if they are damaged or of another spec."""
        if samples_per_shard < 1:
            raise DataError(f"samples_per_shard must be at least 1, found {samples_per_shard}")
        self.spec = spec
        self.extra = {} if extra is None else extra
        self._dst = dst = Path(dst)
        self._samples_per_shard = samples_per_shard
        self._shards: list[ShardInfo] = []
        self._keys: set[str] = set()
        self._moments = no_moments(spec)
        self._distortions = {name: Distortion() for name in spec.tensors}
        self._shard: ShardWriter | None = None
        self._failure: DataError | None = None
        with contextlib.ExitStack() as lock:
            try:
                dst.mkdir(parents=True, exist_ok=True)
                lock.enter_context(sole_writer(dst))
                if not resume and (shard_paths(dst) or (dst / MANIFEST_NAME).exists()):
                    raise DataError(f"{dst} already holds shards; resume it, remove it, or choose another folder")
                for path in dst.iterdir():  # what a writer that was killed left behind
                    if _LEFTOVER_NAME.fullmatch(path.name):
                        path.unlink()
                for path in _complete_shards(dst):
                    self._adopt(path)
                self._keep_views()
            except OSError as error:
                raise _write_failed(dst, error) from error
            self._lock = lock.pop_all()  # kept until the `with` block ends

    def write(self, key: str, tensors: Mapping[str, Tensor], meta: dict[str, Any]) -> None:
        """Append a sample: each tensor of the specification, [N, D], and `meta`, anything that JSON holds.

        Raises DataError for a key used before or with "." or "/" in it, other shapes, a value that is not finite (also
        after the cast to the stored dtype), or a disk that refuses.
        """
        if self._failure is not None:
            raise self._failure
        _check_key(key)
        if key in self._keys:
            raise DataError(f"key {key!r} comes twice; keys must be unique in a dataset ({self._dst})")
        try:
            if self._shard is None:
                path = self._dst / f"shard_{len(self._shards):05d}.tar"
                self._shard = ShardWriter(path, self.spec, self._distortions)
            self._shard.write(key, tensors, meta)
            self._keys.add(key)
            if len(self._shard.index.keys) >= self._samples_per_shard:
                self._finish_shard(self._shard)
        except OSError as error:
            # The tar may end in half a member now, so it is removed, and every later sample is refused.
            self._abort()
            self._failure = _write_failed(self._dst, error)
            raise self._failure from error

    def cost(self) -> dict[str, Any]:
        """What the cast to the stored dtype did to each tensor of the samples written here (`Distortion.to_dict`)."""
        return {name: distortion.to_dict() for name, distortion in self._distortions.items()}

    def done_keys(self) -> set[str]:
        """Keys of the samples already written, those of a resumed dataset included."""
        return set(self._keys)

    def __enter__(self) -> DatasetWriter:
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        with self._lock:
            try:
                if error is None:
                    self._close()
            except OSError as failure:
                raise _write_failed(self._dst, failure) from failure
            finally:
                self._abort()

    def _adopt(self, path: Path) -> None:
        index = ShardIndex.load(index_path(path))
        if differences := index.spec.differences(self.spec.without_views()):
            raise DataError(
                f"{path} was written with another specification, so it cannot be resumed "
                f"({differences}); choose another folder, or the settings that it began with"
            )
        self._keys.update(index.keys)
        self._append(path.name, index)

    def _keep_views(self) -> None:
        """A finished dataset may gain a view separator, but not lose it: its views would be taken for images."""
        try:
            stated = Manifest.load(self._dst).spec.view_separator
        except DataError:  # there is none yet, or it is damaged, and a whole one is written
            return
        if stated not in (None, self.spec.view_separator):
            raise DataError(
                f"{self._dst / MANIFEST_NAME}: view_separator is {stated!r}, found {self.spec.view_separator!r}; give "
                "the same, or choose another folder"
            )

    def _finish_shard(self, shard: ShardWriter) -> None:
        self._append(shard.path.name, shard.finish())
        self._shard = None

    def _append(self, name: str, index: ShardIndex) -> None:
        self._shards.append(ShardInfo(name, len(index.keys), index.num_bytes, index.sha256))
        self._moments = merge_moments(self._moments, index.moments)

    def _close(self) -> None:
        if self._failure is not None:
            raise self._failure
        if self._shard is not None and self._shard.index.keys:
            self._finish_shard(self._shard)
        if not self._shards:
            raise DataError(f"no sample was written to {self._dst}, and a dataset must hold at least one")
        Manifest(self.spec, tuple(self._shards), stats_of_moments(self._moments), self.extra).save(self._dst)

    def _abort(self) -> None:
        if self._shard is not None:
            self._shard.abort()
            self._shard = None


class ShardWriter:
    """Writes one tar and, when finished, its index; the tar appears under its name only then."""

    def __init__(self, path: Path, spec: DatasetSpec, distortions: Mapping[str, Distortion]) -> None:
        """`distortions`, one for each tensor, count what `write` encodes."""
        self.path = path
        self._spec = spec
        self._distortions = distortions
        self._pending = atomic_write(path)
        self._tar = HashingFile(self._pending.__enter__())
        self.index = IndexBuilder(spec)

    def write(self, key: str, tensors: Mapping[str, Tensor], meta: dict[str, Any]) -> None:
        """Append a sample; nothing reaches the file unless all of it is valid."""
        if set(tensors) != set(self._spec.tensors):
            found, expected = (", ".join(sorted(names)) for names in (tensors, self._spec.tensors))
            raise DataError(f"sample {key!r}: holds the tensors {found}, expected {expected}")
        stored: dict[str, Tensor] = {}
        for name in self._spec.tensors:
            stored |= self._encode(key, name, tensors[name])
        decoded = decode_all(stored)
        for name, values in decoded.items():
            if has_nonfinite(values):
                largest, dtype = float(tensors[name].abs().max()), self._spec.tensors[name].dtype
                raise DataError(
                    f"sample {key!r}: {name} reaches {largest:.3g}, more than {dtype} holds; use bf16 or fp32"
                )
        self._append(key, stored, decoded, meta)
        for name, given in tensors.items():
            self._distortions[name].add(given.detach().cpu(), decoded[name])

    def write_stored(self, key: str, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
        """Append a sample whose tensors are as a shard of this specification stores them, to the bit."""
        self._append(key, tensors, decode_all(tensors), meta)

    def _append(self, key: str, tensors: dict[str, Tensor], decoded: dict[str, Tensor], meta: dict[str, Any]) -> None:
        moments = sample_moments(decoded)
        content = safetensors.torch.save(tensors)
        _, offsets = parse_header(content, self._spec, f"{self.path}: sample {key}")
        try:
            meta_content = json.dumps(meta, ensure_ascii=False, allow_nan=False).encode()
        except (TypeError, ValueError) as error:
            raise DataError(f"sample {key!r}: its metadata cannot be written as JSON ({error})") from error
        tensors_offset = self._member(f"{key}.safetensors", content)
        meta_offset = self._member(f"{key}.json", meta_content)
        self.index.add(Member(key, content, tensors_offset, meta_content, meta_offset), offsets, moments)

    def finish(self) -> ShardIndex:
        """Close the tar, then write the index that makes it count."""
        self._tar.write(bytes(2 * tarfile.BLOCKSIZE))  # two blocks of zeros end a tar
        self._tar.write(bytes(-self._tar.num_bytes % tarfile.RECORDSIZE))
        self._pending.__exit__(None, None, None)
        index = self.index.build(self._tar.num_bytes, self._tar.sha256)
        try:
            index.save(index_path(self.path))
        except BaseException:
            self.path.unlink(missing_ok=True)
            raise
        return index

    def abort(self) -> None:
        # A full disk refuses the last buffered bytes as well; the file is removed, so they do not matter.
        with contextlib.suppress(DataError, OSError):
            self._pending.__exit__(DataError, DataError("shard abandoned"), None)

    def _encode(self, key: str, name: str, values: Tensor) -> dict[str, Tensor]:
        expected = self._spec.shape(name)
        if tuple(values.shape) != expected:
            raise DataError(f"sample {key!r}: {name} has shape {list(values.shape)}, expected {list(expected)}")
        if not values.is_floating_point():
            raise DataError(f"sample {key!r}: {name} has dtype {values.dtype}, expected floating point")
        values = values.detach().to("cpu")
        if has_nonfinite(values):
            raise DataError(f"sample {key!r}: {name} holds NaN or infinity; leave the sample out or fix it")
        stored, scale = encode(values, self._spec.tensors[name].dtype)
        return {name: stored} if scale is None else {name: stored, name + SCALE_SUFFIX: scale}

    def _member(self, name: str, content: bytes) -> int:
        """Write a file into the tar; returns where its content starts."""
        info = tarfile.TarInfo(name)
        info.size = len(content)
        info.mode = 0o644
        self._tar.write(info.tobuf(tarfile.PAX_FORMAT))
        start = self._tar.num_bytes
        self._tar.write(content)
        self._tar.write(bytes(-len(content) % tarfile.BLOCKSIZE))
        return start


def shard_paths(dataset_dir: Path) -> list[Path]:
    """The tars in a dataset folder, finished or not, in order."""
    found = [path for path in dataset_dir.iterdir() if _SHARD_NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: int(path.name[len("shard_") : -len(".tar")]))


def _complete_shards(dst: Path) -> Iterator[Path]:
    paths = shard_paths(dst)
    if paths and not index_path(paths[-1]).exists():
        logger.info("%s was not finished; writing it again", paths[-1])
        paths.pop().unlink()
    for number, path in enumerate(paths):
        if path.name != f"shard_{number:05d}.tar":
            raise DataError(f"{dst / f'shard_{number:05d}.tar'} is missing before {path.name}; start in a new folder")
        check_tar_size(path, ShardIndex.load(index_path(path)).num_bytes)
        yield path


def _check_key(key: str) -> None:
    if not isinstance(key, str) or not key or any(character in key for character in "./\0\n"):
        raise DataError(
            f"key {key!r} must be text without '.', '/' and line breaks: a webdataset key ends at the first dot"
        )
    try:
        key.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"key {key!r} is not valid Unicode ({error.reason})") from error


def _write_failed(dst: Path, error: OSError) -> DataError:
    return DataError(
        f"{dst}: writing failed: {error.strerror or error}; shards already complete are kept, "
        "and the same command continues after them once there is room"
    )
