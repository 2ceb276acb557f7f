"""From cases to rows: every provider of every case, forward, backward and both, until the time is up."""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import groupby

import torch

from benchmarks.measure import Rates, Task, Timer, Timing, alternate, peak_memory
from benchmarks.providers import OURS, Provider, gradients, providers, upstream_of
from benchmarks.workloads import PASSES, Case
from blip3o_kernels.workload import Tensors

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Row:
    """One figure: one provider's pass of one case."""

    operation: str
    preset: str
    sweep: bool
    batch_size: int
    num_tokens: int
    tokens: int
    dtype: str
    name: str  # of the pass
    provider: str
    median_ms: float
    low_ms: float
    high_ms: float
    samples: int
    bytes: int
    flops: int
    gb_per_s: float
    tflop_per_s: float
    share_of_copy: float
    share_of_matmul: float
    peak_memory_mib: float


@dataclass(frozen=True)
class Absent:
    """A provider that could not compute a case, with its own error."""

    operation: str
    preset: str
    batch_size: int
    num_tokens: int
    dtype: str
    provider: str
    reason: str


@dataclass(frozen=True)
class Step:
    """A whole training step of a preset: forward, backward, AdamW."""

    preset: str
    batch_size: int
    num_tokens: int
    provider: str  # of the kernels; the rest is compiled by torch.compile for both
    median_ms: float
    low_ms: float
    high_ms: float
    samples: int
    samples_per_s: float
    mfu: float  # operations that the model needs, over time, over the measured matmul rate
    peak_memory_mib: float


@dataclass
class Results:
    """What a run of the benchmark has found so far."""

    rows: list[Row]
    absent: list[Absent]
    not_timed: list[Case]  # the time was up


def run_cases(
    cases: list[Case],
    timer: Timer,
    rates: Rates,
    *,
    device: torch.device | str = "cuda",
    rounds: int = 15,
    deadline: float = float("inf"),
    memory: Callable[[Callable[[], object]], int] = peak_memory,
    providers_of: Callable[[str], list[Provider]] = providers,
) -> Results:
    """Time all cases in their order; those that would begin after `deadline` (of `time.monotonic`) are left out.

    Raises:
        Exception: our kernels failed; another provider's failure is kept as `Absent`.
    """
    results = Results([], [], [])
    for _, group in groupby(cases, lambda case: (case.workload, case.shape.name, case.dtype)):
        torch.compiler.reset()  # its memory of other shapes is limited; what it compiled stays in the cache on disk
        compared = None
        for case in group:
            if time.monotonic() > deadline:
                results.not_timed.append(case)
                continue
            compared = compared or providers_of(case.workload)
            arguments = case.arguments(device)
            found, absent = able(case, compared, arguments)
            results.absent += absent
            upstream = upstream_of(found[0].run(arguments))
            tasks = {name: {p.name: _task(name, p, arguments, upstream) for p in found} for name in PASSES}
            peaks = {provider: memory(partial(task.run, None)) for provider, task in tasks["both"].items()}
            for name in PASSES:
                timings = alternate(tasks[name], timer, rounds)
                results.rows += [_row(case, name, p, timing, rates, peaks[p]) for p, timing in timings.items()]
            del arguments, upstream, tasks
            gc.collect()
    return results


def able(case: Case, compared: list[Provider], arguments: Tensors) -> tuple[list[Provider], list[Absent]]:
    """Call each once, both ways: who can compute this case, and who cannot."""
    found, absent = [], []
    for provider in compared:
        try:
            outputs = provider.run(arguments)
            gradients(outputs, arguments, upstream_of(outputs))
            found.append(provider)
        except Exception as error:  # of other libraries' own kinds; it is reported, not lost
            if provider.name == OURS:
                raise
            shape, reason = case.shape, str(error).strip().split("\n")[0][:200]
            where = (case.workload, case.preset, shape.batch_size, shape.num_tokens, case.dtype)
            absent.append(Absent(*where, provider.name, reason or type(error).__name__))
            logger.warning("%s cannot compute %s of %s: %s", provider.name, case.workload, shape.name, reason)
    return found, absent


def _task(name: str, provider: Provider, arguments: Tensors, upstream: Tensors) -> Task:
    if name == "forward":
        return Task(lambda _: provider.run(arguments))
    if name == "both":
        return Task(lambda _: gradients(provider.run(arguments), arguments, upstream))
    # A new graph for every backward: some libraries write gradients over what they saved.
    return Task(lambda outputs: gradients(outputs, arguments, upstream), lambda: provider.run(arguments))


def _row(case: Case, name: str, provider: str, timing: Timing, rates: Rates, peak: int) -> Row:
    cost, shape = case.cost(name), case.shape
    moved, computed = cost.bytes / timing.median, cost.flops / timing.median
    return Row(
        *(case.workload, case.preset, case.sweep, shape.batch_size, shape.num_tokens, case.tokens, case.dtype),
        name=name,
        provider=provider,
        **timing.milliseconds(),
        bytes=cost.bytes,
        flops=cost.flops,
        gb_per_s=moved / 1e9,
        tflop_per_s=computed / 1e12,
        share_of_copy=moved / rates.copy,
        share_of_matmul=computed / rates.matmul,
        peak_memory_mib=peak / 2**20,
    )
