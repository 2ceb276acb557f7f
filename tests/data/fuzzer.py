"""Feeds damaged and hostile files to everything that reads data: each must end in success or in one clear error.

Tars, indexes, manifests, safetensors headers and pickles are mutated. An exception that is no `Blip3oError`, a crash,
an input that takes too long, or code run from a pickle is a finding; it is printed with the number that makes it again.

    python tests/data/fuzzer.py --inputs 100000 --seed 0 --seconds 3600
    python tests/data/fuzzer.py --seed 0 --only 4711
"""

from __future__ import annotations

import argparse
import builtins
import io
import json
import logging
import mmap
import os
import pickle
import random
import resource
import shutil
import struct
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
import torch

from blip3o_ds.data.format import index as index_module
from blip3o_ds.data.format.schema import DatasetSpec
from blip3o_ds.data.format.writer import DatasetWriter
from blip3o_ds.data.reading.bad_samples import BadSamples
from blip3o_ds.data.reading.dataset import EmbeddingDataset
from blip3o_ds.data.tools.convert import convert
from blip3o_ds.data.tools.pickles import load_pickle
from blip3o_ds.data.tools.repair import repair
from blip3o_ds.data.tools.verify import verify
from blip3o_ds.errors import Blip3oError

CHUNK = 500  # inputs between two lines of results
CASE_SECONDS = 20.0  # an input that takes longer hangs
MEMORY_BYTES = 16 << 30  # of address space: what asks for more fails, as it would on a full machine
# What a program does to run another, or code that it was handed.
FORBIDDEN_EVENTS = {
    *("os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.forkpty", "subprocess.Popen"),
    *("pty.spawn", "socket.connect", "ctypes.dlopen", "webbrowser.open"),
}
INTERESTING = (
    0,
    1,
    7,
    8,
    255,
    511,
    1 << 15,
    (1 << 31) - 1,
    1 << 31,
    (1 << 32) - 1,
    1 << 40,
    (1 << 63) - 1,
    (1 << 64) - 1,
)
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
    torch.manual_seed(0)  # an input is the same whenever it is made again
    canary = work / "it_ran"
    datasets = []
    for dtype in ("bf16", "fp8-e4m3"):
        folder = work / f"sound_{dtype}"
        shutil.rmtree(folder, ignore_errors=True)
        spec = DatasetSpec.pair(2, "cls_patch", 3, 2, dtype, "a", "b")
        with DatasetWriter(folder, spec, 2) as writer:
            for i in range(3):
                key = f"long-{'k' * 100}{i}" if i == 1 else f"key{i}"
                writer.write(key, {"eva": torch.randn(2, 3), "clip": torch.randn(2, 2)}, {"caption": f"a picture {i}"})
        datasets.append({path.name: path.read_bytes() for path in sorted(folder.iterdir())})
    return Corpus(work, canary, datasets, list(_sound_pickles()), list(_hostile_pickles(canary)))


def _sound_pickles() -> Iterator[bytes]:
    eva, clip = torch.randn(2, 4, 3), torch.randn(2, 4, 2)
    tensors = {"eva_blip3o_embeddings": eva, "clip_blip3o_embeddings": clip, "captions": ["a", "b"], "keys": ["x", "y"]}
    arrays = {name: x.numpy() if isinstance(x, torch.Tensor) else x for name, x in tensors.items()}
    arrays |= {"scores": [0.5, 1.5], "extra": {"set": {1}, "bytes": bytearray(b"abc")}, "scalar": np.float32(1)}
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        yield pickle.dumps(arrays, protocol)
        yield pickle.dumps(tensors, protocol)
    for zip_format in (True, False):
        for content in (tensors, arrays):
            buffer = io.BytesIO()
            torch.save(content, buffer, _use_new_zipfile_serialization=zip_format)
            yield buffer.getvalue()


