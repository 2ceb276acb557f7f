"""What every sample of a dataset looks like: its tensors by name, each with a width, a dtype, an encoder and a role.

Everything that reads or writes samples is driven by `DatasetSpec.tensors`, so another tensor in a sample is another
entry there and nothing else.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

from blip3o_ds.errors import DataError

TokenLayout = Literal["patch_only", "cls_patch"]
StorageDType = Literal["bf16", "fp16", "fp32", "fp8-e4m3"]
Role = Literal["condition", "target"]

MAKERS = "`blip3o-ds data convert SRC DST`, `data extract IMAGES DST` or `data demo DST`"
SCALE_SUFFIX = "_scale"  # a sample holds the fp8-e4m3 scales of `eva` as `eva_scale`
_TENSOR_NAME = re.compile(r"[a-z][a-z0-9_]{0,63}")
_MAX_SEPARATOR = 8  # characters
_RESERVED_ENDINGS = (SCALE_SUFFIX, "_offset", "_size")  # the files use them
# What JSON must hold for a specification; format 1 has the pair's fields instead of `tensors`.
_KINDS = {"num_tokens": int, "token_layout": str}
_PAIR_KINDS = {"eva_dim": int, "clip_dim": int, "dtype": str, "condition_encoder": str, "target_encoder": str}
_TENSOR_KINDS = {"dim": int, "dtype": str, "encoder": str, "role": str, "num_tokens": int}


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of a sample, [N, dim]: N is the image's number of tokens, or `num_tokens` where it has its own."""

    dim: int
    dtype: StorageDType
    encoder: str
    role: Role
    num_tokens: int | None = None  # such as the 77 tokens of a text

    def check(self, name: str) -> None:
        """Raise DataError, naming the field, for a value that no tensor can have; `name` is the tensor's."""
        if not isinstance(name, str) or not _TENSOR_NAME.fullmatch(name) or name.endswith(_RESERVED_ENDINGS):
            raise DataError(
                "tensors: a name must be lower-case letters, digits and '_', begin with a letter and not end with "
                f"{', '.join(_RESERVED_ENDINGS)}; found {str(name)[:80]!r}"
            )
        where = f"tensors.{name}"
        _check_positive(f"{where}.dim", self.dim)
        check_choice(f"{where}.dtype", self.dtype, StorageDType)
        check_choice(f"{where}.role", self.role, Role)
        if self.num_tokens is not None:
            _check_positive(f"{where}.num_tokens", self.num_tokens)

    def to_dict(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True)
