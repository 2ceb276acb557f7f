"""Reading pickled embedding shards without running what they contain.

A pickle is code. This reader admits torch tensors, numpy arrays and plain containers, builds them with functions of
its own, and refuses every other name before it is looked up.
"""

from __future__ import annotations

import collections
import io
import math
import os
import pickle
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

import numpy as np
import torch
from torch import Tensor

from blip3o_ds.errors import DataError

_ZIP_MAGIC = b"PK\x03\x04"
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # the first object in a file of torch.save before torch 1.6
_PLAIN_DTYPE = re.compile(r"[<>=|]?(?:[biufcSU]\d*|\?)")


def load_pickle(path: str | Path) -> Any:
    """The object in `path`, written by `pickle.dump` or `torch.save`; tensors come on the CPU.

    Raises DataError that names the file, and the name that was refused, or the damage.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            is_zip = file.read(len(_ZIP_MAGIC)) == _ZIP_MAGIC
            file.seek(0)
            if not is_zip:
                content = _RestrictedUnpickler(file, path).load()
                if type(content) is not int or content != _LEGACY_MAGIC:
                    return content
                file.seek(0)
            return _torch_load(file, str(path))
    except DataError:
        raise
    except MemoryError as error:
        raise DataError(f"{path}: needs more memory than there is, or is damaged") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error
    except Exception as error:  # a damaged pickle fails in any way: end of file, index, type, Unicode
        raise DataError(
            f"{path}: not a readable pickle of tensors ({type(error).__name__}: {error}); if it is damaged or cut "
            "short, copy or write it again"
        ) from error


def _torch_load(file: BinaryIO, where: str) -> Any:
    try:
        with torch.serialization.safe_globals(_ADMITTED_BY_TORCH):
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        refused = re.search(r"GLOBAL ([\w.]+)", str(error))
        if refused is None:
            raise
        raise _refusal(where, refused.group(1)) from None


class _BoundedFile:
    """A file that refuses to read past its end, before any memory is set aside for it."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._num_bytes = os.fstat(file.fileno()).st_size
        self.readline = file.readline

    def read(self, size: int) -> bytes:
        if size > self._num_bytes - self._file.tell():
            raise EOFError(f"{size} bytes are announced, and the file ends before them")
        return self._file.read(size)


class _RestrictedUnpickler(pickle._Unpickler):
    """The unpickler written in Python: the one in C trusts the lengths and places that a file announces, and allocates
    memory for them first. These files hold few objects and large ones, so Python is fast enough.
    """

    # What typeshed leaves out of the class.
    read: Callable[[int], bytes]
    append: Callable[[Any], None]
    stack: list[Any]

    def __init__(self, file: BinaryIO, path: Path) -> None:
        super().__init__(_BoundedFile(file))
        self._path = path

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch.storage", "_load_from_bytes"):
            # What torch itself puts here calls torch.load with weights_only=False, a pickle within the pickle.
            return lambda content: _torch_load(io.BytesIO(content), f"{self._path} (a tensor in it)")
        admitted = _ADMITTED.get((module, name))
        if admitted is not None:
            return admitted
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise _refusal(str(self._path), f"{module}.{name}")

    def load_bytearray8(self) -> None:
        (size,) = struct.unpack("<Q", self.read(8))
        self.append(bytearray(self.read(size)))

    def load_build(self) -> None:
        # State completes arrays and dtypes; on anything else, such as a class, it would change what later loads do.
        if type(self.stack[-2]) not in (_Array, _Dtype):
            raise pickle.UnpicklingError(f"state for a {type(self.stack[-2]).__name__}")
        state = self.stack.pop()
        self.stack[-1].__setstate__(state)

    dispatch: ClassVar[dict[int, Any]] = {
        **pickle._Unpickler.dispatch,
        pickle.BYTEARRAY8[0]: load_bytearray8,
        pickle.BUILD[0]: load_build,
    }


def _refusal(where: str, name: str) -> DataError:
    return DataError(
        f"{where}: refused to load {name!r}: a shard may hold torch tensors, numpy arrays and plain containers only, "
        "since a pickle can run any code; write the shard again without it"
    )


