"""A process group of one in the test's own process, and engines in it, for what needs no launcher."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from blip3o_ds.config import RunConfig, load_run_config
from tests.conftest import PROJECT, SMALL, Run, free_port, train_command


@pytest.fixture(scope="session")
def one_rank() -> Iterator[None]:
    """This process as the only rank; the variables that say so are gone again for processes that tests start."""
    from blip3o_ds.training.launch import init_distributed

    before = dict(os.environ)
    init_distributed(timeout_seconds=60)
    for name in os.environ.keys() - before.keys() - {"LOCAL_RANK"}:  # deepspeed asks for that one again and again
        del os.environ[name]
    yield
    torch.distributed.destroy_process_group()


def small_config(stage: int, **settings: object) -> RunConfig:
    settings = {**SMALL, "train.deepspeed_config": str(PROJECT / f"ds_configs/zero{stage}.json"), **settings}
    return load_run_config("demo", None, [f"{key}={json.dumps(value)}" for key, value in settings.items()])


class Trainee:
    """An engine that learns a step at a time from noise that depends on the step alone."""

    def __init__(self, stage: int, seed: int = 0, **settings: object) -> None:
        from blip3o_ds.model.dit import DiT
        from blip3o_ds.training.engine import Engine

        config = small_config(stage, **settings)
        torch.manual_seed(seed)
        self.engine = Engine(DiT(config.model), config.train, 100, torch.device("cpu"))

    def step(self, number: int) -> float:
        generator = torch.Generator().manual_seed(number)
        clip, eva = (torch.randn(4, 16, dim, generator=generator).to(self.engine.dtype) for dim in (8, 12))
        loss = (self.engine(clip, torch.rand(4, generator=generator), eva).float() - 1).square().mean()
        self.engine.backward(loss)
        self.engine.finish_step()
        return loss.item()

    def weights(self, ema: bool = False) -> dict[str, torch.Tensor]:
        from blip3o_ds.training.ema import gather_weights

        return gather_weights(self.engine.module, self.engine.optimizer, ema)


@pytest.fixture
def trainee(one_rank: None) -> Callable[..., Trainee]:
    return Trainee


class Ranks:
    """Training processes without a launcher, which would end all with the first; output goes to a file each."""

    def __init__(self, data: Path, output: Path, count: int, settings: dict, *extra: str, **variables: str) -> None:
        self.output = output
        output.mkdir(exist_ok=True)
        port = str(free_port())
        self.processes = []
        for rank in range(count):
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1"}
            with open(output / f"rank_{rank}.txt", "w") as file:
                process = subprocess.Popen(
                    train_command(data, output, None, settings, list(extra)),
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    env={**os.environ, **{k: str(v) for k, v in place.items()}, "MASTER_PORT": port, **variables},
                    cwd=PROJECT,
                )
            self.processes.append(process)

    def log(self, rank: int) -> str:
        return (self.output / f"rank_{rank}.txt").read_text()

    def wait_for_step(self, step: int) -> None:
        """Until so many steps stand in the metrics."""
        deadline = time.monotonic() + 120
        while not any(len(file.read_text().splitlines()) >= step for file in self.output.glob("*/metrics.jsonl")):
            assert time.monotonic() < deadline, self.log(0)
            assert all(process.poll() is None for process in self.processes), [
                self.log(rank) for rank in range(len(self.processes))
            ]
            time.sleep(0.01)

    def wait(self, timeout: float = 120) -> list[int]:
        """The exit statuses."""
        deadline = time.monotonic() + timeout
        return [process.wait(max(deadline - time.monotonic(), 0.1)) for process in self.processes]

    def run(self) -> Run:
        return Run(max(self.wait()), self.log(0), sorted(self.output.glob("clip_repro_*"))[-1])


@pytest.fixture
def start_ranks(embeddings: Path, tmp_path: Path) -> Iterator[Callable[..., Ranks]]:
    """`start_ranks(output_name, count, settings, *flags, **environment)`; the end kills them."""
    started: list[Ranks] = []

    def start(name: str, count: int, settings: dict, *extra: str, **variables: str) -> Ranks:
        started.append(Ranks(embeddings, tmp_path / name, count, settings, *extra, **variables))
        return started[-1]

    yield start
    for process in (process for ranks in started for process in ranks.processes):
        process.kill()
        process.wait()
