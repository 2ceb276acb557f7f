"""What the tests share: small datasets of embeddings, and a way to launch real training processes."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

PROJECT = Path(__file__).parent.parent
os.environ.setdefault("DS_ACCELERATOR", "cpu" if not torch.cuda.is_available() else "cuda")
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel is defined, so before any import of kernels


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def write_embeddings(
    folder: Path, num_samples: int, *, grid: int = 4, eva_dim: int = 12, clip_dim: int = 8, seed: int = 0
):
    """A dataset whose CLIP side is a fixed linear map of EVA plus noise, so that there is something to learn."""
    from blip3o_ds.data.format.schema import DatasetSpec
    from blip3o_ds.data.format.writer import DatasetWriter

    spec = DatasetSpec.pair(grid * grid, "patch_only", eva_dim, clip_dim, "fp32", "made-up-eva", "made-up-clip")
    projection = torch.randn(eva_dim, clip_dim, generator=torch.Generator().manual_seed(99)) / eva_dim**0.5
    generator = torch.Generator().manual_seed(seed)
    with DatasetWriter(folder, spec, samples_per_shard=8) as writer:
        for i in range(num_samples):
            eva = torch.randn(grid * grid, eva_dim, generator=generator)
            clip = eva @ projection + 0.3 * torch.randn(grid * grid, clip_dim, generator=generator)
            writer.write(f"sample_{i:05d}", {"eva": eva, "clip": clip}, {"caption": f"number {i}"})
    return folder


@pytest.fixture
def embeddings(tmp_path: Path) -> Path:
    """A training set of 40 samples, 4x4 tokens, 12 -> 8 wide."""
    return write_embeddings(tmp_path / "train", 40)


@dataclass
class Run:
    """A finished training process."""

    returncode: int
    output: str
    run_dir: Path | None

    def metrics(self, kind: str = "train") -> list[dict]:
        lines = (self.run_dir / "metrics.jsonl").read_text().splitlines()
        return [line for line in map(json.loads, lines) if line["kind"] == kind]


SMALL = {  # a model that trains in milliseconds
    "model.eva_dim": 12,
    "model.clip_dim": 8,
    "model.grid_size": 4,
    "model.hidden_size": 32,
    "model.num_layers": 2,
    "model.num_heads": 4,
    "model.num_kv_heads": 2,
    "model.ffn_dim": 64,
    "train.max_steps": 6,
    "train.micro_batch_size": 4,
    "train.log_every": 1,
    "train.eval_every": 0,
    "train.save_every": 0,
    "train.warmup_steps": 2,
    "eval.sampler.steps": 2,
}


def free_port() -> int:
    """A port that nothing on this machine listens on, for a rendezvous."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def train_command(data: Path, output: Path, processes: int | None, settings: dict, extra: list[str]) -> list[str]:
    """The command line of a training run: under the deepspeed launcher, or plain Python with `processes=None`.

    `settings` replace those of `SMALL`; one that is `...` is not given at all.
    """
    script = [str(PROJECT / "scripts" / "train_clip_reproduction.py")]
    if processes is None:
        start = [sys.executable]
    else:
        launcher = str(Path(sys.executable).with_name("deepspeed"))
        start = [launcher, "--num_gpus", str(processes), "--master_port", str(free_port())]
    overrides = [f"--set={key}={json.dumps(value)}" for key, value in {**SMALL, **settings}.items() if value is not ...]
    data_flags = ["--chunked_embeddings_dir", str(data), "--output_dir", str(output), "--model_size", "demo"]
    return [*start, *script, *data_flags, *overrides, *extra]


@pytest.fixture
def launch() -> Callable[..., Run]:
    """Run real training processes to their end."""

    def run(data: Path, output: Path, processes: int | None = None, settings: dict | None = None, *extra: str) -> Run:
        command = train_command(data, output, processes, settings or {}, list(extra))
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        }
        done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=PROJECT, timeout=300)
        runs = sorted(output.glob("clip_repro_*"))
        return Run(done.returncode, done.stdout + done.stderr, runs[-1] if runs else None)

    return run
