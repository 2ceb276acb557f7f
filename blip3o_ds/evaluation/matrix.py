"""A matrix of settings: the YAML file that asks a question, the runs that answer it, and the folders of these runs.

Every variant has the same seeds, data and budget, so that its settings are all in which it differs.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, ValidationError

from blip3o_ds.config import SETTINGS, RunConfig, build_run_config, preset_settings
from blip3o_ds.data.reading.remote import is_remote
from blip3o_ds.errors import ConfigError
from blip3o_ds.evaluation.metrics import METRICS
from blip3o_ds.flow.flow import check_flow
from blip3o_ds.runs.folder import FINAL_SUMMARY, find_runs, read_run_config
from blip3o_ds.settings import Section, flatten, nearest, read_yaml

# The columns of a report unless the file names others: those first that a collapsed sampler cannot win.
DEFAULT_METRICS = (
    *("energy_score", "spread_skill", "mean_error", "frechet", "clip_similarity", "clip_similarity_centered"),
    *("mse", "norm_ratio", "variance_ratio", "retrieval_r1"),
)
# Settings that the bench decides itself, and where it takes them from.
_DECIDED = {
    "data.train_dir": "it is `data.train`, or --train DIR",
    "data.eval_dirs": "they are `data.eval`, or --eval DIR",
    "train.output_dir": "it is a folder for each variant and seed in --out DIR",
    "train.seed": "it is each of `seeds`",
}
_BUDGET = ("train.max_steps", "train.num_epochs", "train.overfit_test_size", "data.max_shards")

FolderName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
Layer = Annotated[dict[str, Any], BeforeValidator(lambda value: flatten(value) if isinstance(value, dict) else value)]


class MatrixData(Section):
    """Folders or URLs; relative ones are relative to the working folder."""

    train: str | None = None
    eval: tuple[str, ...] = ()


class Matrix(Section):
    """What a matrix file says."""

    name: FolderName
    question: str = Field(min_length=1)  # one sentence, with which the report starts
    preset: str
    data: MatrixData = MatrixData()
    seeds: tuple[Annotated[int, Field(ge=0)], ...] = Field(min_length=1)
    common: Layer = Field({})  # settings of all variants, by dotted name
    variants: dict[FolderName, Layer] = Field(min_length=1)  # the others are compared with the first
    metrics: tuple[str, ...] = DEFAULT_METRICS

    def settings(self, variant: str, seed: int) -> dict[str, Any]:
        """What a run is given besides preset, training set and output folder, by dotted name."""
        return {**self.common, **self.variants[variant], "train.seed": seed, "data.eval_dirs": list(self.data.eval)}

    def config(self, variant: str, seed: int, output_dir: Path | None = None) -> RunConfig:
        """The resolved settings of a run; ConfigError if they are not valid."""
        own = {"train.seed": seed, "data.train_dir": self.data.train, "data.eval_dirs": self.data.eval}
        own["train.output_dir"] = None if output_dir is None else str(output_dir)
        layers = [preset_settings(self.preset), self.common, self.variants[variant], own]
        return build_run_config(SETTINGS.merge(layers))


@dataclass(frozen=True)
class PlannedRun:
    """One variant with one seed, which trains in `folder/clip_repro_*`."""

    variant: str
    seed: int
    folder: Path
    config: RunConfig

    @property
    def name(self) -> str:
        """Its folder, relative to that of the bench."""
        return f"{self.variant}/{self.folder.name}"

    @property
    def log(self) -> Path:
        """What its launches printed."""
        return self.folder / "launcher.log"

    @property
    def launches(self) -> Path:
        """When and how it was launched."""
        return self.folder / "launches.json"

    def find(self) -> Path | None:
        """The run's folder, if it has begun."""
        return next(reversed(find_runs(self.folder)), None)

    def trains_as(self, other: PlannedRun) -> bool:
        """Whether the two differ at most in how they are evaluated."""
        return _training_settings(self.config) == _training_settings(other.config)


def load_matrix(path: Path, train: str | None = None, evals: Sequence[str] = ()) -> Matrix:
    """Read a matrix file; `train` and `evals` replace its data. A ConfigError names the file and the field."""
    try:
        matrix = Matrix.model_validate(read_yaml(path, "matrix", Matrix))
    except ValidationError as error:
        raise ConfigError("; ".join(f"{path}: {_explain(item)}" for item in error.errors())) from None
    data = MatrixData(train=train or matrix.data.train, eval=tuple(evals) or matrix.data.eval)
    for field, flag in (("train", "--train DIR"), ("eval", "--eval DIR")):
        if not getattr(data, field):
            raise ConfigError(f"{path}: data.{field} is not given; add {flag}")
    data = MatrixData(train=_absolute(str(data.train)), eval=tuple(map(_absolute, data.eval)))
    matrix = matrix.model_copy(update={"data": data})
    try:
        _check(matrix)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    return matrix


