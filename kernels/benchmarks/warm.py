"""Compile in many processes what one process will then load from the compilers' caches on disk.

Timing needs the GPU for itself and compiling needs CPU cores, so they come one after the other.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Any

import torch

from benchmarks.providers import providers
from benchmarks.runner import able
from benchmarks.workloads import Case

Call = tuple[Callable[..., Any], tuple[Any, ...]]  # a function of a module, and its arguments


def run_in_processes(calls: list[Call], jobs: int | None = None) -> None:
    """Run all calls in `jobs` new processes (by default one for each core, at most 16); the first error is raised."""
    jobs = min(jobs or min(os.cpu_count() or 1, 16), len(calls))
    if not calls:
        return
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        for future in as_completed([pool.submit(function, *arguments) for function, arguments in calls]):
            future.result()


def calls_of(cases: list[Case]) -> list[Call]:
    """Compile the first case of every group that shares a compilation."""
    firsts: dict[tuple[str, str, str], Case] = {}
    for case in cases:
        firsts.setdefault((case.workload, case.shape.name, case.dtype), case)
    return [(compile_case, (case,)) for case in firsts.values()]


def compile_case(case: Case, device: str = "cuda") -> None:
    """Run every provider of a case once, forward and backward."""
    torch.compiler.reset()
    torch.set_num_threads(1)
    able(case, providers(case.workload), case.arguments(device))
