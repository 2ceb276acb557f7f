"""Damaged and hostile files for `fuzzer.py`: sound ones, and random changes to them.

An input depends only on the random generator that it is given, so it can be made again.
"""

from __future__ import annotations

import builtins
import io
import json
import os
import pickle
import random
import re
import shutil
import struct
import subprocess
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
import torch

from blip3o_ds.data.format import index as index_module
from blip3o_ds.data.format.schema import DatasetSpec
from blip3o_ds.data.format.writer import DatasetWriter

INTERESTING = [
    *(0, 1, 7, 8, 255, 511, 1 << 15, 1 << 40),
    *(number for bits in (31, 32, 63, 64) for number in ((1 << bits) - 1, 1 << bits)),
]
JSON_VALUES = (
    *(None, True, -1, 0, 1, 5, 2**31, 2**63, 10**400, 1e308, float("nan"), float("inf"), 0.5, "", "..", "/", "\0"),
    *("\ud800", "bf16", "fp8-e4m3", "x" * 300, [], {}, [[]], [1, 2], {"a": 1}, "pipe:touch it_ran", "shard_00000.tar"),
)


@dataclass
class Corpus:
    """Sound files to begin from, and a folder to put them in."""

    work: Path
    canary: Path  # hostile pickles make it
    datasets: list[dict[str, bytes]]  # files by name
    pickles: list[bytes]
    hostile: list[bytes]


def make_corpus(work: Path) -> Corpus:
    """Two small datasets and pickles in every protocol and format."""
    work.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)  # an input is the same in every run
    canary = work / "it_ran"
    datasets = []
    for dtype in ("bf16", "fp8-e4m3"):
        folder = work / f"sound_{dtype}"
        shutil.rmtree(folder, ignore_errors=True)
        pair = DatasetSpec.pair(2, "cls_patch", 3, 2, dtype, "a", "b")
        spec = replace(pair, view_separator="y") if dtype == "bf16" else pair  # key0, key2
        with DatasetWriter(folder, spec, 2) as writer:
            for i in range(3):
                key = f"long-{'k' * 100}{i}" if i == 1 else f"key{i}"
                writer.write(key, {"eva": torch.randn(2, 3), "clip": torch.randn(2, 2)}, {"caption": f"a picture {i}"})
        datasets.append({path.name: path.read_bytes() for path in sorted(folder.glob("[!.]*"))})
    return Corpus(work, canary, datasets, list(_sound_pickles()), list(_hostile_pickles(canary)))


def _sound_pickles() -> Iterator[bytes]:
    eva, clip = torch.randn(2, 4, 3), torch.randn(2, 4, 2)
    tensors = {"eva_blip3o_embeddings": eva, "clip_blip3o_embeddings": clip, "captions": ["a", "b"], "keys": ["x", "y"]}
    arrays = {name: x.numpy() if isinstance(x, torch.Tensor) else x for name, x in tensors.items()}
    arrays |= {"scores": [0.5, 1.5], "extra": {"set": {1}, "bytes": bytearray(b"abc")}, "scalar": np.float32(1)}
    for content in (arrays, tensors):
        yield from _pickled(content)
        yield from _saved(content)


def _pickled(content: Any) -> list[bytes]:
    return [pickle.dumps(content, protocol) for protocol in range(pickle.HIGHEST_PROTOCOL + 1)]


def _saved(content: Any) -> Iterator[bytes]:
    for zip_format in (True, False):
        buffer = io.BytesIO()
        torch.save(content, buffer, _use_new_zipfile_serialization=zip_format)
        yield buffer.getvalue()


class Reduce:
    """Pickles as a call."""

    def __init__(self, function: Callable, *arguments: Any) -> None:
        self._call = function, arguments

    def __reduce__(self) -> tuple:
        return self._call


