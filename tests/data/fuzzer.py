"""Feeds damaged and hostile files to everything that reads data: each must end in success or in one clear error.

Tars, indexes, manifests, safetensors headers and pickles are mutated. An exception other than a `Blip3oError`, a crash,
an input that takes too long, or code run from a pickle is a finding, printed with the number that reproduces it.

    python tests/data/fuzzer.py --inputs 100000 --seed 0 --seconds 3600
    python tests/data/fuzzer.py --seed 0 --only 4711
"""

from __future__ import annotations

import argparse
import json
import logging
import os
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
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from blip3o_ds.data.reading.bad_samples import BadSamples
from blip3o_ds.data.reading.dataset import EmbeddingDataset
from blip3o_ds.data.tools.convert import convert
from blip3o_ds.data.tools.pickles import load_pickle
from blip3o_ds.data.tools.repair import repair
from blip3o_ds.data.tools.verify import verify
from blip3o_ds.errors import Blip3oError

sys.path.insert(0, str(Path(__file__).parents[2]))  # so that it runs as a script

from tests.data.fuzz_inputs import Corpus, damage_dataset, damage_pickle, make_corpus

CHUNK = 500  # inputs between two lines of results
CASE_SECONDS = 20.0  # an input that takes longer hangs
MEMORY_BYTES = 16 << 30  # of address space: what asks for more fails, as it would on a full machine
# What a program does to run another, or code that it was handed.
FORBIDDEN_EVENTS = {
    *("os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.forkpty", "subprocess.Popen"),
    *("pty.spawn", "socket.connect", "ctypes.dlopen", "webbrowser.open"),
}


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
            # What it repaired is sound; files that the manifest does not list are left alone.
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
    """Fuzz in a process of its own, with the number of the current input in `work/progress`."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    corpus = make_corpus(args.work)
    with open(args.work / "progress", "r+b", buffering=0) as progress:

        def before(number: int) -> None:
            os.pwrite(progress.fileno(), struct.pack("<Q", number), 0)

        for start in range(args.child, args.inputs, CHUNK):
            if time.time() < args.deadline:
                numbers = range(start, min(start + CHUNK, args.inputs))
                print(json.dumps(fuzz(args.seed, numbers, corpus, before)), flush=True)


def run(seed: int, inputs: int, seconds: float, work: Path) -> dict[str, Any]:
    """Fuzz in child processes; an input that crashes or hangs one is a finding, and a new child continues after it."""
    began, start = time.time(), 0
    findings: dict[str, str] = {}
    (work / "progress").write_bytes(bytes(8))
    with open(work / "results", "w+", encoding="utf-8") as results:
        while start < inputs and time.time() < began + seconds:
            command = [sys.executable, __file__, "--seed", str(seed), "--inputs", str(inputs), "--work", str(work)]
            command += ["--child", str(start), "--deadline", str(began + seconds)]
            with subprocess.Popen(command, stdout=results) as process:
                fault = _follow(process, work / "progress")
            if fault is None:
                break
            number = _current_input(work / "progress")
            findings[str(number)] = fault
            start = number + 1
        results.seek(0)
        lines = [json.loads(line) for line in results if line.endswith("\n")]
    counts = sum((Counter(line["counts"]) for line in lines), Counter())
    for line in lines:
        findings |= line["findings"]
    tried = sum(counts.values()) + len(findings)
    seconds = time.time() - began
    return {"inputs": tried, "seconds": seconds, "counts": dict(sorted(counts.items())), "findings": findings}


def _follow(process: subprocess.Popen, progress: Path) -> str | None:
    """Wait for a child to end; what went wrong with it, if anything did."""
    number, since = -1, time.time()
    while process.poll() is None:
        time.sleep(0.2)
        if _current_input(progress) != number:
            number, since = _current_input(progress), time.time()
        elif number > 0 and time.time() > since + CASE_SECONDS:
            process.kill()
            process.wait()
            return f"took more than {CASE_SECONDS:.0f} s"
    return None if process.returncode == 0 else f"ended its process with {process.returncode}"


def _current_input(progress: Path) -> int:
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
