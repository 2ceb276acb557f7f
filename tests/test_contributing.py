"""The six walks of CONTRIBUTING.md, from outside the package or on a copy of it, and that its files are there."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from blip3o_ds.baselines.fit import fit_baselines
from blip3o_ds.cli import main
from blip3o_ds.config import TrainConfig, build_run_config, load_run_config
from blip3o_ds.data.format.schema import TensorSpec
from blip3o_ds.data.format.writer import DatasetWriter
from blip3o_ds.data.normalization import Normalizer
from blip3o_ds.data.reading.dataset import EmbeddingDataset
from blip3o_ds.data.reading.loader import EmbeddingLoader
from blip3o_ds.data.reading.order import GlobalOrder
from blip3o_ds.data.tools.verify import verify
from blip3o_ds.encoders.registry import ENCODERS
from blip3o_ds.evaluation.metrics import METRICS, Metric
from blip3o_ds.evaluation.report import evaluate, format_table
from blip3o_ds.flow.flow import Flow, check_flow
from blip3o_ds.flow.path import PATHS
from blip3o_ds.flow.prediction import PREDICTIONS, Point, Prediction
from blip3o_ds.flow.solvers import posterior_mean, sample
from blip3o_ds.model.dit import DiT
from blip3o_ds.runs.pretrained import Pretrained
from blip3o_ds.training.optim import SCHEDULES, check_names, learning_rate_factor
from tests.conftest import PROJECT, write_embeddings
from tests.encoders.conftest import tiny_spec
from tests.flows import CosinePath, random_prior

TEXT = (PROJECT / "CONTRIBUTING.md").read_text(encoding="utf-8")
MODEL = {"eva_dim": 12, "clip_dim": 8, "grid_size": 4, "hidden_size": 16, "num_layers": 1, "num_heads": 2,
         "num_kv_heads": 1, "ffn_dim": 24}  # fmt: skip


@pytest.fixture
def dataset(tmp_path) -> EmbeddingDataset:
    return EmbeddingDataset(write_embeddings(tmp_path / "data", 10))


def test_every_file_that_is_named_exists():
    named = {
        name for name in re.findall(r"`([\w./-]+/[\w./-]*|[\w-]+\.(?:py|md|toml|jsonl))`", TEXT) if "NAME" not in name
    }
    assert len(named) > 20
    assert {name for name in named if not (PROJECT / name).exists()} == {"metrics.jsonl"}  # that of a run


def test_every_table_is_in_the_file_that_is_named_with_it():
    for file, table in re.findall(r"`([\w/]+\.py)`:[^`;]*?(?:in|entry in) `([A-Z_]+)`", TEXT):
        assert re.search(rf"^{table}\b.*=", (PROJECT / file).read_text(), re.MULTILINE), (file, table)


def test_change_the_flow(monkeypatch):
    """A path, and a prediction of what a guess of the clean embedding lacks."""

    class Missing(Prediction):
        def guess(self, eva, folds):
            return self.prior.mean(eva, folds)

        def training_pair(self, data, noise, t, guess):
            return Point(self.path.point(data, noise, t), t, guess), data - guess

        def clean(self, output, point):
            return point.guess + output.float()

    monkeypatch.setitem(PATHS, "quarter_circle", CosinePath)
    monkeypatch.setitem(PREDICTIONS, "missing", Missing)
    chosen = ["flow.path=quarter_circle", "flow.prediction=missing", "flow.timestep_law=uniform"]
    config = load_run_config("demo", overrides=[*chosen, "eval.sampler.solver=euler", "eval.sampler.steps=25"])
    check_flow(config)
    flow = Flow.from_config(config.flow, random_prior(4, 5, 3))
    eva, clip = torch.ones(2, 4, 5), torch.full((2, 4, 3), 5.0)
    guess = flow.prediction.guess(eva, None)

    def knows_the_data(x_t, t, eva, drop):
        return clip - guess

    noise, t, drop = flow.draw(torch.arange(2), (4, 3), 0, "cpu")
    assert flow.loss(knows_the_data, clip, eva, noise, t, drop).loss < 1e-10
    assert flow.loss(lambda x_t, *_: torch.zeros_like(x_t), clip, eva, noise, t, drop).loss > 1
    torch.testing.assert_close(posterior_mean(knows_the_data, flow, eva, noise), clip)
    generated = sample(knows_the_data, flow, eva, noise, config.eval.sampler)
    torch.testing.assert_close(generated, clip, atol=0.02, rtol=0)  # Euler's error on a curved path


def test_add_an_encoder_pair(monkeypatch, tmp_path, capsys):
    from PIL import Image

    for spec in (tiny_spec("new-condition", seed=1, embed_dim=10), tiny_spec("new-target", seed=2)):
        monkeypatch.setitem(ENCODERS, spec.name, spec)
    (tmp_path / "images").mkdir()
    for number in range(3):
        Image.new("RGB", (40, 36), (number, 50, 90)).save(tmp_path / "images" / f"{number}.png")

    arguments = ["data", "extract", str(tmp_path / "images"), str(tmp_path / "set"), "--json"]
    assert main([*arguments, "--condition", "new-condition", "--target", "new-target"]) == 0

    assert json.loads(capsys.readouterr().out.splitlines()[-1])["written"] == 3
    assert EmbeddingDataset(tmp_path / "set").spec.tensors["eva"].encoder == "new-condition"


KERNEL_EDITS = {  # SwiGLU with a ReLU in place of SiLU
    "swiglu": "reglu",
    "F.silu(gate) * up": "F.relu(gate) * up",
    "out = g * tl.sigmoid(g) * u": "out = tl.maximum(g, 0) * u",
    "sigmoid = tl.sigmoid(g)": "positive = (g > 0).to(tl.float32)",
    "upstream * u * sigmoid * (1 + g * (1 - sigmoid))": "upstream * u * positive",
    "upstream * g * sigmoid": "upstream * g * positive",
}
REGISTRY_LINE = "for operation in (GQA_ATTENTION,"


def test_add_a_kernel(tmp_path):
    shutil.copytree(PROJECT / "kernels", tmp_path / "kernels", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(PROJECT / "scripts", tmp_path / "scripts", ignore=shutil.ignore_patterns("__pycache__"))
    package = tmp_path / "kernels" / "blip3o_kernels"
    code = (package / "swiglu.py").read_text()
    for old, new in KERNEL_EDITS.items():
        assert old in code
        code = code.replace(old, new)
    (package / "reglu.py").write_text(code)
    registry = (package / "registry.py").read_text()
    assert REGISTRY_LINE in registry
    line = "from blip3o_kernels.reglu import OPERATION as REGLU\n\nOPERATIONS:"
    registry = registry.replace("\nOPERATIONS:", line, 1).replace(REGISTRY_LINE, f"{REGISTRY_LINE} REGLU,")
    (package / "registry.py").write_text(registry)
    with open(package / "__init__.py", "a") as file:
        file.write("from blip3o_kernels.reglu import reglu\n")

    checked = _python(tmp_path, "1", "scripts/bench_kernels.py", "--check", "--op", "reglu", "--dtype", "bf16", "fp32")
    listing = (
        "from blip3o_kernels import aot; print({v.kernel for v in aot.shipped_variants(90, operations=('reglu',))})"
    )
    launched = _python(tmp_path, "0", "-c", listing)

    assert checked.count("right reglu") == 2
    assert "WRONG" not in checked
    assert "_forward_kernel" in launched
    assert "_backward_kernel" in launched


def _python(tree, interpret: str, *arguments: str) -> str:
    environment = {**os.environ, "TRITON_INTERPRET": interpret, "PYTHONPATH": str(tree / "kernels")}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=tree, env=environment, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_add_a_metric(monkeypatch, dataset):
    monkeypatch.setitem(METRICS, "worst_similarity", Metric("worst", lambda c: c.column("similarity").min()))
    config, normalizer = build_run_config({"model": MODEL, "eval": {"sampler": {"steps": 1}}}), Normalizer("minimal")
    baselines = fit_baselines(dataset, normalizer)
    flow, model = Flow.from_config(config.flow, baselines.prior), DiT(config.model).eval()
    pretrained = Pretrained(model, flow, normalizer, baselines, config, 0, "model")

    result = evaluate(pretrained, dataset, config.eval)

    truth = torch.stack([dataset.read(*dataset.place(index))["clip"] for index in range(len(dataset))])
    cosines = torch.cosine_similarity(truth, baselines.clip_mean.expand_as(truth), dim=-1).mean(dim=1)
    assert result.readings["mean_embedding"]["worst_similarity"] == pytest.approx(float(cosines.min()), abs=1e-5)
    assert "worst" in format_table({"data": result}).splitlines()[1]
    assert "worst: worst_similarity" in format_table({"data": result})


def test_add_a_schedule(monkeypatch):
    monkeypatch.setitem(SCHEDULES, "linear", lambda progress, floor: 1 - (1 - floor) * progress)
    train = TrainConfig(schedule="linear", warmup_steps=0, min_lr_ratio=0.2)

    check_names(train)

    assert [learning_rate_factor(step, train, 100) for step in (0, 50, 100)] == pytest.approx([1.0, 0.6, 0.2])


def test_store_another_tensor(tmp_path, dataset):
    text = TensorSpec(dim=6, dtype="fp16", encoder="a-text-encoder", role="condition", num_tokens=7)
    spec = replace(dataset.spec, tensors={**dataset.spec.tensors, "text": text})
    with DatasetWriter(tmp_path / "with_text", spec, samples_per_shard=4) as writer:
        for index in range(len(dataset)):
            found = dataset.read(*dataset.place(index))
            writer.write(found.key, {**found.tensors, "text": torch.full((7, 6), float(index))}, {})

    written = EmbeddingDataset(tmp_path / "with_text")
    order = GlobalOrder(written.shard_sizes, seed=0, window_shards=2)
    sizes = {"micro_batch_size": 5, "gradient_accumulation_steps": 1, "rank": 0, "world_size": 1}
    with EmbeddingLoader(written, order, **sizes) as loader:
        [batch] = loader.next_step()
        shape, values = batch["text"].shape, {int(x) for x in batch.decode()["text"][:, 0, 0]}

    assert (tuple(shape), len(values)) == ((5, 7, 6), 5)
    assert verify(tmp_path / "with_text").problems == []
