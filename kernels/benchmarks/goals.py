"""The figures that the kernels are to reach, each a ratio of two numbers measured in one run.

A goal is judged at its worst case, and only where something was measured for it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from benchmarks.providers import OURS, SDPA
from benchmarks.runner import Row, Step
from benchmarks.workloads import ATTENTION

STREAMING_GOALS = {"forward": 0.90, "backward": 0.85}  # share of the copy bandwidth, from 64k tokens on
ATTENTION_GOAL = 1.2  # times the best of SDPA's backends, forward and backward, with QK-norm and positions
STEP_GOALS = {"speedup": 1.15, "mfu": 0.55}  # of a whole training step, against torch.compile and the matmul rate
MANY_TOKENS = 65536


@dataclass(frozen=True)
class Goal:
    """One figure to reach, and the worst case that was measured for it."""

    what: str
    goal: float
    found: float
    where: str

    @property
    def reached(self) -> bool:
        return self.found >= self.goal


def goals(rows: list[Row], steps: list[Step]) -> list[Goal]:
    """The figures to reach for which something was measured, each at its worst case."""
    rows = [row for row in rows if row.dtype == "bf16"]
    found = []
    for operation in dict.fromkeys(row.operation for row in rows if row.operation not in ATTENTION):
        for name, goal in STREAMING_GOALS.items():
            mine = [row for row in rows if (row.operation, row.name, row.provider) == (operation, name, OURS)]
            shares = [(row.share_of_copy, _where(row)) for row in mine if row.tokens >= MANY_TOKENS]
            if shares:
                found.append(Goal(f"{operation}, {name}: share of copy", goal, *min(shares)))
    ratios: dict[str, list[tuple[float, str]]] = {}
    for mine in by_provider([row for row in rows if row.operation in ATTENTION[1:] and row.name == "both"]).values():
        others = [other.median_ms for name, other in mine.items() if name in SDPA]
        if others and OURS in mine:
            row = mine[OURS]
            ratios.setdefault(row.operation, []).append((min(others) / row.median_ms, _where(row)))
    found += [Goal(f"{name}, both: times SDPA's best", ATTENTION_GOAL, *min(all_)) for name, all_ in ratios.items()]
    for preset in dict.fromkeys(step.preset for step in steps):
        mine = {step.provider: step for step in steps if step.preset == preset}
        if OURS in mine:
            found.append(Goal(f"train step, {preset}: share of matmul", STEP_GOALS["mfu"], mine[OURS].mfu, preset))
        if len(mine) == 2:
            speedup = mine["pytorch"].median_ms / mine[OURS].median_ms
            found.append(Goal(f"train step, {preset}: times PyTorch's", STEP_GOALS["speedup"], speedup, preset))
    return found


def goal_table(found: list[Goal]) -> str:
    """One line a goal."""
    verdicts = {True: "reached", False: "MISSED"}
    return "\n".join(
        f"{verdicts[goal.reached]:<8} {goal.what:<45} {goal.found:.2f} of {goal.goal:.2f}  ({goal.where})"
        for goal in found
    )


def _where(row: Row) -> str:
    return f"{row.preset} {row.batch_size}x{row.num_tokens}"


def by_provider(rows: list[Row]) -> dict[tuple[Any, ...], dict[str, Row]]:
    """Rows of the same case and pass, by provider."""
    grouped: dict[tuple[Any, ...], dict[str, Row]] = {}
    for row in rows:
        key = (row.operation, row.preset, row.batch_size, row.num_tokens, row.sweep, row.dtype, row.name)
        grouped.setdefault(key, {})[row.provider] = row
    return grouped