class DatasetSpec:
    """What every sample looks like: `num_tokens` of the image and their layout, and the tensors by name.

    `num_tokens` includes the CLS token of the layout `cls_patch`, which is token 0; the patches fill a square grid.
    Where several samples are views of one image, such as its crops, `view_separator` says which (see `image_of`).
    """

    num_tokens: int
    token_layout: TokenLayout
    tensors: Mapping[str, TensorSpec]
    view_separator: str | None = None

    def __post_init__(self) -> None:
        check_choice("token_layout", self.token_layout, TokenLayout)
        _check_positive("num_tokens", self.num_tokens)
        if not self.tensors:
            raise DataError("tensors must name at least one tensor")
        for name, tensor in self.tensors.items():
            tensor.check(name)
        patches = self.num_tokens - self.num_cls_tokens
        if patches < 1 or math.isqrt(patches) ** 2 != patches:
            raise DataError(
                f"num_tokens {self.num_tokens} with token_layout {self.token_layout} leaves {patches} patches, which "
                "fill no square grid; patch_only needs g*g tokens, cls_patch g*g+1"
            )
        if self.view_separator is not None:
            _check_separator(self.view_separator)

    @staticmethod
    def pair(
        num_tokens: int,
        token_layout: TokenLayout,
        eva_dim: int,
        clip_dim: int,
        dtype: StorageDType,
        condition_encoder: str,
        target_encoder: str,
    ) -> DatasetSpec:
        """The usual sample: the condition `eva` and the target `clip`, both of the image's tokens, in one dtype."""
        eva = TensorSpec(eva_dim, dtype, condition_encoder, "condition")
        clip = TensorSpec(clip_dim, dtype, target_encoder, "target")
        return DatasetSpec(num_tokens, token_layout, {"eva": eva, "clip": clip})

    @property
    def num_cls_tokens(self) -> int:
        return 1 if self.token_layout == "cls_patch" else 0

    @property
    def grid_size(self) -> int:
        """Patches along one side of the grid."""
        return math.isqrt(self.num_tokens - self.num_cls_tokens)

    @property
    def format_version(self) -> int:
        """The version of the files: 1 for the usual pair, which all releases read, 2 for all else."""
        has_names = set(self.tensors) == {"eva", "clip"}
        return 1 if has_names and self == DatasetSpec.pair(**self._pair_fields()) else 2

    @property
    def dtypes(self) -> str | dict[str, str]:
        """The stored dtype of all tensors; by name, where they differ."""
        found = {name: str(tensor.dtype) for name, tensor in self.tensors.items()}
        return found if len(set(found.values())) > 1 else next(iter(found.values()))

    def shape(self, name: str) -> tuple[int, int]:
        """[N, D] of a tensor."""
        tensor = self.tensors[name]
        return tensor.num_tokens or self.num_tokens, tensor.dim

    def model_dims(self) -> dict[str, int]:
        """The dims that a DiT for these samples must have, by the names of its settings."""
        if missing := [name for name in ("eva", "clip") if name not in self.tensors]:
            raise DataError(f"the samples hold {', '.join(self.tensors)}, but the DiT needs {' and '.join(missing)}")
        eva, clip = self.tensors["eva"], self.tensors["clip"]
        return {"eva_dim": eva.dim, "clip_dim": clip.dim, "grid_size": self.grid_size}

    def viewed_as(self, token_layout: TokenLayout | None) -> DatasetSpec:
        """This specification with its samples read as `token_layout`; a CLS token can be dropped, never invented."""
        if token_layout is None or token_layout == self.token_layout:
            return self
        if token_layout == "cls_patch":
            raise DataError(
                f"the samples hold {self.num_tokens} patch tokens and no CLS token, so they cannot be read as "
                "cls_patch; choose patch_only, or extract the embeddings again with the CLS token"
            )
        return replace(self, token_layout=token_layout, num_tokens=self.num_tokens - 1)

    def stored_as(self, dtype: StorageDType) -> DatasetSpec:
        """The same samples with every tensor in another dtype."""
        return replace(self, tensors={name: replace(tensor, dtype=dtype) for name, tensor in self.tensors.items()})

    def image_of(self, key: str) -> str:
        """The name of the image that a sample is a view of: `astronaut` for `astronaut_0012` with the separator `_`.

        A key of another form, and without a separator every key, is an image of its own.
        """
        if self.view_separator is None:
            return key
        image, _, number = key.rpartition(self.view_separator)
        return image if image and number.isascii() and number.isdigit() else key

    def with_views(self, separator: str | None, source: Path | str) -> DatasetSpec:
        """The same with a view separator, unless that is None; DataError, naming `source`, if it has another one."""
        if separator is None or separator == self.view_separator:
            return self
        if self.view_separator is not None:
            raise DataError(
                f"{source}: its view_separator is {self.view_separator!r}, not {str(separator)[:20]!r}; leave that out"
            )
        return replace(self, view_separator=separator)

    def without_views(self) -> DatasetSpec:
        """What an index holds: how a sample is stored, and not what the keys of the whole set mean."""
        return replace(self, view_separator=None)

    def differences(self, other: DatasetSpec) -> str:
        """The fields in which two specifications differ, as `name: mine != other's`; empty when equal."""
        mine, theirs = self._fields(), other._fields()
        names = [name for name in {**mine, **theirs} if mine.get(name) != theirs.get(name)]
        return ", ".join(f"{name}: {mine.get(name)!r} != {theirs.get(name)!r}" for name in names)

    def to_dict(self) -> dict[str, Any]:
        """As the manifest holds it, in this specification's `format_version`."""
        if self.format_version == 1:
            return self._pair_fields()
        tensors = {name: tensor.to_dict() for name, tensor in self.tensors.items()}
        content = {"num_tokens": self.num_tokens, "token_layout": self.token_layout, "tensors": tensors}
        return content if self.view_separator is None else {**content, "view_separator": self.view_separator}

    @staticmethod
    def from_dict(content: Any, source: Path | str) -> DatasetSpec:
        """Read a specification of either version out of JSON; `source` is the file that errors name."""
        fields = read_fields(content, _KINDS, source, "spec")
        if "tensors" in content:
            entries = read_field(content, "tensors", dict, source, "spec")
            fields["tensors"] = {name: _read_tensor(entries, name, source) for name in entries}
        else:
            fields |= read_fields(content, _PAIR_KINDS, source, "spec")
        has_views = "view_separator" in content
        separator = read_field(content, "view_separator", str, source, "spec") if has_views else None
        try:
            spec = DatasetSpec(**fields) if "tensors" in fields else DatasetSpec.pair(**fields)
            return replace(spec, view_separator=separator)
        except DataError as error:
            raise DataError(f"{source}: spec: {error}") from error

    def _pair_fields(self) -> dict[str, Any]:
        """The arguments of `pair` that give this specification, if it is a pair; also the entries of format 1."""
        eva, clip = self.tensors["eva"], self.tensors["clip"]
        return {
            "num_tokens": self.num_tokens,
            "token_layout": self.token_layout,
            "eva_dim": eva.dim,
            "clip_dim": clip.dim,
            "dtype": eva.dtype,
            "condition_encoder": eva.encoder,
            "target_encoder": clip.encoder,
        }

    def _fields(self) -> dict[str, Any]:
        fields: dict[str, Any] = {"num_tokens": self.num_tokens, "token_layout": self.token_layout}
        for name, tensor in self.tensors.items():
            fields |= {f"tensors.{name}.{field}": value for field, value in tensor.to_dict().items()}
        return {**fields, "view_separator": self.view_separator}


