"""Runs a matrix of settings: each run is a training under the deepspeed launcher, one after another, resumable.

What a finished run wrote is kept, an unfinished run goes on, and a failed one does not stop the others.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import logging
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from blip3o_ds.data.reading.bad_samples import BadSamples
from blip3o_ds.errors import Blip3oError, CheckpointError, ConfigError, TrainingError
from blip3o_ds.evaluation.matrix import Matrix, PlannedRun, check_unchanged, is_finished, overrides, plan_runs
from blip3o_ds.evaluation.matrix_report import write_report
from blip3o_ds.evaluation.matrix_results import Bench, read_result
from blip3o_ds.evaluation.plots import read_metrics
from blip3o_ds.files import FileLock, atomic_write_json, read_json
from blip3o_ds.progress import format_duration
from blip3o_ds.runs.checkpoint import find_checkpoint
from blip3o_ds.runs.folder import CHECKPOINTS, FINAL_SUMMARY, METRICS, RUN_CONFIG, TENSORBOARD, read_run_config
from blip3o_ds.training.datasets import open_eval_data, open_train_data
from blip3o_ds.training.launch import free_port
from blip3o_ds.training.optim import check_names
from blip3o_ds.training.resume import package_versions
from blip3o_ds.training.setup import count_steps

logger = logging.getLogger(__name__)

CPU_PROCESSES = 2


@dataclass(frozen=True)
class Task:
    """A run, and how far it is."""

    run: PlannedRun
    steps: int  # of the whole run
    done: int  # of its newest checkpoint
    finished: bool
    trained: PlannedRun | None  # a run before it that differs in its evaluation alone, so that one training serves both

    @property
    def state(self) -> str:
        if self.finished:
            return "finished"
        if self.trained:
            return f"an evaluation of {self.trained.name}"
        return f"{self.steps} steps" + (f", from {self.done}" if self.done else "")


def default_processes() -> int:
    """One process for each GPU, or two without any."""
    return torch.cuda.device_count() or CPU_PROCESSES


def plan_tasks(matrix: Matrix, out: Path, processes: int) -> list[Task]:
    """The runs and how far they are.

    Raises ConfigError for settings that the data refuses, or that are not those with which a run began; DataError for
    data that cannot be opened.
    """
    runs = plan_runs(matrix, out)
    check_unchanged(runs, processes)
    steps = {}
    for run in runs[: len(matrix.variants)]:  # the first seed's: data and length are those of the others
        check_names(run.config.train)
        dataset = open_train_data(run.config, BadSamples())
        open_eval_data(run.config, dataset, BadSamples())
        steps[run.variant] = count_steps(run.config, len(dataset), run.config.train.global_batch(processes))
    return [_task(run, steps[run.variant], runs[:number]) for number, run in enumerate(runs)]


def run_matrix(matrix: Matrix, out: Path, processes: int, command: str) -> dict[str, Any]:
    """Make the runs that are not finished, and write the report into `out`; returns what `results.json` holds.

    `command` is how the bench was called. Raises TrainingError, after the report is written, if runs failed; and what
    `plan_tasks` raises, before any run.
    """
    out = out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    with _alone(out), _stopping():
        tasks = plan_tasks(matrix, out, processes)
        results = []
        for number, task in enumerate(tasks, start=1):
            logger.info("[%d/%d] %s: %s, log in %s", number, len(tasks), task.run.name, task.state, task.run.log)
            if task.trained and not task.run.find():
                _copy_training(task.trained, task.run)
            error = None if task.finished else _make(matrix, task.run, processes)
            results.append(read_result(task.run, error))
        bench = Bench(matrix, results)
        facts = {"command": command, "processes": processes, "total_steps": tasks[0].steps, **describe_machine()}
        content = write_report(bench, out, facts)
    failed = [f"{result.run.name}: {result.error}" for result in results if result.error]
    if failed:
        raise TrainingError(f"{len(failed)} of {len(tasks)} runs failed, the report is in {out}: {'; '.join(failed)}")
    return content


def training_command(matrix: Matrix, run: PlannedRun, processes: int) -> list[str]:
    """The command line that begins a run, or resumes it at its newest checkpoint."""
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", str(processes)]
    launcher += ["--master_port", str(free_port()), "--module", "blip3o_ds.cli", "train"]
    if run_dir := run.find():
        return [*launcher, "--resume", str(run_dir)]
    where = ["--chunked_embeddings_dir", str(matrix.data.train), "--output_dir", str(run.folder)]
    return [*launcher, *where, "--model_size", matrix.preset, *overrides(matrix.settings(run.variant, run.seed))]


def describe_machine() -> dict[str, Any]:
    """`machine` and `versions` for the results."""
    gpus = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    return {"machine": {"cpu": _cpu_model(), "cores": _cores(), "gpus": gpus}, "versions": package_versions()}


def _task(run: PlannedRun, steps: int, before: Sequence[PlannedRun]) -> Task:
    run_dir = run.find()
    if run_dir is None:
        trained = next((other for other in before if other.trains_as(run)), None)
        return Task(run, steps, steps if trained else 0, False, trained)
    checkpoints = sorted((run_dir / CHECKPOINTS).glob("step_*"))
    done = int(checkpoints[-1].name.removeprefix("step_")) if checkpoints else 0
    return Task(run, steps, done, is_finished(run_dir), None)


def _copy_training(source: PlannedRun, run: PlannedRun) -> None:
    """Make the folder of `run` that of `source` at the end of its training, so that resuming it evaluates it.

    Checkpoints are never written to, so they are linked. The evaluations on the way were other ones, and are left out.
    If the training failed, or is no longer there, `run` has its own.
    """
    run_dir = source.find()
    if run_dir is None or not is_finished(run_dir):
        return
    unfinished = run.folder / f".{run_dir.name}"
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        if find_checkpoint(run_dir / CHECKPOINTS) is not None:
            _copy_run(run_dir, unfinished, run)
            unfinished.rename(run.folder / run_dir.name)
    except (OSError, Blip3oError) as error:
        logger.warning("%s trains for itself, as %s cannot be copied: %s", run.name, run_dir, error)
        shutil.rmtree(unfinished, ignore_errors=True)


def _copy_run(run_dir: Path, unfinished: Path, run: PlannedRun) -> None:
    shutil.copytree(
        run_dir, unfinished, ignore=shutil.ignore_patterns(CHECKPOINTS, FINAL_SUMMARY, METRICS, TENSORBOARD)
    )
    shutil.copytree(run_dir / CHECKPOINTS, unfinished / CHECKPOINTS, copy_function=_link_or_copy)
    lines = [json.dumps(line) + "\n" for line in read_metrics(run_dir / METRICS) if line["kind"] != "eval"]
    (unfinished / METRICS).write_text("".join(lines), encoding="utf-8")
    _, content = read_run_config(run_dir)
    content["config"]["eval"] = run.config.model_dump(mode="json")["eval"]
    content["config"]["train"]["output_dir"] = str(run.folder)
    atomic_write_json(unfinished / RUN_CONFIG, content)


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # the file system has no links, or the two are on different ones
        shutil.copy2(source, target)


def _make(matrix: Matrix, run: PlannedRun, processes: int) -> str | None:
    """Launch a run and wait for its end; None if it finished, else why not."""
    run.folder.mkdir(parents=True, exist_ok=True)
    command = training_command(matrix, run, processes)
    began, start = datetime.datetime.now().astimezone().isoformat(timespec="seconds"), time.monotonic()
    status = None  # if the bench is stopped
    try:
        status = _launch(command, run.log, processes)
    finally:
        seconds = time.monotonic() - start
        _record(run.launches, {"command": command, "began": began, "seconds": seconds, "exit_status": status})
    run_dir = run.find()
    if status == 0 and run_dir is not None and is_finished(run_dir):
        logger.info("%s: finished in %s", run.name, format_duration(seconds))
        return None
    problem = _last_error(run.log) if status else "it ended before its last step; the same command resumes it"
    logger.warning("%s failed with exit status %d: %s", run.name, status, problem)
    return f"exit status {status}: {problem} (log: {run.log})"


def _launch(command: Sequence[str], log: Path, processes: int) -> int:
    """The exit status of `command`, whose output is appended to `log`.

    Whatever ends this function early stops the ranks too, which save a checkpoint first.
    """
    with open(log, "ab") as file:
        file.write(f"$ {shlex.join(command)}\n".encode())
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=_environment(processes),
            start_new_session=True,  # the launcher passes no signal on, so all of its processes get it together
        )
        assert process.stdout is not None
        try:
            _copy(process.stdout, file)
        except BaseException:
            logger.warning("stopping; the run saves its state first")
            os.killpg(process.pid, signal.SIGTERM)
            _copy(process.stdout, file)
            raise
        finally:
            process.stdout.close()
            process.wait()
    return process.returncode


def _copy(source: Any, file: Any) -> None:
    """Until the last of the processes that write to `source` has ended."""
    for line in source:
        file.write(line)
        file.flush()


def _environment(processes: int) -> dict[str, str]:
    """The launcher's variables: what compiles DeepSpeed's operations is found, and ranks share the cores of a CPU."""
    found = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ.get('PATH', os.defpath)}"}
    if not torch.cuda.is_available():
        found.setdefault("DS_ACCELERATOR", "cpu")
        found.setdefault("OMP_NUM_THREADS", str(-(-_cores() // processes)))
    return found


def _record(path: Path, launch: dict[str, Any]) -> None:
    former = read_json(path, CheckpointError, "remove it")["launches"] if path.exists() else []
    atomic_write_json(path, {"launches": [*former, launch]})


def _last_error(log: Path) -> str:
    """The line of the log that says what went wrong."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    lines = lines[max(number for number, line in enumerate(lines) if line.startswith("$ ")) + 1 :]  # of this launch
    ours = [line for line in lines if line.startswith("blip3o-ds: error:")]
    return ([*lines, *ours[:1]] or ["it printed nothing"])[-1]  # other ranks' errors follow from the first one's


@contextlib.contextmanager
def _alone(out: Path) -> Iterator[None]:
    try:
        lock = FileLock(out / ".lock", wait=False)
    except BlockingIOError:
        raise ConfigError(f"{out}: another process makes the runs there; wait for it, or give another --out") from None
    with lock:
        yield


@contextlib.contextmanager
def _stopping() -> Iterator[None]:
    """SIGTERM ends the bench as Ctrl-C does, so that no training outlives it."""

    def stop(number: int, frame: Any) -> None:
        raise SystemExit(128 + number)

    former = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, former)


def _cores() -> int:
    return len(os.sched_getaffinity(0))


def _cpu_model() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()  # ARM names no model