def plan_runs(matrix: Matrix, out: Path) -> list[PlannedRun]:
    """All runs in the order in which they are made: every variant with the first seed, then with the next."""
    runs = []
    for seed in matrix.seeds:
        for variant in matrix.variants:
            folder = out.absolute() / variant / f"seed_{seed}"
            runs.append(PlannedRun(variant, seed, folder, matrix.config(variant, seed, folder)))
    return runs


def is_finished(run_dir: Path) -> bool:
    """Whether a run has been evaluated at its end."""
    return (run_dir / FINAL_SUMMARY).is_file()


def check_unchanged(runs: Sequence[PlannedRun], processes: int) -> None:
    """Raise a ConfigError if runs that have begun did so with other settings, or on another number of processes."""
    begun = [(run, run_dir) for run in runs if (run_dir := run.find())]
    changed = [(run_dir, found) for run, run_dir in begun if (found := _changes(run, run_dir, processes))]
    if changed:
        (run_dir, found), *others = changed
        more = f" (and so for {len(others)} more)" if others else ""
        raise ConfigError(
            f"{run_dir}: {'; '.join(found)}{more}. Change it back, give another --out DIR, or remove the folders of "
            "the runs that are to be made again"
        )


def overrides(settings: dict[str, Any]) -> list[str]:
    """The command line's `--set` for each setting."""
    return [f"--set={name}={json.dumps(value, ensure_ascii=False)}" for name, value in settings.items()]


def _changes(run: PlannedRun, run_dir: Path, processes: int) -> list[str]:
    saved, content = read_run_config(run_dir)
    given = run.config.model.model_fields_set
    names = [
        name
        for name, setting in SETTINGS.items()
        if name != "train.output_dir" and not (setting.from_data and name.rpartition(".")[2] not in given)
    ]
    pairs = {name: (attrgetter(name)(saved), attrgetter(name)(run.config)) for name in names}
    pairs["number of processes"] = (content.get("world_size"), processes)
    return [f"{name} was {before!r} and is {now!r} now" for name, (before, now) in pairs.items() if before != now]


def _check(matrix: Matrix) -> None:
    """Raise a ConfigError, which begins with the field, for what no single field can tell."""
    if len(set(matrix.seeds)) < len(matrix.seeds):
        raise ConfigError(f"seeds = {list(matrix.seeds)}: one of them stands there twice")
    for metric in matrix.metrics:
        if metric not in METRICS:
            raise ConfigError(f"metrics: {metric!r} is unknown{nearest(metric, list(METRICS))}")
    preset_settings(matrix.preset)
    layers = {"common": matrix.common, **{f"variants.{name}": layer for name, layer in matrix.variants.items()}}
    for field, layer in layers.items():
        for name in _DECIDED.keys() & layer.keys():
            raise ConfigError(f"{field}: {name} cannot be set here; {_DECIDED[name]}")
        try:  # each on its own, so that an error of the common settings is not taken for a variant's
            check_flow(build_run_config(SETTINGS.merge([preset_settings(matrix.preset), matrix.common, layer])))
        except ConfigError as error:
            raise ConfigError(f"{field}: {error}") from None
    first, *others = matrix.variants
    expected = _budget(matrix.config(first, 0))
    for variant in others:
        for name, value in _budget(matrix.config(variant, 0)).items():
            if value != expected[name]:
                raise ConfigError(
                    f"variants.{variant}: {name} is {value} here and {expected[name]} in {first!r}; all variants have "
                    "one budget, which is set in `common`"
                )


def _training_settings(config: RunConfig) -> dict[str, Any]:
    settings = flatten(config.model_dump())
    return {name: v for name, v in settings.items() if not name.startswith("eval.") and name != "train.output_dir"}


def _budget(config: RunConfig) -> dict[str, Any]:
    return {
        **{name: attrgetter(name)(config) for name in _BUDGET},
        "the batch (micro_batch_size times gradient_accumulation_steps)": config.train.global_batch(1),
    }


def _explain(item: Any) -> str:
    field = ".".join(str(part) for part in item["loc"] if part != "[key]")
    if item["type"] == "extra_forbidden":
        valid = MatrixData if field.startswith("data.") else Matrix
        return f"{field} is not a field of a matrix{nearest(field.rpartition('.')[2], list(valid.model_fields))}"
    if item["type"] == "missing":
        return f"{field} is missing; a matrix has the fields {', '.join(Matrix.model_fields)}"
    return f"{field} = {item['input']!r}: {item['msg'].lower()}"


def _absolute(location: str) -> str:
    return location if is_remote(location) else str(Path(location).absolute())
