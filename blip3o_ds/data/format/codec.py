"""A sample's tensors to bytes and back: the cast to the stored dtype, the safetensors file, the checks.

In fp8-e4m3 every token has its own fp32 scale, amax / 448, and is read as bf16; all other dtypes are read as stored.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from blip3o_ds.data.format.schema import SCALE_SUFFIX, DatasetSpec, StorageDType
from blip3o_ds.errors import DataError
from blip3o_kernels import dequantize_fp8

FP8_MAX = 448.0  # the largest float8_e4m3fn
_PIECE_BYTES = 1 << 19  # half of the L2 cache of a current core
_LARGEST_SCALE = torch.finfo(torch.bfloat16).max / FP8_MAX

_TORCH_DTYPES: dict[StorageDType, torch.dtype] = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "fp8-e4m3": torch.float8_e4m3fn,
}
# Their names in safetensors, and the bits of infinity: as an integer, every NaN lies above it and all else below.
_FORMATS = {
    torch.bfloat16: ("BF16", 0x7F80),
    torch.float16: ("F16", 0x7C00),
    torch.float32: ("F32", 0x7F800000),
    torch.float8_e4m3fn: ("F8_E4M3", 0x7F),  # has no infinity, and one NaN of each sign
}


@dataclass(frozen=True)
class StoredTensor:
    """One tensor in a sample's file; `on_grid`, where its tokens are those of the image, token 0 a CLS token or not."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    on_grid: bool

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Piece:
    """A stretch of a tensor: its bytes, and the same bits as signed and as unsigned integers."""

    def __init__(self, content: np.ndarray, dtype: torch.dtype) -> None:
        size = dtype.itemsize
        self.bytes, self.signed, self.unsigned = content, content.view(f"i{size}"), content.view(f"u{size}")
        self.infinity = _FORMATS[dtype][1]  # as a signed integer
        self.negative_infinity = self.infinity + (1 << 8 * size - 1)  # as an unsigned one

    def has_nonfinite(self) -> bool:
        largest = np.maximum.reduce  # without the Python wrapper that `max` goes through
        return bool(largest(self.signed) >= self.infinity or largest(self.unsigned) >= self.negative_infinity)


class SampleMemory(dict[str, Tensor]):
    """The contiguous CPU tensors that a sample is read into, by name, and their `pieces`, each checked once read.

    For memory that is filled many times they are made once: it takes longer than reading a small sample.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__(tensors)
        self.pieces = {name: _pieces(tensor) for name, tensor in tensors.items()}


def _pieces(tensor: Tensor) -> list[Piece]:
    content = _bytes(tensor)
    return [Piece(content[i : i + _PIECE_BYTES], tensor.dtype) for i in range(0, len(content), _PIECE_BYTES)]


def _bytes(tensor: Tensor) -> np.ndarray:
    return tensor.view(torch.uint8).numpy().reshape(-1)


def stored_tensors(spec: DatasetSpec) -> list[StoredTensor]:
    """The tensors that a sample's file of this dataset holds."""
    stored = []
    for name, tensor in spec.tensors.items():
        num_tokens, dim = spec.shape(name)
        on_grid = tensor.num_tokens is None
        stored.append(StoredTensor(name, _TORCH_DTYPES[tensor.dtype], (num_tokens, dim), on_grid))
        if tensor.dtype == "fp8-e4m3":
            stored.append(StoredTensor(name + SCALE_SUFFIX, torch.float32, (num_tokens,), on_grid))
    return stored


def encode(values: Tensor, dtype: StorageDType) -> tuple[Tensor, Tensor | None]:
    """Cast `values` [N, D] to the stored dtype; for fp8-e4m3 also the scales [N] fp32 to multiply with."""
    if dtype != "fp8-e4m3":
        return values.to(_TORCH_DTYPES[dtype]).contiguous(), None
    values = values.float()
    largest = values.abs().amax(dim=-1)  # [N]
    # The smallest normal float keeps 1/scale finite; a token of zeros is stored as zeros under any scale.
    scale = (largest / FP8_MAX).clamp_min(torch.finfo(torch.float32).tiny)
    scaled = (values / scale[:, None]).clamp(-FP8_MAX, FP8_MAX)
    return scaled.to(torch.float8_e4m3fn), scale


def decode(stored: Tensor, scale: Tensor | None) -> Tensor:
    """The values [..., D] that a reader gets for what `encode` stored; on the GPU, one pass."""
    return stored if scale is None else dequantize_fp8(stored, scale)


