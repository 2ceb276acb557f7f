"""What a run reports: log file and console, `metrics.jsonl`, and TensorBoard.

Only rank 0 writes. After a resume the lines past the checkpoint's step are dropped, so that every step appears once.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from blip3o_ds.files import atomic_write_bytes
from blip3o_ds.runs.folder import METRICS, TENSORBOARD

logger = logging.getLogger(__name__)


def setup_logging(rank: int, log_file: Path | None = None) -> None:
    """Send this project's log to stderr, and to `log_file` on rank 0; the other ranks log only warnings."""
    root = logging.getLogger("blip3o_ds")
    root.handlers.clear()
    root.propagate = False
    root.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    place = "" if rank == 0 else f"[rank {rank}] "
    form = logging.Formatter(f"%(asctime)s %(levelname)s {place}%(message)s", "%H:%M:%S")
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stderr)]
    if log_file and rank == 0:
        handlers.append(logging.FileHandler(log_file))
    for handler in handlers:
        handler.setFormatter(form)
        root.addHandler(handler)


class MetricsWriter:
    """Writes metrics to `run_dir/metrics.jsonl` and `run_dir/tensorboard`; on ranks other than 0 it does nothing."""

    def __init__(self, run_dir: Path, rank: int, resumed_step: int = 0) -> None:
        self._run_dir, self._rank = run_dir, rank
        self._file: TextIO | None = None
        self.rewind(resumed_step)

    def rewind(self, step: int) -> None:
        """Drop the lines of later steps, which will be taken again."""
        if self._rank > 0:
            return
        from torch.utils.tensorboard import SummaryWriter

        self.close()
        path = self._run_dir / METRICS
        drop_lines_after(path, step)
        self._file = open(path, "a", encoding="utf-8", buffering=1)  # noqa: SIM115 (close() closes it)
        self._board = SummaryWriter(str(self._run_dir / TENSORBOARD), purge_step=step + 1 if step else None)

    def train(self, step: int, metrics: Mapping[str, float]) -> None:
        self._write({"step": step, "kind": "train", **metrics}, "train/", step, metrics)

    def evaluation(self, step: int, split: str, reading: str, metrics: Mapping[str, float]) -> None:
        line = {"step": step, "kind": "eval", "split": split, "reading": reading, **metrics}
        self._write(line, f"eval_{split}/{reading}/", step, metrics)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._board.close()

    def _write(self, line: dict[str, Any], prefix: str, step: int, metrics: Mapping[str, float]) -> None:
        if self._file is None:
            return
        self._file.write(json.dumps(line) + "\n")
        for name, value in metrics.items():
            self._board.add_scalar(prefix + name, value, step)


def drop_lines_after(path: Path, step: int) -> None:
    """Rewrite a `metrics.jsonl` without the lines of later steps, and without a last line that was cut short."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except json.JSONDecodeError:
            logger.warning("%s: a line that was cut off is dropped: %.40s", path, line)
    atomic_write_bytes(path, "".join(kept).encode())