class _Reduce:
    """Pickles as a call."""

    def __init__(self, function: Callable, *arguments: Any) -> None:
        self._call = function, arguments

    def __reduce__(self) -> tuple:
        return self._call


def _hostile_pickles(canary: Path) -> Iterator[bytes]:
    touch, write = f"touch {canary}", f"open({str(canary)!r}, 'w').close()"
    calls = [
        _Reduce(os.system, touch),
        _Reduce(os.popen, touch),
        _Reduce(subprocess.Popen, ["touch", str(canary)]),
        _Reduce(builtins.eval, write),
        _Reduce(builtins.exec, write),
        _Reduce(builtins.open, str(canary), "w"),
        _Reduce(builtins.getattr, "x", "upper"),
        _Reduce(builtins.__import__, "os"),
        _Reduce(pickle.loads, pickle.dumps(_Reduce(os.system, touch))),
        _Reduce(torch.load, str(canary)),
        _Reduce(torch.storage._load_from_bytes, pickle.dumps(_Reduce(os.system, touch), 2)),
    ]
    for call in calls:
        for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
            yield pickle.dumps({"keys": [call]}, protocol)
        for zip_format in (True, False):
            buffer = io.BytesIO()
            torch.save({"keys": [call]}, buffer, _use_new_zipfile_serialization=zip_format)
            yield buffer.getvalue()
            yield pickle.dumps(_Reduce(torch.storage._load_from_bytes, buffer.getvalue()), 2)
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
        kind = rng.randrange(9)
        if kind <= 1 and data:
            data[place % len(data)] ^= 1 << rng.randrange(8)
        elif kind == 2 and data:
            data[place % len(data)] = rng.randrange(256)
        elif kind == 3:
            del data[place:]
        elif kind == 4:
            del data[place : place + rng.choice((1, 2, 8, 100, 512))]
        elif kind == 5:
            span = data[place : place + rng.choice((1, 8, 64, 512))]
            data[place:place] = span
        elif kind == 6:
            other = rng.choice(others)
            start = rng.randrange(len(other) + 1)
            data[place : place + rng.choice((0, 16, 512))] = other[start : start + rng.choice((4, 64, 512))]
        elif kind == 7:
            width = rng.choice((1, 2, 4, 8))
            value = rng.choice(INTERESTING) % (1 << 8 * width)
            data[place : place + width] = value.to_bytes(width, rng.choice(("little", "big")))
        else:  # a digit in text: sizes in tar and JSON
            digits = [i for i in range(place, min(place + 200, len(data))) if 48 <= data[i] <= 57]
            if digits:
                data[rng.choice(digits)] = rng.choice(b'0123456789-.e["')
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
    name = rng.choice([name for name in files if name.endswith(".tar")])
    target = rng.choice(("tar", "header", "index", "signed index", "manifest", "manifest field"))
    if target == "tar":
        files[name] = _same_size(rng, mutate(rng, files[name], everything), files[name])
    elif target == "header":
        files[name] = _damage_header(rng, files[name])
    elif target == "index":
        files[f"{name}.idx"] = mutate(rng, files[f"{name}.idx"], everything)
    elif target == "signed index":
        files[f"{name}.idx"] = _damage_signed_index(rng, files[f"{name}.idx"])
    elif target == "manifest":
        files["manifest.json"] = mutate(rng, files["manifest.json"], everything)
    else:
        files["manifest.json"] = json.dumps(change_json(rng, json.loads(files["manifest.json"]))).encode()
    return target, files


def _same_size(rng: random.Random, mutated: bytes, original: bytes) -> bytes:
    """Mostly of the size that the index names, or the loader would look no further."""
    return mutated if rng.random() < 0.2 else mutated[: len(original)].ljust(len(original), b"\0")


