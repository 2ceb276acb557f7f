"""The search for launch configurations: every candidate at the presets' shapes, the best ones written to `tuned.json`.

A candidate counts by its time over that of the rule's configuration, summed over the shapes of one class. The best
few are timed again in turn with the rule, and the winner must compute what the rule's configuration computes.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from triton.runtime.errors import OutOfResources, PTXASError

from benchmarks.measure import Task, Timer, alternate
from benchmarks.providers import gradients, providers, upstream_of
from benchmarks.warm import Call
from benchmarks.workloads import DTYPES, WORKLOADS, Case, model_shape
from blip3o_kernels.launch import force_config, shape_class
from blip3o_kernels.registry import OPERATIONS
from blip3o_kernels.workload import Tensors

logger = logging.getLogger(__name__)

FINALISTS = 4
RULE = "rule"
TUNABLE = tuple(name for name, operation in OPERATIONS.items() if operation.candidates)
TOLERANCE = {"bf16": 2e-2, "fp16": 4e-3, "fp32": 1e-4}  # of the norm of the difference, relative


@dataclass(frozen=True)
class Search:
    """One operation of one class of shapes."""

    op: str  # as in the table: one kernel
    shape_class: str
    candidates: tuple[Any, ...]
    cases: tuple[Case, ...]  # what is timed: shapes of this class
    backward: bool


@dataclass(frozen=True)
class Found:
    """The best configuration of a search."""

    search: Search
    config: Any | None  # None: nothing beats the rule
    speedup: float  # of the rule's time over its own
    tried: int
    failed: int  # candidates that the GPU could not launch


def searches(operations: list[str], dtypes: list[str], presets: list[str], arch: int) -> list[Search]:
    """Every class of shapes that the presets have, once; 64k tokens each, attention 32k of 256 and of 257."""
    found: dict[tuple[str, str], Search] = {}
    for dtype in dtypes:
        for preset in presets:
            for name in operations:
                operation, shape = OPERATIONS[name], model_shape(preset, 256, 256)
                cases: tuple[Case, ...] = (Case(name, shape, dtype),)
                if WORKLOADS[name].products[0]:  # attention: groups of three heads and of two, a token over or none
                    sizes = [(p, N) for p in ("base", "large") for N in (256, 257)]
                    cases = tuple(Case(name, model_shape(p, N, 128), dtype) for p, N in sizes)
                D = getattr(shape, operation.channels)
                for op, configs in operation.candidates(D, DTYPES[dtype], arch).items():
                    key, backward = shape_class(DTYPES[dtype], D=D), not op.endswith(("forward", name))
                    found.setdefault((op, key), Search(op, key, tuple(configs), cases, backward))
    return list(found.values())


def tune(
    planned: list[Search],
    timer: Timer,
    record: Callable[[str, str, Any | None], None],
    *,
    device: torch.device | str = "cuda",
    deadline: float = float("inf"),
) -> list[Found]:
    """Search one after the other and record each winner as it is found.

    Args:
        record: of operation, class of shapes and configuration, None where the rule is best.
        deadline: of `time.monotonic`; searches that would begin later are left out.
    """
    found = []
    for search in planned:
        if time.monotonic() > deadline:
            logger.warning("time is up: %s, %s and what follows stay as they are", search.op, search.shape_class)
            break
        result = _search(search, timer, device)
        record(search.op, search.shape_class, result.config)
        found.append(result)
    return found


def _search(search: Search, timer: Timer, device: torch.device | str) -> Found:
    scores: dict[Any, float] = dict.fromkeys([RULE, *search.candidates], 0.0)
    for case in search.cases:
        bench = _Bench(search, case, device)
        times = {config: bench.quick_time(config, timer) for config in scores}
        scores = {config: scores[config] + times[config] / times[RULE] for config in scores}
    failed = sum(score == float("inf") for score in scores.values())
    ranked = sorted((c for c in search.candidates if scores[c] < float("inf")), key=scores.__getitem__)
    finals = dict.fromkeys([RULE, *ranked[:FINALISTS]], 0.0)
    for case in search.cases:
        bench = _Bench(search, case, device)
        right = {c: score for c, score in finals.items() if c == RULE or bench.agrees(c)}
        timings = alternate({str(c): Task(lambda _, c=c, run=bench.run: run(c)) for c in right}, timer, rounds=15)
        rule = timings[RULE].median
        finals = {c: score + timings[str(c)].median / rule for c, score in right.items()}
    best = min(finals, key=finals.__getitem__)
    config = None if best == RULE else best
    return Found(search, config, len(search.cases) / finals[best], len(search.candidates), failed)


class _Bench:
    """Runs one pass of one case with any configuration."""

    def __init__(self, search: Search, case: Case, device: torch.device | str) -> None:
        self.search, self.case = search, case
        self.provider = providers(case.workload)[0]
        self.arguments: Tensors = case.arguments(device)
        self.outputs: Tensors = self.provider.run(self.arguments)
        self.upstream = upstream_of(self.outputs)

    def run(self, config: Any) -> Tensors:
        with force_config(self.search.op, None if config == RULE else config):
            if not self.search.backward:
                return self.provider.run(self.arguments)
            return gradients(self.outputs, self.arguments, self.upstream, retain_graph=True)

    def quick_time(self, config: Any, timer: Timer) -> float:
        """The least of five; infinite for what the GPU cannot launch."""
        task = Task(lambda _: self.run(config))
        try:
            timer(task)
        except (OutOfResources, PTXASError) as error:
            logger.info("%s: %s cannot be launched: %s", self.search.op, config, error)
            return float("inf")
        return min(timer(task) for _ in range(5))

    def agrees(self, config: Any) -> bool:
        """The results are those of the rule's configuration, up to the order of sums."""
        for found, expected in zip(self.run(config), self.run(RULE), strict=True):
            found, expected = found.detach().double(), expected.detach().double()
            difference = ((found - expected).norm() / expected.norm().clamp_min(1e-30)).item()
            if not difference <= TOLERANCE[self.case.dtype]:
                logger.error("%s: %s is wrong by %.2g, it is left out", self.search.op, config, difference)
                return False
        return True


def compile_calls(planned: list[Search], chunk: int = 8) -> list[Call]:
    """Calls for other processes, each compiling a few candidates of one search."""
    return [
        (compile_candidates, (search, search.candidates[start : start + chunk]))
        for search in planned
        for start in range(0, len(search.candidates), chunk)
    ]


def compile_candidates(search: Search, candidates: tuple[Any, ...], device: str = "cuda") -> None:
    """Launch each once, so that the cache on disk has it; on few samples, whose number no compilation depends on."""
    for case in search.cases:
        bench = _Bench(search, replace(case, shape=replace(case.shape, batch_size=8)), device)
        for config in candidates:
            bench.quick_time(config, _run_once)


def _run_once(task: Task) -> float:
    task.run(task.prepare())
    return 0.0
