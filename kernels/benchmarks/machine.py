"""The machine and the software that a figure belongs to: without them it says nothing."""

from __future__ import annotations

import datetime
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch
import triton


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