def _rebuild_tensor(storage: Any, offset: int, size: tuple, stride: tuple, *_: Any) -> Tensor:
    """The tensor of `torch._utils._rebuild_tensor_v2`; whether it wants a gradient and its hooks are left out."""
    if not isinstance(storage, torch.storage.TypedStorage):
        raise pickle.UnpicklingError(f"a tensor on a {type(storage).__name__} instead of a storage")
    num_values = storage._untyped_storage.nbytes() // storage.dtype.itemsize
    last = offset + sum((length - 1) * step for length, step in zip(size, stride, strict=True))
    if min(offset, *size, *stride) < 0 or (0 not in size and max(last + 1, math.prod(size)) > num_values):
        # torch would enlarge the storage, with whatever was in memory there.
        raise pickle.UnpicklingError(f"a tensor {list(size)} out of bounds of its {num_values} values")
    return torch._utils._rebuild_tensor(storage, offset, size, stride)


class _Dtype:
    """Stands for a numpy dtype while its array is built; only plain numbers, booleans and text are admitted."""

    def __init__(self, name: str, *_: Any) -> None:
        if not isinstance(name, str) or not _PLAIN_DTYPE.fullmatch(name):
            raise pickle.UnpicklingError(f"numpy dtype {name!r} is not a plain one")
        self.dtype = np.dtype(name)

    def __setstate__(self, state: tuple) -> None:
        _, order, subarray, names, fields, *_ = state
        if subarray is not None or names is not None or fields is not None:
            raise pickle.UnpicklingError("a structured numpy dtype is not a plain one")
        if order in ("<", ">"):
            self.dtype = self.dtype.newbyteorder(order)


class _Array(np.ndarray):
    """An array that checks the state it is given; numpy's own does not."""

    def __new__(cls, *_: Any) -> _Array:
        return np.ndarray.__new__(cls, (0,), np.int8)

    def __setstate__(self, state: tuple) -> None:  # type: ignore[override]
        version, shape, dtype, is_fortran, content = state
        dtype = _plain(dtype)
        expected = dtype.itemsize * math.prod(shape)
        if not isinstance(content, bytes) or len(content) != expected or min(shape, default=0) < 0:
            raise pickle.UnpicklingError(f"a numpy array of shape {shape} and {dtype} with other content")
        super().__setstate__((version, shape, dtype, is_fortran, content))


def _plain(dtype: Any) -> np.dtype:
    if not isinstance(dtype, _Dtype):
        raise pickle.UnpicklingError(f"a {type(dtype).__name__} where a numpy dtype belongs")
    return dtype.dtype


def _array_from_buffer(content: Any, dtype: Any, shape: tuple, order: Any, *_: Any) -> np.ndarray:
    return np.frombuffer(content, dtype=_plain(dtype)).reshape(shape, order=order)


def _numpy_scalar(dtype: Any, content: bytes) -> Any:
    return np.frombuffer(content, dtype=_plain(dtype), count=1)[0]


def _bytearray(content: Any = b"", encoding: str = "latin1") -> bytearray:
    if isinstance(content, str):
        content = _encode_latin1(content, encoding.replace("-", ""))
    if not isinstance(content, bytes):
        raise pickle.UnpicklingError(f"a bytearray of a {type(content).__name__}")
    return bytearray(content)


def _encode_latin1(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"text encoding {encoding!r} instead of latin1")
    return text.encode("latin1")


_ADMITTED: dict[tuple[str, str], Callable[..., Any]] = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("_codecs", "encode"): _encode_latin1,  # bytes in the protocols before 3
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch", "Size"): torch.Size,
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Dtype,
}
for _module in ("numpy.core", "numpy._core"):
    _ADMITTED[f"{_module}.multiarray", "_reconstruct"] = _Array
    _ADMITTED[f"{_module}.multiarray", "scalar"] = _numpy_scalar
    _ADMITTED[f"{_module}.numeric", "_frombuffer"] = _array_from_buffer
for _module in ("builtins", "__builtin__"):
    for _kind in (set, frozenset, complex):
        _ADMITTED[_module, _kind.__name__] = _kind
    _ADMITTED[_module, "bytearray"] = _bytearray

# The same stand-ins for the restricted unpickler of torch, which knows tensors but no numpy arrays.
_ADMITTED_BY_TORCH: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
    (builder, f"{module}.{name}") for (module, name), builder in _ADMITTED.items() if module.startswith("numpy")
]
