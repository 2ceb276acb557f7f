"""How fast samples come off a disk or out of the page cache, beside what the machine could do.

Every way of reading delivers the same samples in the same run and process, and only the bytes of their tensors count,
so the rates compare.

    python scripts/bench_loader.py [DIR] [--json]
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import pickle
import platform
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch

from blip3o_ds import cli
from blip3o_ds.data.format.codec import stored_tensors
from blip3o_ds.data.format.schema import DatasetSpec
from blip3o_ds.data.format.writer import DatasetWriter
from blip3o_ds.data.reading.dataset import EmbeddingDataset, load_manifest
from blip3o_ds.data.reading.loader import EmbeddingLoader
from blip3o_ds.data.reading.order import GlobalOrder
from blip3o_ds.data.reading.remote import is_remote
from blip3o_ds.errors import DataError

BATCH = 8  # samples, of every way that makes batches
_SAMPLES, _SAMPLES_PER_SHARD = 512, 64
_SPEC = DatasetSpec.pair(256, "patch_only", 4096, 1024, "bf16", "eva-clip-8b", "clip-vit-l14")
_MOST_BYTES = 4 << 30  # of the shards that are read
_LARGE = 1 << 30  # bytes of the buffers of the memory copy, at most: far more than any cache
_CHUNK = 1 << 22
_BUFFERS = 4  # of the loader, a batch in each
_ROUNDS = 5

_Way = Callable[[], float | None]  # reads all samples; returns its seconds unless they are those of the call


def bench(dataset_dir: str | Path | None = None) -> dict[str, Any]:
    """Time each way of reading on a dataset's shards, or on a temporary dataset of 512 samples of real size.

    Warm (from the page cache) and cold (evicted from it), each the best of five rounds over all ways; the loader warm
    in the second epoch after its opening, cold in the first. Returns `machine`, `samples`, `sample_bytes` and `rows`,
    each with `name`, `state`, `samples_per_second`, `gib_per_second` and `ratio_to_memory_copy`; and the factors of the
    loader over the others, warm. A dataset that is given has no pickles beside it and is read up to 4 GiB, and cold
    rows are left out where the files cannot be evicted, as on tmpfs.
    """
    with ExitStack() as stack:
        pickles: list[Path] = []
        if dataset_dir is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="blip3o-bench-")))
            dataset_dir = folder / "dataset"
            _write_dataset(dataset_dir)
            pickles = _write_pickles(dataset_dir, folder)
        elif is_remote(dataset_dir):
            raise DataError(f"{dataset_dir}: the bench reads a local or shared file system, not a URL")
        manifest = load_manifest(dataset_dir)
        if manifest.selection is not None:
            raise DataError(f"{dataset_dir}: the bench reads whole tars; give {manifest.selection.of}, not its split")
        ends = np.cumsum([shard.num_bytes for shard in manifest.shards])
        dataset = EmbeddingDataset(dataset_dir, max_shards=max(1, int((ends <= _MOST_BYTES).sum())))
        stack.callback(dataset.close)
        return _run(dataset, Path(dataset_dir), pickles)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """The command: print the rows as a table."""
    result = bench(args.dir)
    print(f"{'':28}{'':6}{'samples/s':>11}{'GiB/s':>8}{'of memory copy':>16}")
    for row in result["rows"]:
        name, state, samples, gib, ratio = row.values()
        print(f"{name:28}{state:6}{samples:11.0f}{gib:8.2f}{ratio:16.2f}")
    for name, value in result["factors"].items():
        print(f"{name.replace('_', ' ')}: {value:.2f}")
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench_loader.py", description=__doc__.splitlines()[0])
    parser.add_argument("dir", metavar="DIR", nargs="?", help="a dataset; by default a temporary one is made")
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object on the last line")
    parser.set_defaults(run=run, command="bench")
    return cli.main(arguments, parser)


def _run(dataset: EmbeddingDataset, folder: Path, pickles: list[Path]) -> dict[str, Any]:
    tars = [folder / shard.name for shard in dataset.manifest.shards[: len(dataset.shard_sizes)]]
    sample_bytes = sum(tensor.num_bytes for tensor in stored_tensors(dataset.spec))
    num_samples = len(dataset)
    total = num_samples * sample_bytes
    ways: dict[str, _Way] = {
        "sequential read": lambda: _read_through(tars),
        "tarfile": lambda: _read_tars(tars),
        "webdataset": lambda: _drain(_webdataset_batches(tars)),
    }
    if pickles:
        ways["pickled shards"] = lambda: _drain(_pickled_batches(pickles))
    source, reused = (np.ones(min(total, size), np.uint8) for size in (_LARGE, _BUFFERS * BATCH * sample_bytes))
    large = np.ones_like(source)
    warm = {
        "memory copy": lambda: _copy(source, large, total),
        "memory copy, reused buffer": lambda: _copy(source, reused, total),
        **ways,
        "loader": lambda: _time_loader(dataset, epoch=1),
    }
    cold = {**ways, "loader": lambda: _time_loader(dataset, epoch=0)}
    _read_through(tars + pickles)
    seconds = {(name, "warm"): best for name, best in _best(warm).items()}
    if _evict(tars):
        seconds |= {(name, "cold"): best for name, best in _best(cold, lambda: _evict(tars + pickles)).items()}
    rows = [
        {
            "name": name,
            "state": state,
            "samples_per_second": num_samples / elapsed,
            "gib_per_second": total / elapsed / 2**30,
            "ratio_to_memory_copy": seconds["memory copy", "warm"] / elapsed,
        }
        for (name, state), elapsed in seconds.items()
    ]
    factors = {
        f"loader_over_{name.replace(' ', '_')}": seconds[name, "warm"] / seconds["loader", "warm"] for name in ways
    }
    facts = {"machine": _machine(), "samples": num_samples, "sample_bytes": sample_bytes}
    return {**facts, "rows": rows, "factors": factors}


def _best(ways: dict[str, _Way], prepare: Callable[[], Any] = lambda: None) -> dict[str, float]:
    """The least seconds of each in some rounds over all of them, so that other load affects all alike."""
    seconds = dict.fromkeys(ways, math.inf)
    for _ in range(_ROUNDS):
        for name, read in ways.items():
            prepare()
            started = time.perf_counter()
            own = read()
            seconds[name] = min(seconds[name], own or time.perf_counter() - started)
    return seconds


def _copy(source: np.ndarray, target: np.ndarray, total: int) -> None:
    """Copies `total` bytes out of the whole of `source` into the smaller `target`, repeatedly."""
    blocks = len(source) // len(target)
    for number, start in enumerate(range(0, total, len(target))):
        offset, count = number % blocks * len(target), min(len(target), total - start)
        np.copyto(target[:count], source[offset : offset + count])


def _read_through(paths: list[Path]) -> None:
    chunk = memoryview(bytearray(_CHUNK))
    for path in paths:
        with open(path, "rb", buffering=0) as file:
            while file.readinto(chunk):
                pass


def _read_tars(tars: list[Path]) -> None:
    for path in tars:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if member.name.endswith(".safetensors"):
                    tar.extractfile(member).read()


def _webdataset_batches(tars: list[Path]) -> Iterator[Any]:
    import webdataset

    samples = webdataset.WebDataset([str(path) for path in tars], shardshuffle=False, empty_check=False)
    return iter(samples.map(lambda sample: safetensors.torch.load(sample["safetensors"])).batched(BATCH, _stack))


def _stack(samples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    names = [name for name, value in samples[0].items() if isinstance(value, torch.Tensor)]  # not its file name
    return {name: torch.stack([sample[name] for sample in samples]) for name in names}


def _pickled_batches(pickles: list[Path]) -> Iterator[Any]:
    for path in pickles:
        with open(path, "rb") as file:
            shard = pickle.load(file)  # written by this process
        eva, clip = shard["eva_blip3o_embeddings"], shard["clip_blip3o_embeddings"]
        for rows in torch.randperm(len(eva)).split(BATCH):
            yield eva[rows], clip[rows]


def _time_loader(dataset: EmbeddingDataset, epoch: int) -> float:
    """Seconds of the steps of this epoch, the first one from the loader's opening on."""
    batch = min(BATCH, len(dataset))
    steps = math.ceil(len(dataset) / batch)
    order = GlobalOrder(dataset.shard_sizes, seed=0)
    sizes = {"micro_batch_size": batch, "gradient_accumulation_steps": 1, "prefetch": _BUFFERS - 2}
    started = time.perf_counter()
    with EmbeddingLoader(dataset, order, rank=0, world_size=1, **sizes) as loader:
        for step in range((epoch + 1) * steps):
            if epoch and step == epoch * steps:
                started = time.perf_counter()
            loader.next_step()
        return time.perf_counter() - started


