"""Times on the GPU, providers in turn, so that all of them see the same clocks and temperatures.

What is timed is a `Task`; how, is a `Timer`, a function from a task to seconds. `CudaTimer` is the real one.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

Prepared = Any
MAX_HEAD_START = 5e-3  # seconds; what takes longer to queue, such as the first call, is timed as it comes


@dataclass
class Task:
    """`run` is timed, on what `prepare` has just made, untimed."""

    run: Callable[[Prepared], object]
    prepare: Callable[[], Prepared] = lambda: None
    queueing: float = 1e-3  # seconds that the CPU takes to queue it; the timer learns it


Timer = Callable[[Task], float]


@dataclass(frozen=True)
class Timing:
    """Seconds: the median of several samples, and the 20th and 80th percentile as their spread."""

    median: float
    low: float
    high: float
    samples: int

    @classmethod
    def of(cls, samples: list[float]) -> Timing:
        ordered = sorted(samples)
        low, high = (ordered[round(share * (len(ordered) - 1))] for share in (0.2, 0.8))
        return cls(median(ordered), low, high, len(ordered))

    def milliseconds(self) -> dict[str, float]:
        """The columns of a report."""
        times = {"median_ms": self.median, "low_ms": self.low, "high_ms": self.high}
        return {**{name: 1e3 * seconds for name, seconds in times.items()}, "samples": self.samples}


def alternate(tasks: dict[str, Task], timer: Timer, rounds: int, seconds: float = 1.0) -> dict[str, Timing]:
    """Time every task once a round, `rounds` times, or fewer (at least 3) where a round takes long.

    Args:
        seconds: about how long all rounds together may take.
    """
    began = time.perf_counter()
    for task in tasks.values():
        timer(task)  # the first call is not like the others
    once = max(time.perf_counter() - began, 1e-9)
    rounds = max(3, min(rounds, int(seconds / once)))
    samples: dict[str, list[float]] = {name: [] for name in tasks}
    for _ in range(rounds):
        for name, task in tasks.items():
            samples[name].append(timer(task))
    return {name: Timing.of(values) for name, values in samples.items()}


class CudaTimer:
    """Time on the device between two events, from a cold L2 cache.

    Before the first event the GPU is kept busy for as long as the CPU needs to queue the task, so that gaps between
    launches are not measured: a training step queues far ahead too.
    """

    def __init__(self) -> None:
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        self._flushed = torch.empty(4 * max(properties.L2_cache_size, 1 << 25), dtype=torch.int8, device="cuda")
        self._start, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def __call__(self, task: Task) -> float:
        prepared = task.prepare()
        torch.cuda.synchronize()
        self._flushed.zero_()
        torch.cuda._sleep(int(2e9 * task.queueing))  # cycles, at about 2 GHz
        self._start.record()
        began = time.perf_counter()
        task.run(prepared)
        task.queueing = min(1.25 * (time.perf_counter() - began) + 20e-6, MAX_HEAD_START)
        self._end.record()
        self._end.synchronize()
        return 1e-3 * self._start.elapsed_time(self._end)


@dataclass(frozen=True)
class Rates:
    """What this machine reaches by itself, measured in the same run: the yardsticks of all shares."""

    copy: float  # bytes per second, read and written, of a large copy on the device
    matmul: float  # operations per second of a large bf16 matrix product of random numbers


def measure_rates(timer: Timer) -> Rates:
    """Copy of 2 GiB and an 8192 x 8192 x 8192 product; medians of 10."""
    source = torch.randn(2**29, device="cuda")
    target = torch.empty_like(source)
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)
    tasks = {"copy": Task(lambda _: target.copy_(source)), "matmul": Task(lambda _: torch.mm(a, b, out=out))}
    timings = alternate(tasks, timer, rounds=10)
    moved = 2 * source.numel() * source.element_size()
    return Rates(moved / timings["copy"].median, 2 * 8192**3 / timings["matmul"].median)


def peak_memory(run: Callable[[], object]) -> int:
    """Bytes that `run` has allocated at most, beyond what was there before."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
