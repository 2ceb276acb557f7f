"""The Python face: cheap to import, and the same numbers as the command line."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
import torch

import blip3o_ds
from blip3o_ds.baselines.fit import fit_baselines
from blip3o_ds.config import build_run_config
from blip3o_ds.data.normalization import Normalizer
from blip3o_ds.data.reading.dataset import EmbeddingDataset
from blip3o_ds.errors import ConfigError
from blip3o_ds.evaluation.generate import generate
from blip3o_ds.runs.folder import BASELINES, NORMALIZER
from tests.conftest import PROJECT, write_embeddings

MODEL = {"eva_dim": 12, "clip_dim": 8, "grid_size": 4, "hidden_size": 16, "num_layers": 1, "num_heads": 2,
         "num_kv_heads": 1, "ffn_dim": 24}  # fmt: skip


def stack(dataset: EmbeddingDataset, name: str) -> torch.Tensor:
    return torch.stack([dataset.read(*dataset.place(index))[name] for index in range(len(dataset))])


@pytest.fixture
def dataset(tmp_path) -> EmbeddingDataset:
    return blip3o_ds.load_dataset(write_embeddings(tmp_path / "data", 10))


@pytest.fixture
def pretrained(tmp_path, dataset):
    """An export whose embeddings are standardised, so that raw space and network space differ."""
    config = build_run_config({"model": MODEL, "eval": {"sampler": {"steps": 3}, "batch_size": 4}})
    torch.manual_seed(0)
    model = blip3o_ds.DiT(config.model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    normalizer = Normalizer.from_stats("standardize", dataset.manifest.stats)
    settings = {name: getattr(config, name).model_dump(mode="json") for name in ("flow", "eval")}
    facts = {"normalization": "standardize", "precision": "bf16", "step": 7, "weights": "ema"}
    folder = tmp_path / "exported"
    model.save_pretrained(folder, extra={**settings, **facts})
    normalizer.save(folder / NORMALIZER)
    fit_baselines(dataset, normalizer).save(folder / BASELINES)
    return blip3o_ds.load_pretrained(folder)


def test_importing_the_package_imports_no_torch():
    code = "import sys, blip3o_ds; assert 'torch' not in sys.modules; blip3o_ds.DiT; assert 'torch' in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_name_is_there_and_no_other():
    assert {"DiT", "evaluate", "load_dataset", "load_pretrained", "sample"} <= set(dir(blip3o_ds))
    assert all(callable(getattr(blip3o_ds, name)) for name in blip3o_ds.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = blip3o_ds.nothing


def test_sample_gives_what_generate_writes(pretrained, dataset, tmp_path):
    generate(pretrained, dataset, tmp_path / "out", pretrained.config.eval, "x", num_samples=2)
    eva, clip = stack(dataset, "eva"), stack(EmbeddingDataset(tmp_path / "out"), "clip")
    keys = [dataset.key(*dataset.place(index)) for index in range(10)]

    together = blip3o_ds.sample(pretrained, eva, keys)
    last = blip3o_ds.sample(pretrained, eva[7:], keys[7:], k=1)

    torch.testing.assert_close(together, clip[::2])
    torch.testing.assert_close(last, clip[15::2])


def test_images_without_keys_have_noise_of_their_own(pretrained, dataset):
    same = blip3o_ds.sample(pretrained, stack(dataset, "eva")[:1].expand(3, -1, -1))

    assert len(torch.unique(same, dim=0)) == 3


def test_evaluate_measures_what_sample_gives(pretrained, dataset):
    eva, clip = stack(dataset, "eva"), stack(dataset, "clip")

    result = blip3o_ds.evaluate(pretrained, dataset, steps=2, solver="heun", seed=5)

    keys = [dataset.key(*dataset.place(index)) for index in range(10)]
    generated = blip3o_ds.sample(pretrained, eva, keys, steps=2, solver="heun", seed=5)
    assert result.readings["sampled"]["mse"] == pytest.approx(float((generated - clip).square().mean()), rel=1e-5)
    assert (result.space, result.num_samples, result.sampler.steps) == ("raw", 10, 2)
    assert result.samples_per_image == pretrained.config.eval.num_samples
    assert blip3o_ds.evaluate(pretrained, dataset, max_samples=4, num_samples=2).samples_per_image == 2
    assert blip3o_ds.evaluate(pretrained, dataset, max_samples=4).num_samples == 4


def test_the_example_of_the_readme_runs(pretrained, dataset, tmp_path, capsys):
    [code] = re.findall(r"```python\n(import blip3o_ds.*?)```", (PROJECT / "README.md").read_text(), re.DOTALL)
    places = {"data/parts/eval": tmp_path / "data", "exported": tmp_path / "exported", "cuda": "cpu"}
    for written, place in places.items():
        assert f'"{written}"' in code
        code = code.replace(f'"{written}"', f'"{place}"')

    exec(code, {})

    expected = blip3o_ds.evaluate(pretrained, dataset).readings["sampled"]["clip_similarity"]
    assert float(capsys.readouterr().out) == pytest.approx(expected)


def test_a_wrong_setting_of_the_sampler_is_named(pretrained, dataset):
    with pytest.raises(ConfigError, match=r"eval\.sampler\.step.*steps"):
        blip3o_ds.evaluate(pretrained, dataset, step=2)
    with pytest.raises(ConfigError, match=r"eval\.sampler\.solver.*'euler2'"):
        blip3o_ds.sample(pretrained, torch.zeros(1, 16, 12), solver="euler2")
