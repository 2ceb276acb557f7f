#!/usr/bin/env python
"""Print a finished run's evaluation as a table and draw its curves: scripts/show_run.py RUN."""

import json
import sys
from pathlib import Path

from blip3o_ds.evaluation.plots import plot_evaluation, plot_training_curve
from blip3o_ds.evaluation.report import EvalResult, format_table


def main(run_dir: Path) -> None:
    evaluation = json.loads((run_dir / "final_summary.json").read_text())["evaluation"]
    results = {split: EvalResult.from_dict(result) for split, result in evaluation.items()}
    print(format_table(results))
    plot_evaluation(results, run_dir / "evaluation.png")
    plot_training_curve(run_dir / "metrics.jsonl", run_dir / "training.png")
    print(f"pictures: {run_dir}/training.png, {run_dir}/evaluation.png")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