def _damage_header(rng: random.Random, tar: bytes) -> bytes:
    starts = [place - 9 for place in _all(tar, b'{"') if tar[place - 8 : place].strip(b"\0")]
    start = rng.choice(starts) + 1
    length = int.from_bytes(tar[start : start + 8], "little") + 8
    data = bytearray(tar)
    if rng.random() < 0.3:
        data[start : start + 8] = rng.choice((*INTERESTING, length + 1, length - 9)).to_bytes(8, "little")
    else:
        header = bytes(data[start + 8 : start + length])
        if rng.random() < 0.5:
            new = json.dumps(change_json(rng, json.loads(header)), separators=(",", ":")).encode()
        else:
            new = mutate(rng, header, [header])
        data[start + 8 : start + length] = new[: length - 8].ljust(length - 8, b" ")
    return bytes(data)


def _all(content: bytes, part: bytes) -> Iterator[int]:
    place = content.find(part)
    while place >= 0:
        if content[place + 2 : place + 6] in (b'eva"', b"clip", b"eva_"):
            yield place
        place = content.find(part, place + 1)


def _damage_signed_index(rng: random.Random, content: bytes) -> bytes:
    """An index whose digest is right or missing, so that what it says is looked at."""
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    metadata = json.loads(header["__metadata__"][index_module._METADATA_KEY])
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


def try_dataset(rng: random.Random, corpus: Corpus, files: dict[str, bytes]) -> bool:
    """Read, verify and perhaps repair; whether everything went well. Raises what the library raises."""
    folder = corpus.work / "dataset"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    refused = False
    for bad_samples in (BadSamples(), BadSamples("skip", "skip")):
        try:
            dataset = EmbeddingDataset(folder, bad_samples=bad_samples)
            for shard, size in enumerate(dataset.shard_sizes[:4]):
                for i in range(min(size, 4)):
                    dataset.read(shard, i)
                    dataset.meta(shard, i)
        except Blip3oError:
            refused = True
    refused |= not verify(folder, workers=1).ok
    if rng.random() < 0.15:
        try:
            repair(folder, workers=1)
        except Blip3oError:
            return False
        if problems := verify(folder, workers=1).problems:
            # What repair says it mended is sound; files that the manifest does not list are not its business.
            assert all("not listed in the manifest" in problem for problem in problems), problems
    return not refused


def try_pickle(rng: random.Random, corpus: Corpus, content: bytes) -> bool:
    """Load it and, now and then, convert it."""
    path = corpus.work / "embeddings_shard_00000_patch_only.pkl"
    path.write_bytes(content)
    try:
        load_pickle(path)
        if rng.random() < 0.3:
            destination = corpus.work / "converted"
            shutil.rmtree(destination, ignore_errors=True)
            convert(path, destination)
    except Blip3oError:
        return False
    return True


def try_input(seed: int, number: int, corpus: Corpus) -> tuple[str, bool]:
    """Make input `number` and try it: its kind, and whether it was read without an error."""
    rng = random.Random(f"{seed}:{number}")
    if number % 2:
        kind, content = damage_pickle(rng, corpus)
        ok = try_pickle(rng, corpus, content)
    else:
        kind, files = damage_dataset(rng, corpus)
        ok = try_dataset(rng, corpus, files)
    if corpus.canary.exists():
        corpus.canary.unlink()
        raise AssertionError("code from a file was run: the canary is there")
    return kind, ok


class Watch:
    """Notes what an input does that only code could do; audit hooks cannot be removed, so it is switched."""

    def __init__(self) -> None:
        self.on = False
        self.seen: list[str] = []
        sys.addaudithook(self._note)

    def _note(self, event: str, arguments: tuple) -> None:
        if self.on and event in FORBIDDEN_EVENTS:
            self.seen.append(f"{event}{arguments!r}"[:200])


