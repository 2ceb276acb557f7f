#!/usr/bin/env python
"""Time the kernels on this GPU beside PyTorch, torch.compile, SDPA's backends and other libraries; write and print it.

    python scripts/bench_kernels.py                        # all operations, bf16, and the training step; some minutes
    python scripts/bench_kernels.py --op sandwich --quick  # a minute
    python scripts/bench_kernels.py --check                # right or wrong, no times

Without a GPU nothing is timed: the operations are checked in Triton's interpreter instead. Exit 0 done and right, 1
wrong, 2 wrong usage. `kernels/benchmarks/README.md` says how to read the results.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "kernels"))  # `benchmarks` is not installed

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel is defined, so before their import

from benchmarks.check import check
from benchmarks.workloads import DTYPES, PRESETS, SWEEP_TOKENS, WORKLOADS, model_cases, sweep_cases

RESULTS = Path(__file__).resolve().parent.parent / "kernels" / "benchmarks" / "results"
TRAIN_STEP = "train_step"
STEP_PRESETS = ("base", "large")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", nargs="+", choices=[*WORKLOADS, TRAIN_STEP], default=[*WORKLOADS, TRAIN_STEP])
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["bf16"])
    parser.add_argument("--preset", nargs="+", choices=PRESETS, default=list(PRESETS))
    parser.add_argument("--batch", nargs="+", type=int, default=[32, 128, 512], help="samples")
    parser.add_argument("--tokens", nargs="+", type=int, choices=(256, 257), default=[256, 257], help="of a sample")
    parser.add_argument("--out", type=Path, help=f"folder of the results; default {RESULTS}/<name of the GPU>")
    parser.add_argument("--quick", action="store_true", help="base preset, one shape, a short sweep")
    parser.add_argument("--check", action="store_true", help="check that every operation is right, and time nothing")
    parser.add_argument("--budget", type=float, default=3600, help="seconds after which no further case is begun")
    parser.add_argument("--jobs", type=int, help="processes that compile; default one for each core, at most 16")
    parser.add_argument("--commit", help="of the code, where the tree has no git to ask")
    return parser.parse_args(arguments)


def run_check(options: argparse.Namespace, device: str) -> int:
    where = "this GPU" if device == "cuda" else "Triton's interpreter"
    print(f"checking against float64 on {where}; error over what is allowed, at its worst:")
    wrong = 0
    for verdict in check([op for op in options.op if op != TRAIN_STEP], options.dtype, device):
        wrong += not verdict.right
        word = "right" if verdict.right else "WRONG"
        print(f"  {word} {verdict.operation:<20} {verdict.dtype:<5} {verdict.worst:.2f} ({verdict.tensor})", flush=True)
    print(f"{wrong} wrong" if wrong else "all right")
    return 1 if wrong else 0


def run_benchmark(options: argparse.Namespace) -> int:
    from benchmarks import report
    from benchmarks.goals import goal_table, goals
    from benchmarks.measure import CudaTimer, measure_rates
    from benchmarks.report import describe
    from benchmarks.runner import run_cases
    from benchmarks.warm import calls_of, run_in_processes

    deadline = time.monotonic() + options.budget
    machine = describe([sys.executable, *sys.argv], options.commit)
    step_presets = [preset for preset in STEP_PRESETS if preset in options.preset] if TRAIN_STEP in options.op else []
    if step_presets:
        import train_step  # needs the requirements of blip3o_ds, which the kernels do without

    cases = planned_cases(options)
    steps = [(train_step.compile_step, (preset, name)) for preset in step_presets for name in train_step.MODES]
    print(f"{machine['gpu']}: compiling for {len(cases)} cases", flush=True)
    run_in_processes([*steps, *calls_of(cases)], options.jobs)

    timer = CudaTimer()
    rates = measure_rates(timer)
    print(f"measured: copy {rates.copy / 1e9:.0f} GB/s, bf16 matmul {rates.matmul / 1e12:.0f} TFLOP/s", flush=True)
    rounds = 5 if options.quick else 15
    folder = options.out or RESULTS / report.slug(machine["gpu"])
    measured_steps = train_step.time_steps(step_presets, timer, rates, rounds) if step_presets else []
    results = run_cases(cases, timer, rates, rounds=rounds, deadline=deadline)
    report.write_report(folder, machine, rates, results, measured_steps)
    print(report.table(results.rows))
    print(report.step_table(measured_steps))
    for absent in {(a.operation, a.provider, a.reason) for a in results.absent}:
        print("{} has no {}: {}".format(absent[0], *absent[1:]))
    if results.not_timed:
        print(f"{len(results.not_timed)} of {len(cases)} cases were not begun within {options.budget:.0f} s")
    print(goal_table(goals(results.rows, measured_steps)))
    print(f"written to {folder}")
    return 0


def planned_cases(options: argparse.Namespace) -> list:
    """The base and large presets, the sweep over tokens, then the small ones: what is last falls to the budget."""
    operations = [op for op in options.op if op != TRAIN_STEP]
    if options.quick:
        return [
            *model_cases(operations, options.dtype, ["base"], [256], [257]),
            *sweep_cases(operations, options.dtype, SWEEP_TOKENS[::4]),
        ]
    large, small = ([p for p in options.preset if (p in STEP_PRESETS) == first] for first in (True, False))
    return [
        *model_cases(operations, options.dtype, large, options.batch, options.tokens),
        *sweep_cases(operations, options.dtype),
        *model_cases(operations, options.dtype, small, options.batch, options.tokens),
    ]


def main(arguments: list[str] | None = None) -> int:
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    options = parse(arguments)
    if not torch.cuda.is_available():
        print("no CUDA device: nothing is timed here")
        return run_check(options, "cpu")
    return run_check(options, "cuda") if options.check else run_benchmark(options)


if __name__ == "__main__":
    sys.exit(main())