def read_field(content: Any, name: str, kind: type, source: Path | str, parent: str = "") -> Any:
    """`content[name]` of a JSON object, checked to be a `kind`; a DataError names the file and the field."""
    label = f"{parent}.{name}" if parent else name
    if not isinstance(content, dict):
        raise DataError(f"{source}: {parent or 'the file'} must be a JSON object, found {type(content).__name__}")
    if name not in content:
        raise DataError(f"{source}: field {label} is missing; write the dataset again with {MAKERS}")
    value = content[name]
    if not isinstance(value, kind) or (kind is int and not _is_count(value)):
        expected = "non-negative integer" if kind is int else kind.__name__
        raise DataError(f"{source}: field {label} must be a {expected}, found {str(value)[:80]!r}")
    return value


def read_fields(content: Any, kinds: Mapping[str, type], source: Path | str, parent: str) -> dict[str, Any]:
    """Several fields of a JSON object by name, each checked by `read_field`."""
    return {name: read_field(content, name, kind, source, parent) for name, kind in kinds.items()}


def _is_count(value: Any) -> bool:
    return not isinstance(value, bool) and 0 <= value < 1 << 63


def _read_tensor(entries: dict[str, Any], name: str, source: Path | str) -> TensorSpec:
    entry = read_field(entries, name, dict, source, "spec.tensors")
    parent = f"spec.tensors.{name}"
    if unknown := sorted(set(entry) - set(_TENSOR_KINDS)):
        raise DataError(f"{source}: field {parent}.{unknown[0]} is unknown; expected {', '.join(_TENSOR_KINDS)}")
    kinds = {field: kind for field, kind in _TENSOR_KINDS.items() if field != "num_tokens" or field in entry}
    return TensorSpec(**read_fields(entry, kinds, source, parent))


def _check_positive(name: str, value: object) -> None:
    if not isinstance(value, int) or value < 1:
        raise DataError(f"{name} must be a positive integer, found {value!r}")


def _check_separator(separator: object) -> None:
    # No digit, or the number of a view would have no clear beginning; no key has a dot or a slash.
    if (
        not isinstance(separator, str)
        or not 0 < len(separator) <= _MAX_SEPARATOR
        or not separator.isprintable()
        or any(character.isdigit() or character in "./" for character in separator)
    ):
        raise DataError(
            f"view_separator must be 1 to {_MAX_SEPARATOR} printable characters without digits, '.' and '/', found "
            f"{str(separator)[:20]!r}"
        )


def check_choice(name: str, value: object, choices: Any) -> None:
    """Raise DataError unless `value`, of the field `name`, is one that the Literal `choices` lists."""
    if value not in get_args(choices):
        raise DataError(f"{name} must be one of {', '.join(get_args(choices))}, found {value!r}")
