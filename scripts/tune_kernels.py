#!/usr/bin/env python
"""Search launch configurations on this GPU and write the best to the package's `tuned.json`, under the GPU's name.

    python scripts/tune_kernels.py [--op ...] [--dtype bf16] [--preset base large]

One process, one GPU, nothing else on it. Commit the file: a first step then needs no search.
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

from benchmarks.tuning import TUNABLE, compile_calls, searches, tune
from benchmarks.warm import run_in_processes
from benchmarks.workloads import DTYPES, PRESETS
from blip3o_kernels.launch import TUNED_PATH, gpu_name, record


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", nargs="+", choices=TUNABLE, default=list(TUNABLE))
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["bf16"])
    parser.add_argument("--preset", nargs="+", choices=PRESETS, default=list(PRESETS))
    parser.add_argument("--out", type=Path, default=TUNED_PATH, help="the table; default the package's own")
    parser.add_argument("--budget", type=float, default=3600, help="seconds after which no further search is begun")
    parser.add_argument("--jobs", type=int, help="processes that compile; default one for each core, at most 16")
    return parser.parse_args(arguments)


def obstacle() -> str | None:
    """Why no search can run here, or None."""
    if not torch.cuda.is_available():
        return "no CUDA device: launch configurations can only be found on the GPU that will use them"
    if os.environ.get("TRITON_INTERPRET", "0") not in ("0", ""):
        return "TRITON_INTERPRET is set: interpreted kernels have no speed to compare; unset it"
    if os.environ.get("RANK", "0") != "0" or os.environ.get("WORLD_SIZE", "1") != "1":
        return "started as one of several ranks: only one process may write the table; start it without a launcher"
    return None


def main(arguments: list[str] | None = None) -> int:
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    options = parse(arguments)
    reason = obstacle()
    if reason:
        print(f"tune_kernels.py: {reason}", file=sys.stderr)
        return 1
    from benchmarks.measure import CudaTimer

    deadline = time.monotonic() + options.budget
    gpu = gpu_name(torch.cuda.current_device())
    major, minor = torch.cuda.get_device_capability()
    planned = searches(options.op, options.dtype, options.preset, 10 * major + minor)
    candidates = sum(len(search.candidates) for search in planned)
    print(f"{gpu}: {len(planned)} searches, {candidates} candidates to compile", flush=True)
    run_in_processes(compile_calls(planned), options.jobs)

    if not options.out.exists():
        options.out.write_text("{}\n", encoding="utf-8")
    found = tune(planned, CudaTimer(), lambda *entry: record(gpu, *entry, options.out), deadline=deadline)
    for result in found:
        search, choice = result.search, result.config or "the rule"
        print(f"{search.op:<28} {search.shape_class:<18} {choice}  {result.speedup:.2f} times the rule's speed")
        if result.failed:
            print(f"{'':<28} {result.failed} of {result.tried} candidates could not be launched")
    print(f"{len(found)} of {len(planned)} classes searched; written to {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
