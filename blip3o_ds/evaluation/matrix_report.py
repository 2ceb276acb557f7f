"""The report on a matrix of settings: tables of its variants beside the baselines, curves, and how it was made."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from blip3o_ds.evaluation.document import Block, Cell, Heading, Paragraph, Picture, Table, to_html, to_markdown
from blip3o_ds.evaluation.matrix_results import Bench, Readings, Stat
from blip3o_ds.evaluation.metrics import METRICS
from blip3o_ds.evaluation.plots import Panel, plot_panels
from blip3o_ds.evaluation.report import MODEL_READINGS, row_label
from blip3o_ds.files import atomic_write_bytes, atomic_write_json
from blip3o_ds.progress import format_duration

RESULTS, REPORT, PAGE, CURVES = "results.json", "report.md", "report.html", "curves.png"
LEGEND = (
    "Mean ± standard deviation over the seeds. Bold: the best variant of a reading. After a value, compared with "
    "{first}: + better, - worse, ≠ other (of a metric without a best), = no difference beyond the spread, which is the "
    "root of the sum of both variances. Baselines need no training; they depend on the data, not on the model."
)


def write_report(bench: Bench, out: Path, facts: dict[str, Any]) -> dict[str, Any]:
    """Write the four files into `out`, and return what `results.json` holds.

    `facts` say how the bench was made: `command`, `processes`, `total_steps` of a run, `machine` and `versions`.
    """
    content = {
        **bench.matrix.model_dump(mode="json"),
        **facts,
        "seconds": sum(result.seconds for result in bench.results),
        "runs": [result.to_dict(out) for result in bench.results],
        "summary": bench.summary(),
    }
    blocks = list(_blocks(bench, content))
    if bench.splits:
        plot_panels(_panels(bench), list(bench.matrix.variants), len(bench.splits), out / CURVES)
    atomic_write_json(out / RESULTS, content)
    atomic_write_bytes(out / REPORT, to_markdown(blocks).encode())
    atomic_write_bytes(out / PAGE, to_html(blocks, out).encode())
    return content


def _blocks(bench: Bench, content: dict[str, Any]) -> Iterator[Block]:
    matrix = bench.matrix
    yield Heading(matrix.name, 1)
    yield Paragraph(matrix.question)
    yield Paragraph(_budget(bench, content))
    yield Table(("variant", "settings"), [[Cell(name), Cell(_stated(of))] for name, of in matrix.variants.items()])
    for result in bench.results:
        if result.error:
            yield Paragraph(f"FAILED: {result.run.name}: {result.error}")
    for split in bench.splits:
        example = next(iter(bench.examples(split).values()))
        yield Heading(f"{split} ({example.num_samples} images)")
        yield from _split(bench, split)
    if bench.splits:
        yield Paragraph(LEGEND.format(first=next(iter(matrix.variants))))
        yield Heading("Curves")
        yield Paragraph(
            "Means over the seeds in a band of one standard deviation; baselines are flat. Evaluations during a run "
            "are over at most eval.max_samples images, the last one over all."
        )
        yield Picture(CURVES, "metrics over the steps")
    yield Heading("Runs")
    yield _runs(content)
    yield from (Paragraph(text) for text in _made_by(content))


def _budget(bench: Bench, content: dict[str, Any]) -> str:
    matrix, train = bench.matrix, bench.results[0].run.config.train
    batch = train.global_batch(content["processes"])
    return (
        f"{len(matrix.variants)} variants with {len(matrix.seeds)} seeds each ({', '.join(map(str, matrix.seeds))}), "
        f"preset {matrix.preset}, {content['total_steps']} steps of {batch} samples, trained on {matrix.data.train}. "
        f"Settings of all: {_stated(matrix.common)}."
    )


def _stated(settings: dict[str, Any]) -> str:
    return ", ".join(f"{name}: {json.dumps(value, ensure_ascii=False)}" for name, value in settings.items()) or "none"


def _split(bench: Bench, split: str) -> Iterator[Block]:
    """The table of one dataset, and what must not be compared in it."""
    stats = {variant: bench.readings(split, variant) for variant in bench.matrix.variants}
    samplers = {result.run.variant: result.run.config.eval.sampler for result in bench.results}
    rows = []
    for reading in MODEL_READINGS:
        for variant in bench.matrix.variants:
            head = [Cell(row_label(reading, samplers[variant])), Cell(_with_count(bench, variant))]
            rows.append(head + [_cell(bench, split, stats, variant, reading, name) for name in bench.matrix.metrics])
    yield Table(("reading", "variant", *bench.matrix.metrics), rows + _baseline_rows(bench, split, stats))
    spaces: dict[str, list[str]] = {}
    for variant, example in bench.examples(split).items():
        spaces.setdefault(example.space.replace("_", "-"), []).append(variant)
    if len(spaces) > 1:
        stated = "; ".join(f"{space} embeddings: {', '.join(variants)}" for space, variants in spaces.items())
        yield Paragraph(
            f"Measured on {stated}. Most metrics depend on the embeddings' length, so they are compared only with "
            "variants measured like the first."
        )


def _with_count(bench: Bench, variant: str) -> str:
    finished, all_seeds = len(bench.of(variant)), len(bench.matrix.seeds)
    return variant if finished == all_seeds else f"{variant} ({all_seeds - finished} of {all_seeds} FAILED)"


def _cell(bench: Bench, split: str, stats: dict[str, Readings], variant: str, reading: str, metric: str) -> Cell:
    """One value, marked if it is the best of those that may be compared, and whether it differs from the first's."""
    column = {name: stat for name, of in stats.items() if (stat := of.get(reading, {}).get(metric))}
    if variant not in column:
        return Cell("-" if stats[variant] else "failed")
    stat, first, comparable = column[variant], next(iter(stats)), bench.comparable(split, metric)
    if variant not in comparable:
        return Cell(str(stat))
    ideal = METRICS[metric].ideal
    mark = _verdict(stat, column[first], ideal) if variant != first and first in column else ""
    return Cell(f"{stat}{mark}", _is_best(stat, [column[name] for name in comparable if name in column], ideal))