def decode_all(stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A sample's or a batch's tensors as a reader gets them, each multiplied with its scales where it has any."""
    return {
        name: decode(tensor, stored.get(name + SCALE_SUFFIX))
        for name, tensor in stored.items()
        if not name.endswith(SCALE_SUFFIX)
    }


def check_values(stored: Mapping[str, Tensor], where: str) -> None:
    """Raise DataError, naming the sample (`where`) and the tensor, if a value read from it would be NaN or infinity."""
    for name, tensor in stored.items():
        if not name.endswith(SCALE_SUFFIX):
            found = "NaN or infinity" if has_nonfinite(tensor) else ""
        else:
            is_sound = bool((tensor.abs() <= _LARGEST_SCALE).all())
            found = "" if is_sound else f"NaN or a value beyond {_LARGEST_SCALE:.3g}, which makes values infinite"
        if found:
            raise DataError(f"{where}: {name} holds {found}; `blip3o-ds data verify` checks the rest")


def parse_header(content: bytes | bytearray, spec: DatasetSpec, where: str) -> tuple[int, dict[str, int]]:
    """The length in bytes of a sample's safetensors header and each tensor's offset in the file, checked by `spec`.

    `where` names the sample in errors; `content` must hold at least the header.
    """
    length = 8 + int.from_bytes(content[:8], "little")
    try:
        if length > len(content):
            raise ValueError(f"its length {length} exceeds the file's {len(content)} bytes")
        entries = json.loads(bytes(content[8:length]))
        if not isinstance(entries, dict):
            raise ValueError("not a JSON object")
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: the safetensors header is damaged ({error}); write this shard again") from error
    expected = stored_tensors(spec)
    found = sorted(set(entries) - {"__metadata__"})
    if found != sorted(tensor.name for tensor in expected):
        names = ", ".join(tensor.name for tensor in expected)
        raise DataError(f"{where}: the file holds the tensors {', '.join(found)}, expected {names}")
    return length, {tensor.name: length + _checked_offset(entries[tensor.name], tensor, where) for tensor in expected}


def has_nonfinite(values: Tensor) -> bool:
    """Whether a floating-point CPU tensor holds NaN or infinity, at memory speed for the stored dtypes.

    Two integer maxima over the bits; `torch.isfinite` on CPU takes some fifty times as long for bf16.
    """
    if values.dtype not in _FORMATS:
        return not bool(torch.isfinite(values).all())
    return Piece(_bytes(values.detach().contiguous()), values.dtype).has_nonfinite()


def _checked_offset(entry: Any, tensor: StoredTensor, where: str) -> int:
    if not isinstance(entry, dict) or not isinstance(entry.get("data_offsets"), list):
        raise DataError(f"{where}: the safetensors header is damaged at tensor {tensor.name}")
    expected = (_FORMATS[tensor.dtype][0], list(tensor.shape))
    found = (entry.get("dtype"), entry.get("shape"))
    if found != expected:
        raise DataError(
            f"{where}: tensor {tensor.name} is {found[0]} {found[1]}, expected {expected[0]} {expected[1]} "
            "as the dataset's spec says"
        )
    offsets = entry["data_offsets"]
    if [type(offset) for offset in offsets] != [int, int] or not 0 <= offsets[0] == offsets[1] - tensor.num_bytes:
        raise DataError(
            f"{where}: tensor {tensor.name} lies at the bytes {str(offsets)[:80]} of its file's data, expected "
            f"{tensor.num_bytes} bytes: the safetensors header is damaged"
        )
    return offsets[0]


class Distortion:
    """Compares tokens as they were given with the same tokens as they are read."""

    def __init__(self) -> None:
        self._tokens = 0
        self._errors = self._cosines = 0.0  # sums
        self._largest_error, self._smallest_cosine = 0.0, 1.0

    def add(self, given: Tensor, stored: Tensor) -> None:
        """Count tokens `given` [N, D] that are read back as `stored` [N, D]."""
        if given.dtype == stored.dtype and torch.equal(given, stored):  # much the faster, and often so
            self._tokens += len(given)
            self._cosines += len(given)
            return
        x, y = given.float(), stored.float()
        # Squares of the largest and the smallest floats leave fp32's range, so each token is divided by its largest.
        largest = x.abs().amax(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
        x, y = x / largest, y / largest
        x_norm, y_norm = x.norm(dim=-1), y.norm(dim=-1)  # x_norm is at least 1, or 0 for a token of zeros
        zeros = x_norm == 0
        errors = torch.where(zeros, y_norm, (x - y).norm(dim=-1) / x_norm)
        cosines = torch.where(zeros & (y_norm == 0), 1.0, (x * y).sum(dim=-1) / (x_norm * y_norm).clamp_min(1e-12))
        self._tokens += len(x)
        self._errors += float(errors.double().sum())
        self._cosines += float(cosines.double().sum())
        self._largest_error = max(self._largest_error, float(errors.max()))
        self._smallest_cosine = min(self._smallest_cosine, float(cosines.min()))

    def to_dict(self) -> dict[str, Any]:
        """The `tokens` counted, and mean and worst of |given - stored| / |given| and of the cosine, None for no tokens.

        The cosine is computed in fp32, so it is exact to about 1e-7.
        """
        if self._tokens == 0:
            return {"tokens": 0, "relative_error": None, "relative_error_max": None, "cosine": None, "cosine_min": None}
        return {
            "tokens": self._tokens,
            "relative_error": self._errors / self._tokens,
            "relative_error_max": self._largest_error,
            "cosine": self._cosines / self._tokens,
            "cosine_min": self._smallest_cosine,
        }
