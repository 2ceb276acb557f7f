"""What a run of the benchmark leaves behind: a table to read, CSV to compute with, JSON with the machine, PNG curves.

Every file is renamed into place when it is whole; the JSON comes last.
"""

from __future__ import annotations

import csv
import datetime
import io
import json
import platform
import re
import subprocess
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
import triton

from benchmarks.goals import by_provider, goals
from benchmarks.measure import Rates
from benchmarks.providers import OURS
from benchmarks.runner import Results, Row, Step
from benchmarks.workloads import PASSES
from blip3o_kernels.launch import write_atomically

COLOURS = {OURS: "#c0392b", "compile": "#1b6ca8", "pytorch": "#9a9a9a", "flash": "#2e8b57", "cudnn": "#8e5ea2"}


def slug(name: str) -> str:
    """A GPU's name as a folder's, `nvidia-h100-80gb-hbm3`."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def write_report(folder: Path, machine: dict[str, Any], rates: Rates, results: Results, steps: list[Step]) -> None:
    """Write `results.csv`, `train_step.csv`, one PNG for each operation, and `results.json` into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "results.csv", _csv(Row, results.rows))
    if steps:
        write_atomically(folder / "train_step.csv", _csv(Step, steps))
    for operation in dict.fromkeys(row.operation for row in results.rows):
        for dtype in dict.fromkeys(row.dtype for row in results.rows if row.operation == operation):
            rows = [row for row in results.rows if (row.operation, row.dtype) == (operation, dtype) and row.sweep]
            if rows:
                write_atomically(folder / f"{operation}_{dtype}.png", _picture(rows, machine, rates))
    content = {
        "machine": machine,
        "measured_rates": {"copy_gb_per_s": rates.copy / 1e9, "matmul_tflop_per_s": rates.matmul / 1e12},
        "goals": [{**asdict(goal), "reached": goal.reached} for goal in goals(results.rows, steps)],
        "train_step": [asdict(step) for step in steps],
        "rows": [asdict(row) for row in results.rows],
        "absent": [asdict(absent) for absent in results.absent],
        "not_timed": [asdict(case) for case in results.not_timed],
    }
    write_atomically(folder / "results.json", (json.dumps(content, indent=1, allow_nan=False) + "\n").encode())


def table(rows: list[Row]) -> str:
    """One line a case and pass: our time, its share of the machine's rates, and the others' times over ours."""
    head = ("operation", "shape", "dtype", "pass", "ms", "spread", "GB/s", "copy", "TFLOP/s", "matmul")
    lines = ["{:<20} {:<18} {:<5} {:<8} {:>8} {:>7} {:>6} {:>5} {:>7} {:>6}  others, times ours".format(*head)]
    for key, mine in by_provider(rows).items():
        if OURS not in mine:
            continue
        row, spread = mine[OURS], (mine[OURS].high_ms - mine[OURS].low_ms) / mine[OURS].median_ms
        rate = f"{row.tflop_per_s:>7.0f} {row.share_of_matmul:>6.0%}" if row.flops else f"{'':>14}"
        others = " ".join(
            f"{name} {other.median_ms / row.median_ms:.2f}" for name, other in mine.items() if name != OURS
        )
        shape = f"{key[1]} {row.batch_size}x{row.num_tokens}"
        lines.append(
            f"{row.operation:<20} {shape:<18} {row.dtype:<5} {row.name:<8} {row.median_ms:>8.4f} {spread:>7.1%} "
            f"{row.gb_per_s:>6.0f} {row.share_of_copy:>5.0%} {rate}  {others}"
        )
    return "\n".join(lines)


def step_table(steps: list[Step]) -> str:
    """One line a preset and provider."""
    return "\n".join(
        f"train step {step.preset:<6} {step.batch_size}x{step.num_tokens} {step.provider:<8} {step.median_ms:>9.2f} ms "
        f"({step.low_ms:.2f} to {step.high_ms:.2f})  {step.samples_per_s:>7.0f} samples/s  "
        f"{step.mfu:.1%} of matmul  {step.peak_memory_mib:.0f} MiB"
        for step in steps
    )


def _csv(kind: type, items: list[Any]) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, [field.name for field in fields(kind)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(item) for item in items)
    return text.getvalue().encode()


def _picture(rows: list[Row], machine: dict[str, Any], rates: Rates) -> bytes:
    """Bandwidth, or operations per second for attention, over tokens; a panel for each pass."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    products = rows[0].flops > 0
    figure = Figure(figsize=(13, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 3, sharey=True)
    for ax, name in zip(axes, PASSES, strict=True):
        for provider in dict.fromkeys(row.provider for row in rows):
            mine = sorted((r for r in rows if (r.name, r.provider) == (name, provider)), key=lambda row: row.tokens)
            values = [row.tflop_per_s if products else row.gb_per_s for row in mine]
            width = 2.2 if provider == OURS else 1.2
            x = [row.tokens for row in mine]
            ax.plot(x, values, marker=".", label=provider, color=COLOURS.get(provider), linewidth=width)
        limit = rates.matmul / 1e12 if products else rates.copy / 1e9
        ax.axhline(limit, color="black", linestyle=":", label="measured " + ("matmul" if products else "copy"))
        ax.set_xscale("log", base=2)
        ax.set_title(name, fontsize=10)
        ax.set_xlabel("tokens")
        ax.grid(alpha=0.3)
    axes[0].set_ylabel("TFLOP/s" if products else "GB/s")
    axes[0].set_ylim(bottom=0)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", fontsize=8, frameon=False)
    row = rows[0]
    figure.suptitle(f"{row.operation}, {row.dtype}, {row.preset} preset's widths; {machine['gpu']}", fontsize=11)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=110)
    return picture.getvalue()


def describe(command: list[str], commit: str | None = None) -> dict[str, Any]:
    """GPU, driver, power limit, versions, commit, date and the command; what cannot be found out is null.

    Args:
        commit: for a copy of the tree that has no git beside it.
    """
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    query = ["nvidia-smi", "-i", f"GPU-{properties.uuid}", "--query-gpu=driver_version,power.limit,clocks.max.sm"]
    values = (_output([*query, "--format=csv,noheader"]) or "").split(", ")
    driver, power, clock = values if len(values) == 3 else [None] * 3
    return {
        "gpu": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "l2_mib": properties.L2_cache_size / 2**20,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "driver": driver,
        "power_limit": power,
        "max_sm_clock": clock,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "commit": commit or _commit(),
        "command": " ".join(command),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def _commit() -> str | None:
    here = str(Path(__file__).resolve().parent)
    commit = _output(["git", "-C", here, "rev-parse", "HEAD"])
    changed = commit and _output(["git", "-C", here, "status", "--porcelain", "--untracked-files=no"])
    return f"{commit} with changes" if changed else commit


def _output(command: list[str]) -> str | None:
    """What a program prints; None where there is no such program or it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return (done.stdout.strip() or None) if done.returncode == 0 else None
