"""The search for launch configurations, with made-up times: what it tries, keeps, leaves out and writes."""

import importlib.util
import json
from dataclasses import replace
from importlib import import_module
from unittest import mock

import pytest
import torch
from triton.runtime.errors import OutOfResources

from benchmarks import tuning
from benchmarks.check import SMALL
from benchmarks.tuning import TUNABLE, Search, compile_calls, compile_candidates, searches, tune
from benchmarks.workloads import Case
from blip3o_kernels.aot import SHAPES
from blip3o_kernels.launch import RowConfig, SumConfig, record, shape_class
from tests.conftest import PROJECT
from tests.kernels.accuracy import DEVICE

A, B, C = RowConfig(1, 1), RowConfig(2, 2), RowConfig(4, 4)


def search(candidates=(A, B, C), op="rms_norm"):
    case = Case("rms_norm", replace(SMALL, batch_size=1, num_tokens=3), "fp32")
    return Search(op, "float32 D=48", tuple(candidates), (case,), backward=op.endswith("backward"))


class Asked(Exception):
    """Carries the configuration that a task was about to run with."""


def timer(seconds):
    """Takes the time of a task's configuration from `seconds`, None being the rule's, and runs nothing."""

    def ask(op, config):
        raise Asked(config)

    def time(task):
        with mock.patch.object(tuning, "force_config", ask):
            try:
                task.run(task.prepare())
            except Asked as asked:
                value = seconds[asked.args[0]]
        if isinstance(value, Exception):
            raise value
        return value

    return time


def results_of(planned, seconds, **options):
    recorded = []
    found = tune(planned, timer(seconds), lambda *entry: recorded.append(entry), device=DEVICE, **options)
    return found, recorded


def test_the_fastest_candidate_is_recorded():
    found, recorded = results_of([search()], {None: 2.0, A: 3.0, B: 1.0, C: 2.5})
    assert recorded == [("rms_norm", "float32 D=48", B)]
    assert found[0].speedup == pytest.approx(2.0)


def test_the_rule_stays_where_nothing_beats_it():
    found, recorded = results_of([search()], {None: 1.0, A: 3.0, B: 1.5, C: 2.5})
    assert recorded == [("rms_norm", "float32 D=48", None)]
    assert found[0].config is None


def test_what_the_gpu_cannot_launch_is_counted_and_left_out():
    too_much = OutOfResources(300000, 232448, "shared memory")
    found, recorded = results_of([search()], {None: 2.0, A: too_much, B: 1.0, C: 2.5})
    assert recorded[0][2] == B
    assert found[0].failed == 1


def test_a_candidate_that_computes_something_else_never_wins(monkeypatch, caplog):
    right = tuning._Bench.run

    def run(self, config):
        outputs = right(self, config)
        return tuple(1.01 * y for y in outputs) if config == B else outputs

    monkeypatch.setattr(tuning._Bench, "run", run)
    _, recorded = results_of([search()], {None: 2.0, A: 1.5, B: 1.0, C: 2.5})
    assert recorded[0][2] == A
    assert "is wrong by 0.01" in caplog.text


def test_a_backward_kernel_is_searched_in_the_backward_pass():
    fast, slow = SumConfig(2, 2, 512), SumConfig(4, 2, 512)
    found, recorded = results_of([search((slow, fast), "rms_norm_backward")], {None: 2.0, fast: 1.0, slow: 3.0})
    assert recorded == [("rms_norm_backward", "float32 D=48", fast)]
    assert found[0].tried == 2


def test_searches_end_with_the_time():
    assert results_of([search()], {}, deadline=0.0) == ([], [])