def fuzz(seed: int, numbers: range, corpus: Corpus, before: Callable[[int], object]) -> dict[str, Any]:
    """Try the inputs `numbers`, calling `before` on each; counts by kind and outcome, and findings by number."""
    watch = Watch()
    counts: Counter[str] = Counter()
    findings: dict[int, str] = {}
    logging.disable(logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for number in numbers:
            before(number)
            watch.on = True
            try:
                kind, ok = try_input(seed, number, corpus)
                counts[f"{kind}: {'read' if ok else 'refused'}"] += 1
            except Exception:
                findings[number] = traceback.format_exc(limit=-8)
            watch.on = False
            if watch.seen:
                findings[number] = f"did what only code does: {watch.seen}"
                watch.seen.clear()
    logging.disable(logging.NOTSET)
    return {"counts": dict(counts), "findings": findings}


def child(args: argparse.Namespace) -> None:
    """Fuzz in a process of its own, with the number of the input under way in `work/progress`."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    corpus = make_corpus(args.work)
    with open(args.work / "progress", "r+b") as file, mmap.mmap(file.fileno(), 8) as progress:

        def before(number: int) -> None:
            progress[:] = struct.pack("<Q", number)

        for start in range(args.child, args.inputs, CHUNK):
            if time.time() < args.deadline:
                numbers = range(start, min(start + CHUNK, args.inputs))
                print(json.dumps(fuzz(args.seed, numbers, corpus, before)), flush=True)


def run(seed: int, inputs: int, seconds: float, work: Path) -> dict[str, Any]:
    """Fuzz in child processes; an input that crashes or hangs one is a finding, and a new child goes on after it."""
    began = time.time()
    findings: dict[str, str] = {}
    start = 0
    (work / "progress").write_bytes(bytes(8))
    with open(work / "results", "w+", encoding="utf-8") as results:
        while start < inputs and time.time() < began + seconds:
            command = [sys.executable, __file__, "--seed", str(seed), "--inputs", str(inputs), "--work", str(work)]
            command += ["--child", str(start), "--deadline", str(began + seconds)]
            with subprocess.Popen(command, stdout=results) as process:
                fault = _follow(process, work / "progress")
            if fault is None:
                break
            number = _under_way(work / "progress")
            findings[str(number)] = fault
            start = number + 1
        results.seek(0)
        lines = [json.loads(line) for line in results if line.endswith("\n")]
    counts = sum((Counter(line["counts"]) for line in lines), Counter())
    for line in lines:
        findings |= line["findings"]
    tried = sum(counts.values()) + len(findings)
    return {
        "inputs": tried,
        "seconds": time.time() - began,
        "counts": dict(sorted(counts.items())),
        "findings": findings,
    }


def _follow(process: subprocess.Popen, progress: Path) -> str | None:
    """Wait for a child to end; what went wrong with it, if anything did."""
    number, since = -1, time.time()
    while process.poll() is None:
        time.sleep(0.2)
        if _under_way(progress) != number:
            number, since = _under_way(progress), time.time()
        elif number > 0 and time.time() > since + CASE_SECONDS:
            process.kill()
            process.wait()
            return f"took more than {CASE_SECONDS:.0f} s"
    return None if process.returncode == 0 else f"ended its process with {process.returncode}"


def _under_way(progress: Path) -> int:
    return struct.unpack("<Q", progress.read_bytes())[0]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--inputs", type=int, default=100_000, metavar="N")
    parser.add_argument("--seconds", type=float, default=float("inf"), metavar="X", help="stop after so long")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    parser.add_argument("--only", type=int, metavar="N", help="try this one input again, with its traceback")
    parser.add_argument("--work", type=Path, metavar="DIR", help="for small files; by default a temporary folder")
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--deadline", type=float, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child is not None:
        child(args)
        return 0
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as temporary:
        work = args.work or Path(temporary)
        if args.only is not None:
            print(try_input(args.seed, args.only, make_corpus(work)))
            return 0
        result = run(args.seed, args.inputs, args.seconds, work)
    for number, finding in result["findings"].items():
        print(f"input {number}: {finding}", file=sys.stderr)
    print(json.dumps({**result, "findings": len(result["findings"])}))
    return 1 if result["findings"] else 0


if __name__ == "__main__":
    sys.exit(main())