def _hostile_pickles(canary: Path) -> Iterator[bytes]:
    touch, write = f"touch {canary}", f"open({str(canary)!r}, 'w').close()"
    calls = [
        Reduce(os.system, touch),
        Reduce(os.popen, touch),
        Reduce(subprocess.Popen, ["touch", str(canary)]),
        Reduce(builtins.eval, write),
        Reduce(builtins.exec, write),
        Reduce(builtins.open, str(canary), "w"),
        Reduce(builtins.getattr, "x", "upper"),
        Reduce(builtins.__import__, "os"),
        Reduce(pickle.loads, pickle.dumps(Reduce(os.system, touch))),
        Reduce(torch.load, str(canary)),
        Reduce(torch.storage._load_from_bytes, pickle.dumps(Reduce(os.system, touch), 2)),
    ]
    for call in calls:
        yield from _pickled({"keys": [call]})
        for saved in _saved({"keys": [call]}):
            yield saved
            yield pickle.dumps(Reduce(torch.storage._load_from_bytes, saved), 2)
    yield b"cnumpy\nndarray\n(N}X\x0b\x00\x00\x00__setstate__cnumpy\ndtype\nstb."  # state for a class
    yield b"cbuiltins\nbytearray\n(I1099511627776\ntR."
    yield b"\x80\x05\x96" + struct.pack("<Q", 1 << 62) + b"."
    yield b"\x80\x04\x8e" + struct.pack("<Q", 1 << 40) + b"."
    yield b"Nr\xff\xff\xff\xff."  # a place in the memo that needs 32 GiB
    yield b"\x80\x04\x95" + struct.pack("<Q", 1 << 40) + b"N."


def mutate(rng: random.Random, content: bytes, others: list[bytes]) -> bytes:
    """One to three random changes."""
    data = bytearray(content)
    for _ in range(rng.randint(1, 3)):
        place = rng.randrange(len(data) + 1)
        span = rng.choice((1, 2, 8, 64, 100, 512))
        change = rng.choice(("bit", "bit", "byte", "cut", "remove", "repeat", "splice", "number", "digit"))
        if change == "bit":
            data[place : place + 1] = (byte ^ (1 << rng.randrange(8)) for byte in data[place : place + 1])
        elif change == "byte":
            data[place : place + 1] = (rng.randrange(256) for _ in data[place : place + 1])
        elif change == "cut":
            del data[place:]
        elif change == "remove":
            del data[place : place + span]
        elif change == "repeat":
            data[place:place] = data[place : place + span]
        elif change == "splice":
            other = rng.choice(others)
            start = rng.randrange(len(other) + 1)
            data[place : place + rng.choice((0, 16, 512))] = other[start : start + span]
        elif change == "number":
            width = rng.choice((1, 2, 4, 8))
            value = rng.choice(INTERESTING) % (1 << 8 * width)
            data[place : place + width] = value.to_bytes(width, rng.choice(("little", "big")))
        elif digits := [i for i, byte in enumerate(data[place : place + 200], place) if chr(byte).isdecimal()]:
            data[rng.choice(digits)] = rng.choice(b'0123456789-.e["')  # sizes in tar and JSON
    return bytes(data)