def _is_best(stat: Stat, rivals: list[Stat], ideal: float | None) -> bool:
    if ideal is None or len(rivals) < 2:
        return False
    return stat.distance(ideal) == min(rival.distance(ideal) for rival in rivals)


def _verdict(stat: Stat, first: Stat, ideal: float | None) -> str:
    differs = stat.differs(first)
    if differs is None:
        return ""
    if not differs:
        return " ="
    if ideal is None:
        return " ≠"
    return " +" if stat.distance(ideal) < first.distance(ideal) else " -"


def _baseline_rows(bench: Bench, split: str, stats: dict[str, Readings]) -> list[list[Cell]]:
    """A row for each baseline, or several where it is not the same for all variants, as in other embedding spaces."""
    rows = []
    sampler = next(iter(bench.examples(split).values())).sampler
    for baseline in bench.baselines(split):
        variants: dict[tuple[str, ...], list[str]] = {}  # values as shown -> those that have them
        for variant, readings in stats.items():
            if found := readings.get(baseline):
                shown = tuple(_once(found[name]) if name in found else "-" for name in bench.matrix.metrics)
                variants.setdefault(shown, []).append(variant)
        for shown, names in variants.items():
            label = ", ".join(names) if len(variants) > 1 else ""
            rows.append([Cell(text) for text in (row_label(baseline, sampler), label, *shown)])
    return rows


def _once(stat: Stat) -> str:
    """A baseline that no seed changes has no spread, but for rounding."""
    varies = stat.std is not None and stat.std > 1e-6 * abs(stat.mean)
    return str(stat if varies else Stat(stat.mean, None, 1))


def _panels(bench: Bench) -> list[Panel]:
    """A row for each metric, a column for each split."""
    panels = []
    for metric in bench.matrix.metrics:
        for split in bench.splits:
            variants = bench.comparable(split, metric)
            curves = {
                (variant, reading): [(step, stat.mean, stat.std or 0.0) for step, stat in points]
                for variant in variants
                for reading in MODEL_READINGS
                if (points := bench.curve(split, variant, reading, metric))
            }
            first = bench.readings(split, variants[0]) if variants else {}
            levels = {
                name: first[name][metric].mean for name in bench.baselines(split) if metric in first.get(name, {})
            }
            panels.append(Panel(f"{split}: {metric}", curves, levels))
    return panels


def _runs(content: dict[str, Any]) -> Table:
    rows = [
        [
            *(Cell(run["variant"]), Cell(str(run["seed"])), Cell(run["status"]), Cell(format_duration(run["seconds"]))),
            *(Cell(run["run_dir"] or "-"), Cell(run["log"])),
        ]
        for run in content["runs"]
    ]
    return Table(("variant", "seed", "status", "wall time", "run", "log"), rows)


def _made_by(content: dict[str, Any]) -> Iterator[str]:
    machine, versions = content["machine"], content["versions"]
    gpus = ", ".join(machine["gpus"]) or "no GPU"
    stated = ", ".join(f"{name} {version}" for name, version in versions.items())
    yield (
        f"Number of processes: {content['processes']}. {machine['cpu']}, {machine['cores']} cores, {gpus}; {stated}; "
        f"{format_duration(content['seconds'])} in all."
    )
    made: dict[str, list[str]] = {}
    for run in content["runs"]:
        if run["environment"]:
            facts = {name: run["environment"].get(name) for name in ("versions", "git", "machine", "threads_per_rank")}
            made.setdefault(json.dumps(facts), []).append(f"{run['variant']}/seed_{run['seed']}")
    if len(made) > 1:
        stated = "; ".join(f"{', '.join(names)}: {facts}" for facts, names in made.items())
        yield f"NOTE: the runs were not all made by the same code or machine. {stated}"
    yield f"Command: {content['command']}"
