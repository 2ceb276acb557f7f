"""The benchmark's own code, on made-up times: what it counts, times, leaves out, writes and prints."""

import csv
import importlib
import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from benchmarks import check as checking
from benchmarks import report
from benchmarks.check import SMALL, check
from benchmarks.goals import goals
from benchmarks.measure import Rates, Task, Timing, alternate
from benchmarks.providers import OURS, Provider, gradients, providers
from benchmarks.runner import Results, Step, run_cases
from benchmarks.warm import calls_of, run_in_processes
from benchmarks.workloads import WORKLOADS, Case, model_cases, model_shape, sweep_cases
from blip3o_kernels import launch
from blip3o_kernels.registry import REFERENCE
from tests.conftest import PROJECT
from tests.kernels.accuracy import DEVICE

TINY = replace(SMALL, batch_size=1, num_tokens=2)
RATES = Rates(copy=1e12, matmul=1e14)
MACHINE = {"gpu": "Made-Up GPU 80GB"}


def script(name):
    """A script as a module, its folder importable as when it is run."""
    spec = importlib.util.spec_from_file_location(name, PROJECT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def fake_timer(seconds=1e-3):
    """Runs a task, and says it took so long."""

    def timer(task):
        task.run(task.prepare())
        return seconds

    return timer


def plain(name):
    """Two providers that are quick on the CPU, under the names of ours and of torch.compile."""
    return [Provider(label, lambda arguments: WORKLOADS[name].run(REFERENCE, arguments)) for label in (OURS, "compile")]


def run(cases, **options):
    options = {"timer": fake_timer(), "providers_of": plain, "memory": lambda run: 2**20, **options}
    return run_cases(cases, options.pop("timer"), RATES, device=DEVICE, rounds=3, **options)


def test_bytes_and_operations_are_those_of_the_readme():
    shape = model_shape("base", 256, 2)
    T, D, F, C, e = 512, 768, 3072, 1024, 2
    expected = {
        "rms_norm": (2 * T * D * e, 3 * T * D * e),
        "modulated_rms_norm": (2 * T * D * e, 3 * T * D * e),
        "sandwich": (4 * T * D * e, 6 * T * D * e),
        "qk_norm_rope": (2 * T * 16 * 64 * e, 3 * T * 16 * 64 * e),
        "swiglu": (3 * T * F * e, 5 * T * F * e),
        "flow_matching_loss": (2 * T * C * e, 3 * T * C * e),
    }
    for name, (forward, backward) in expected.items():
        case = Case(name, shape, "bf16")
        assert [case.cost(p).bytes for p in ("forward", "backward", "both")] == [forward, backward, forward + backward]
    attention = Case("gqa_attention", shape, "bf16").cost("forward")
    assert attention.flops == 4 * 2 * 12 * 256 * 256 * 64
    assert attention.bytes == e * T * 64 * 2 * (12 + 4) + 4 * T * 12
    assert Case("self_attention", shape, "bf16").cost("backward").flops == 2.5 * attention.flops


@pytest.mark.parametrize("name", WORKLOADS)
def test_counted_bytes_are_those_of_the_tensors(name):
    """What the forward reads and writes, less the small tensors that the counts leave out."""
    case = Case(name, replace(SMALL, batch_size=4, num_tokens=64), "bf16")
    arguments = case.arguments(DEVICE)
    outputs = WORKLOADS[name].run(REFERENCE, arguments)
    tensors = [x for x in (*arguments, *outputs) if x.dim() > 2]
    if name in ("self_attention", "cross_attention"):  # two operations: q and k are written, and read again
        tensors += [arguments[0], arguments[1]] * 2
    moved = sum(x.numel() * x.element_size() for x in tensors)
    if name == "qk_norm_rope":
        assert case.cost("forward").bytes == moved
    else:
        assert case.cost("forward").bytes == pytest.approx(moved, rel=0.1)  # attention also writes a number a row


def test_all_providers_give_the_same_and_compile_once_for_all_batch_sizes():
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    compared = [p for p in providers("gqa_attention", backend="aot_eager") if p.name in ("pytorch", "compile")]
    for batch_size in (3, 5, 7):
        arguments = Case("gqa_attention", replace(SMALL, batch_size=batch_size), "fp32").arguments(DEVICE)
        results = []
        for provider in compared:
            outputs = provider.run(arguments)
            results.append([*outputs, *gradients(outputs, arguments, tuple(map(torch.ones_like, outputs)))])
        for found, expected in zip(*results, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_arguments_lie_as_in_the_model():
    q, k, v, *_ = Case("self_attention", SMALL, "bf16").arguments(DEVICE)
    assert q.untyped_storage().data_ptr() == k.untyped_storage().data_ptr() == v.untyped_storage().data_ptr()
    assert all(x.is_leaf and x.requires_grad for x in (q, k, v))
    gate, up = Case("swiglu", SMALL, "bf16").arguments(DEVICE)
    assert gate.stride() == up.stride() == (33 * 80, 80, 1)


def test_every_shape_of_the_grid_is_planned_once():
    cases = model_cases(["rms_norm", "swiglu"], ["bf16"], ["base", "tiny"], [32, 512], [256, 257])
    assert len(cases) == len(set(cases)) == 16
    assert {(case.preset, case.tokens) for case in cases} >= {("base", 512 * 257), ("tiny", 32 * 256)}
    tokens = [case.tokens for case in sweep_cases(["rms_norm"], ["bf16"])]
    assert (tokens[0], tokens[-1]) == (1024, 2**19)
    with pytest.raises(ValueError, match=r"expected one of tiny-256.*found huge-256"):
        model_shape("huge", 256, 1)


def test_providers_take_turns():
    order = []
    tasks = {name: Task(lambda _, name=name: order.append(name)) for name in "ab"}
    timings = alternate(tasks, fake_timer(), rounds=4)
    assert order == ["a", "b"] * 5  # the first of each is not counted
    assert timings["a"] == Timing(1e-3, 1e-3, 1e-3, 4)


def test_a_timing_is_median_and_percentiles():
    assert Timing.of([5.0, 1.0, 2.0, 4.0, 3.0, 100.0]) == Timing(3.5, 2.0, 5.0, 6)


def test_only_the_run_is_timed_on_what_was_prepared():
    seen = []
    task = Task(seen.append, lambda: "prepared")
    alternate({"a": task}, fake_timer(), rounds=3)
    assert seen == ["prepared"] * 4


def test_rows_hold_rates_and_shares_of_what_was_measured():
    case = Case("gqa_attention", TINY, "bf16")
    rows = run([case]).rows
    assert [(row.name, row.provider) for row in rows] == [
        (name, provider) for name in ("forward", "backward", "both") for provider in (OURS, "compile")
    ]
    row, cost = rows[0], case.cost("forward")
    assert row.median_ms == 1.0
    assert row.gb_per_s == pytest.approx(cost.bytes / 1e-3 / 1e9)
    assert row.share_of_copy == pytest.approx(cost.bytes / 1e-3 / RATES.copy)
    assert row.share_of_matmul == pytest.approx(cost.flops / 1e-3 / RATES.matmul)
    assert row.peak_memory_mib == 1


def test_a_provider_that_cannot_is_named_with_its_reason_and_the_others_are_timed():
    def refuse(arguments):
        raise RuntimeError("no kernel for this\nand more")

    results = run([Case("rms_norm", TINY, "bf16")], providers_of=lambda name: [*plain(name), Provider("x", refuse)])
    assert {row.provider for row in results.rows} == {OURS, "compile"}
    assert [(absent.provider, absent.reason) for absent in results.absent] == [("x", "no kernel for this")]


def test_our_own_failure_is_not_hidden():
    def fail(arguments):
        raise RuntimeError("illegal memory access")

    with pytest.raises(RuntimeError, match="illegal memory access"):
        run([Case("rms_norm", TINY, "bf16")], providers_of=lambda name: [Provider(OURS, fail)])


def test_what_the_time_does_not_allow_is_listed():
    case = Case("rms_norm", TINY, "bf16")
    results = run([case], deadline=0.0)
    assert (results.rows, results.not_timed) == ([], [case])


def made_up():
    """Results of a sweep and a grid in which all of ours take 1 ms and all others 1 ms as well."""
    sweep = [Case("self_attention", replace(TINY, name="base-2", batch_size=B), "bf16", sweep=True) for B in (1, 4)]
    results = run([*sweep, Case("sandwich", TINY, "bf16")])
    steps = [
        Step("base", 8, 256, name, ms, ms, ms, 5, 8 / ms, 0.5, 1.0) for name, ms in ((OURS, 10.0), ("pytorch", 12.0))
    ]
    return results, steps


def test_the_report_is_csv_json_and_pictures_and_nothing_half_written(tmp_path):
    results, steps = made_up()
    report.write_report(tmp_path / "gpu", MACHINE, RATES, results, steps)

    names = sorted(path.name for path in (tmp_path / "gpu").iterdir())
    assert names == ["results.csv", "results.json", "self_attention_bf16.png", "train_step.csv"]
    with open(tmp_path / "gpu" / "results.csv") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(results.rows) == 18
    assert float(rows[0]["median_ms"]) == 1.0
    content = json.loads((tmp_path / "gpu" / "results.json").read_text())
    assert content["machine"] == MACHINE
    assert content["measured_rates"] == {"copy_gb_per_s": 1000.0, "matmul_tflop_per_s": 100.0}
    assert [step["provider"] for step in content["train_step"]] == [OURS, "pytorch"]
    assert (tmp_path / "gpu" / "self_attention_bf16.png").read_bytes().startswith(b"\x89PNG")


def test_a_failed_write_leaves_the_last_report(tmp_path, monkeypatch):
    results, steps = made_up()
    report.write_report(tmp_path, MACHINE, RATES, results, steps)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def fail(*paths):
        raise OSError("disk full")

    monkeypatch.setattr(launch.os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        report.write_report(tmp_path, MACHINE, RATES, Results([], [], []), [])
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_the_table_compares_with_ours():
    results, steps = made_up()
    slower = [replace(row, median_ms=1.5) if row.provider == "compile" else row for row in results.rows]
    lines = report.table(slower).splitlines()
    assert len(lines) == 1 + 9
    assert "compile 1.50" in lines[1]
    assert "10.00 ms" in report.step_table(steps)


def test_goals_are_judged_at_their_worst_case():
    results, steps = made_up()
    row = next(r for r in results.rows if (r.operation, r.name, r.provider) == ("sandwich", "forward", OURS))
    streaming = [replace(row, tokens=tokens, share_of_copy=share) for tokens, share in
                 ((1024, 0.1), (65536, 0.95), (131072, 0.91))]  # fmt: skip
    both = next(r for r in results.rows if (r.operation, r.name, r.provider) == ("self_attention", "both", OURS))
    attention = [both, replace(both, provider="flash", median_ms=1.3), replace(both, provider="cudnn", median_ms=1.1)]

    found = {goal.what: goal for goal in goals([*streaming, *attention], steps)}
    assert found["sandwich, forward: share of copy"].found == 0.91
    assert found["sandwich, forward: share of copy"].reached
    assert found["self_attention, both: times SDPA's best"].found == pytest.approx(1.1)
    assert not found["self_attention, both: times SDPA's best"].reached
    assert found["train step, base: times PyTorch's"].found == pytest.approx(1.2)
    assert not found["train step, base: share of matmul"].reached


def test_a_gpu_name_becomes_a_folder_name():
    assert report.slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"


def test_one_case_of_each_compilation_is_compiled_ahead():
    cases = model_cases(["rms_norm", "swiglu"], ["bf16"], ["base"], [32, 128], [256, 257])
    assert [arguments[0].shape.batch_size for _, arguments in calls_of(cases)] == [32] * 4


def test_calls_run_in_processes_of_their_own_and_their_errors_come_back(tmp_path):
    run_in_processes([(os.mkdir, (str(tmp_path / name),)) for name in "ab"], jobs=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]
    with pytest.raises(FileNotFoundError):
        run_in_processes([(os.mkdir, (str(tmp_path / "no" / "such"),))], jobs=1)


def test_the_check_finds_every_operation_right():
    verdicts = list(check(["rms_norm", "cross_attention", "swiglu"], ["bf16"], DEVICE))
    assert [verdict.operation for verdict in verdicts] == ["rms_norm", "qk_norm_rope", "gqa_attention", "swiglu"]
    assert all(verdict.right for verdict in verdicts)


def test_the_check_notices_a_wrong_operation(monkeypatch):
    wrong = SimpleNamespace(swiglu=lambda gate, up: REFERENCE.swiglu(gate, up) * 1.01)
    monkeypatch.setattr(checking, "blip3o_kernels", wrong)
    (verdict,) = check(["swiglu"], ["bf16"], DEVICE)
    assert not verdict.right


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the script times")
def test_without_a_gpu_the_script_times_nothing_checks_and_exits_zero():
    command = [sys.executable, "scripts/bench_kernels.py", "--op", "swiglu", "--quick"]
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=PROJECT, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "nothing is timed here" in done.stdout
    assert "right swiglu" in done.stdout
    assert "all right" in done.stdout
    assert "ms" not in done.stdout.split()


def test_the_scripts_check_exits_one_when_something_is_wrong(monkeypatch, capsys):
    bench = script("bench_kernels")
    monkeypatch.setattr(bench, "check", lambda *_: iter([checking.Verdict("swiglu", "bf16", 3.0, "output 0")]))
    assert bench.run_check(bench.parse(["--check"]), "cpu") == 1
    assert "WRONG swiglu" in capsys.readouterr().out


def test_what_matters_most_is_timed_first():
    bench = script("bench_kernels")
    presets = [case.preset for case in bench.planned_cases(bench.parse([]))]
    assert presets == sorted(presets, key=lambda p: p not in ("base", "large"))
    quick = bench.planned_cases(bench.parse(["--quick"]))
    assert len(quick) == 4 * len(WORKLOADS)


def small_dit():
    from blip3o_ds.config import ModelConfig

    return ModelConfig(
        eva_dim=10, clip_dim=6, grid_size=2, hidden_size=64, num_layers=1, num_heads=2, num_kv_heads=1, ffn_dim=72,
        timestep_embed_dim=16,
    )  # fmt: skip


def test_the_timed_step_trains_with_either_provider_and_updates_what_the_model_reads():
    train_step = script("train_step")
    curves = []
    for mode in train_step.MODES.values():
        step = train_step.TrainStep(small_dit(), 2, mode, device=DEVICE, compiled=False)
        before = [master.clone() for master in step.masters]
        curves.append([step().item() for _ in range(3)])
        assert all(not torch.equal(*pair) for pair in zip(before, step.masters, strict=True))
        assert all(torch.equal(w, m.to(w.dtype)) for w, m in zip(step.weights, step.masters, strict=True))
        assert step.model.rope.cos.dtype == torch.float32
    assert curves[0] == pytest.approx(curves[1], rel=2e-2)
    assert curves[1][-1] < curves[1][0]


def test_steps_are_compared_in_turn_and_their_share_is_of_the_matmul_rate(monkeypatch):
    from blip3o_ds.planning.flops import train_flops_per_sample

    train_step = script("train_step")
    monkeypatch.setattr(train_step, "get_blip3o_clip_config", lambda preset: small_dit())
    monkeypatch.setattr(train_step, "TrainStep", partial(train_step.TrainStep, device=DEVICE, compiled=False))
    monkeypatch.setattr(train_step, "peak_memory", lambda run: 2**20)
    monkeypatch.setattr(train_step, "BATCHES", {"base": 2})
    steps = train_step.time_steps(["base"], lambda task: 0.5, RATES, rounds=3)
    assert [step.provider for step in steps] == [OURS, "pytorch"]
    assert steps[0].samples_per_s == 4
    assert steps[0].mfu == pytest.approx(2 * train_flops_per_sample(small_dit()) / 0.5 / RATES.matmul)


def test_the_script_writes_and_prints_what_it_measured(tmp_path, monkeypatch, capsys):
    """All of the script but the GPU: its clock, its rates and its name are made up."""
    cases = [Case("sandwich", replace(TINY, name="base-2", batch_size=B), "bf16", sweep=True) for B in (1, 2)]
    monkeypatch.syspath_prepend(str(PROJECT / "scripts"))
    bench, train_step = script("bench_kernels"), importlib.import_module("train_step")
    compiled = []
    package = "benchmarks"
    for target, value in {
        f"{package}.report.describe": lambda command, commit: {**MACHINE, "commit": commit},
        f"{package}.measure.CudaTimer": fake_timer,
        f"{package}.measure.measure_rates": lambda timer: RATES,
        f"{package}.warm.run_in_processes": lambda calls, jobs: compiled.extend(calls),
        f"{package}.runner.run_cases": lambda cases, *_, **__: run(cases),
    }.items():
        monkeypatch.setattr(target, value)
    monkeypatch.setattr(train_step, "time_steps", lambda presets, *_: made_up()[1])
    monkeypatch.setattr(bench, "planned_cases", lambda options: cases)

    assert bench.run_benchmark(bench.parse(["--out", str(tmp_path), "--preset", "base", "--commit", "abc"])) == 0
    assert [arguments for _, arguments in compiled] == [("base", OURS), ("base", "pytorch"), (cases[0],)]
    assert json.loads((tmp_path / "results.json").read_text())["machine"]["commit"] == "abc"
    assert (tmp_path / "sandwich_bf16.png").exists()
    printed = capsys.readouterr().out
    assert "copy 1000 GB/s" in printed
    assert "train step base" in printed
    assert "train step, base: times PyTorch's" in printed


def test_one_command_runs_the_stages_in_order_within_eight_minutes(tmp_path):
    command = ["scripts/gpu_check.sh", "--dry-run", "--out", str(tmp_path), "--commit", "abc"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=PROJECT, timeout=120)
    assert done.returncode == 0, done.stderr
    stages = [line for line in done.stdout.splitlines() if line.startswith("== ")]
    assert [line.split()[1] for line in stages] == ["tests", "tune", "bench"]
    assert sum(int(line.split("at most ")[1].split()[0]) for line in stages) <= 480
    assert stages[2].endswith(f"--out {tmp_path} --commit abc")
    assert not any(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the script runs")
def test_without_a_gpu_the_one_command_refuses():
    done = subprocess.run(["scripts/gpu_check.sh"], capture_output=True, text=True, cwd=PROJECT, timeout=120)
    assert done.returncode == 1
    assert "no CUDA device" in done.stderr