def test_every_kernel_of_every_preset_is_searched_once():
    planned = searches(list(TUNABLE), ["bf16"], ["tiny", "small", "base", "large"], 90)
    keys = [(s.op, s.shape_class) for s in planned]
    assert len(keys) == len(set(keys))
    widths = {shape.hidden_size for shape in SHAPES}
    expected = {("sandwich_backward", f"bfloat16 D={width}") for width in widths}
    expected |= {(f"gqa_attention_{kernel}", "bfloat16 D=64") for kernel in ("forward", "dq", "dkdv")}
    expected |= {("swiglu", "bfloat16 D=4096"), ("qk_norm_rope_backward", "bfloat16 D=64")}
    assert expected <= set(keys)
    assert all(s.backward == s.op.endswith(("backward", "dq", "dkdv")) for s in planned)
    assert all(len(s.candidates) > 1 for s in planned)


@pytest.mark.parametrize("op", TUNABLE)
def test_the_kernels_ask_for_the_classes_that_are_searched(op, monkeypatch):
    """An entry under another key than a launch looks up would never be used."""
    asked = []

    def choose(name, key, x, default):
        asked.append((name, key))
        return default

    for module in ("launch", "swiglu", "gqa_attention"):
        monkeypatch.setattr(import_module(f"blip3o_kernels.{module}"), "choose", choose)
    for planned in searches([op], ["bf16"], ["base"], 90):
        few = replace(planned.cases[0].shape, batch_size=1, num_tokens=3)
        tuning._Bench(planned, Case(op, few, "bf16"), DEVICE).run(tuning.RULE)
        assert (planned.op, planned.shape_class) in asked


def test_compiling_ahead_covers_every_candidate():
    planned = [search((A, B, C)), search((SumConfig(2, 2, 512),), "rms_norm_backward")]
    calls = compile_calls(planned, chunk=2)
    assert [arguments[1] for _, arguments in calls] == [(A, B), (C,), (SumConfig(2, 2, 512),)]
    with mock.patch.object(tuning._Bench, "quick_time") as timed:
        compile_candidates(*calls[0][1], device=DEVICE)
    assert [call.args[0] for call in timed.call_args_list] == [A, B]


def test_winners_reach_the_table(tmp_path):
    path = tmp_path / "tuned.json"
    path.write_text("{}")
    key = shape_class(torch.float32, D=48)
    tune([search()], timer({None: 2.0, A: 3.0, B: 1.0, C: 2.5}), lambda *e: record("Some GPU", *e, path), device=DEVICE)
    assert json.loads(path.read_text()) == {"Some GPU": {"rms_norm": {key: {"rows": 2, "num_warps": 2}}}}


def script():
    spec = importlib.util.spec_from_file_location("tune_kernels", PROJECT / "scripts" / "tune_kernels.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_script_writes_under_the_name_of_the_gpu(tmp_path, monkeypatch, capsys):
    """All of the script but the GPU: its name and its clock are made up."""
    tuner = script()
    monkeypatch.setattr(tuner, "obstacle", lambda: None)
    monkeypatch.setattr(tuner, "gpu_name", lambda index: "Some GPU")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(tuner, "searches", lambda *_: [search()])
    monkeypatch.setattr(tuner, "run_in_processes", lambda calls, jobs: None)
    monkeypatch.setattr("benchmarks.measure.CudaTimer", lambda: timer({None: 2.0, A: 3.0, B: 1.0, C: 4.0}))
    monkeypatch.setattr(tuner, "tune", lambda *inputs, **options: tune(*inputs, **{**options, "device": DEVICE}))

    assert tuner.main(["--out", str(tmp_path / "table.json")]) == 0
    assert json.loads((tmp_path / "table.json").read_text())["Some GPU"]["rms_norm"]
    assert "2.00 times the rule's speed" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the script searches")
def test_without_a_gpu_the_script_refuses(capsys):
    assert script().main([]) == 1
    assert "no CUDA device" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "value", "reason"), [("TRITON_INTERPRET", "1", "TRITON_INTERPRET is set"), ("RANK", "1", "several ranks")]
)
def test_the_script_refuses_what_could_not_give_one_honest_table(monkeypatch, name, value, reason):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv(name, value)
    assert reason in script().obstacle()