def change_json(rng: random.Random, value: Any) -> Any:
    """The same with one of its parts replaced, removed or doubled."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(list(value))
        if rng.random() < 0.1:
            return {name: part for name, part in value.items() if name != key}
        return {**value, key: change_json(rng, value[key])}
    if isinstance(value, list) and value and rng.random() < 0.8:
        place = rng.randrange(len(value))
        if rng.random() < 0.2:
            return rng.choice((value[:place], value + value, value[:place] + value[place + 1 :]))
        return [*value[:place], change_json(rng, value[place]), *value[place + 1 :]]
    return rng.choice(JSON_VALUES)


def damage_dataset(rng: random.Random, corpus: Corpus) -> tuple[str, dict[str, bytes]]:
    """A dataset with one file changed."""
    files = dict(rng.choice(corpus.datasets))
    everything = [content for dataset in corpus.datasets for content in dataset.values()]
    tar = rng.choice([name for name in files if name.endswith(".tar")])
    index, manifest = f"{tar}.idx", "manifest.json"
    target = rng.choice(("tar", "header", "index", "signed index", "manifest", "manifest field"))
    if target == "tar":
        changed = mutate(rng, files[tar], everything)
        # Mostly of the size that the index names, or the loader would not look further.
        files[tar] = changed if rng.random() < 0.2 else changed[: len(files[tar])].ljust(len(files[tar]), b"\0")
    elif target == "header":
        files[tar] = _damage_header(rng, files[tar])
    elif target == "index":
        files[index] = mutate(rng, files[index], everything)
    elif target == "signed index":
        files[index] = _damage_signed_index(rng, files[index])
    elif target == "manifest":
        files[manifest] = mutate(rng, files[manifest], everything)
    else:
        files[manifest] = json.dumps(change_json(rng, json.loads(files[manifest]))).encode()
    return target, files


def _damage_header(rng: random.Random, tar: bytes) -> bytes:
    start = rng.choice([match.start() for match in re.finditer(rb'\{"(eva"|clip"|eva_|clip_)', tar)])
    length = int.from_bytes(tar[start - 8 : start], "little")
    header = tar[start : start + length]
    data = bytearray(tar)
    kind = rng.randrange(3)
    if kind == 0:
        data[start - 8 : start] = (rng.choice((*INTERESTING, length + 9, length - 1)) % (1 << 64)).to_bytes(8, "little")
    elif kind == 1:
        new = json.dumps(change_json(rng, json.loads(header)), separators=(",", ":")).encode()
        data[start : start + length] = new[:length].ljust(length)
    else:
        data[start : start + length] = mutate(rng, header, [header])[:length].ljust(length)
    return bytes(data)


def _damage_signed_index(rng: random.Random, content: bytes) -> bytes:
    """An index whose digest is right or missing, so that what it says is looked at."""
    length = int.from_bytes(content[:8], "little")
    metadata = json.loads(json.loads(content[8 : 8 + length])["__metadata__"][index_module._METADATA_KEY])
    arrays = {name: array.copy() for name, array in safetensors.numpy.load(content).items()}
    metadata.pop("digest")
    name = rng.choice(list(arrays))
    kind = rng.randrange(5)
    if kind == 0:
        metadata = change_json(rng, metadata)
    elif kind == 1:
        arrays.pop(name)
    elif kind == 2:
        arrays[name] = arrays[name].astype(rng.choice((np.int32, np.float64, np.uint8)))
    elif kind == 3:
        arrays[name] = arrays[name][: rng.randrange(len(arrays[name]) + 1)]
    else:
        flat = arrays[name].reshape(-1)
        value = rng.choice((-1, 0, 1, 512, 1 << 31, -(1 << 63), (1 << 63) - 1, int(rng.gauss(0, 1000))))
        flat[rng.randrange(len(flat))] = value % 256 if flat.dtype == np.uint8 else value
    if isinstance(metadata, dict) and rng.random() < 0.5:
        metadata["digest"] = index_module._digest(metadata, arrays)
    return safetensors.numpy.save(arrays, {index_module._METADATA_KEY: json.dumps(metadata)})


def damage_pickle(rng: random.Random, corpus: Corpus) -> tuple[str, bytes]:
    """A mutated pickle, perhaps a hostile one; those in zips get right checksums again."""
    hostile = rng.random() < 0.3
    content = rng.choice(corpus.hostile if hostile else corpus.pickles)
    if hostile and rng.random() < 0.3:
        return "hostile pickle", content
    others = corpus.hostile + corpus.pickles
    if content[:2] == b"PK" and rng.random() < 0.7:
        return "zipped pickle", _damage_zip(rng, content, others)
    return "hostile pickle, mutated" if hostile else "pickle", mutate(rng, content, others)


def _damage_zip(rng: random.Random, content: bytes, others: list[bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as source, zipfile.ZipFile(buffer, "w") as target:
        names = source.namelist()
        chosen = rng.choice([name for name in names if name.endswith("data.pkl")] * 3 + names)
        for name in names:
            part = source.read(name)
            target.writestr(name, mutate(rng, part, others) if name == chosen else part)
    return buffer.getvalue()
