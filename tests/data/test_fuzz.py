"""A short run of `tests/data/fuzzer.py`, and that it notices what it is there to notice."""

from __future__ import annotations

import importlib.util
import pickle
import sys
from pathlib import Path

import pytest

from tests.conftest import PROJECT
from tests.data.fuzz_inputs import Reduce


@pytest.fixture(scope="module")
def fuzz_data():
    spec = importlib.util.spec_from_file_location("fuzz_data", PROJECT / "tests" / "data" / "fuzzer.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_damaged_and_hostile_files_end_in_success_or_in_a_clear_error(fuzz_data, tmp_path):
    result = fuzz_data.run(seed=7, inputs=2000, seconds=600, work=tmp_path)
    assert result["findings"] == {}
    assert result["inputs"] == 2000
    assert len(result["counts"]) > 15  # of all kinds, some read and some refused


def test_code_run_from_a_pickle_would_be_noticed(fuzz_data, tmp_path, monkeypatch):
    monkeypatch.setattr(fuzz_data, "load_pickle", lambda path: pickle.loads(Path(path).read_bytes()))
    corpus = fuzz_data.make_corpus(tmp_path)
    corpus.pickles = corpus.hostile = [pickle.dumps(Reduce(print, "no attack")), *corpus.hostile[:6]]
    findings = fuzz_data.fuzz(0, range(60), corpus, lambda number: None)["findings"]
    assert any("os.system" in finding for finding in findings.values())
    assert not corpus.canary.exists()


def test_an_input_that_ends_or_stops_the_process_would_be_noticed(fuzz_data, tmp_path, monkeypatch):
    script = tmp_path / "child.py"
    script.write_text(
        "import os, struct, sys, time\n"
        "start = int(sys.argv[sys.argv.index('--child') + 1])\n"
        "for number in range(start, 10):\n"
        f"    open({str(tmp_path / 'progress')!r}, 'wb').write(struct.pack('<Q', number))\n"
        "    number == 3 and os.abort()\n"
        "    number == 6 and time.sleep(60)\n"
    )
    monkeypatch.setattr(fuzz_data, "__file__", str(script))
    monkeypatch.setattr(fuzz_data, "CASE_SECONDS", 1.0)
    findings = fuzz_data.run(seed=0, inputs=10, seconds=60, work=tmp_path)["findings"]
    assert findings == {"3": "ended its process with -6", "6": "took more than 1 s"}
