"""Every file of ds_configs/ that a CPU can run, run: offloaded and replicated states train as the plain ones do."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import PROJECT

FILES = PROJECT / "ds_configs"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["zero2-offload", "zero3-offload", "zero3-hpz-quantised"])
def test_a_variant_gives_the_weights_and_the_average_of_its_plain_stage(embeddings, tmp_path, launch, name):
    variant = json.loads((FILES / f"{name}.json").read_text())
    variant["zero_optimization"].pop("zero_quantized_weights", None)  # its kernels are CUDA's
    file = tmp_path / "variant.json"
    file.write_text(json.dumps(variant))
    plain = FILES / f"zero{variant['zero_optimization']['stage']}.json"

    runs = [
        launch(embeddings, tmp_path / f.stem, 2, {"train.precision": "fp32"}, "--deepspeed_config", str(f))
        for f in (plain, file)
    ]

    assert [run.returncode for run in runs] == [0, 0], runs[1].output
    for weights in ("model.safetensors", "ema.safetensors"):
        expected, found = (load_file(run.run_dir / "checkpoints/step_00000006" / weights) for run in runs)
        for key in expected:
            torch.testing.assert_close(found[key], expected[key], rtol=1e-5, atol=1e-6)


def test_quantised_weights_on_a_cpu_are_refused(embeddings, tmp_path, launch):
    file = str(FILES / "zero3-hpz-quantised.json")

    run = launch(embeddings, tmp_path / "out", None, {}, "--deepspeed_config", file)

    assert run.returncode == 2
    assert "zero_quantized_weights needs CUDA" in run.output
