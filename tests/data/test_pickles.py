"""Pickles are read as data: what they hold comes back, and code in them is refused without being run."""

from __future__ import annotations

import collections
import io
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from blip3o_ds.data.tools.pickles import load_pickle
from blip3o_ds.errors import DataError


def tensors_and_arrays() -> dict:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(6, 8, generator=generator)
    return {
        "float": values,
        "bfloat16": values.bfloat16(),
        "view": values[1:4, ::2],
        "array": values.numpy().astype(np.float16),
        "fortran": np.asfortranarray(values.numpy()),
        "big_endian": np.arange(4, dtype=">f4"),
        "scalar": np.float32(1.5),
        "text": np.array(["one", "two"]),
        "plain": {"keys": ["a", "b"], "set": {1, 2}, "ordered": collections.OrderedDict(a=None), "bytes": b"x"},
        "torch_plain": (torch.Size([1, 2]), torch.float16),
    }


def assert_same(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if isinstance(value, torch.Tensor):
            assert found[name].dtype == value.dtype
            assert torch.equal(found[name], value)
        elif isinstance(value, np.ndarray | np.generic):
            np.testing.assert_array_equal(np.asarray(found[name]), value)
        else:
            assert found[name] == value


class Attack:
    """Touches a file when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple:
        return os.system, (f"touch {self.trace}",)


class BytesInTensor:
    """Goes through the loader that torch puts into plain pickles, which trusts its bytes."""

    def __init__(self, content: bytes) -> None:
        self.content = content

    def __reduce__(self) -> tuple:
        return torch.storage._load_from_bytes, (self.content,)


def saved(value: object, *, zip_format: bool) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, _use_new_zipfile_serialization=zip_format)
    return buffer.getvalue()


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_plain_pickle_of_any_protocol_gives_back_what_was_put_in(tmp_path: Path, protocol: int) -> None:
    path = tmp_path / "shard.pkl"
    path.write_bytes(pickle.dumps(tensors_and_arrays(), protocol=protocol))

    assert_same(load_pickle(path), tensors_and_arrays())


@pytest.mark.parametrize("zip_format", [True, False])
def test_a_file_of_torch_save_gives_back_what_was_put_in(tmp_path: Path, zip_format: bool) -> None:
    path = tmp_path / "shard.pkl"
    path.write_bytes(saved(tensors_and_arrays(), zip_format=zip_format))

    assert_same(load_pickle(path), tensors_and_arrays())


@pytest.mark.parametrize("where", ["plain", "torch_zip", "torch_legacy", "tensor_zip", "tensor_legacy", "tensor_plain"])
def test_code_in_a_pickle_is_refused_and_not_run(tmp_path: Path, where: str) -> None:
    trace = tmp_path / "it_ran"
    attack = {"captions": [Attack(trace)]}
    contents = {
        "plain": lambda: pickle.dumps(attack),
        "torch_zip": lambda: saved(attack, zip_format=True),
        "torch_legacy": lambda: saved(attack, zip_format=False),
        "tensor_zip": lambda: pickle.dumps(BytesInTensor(saved(attack, zip_format=True))),
        "tensor_legacy": lambda: pickle.dumps(BytesInTensor(saved(attack, zip_format=False))),
        "tensor_plain": lambda: pickle.dumps(BytesInTensor(pickle.dumps(attack, protocol=2))),
    }
    path = tmp_path / "shard.pkl"
    path.write_bytes(contents[where]())

    with pytest.raises(DataError, match=r"shard\.pkl.*refused to load '(posix|nt)\.system'"):
        load_pickle(path)

    assert not trace.exists()


@pytest.mark.parametrize(
    ("content", "name"),
    [
        (b"cbuiltins\neval\n(S'1'\ntR.", "builtins.eval"),
        (b"cbuiltins\ngetattr\n(S'1'\nS'x'\ntR.", "builtins.getattr"),
        (b"ctorch\nload\n(S'x'\ntR.", "torch.load"),
        (b"\x80\x04\x8c\x13torch.serialization\x8c\x04load\x93.", "torch.serialization.load"),
        (b"\x80\x04\x8c\x05torch\x8c\x15serialization.os.path\x93.", "torch.serialization.os.path"),
    ],
)
def test_other_names_are_refused_by_name(tmp_path: Path, content: bytes, name: str) -> None:
    path = tmp_path / "shard.pkl"
    path.write_bytes(content)

    with pytest.raises(DataError) as caught:
        load_pickle(path)

    assert name in str(caught.value)
    assert str(path) in str(caught.value)


def test_an_array_of_objects_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "shard.pkl"
    path.write_bytes(pickle.dumps(np.array([{"a": 1}], dtype=object)))

    with pytest.raises(DataError, match="not a plain one"):
        load_pickle(path)


@pytest.mark.parametrize("damage", ["empty", "cut", "garbage"])
def test_a_damaged_file_is_an_error_that_names_it(tmp_path: Path, damage: str) -> None:
    whole = pickle.dumps(tensors_and_arrays())
    path = tmp_path / "shard.pkl"
    path.write_bytes({"empty": b"", "cut": whole[: len(whole) // 2], "garbage": b"\x89PNG not a pickle"}[damage])

    with pytest.raises(DataError, match=r"shard\.pkl: not a readable pickle"):
        load_pickle(path)


def test_a_tensor_larger_than_its_storage_is_refused(tmp_path: Path) -> None:
    honest = pickle.dumps(torch.zeros(4), protocol=2)
    shape = b"K\x04\x85"  # the tuple (4,): the size, then the stride is (1,)
    assert honest.count(shape) == 1
    path = tmp_path / "shard.pkl"
    path.write_bytes(honest.replace(shape, b"K\xff\x85"))

    with pytest.raises(DataError, match="out of bounds"):
        load_pickle(path)