def _drain(batches: Iterator[Any]) -> None:
    for _ in batches:
        pass


def _evict(paths: list[Path]) -> bool:
    """Drop the files from the page cache; False where the system keeps them."""
    gone = True
    for path in paths:
        with open(path, "rb", buffering=0) as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            with contextlib.suppress(BlockingIOError):  # it would have to come from the disk
                gone &= os.preadv(file.fileno(), [bytearray(1)], path.stat().st_size // 2, os.RWF_NOWAIT) != 1
    return gone


def _write_dataset(folder: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    pool = {name: torch.randn(8, *_SPEC.shape(name), generator=generator).bfloat16() for name in _SPEC.tensors}
    with DatasetWriter(folder, _SPEC, _SAMPLES_PER_SHARD) as writer:
        for i in range(_SAMPLES):
            tensors = {name: values[i % 8] for name, values in pool.items()}
            writer.write(f"sample{i:06d}", tensors, {"caption": f"sample {i}"})


def _write_pickles(dataset_dir: Path, folder: Path) -> list[Path]:
    """The same samples as the pickles that `data convert` reads."""
    paths = []
    dataset = EmbeddingDataset(dataset_dir)
    for shard, size in enumerate(dataset.shard_sizes):
        samples = [dataset.read(shard, index) for index in range(size)]
        content = {f"{name}_blip3o_embeddings": torch.stack([s[name] for s in samples]) for name in ("eva", "clip")}
        content |= {"captions": [""] * size, "keys": [sample.key for sample in samples]}
        paths.append(folder / f"embeddings_shard_{shard:05d}_patch_only.pkl")
        paths[-1].write_bytes(pickle.dumps(content, protocol=4))
    return paths


def _machine() -> dict[str, Any]:
    return {
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
    }


if __name__ == "__main__":
    sys.exit(main())
