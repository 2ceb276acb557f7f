"""A generated dataset is a dataset: whole, with the source's conditions, keys and captions."""

from __future__ import annotations

import pytest
import torch

from blip3o_ds.baselines import fit_baselines
from blip3o_ds.config import EvalConfig, FlowConfig, SamplerConfig
from blip3o_ds.data.normalization import Normalizer
from blip3o_ds.data.reading.dataset import EmbeddingDataset
from blip3o_ds.data.tools.convert import convert
from blip3o_ds.data.tools.verify import verify
from blip3o_ds.errors import DataError
from blip3o_ds.evaluation.generate import generate
from blip3o_ds.evaluation.report import evaluate
from blip3o_ds.flow.flow import Flow
from blip3o_ds.runs.pretrained import Pretrained
from tests.evaluation.conftest import CLIP, TOKENS, linear_pairs, random_model

SETTINGS = EvalConfig(sampler=SamplerConfig(steps=3, seed=5), batch_size=4, max_samples=None)
FLOW = Flow.from_config(FlowConfig())
RAW = Normalizer("minimal")


def read_all(folder):
    dataset = EmbeddingDataset(folder)
    places = [(shard, index) for shard, size in enumerate(dataset.shard_sizes) for index in range(size)]
    samples = [dataset.read(*place) for place in places]
    eva, clip = (torch.stack([sample[side] for sample in samples]) for side in ("eva", "clip"))
    return [sample.key for sample in samples], eva, clip, [dataset.meta(*place) for place in places]


@pytest.fixture
def source(make_dataset):
    eva, clip, _ = linear_pairs(11, noise=0.5)
    return make_dataset(eva, clip, "source")


@pytest.fixture
def pretrained(source, config):
    """A function that puts a model together with what generation needs."""

    def together(model, normalizer=RAW) -> Pretrained:
        return Pretrained(model, FLOW, normalizer, fit_baselines(source, normalizer), config, 0, "ema")

    return together


def test_conditions_keys_captions_and_order_are_those_of_the_source(source, pretrained, tmp_path, config):
    result = generate(pretrained(random_model(config)), source, tmp_path / "out", SETTINGS, "a model")

    facts = {"solver": "euler", "steps": 3, "guidance_scale": 1.0, "seed": 5}
    facts |= {"normalization": "minimal", "source": "a model"}
    assert result == {"dataset": str(tmp_path / "out"), "num_samples": 11, "generated": facts}
    keys, eva, _, meta = read_all(tmp_path / "out")
    expected_keys, expected_eva, _, expected_meta = read_all(source.location)
    assert keys == expected_keys
    assert torch.equal(eva, expected_eva)
    assert meta == [{**content, "generated": facts} for content in expected_meta]
    report = verify(tmp_path / "out")
    assert not report.problems
    assert EmbeddingDataset(tmp_path / "out").manifest.extra == {"generated": facts}


def test_views_stay_views(source, pretrained, tmp_path, config):
    convert(source.location, tmp_path / "views", dtype="fp32", view_separator="_")
    views = EmbeddingDataset(tmp_path / "views")
    generate(pretrained(random_model(config)), views, tmp_path / "out", SETTINGS, "a model")
    assert EmbeddingDataset(tmp_path / "out").spec == views.spec
    assert views.spec.view_separator == "_"


@pytest.mark.parametrize("mode", ["minimal", "standardize"])
def test_what_is_generated_is_what_was_evaluated(source, pretrained, tmp_path, config, mode):
    normalizer = Normalizer.from_stats(mode, source.manifest.stats)
    model = random_model(config)

    generate(pretrained(model, normalizer), source, tmp_path / "out", SETTINGS, "a model")
    result = evaluate(pretrained(model, normalizer), source, SETTINGS.model_copy(update={"batch_size": 3}))

    generated, true = read_all(tmp_path / "out")[2].double(), read_all(source.location)[2].double()
    assert result.readings["sampled"]["mse"] == pytest.approx(float((generated - true).square().mean()), rel=1e-5)


def test_a_folder_that_holds_something_is_refused(source, pretrained, config):
    with pytest.raises(FileExistsError, match="source already exists"):
        generate(pretrained(random_model(config)), source, source.location, SETTINGS, "a model")
    assert not verify(source.location).problems


def test_a_model_that_diverges_midway_leaves_nothing(source, pretrained, tmp_path):
    calls = []

    def model(x, t, eva, drop):
        calls.append(len(x))
        return torch.full((len(x), TOKENS, CLIP), float("nan") if len(calls) > 3 else 0.0)  # 3 calls a batch

    before = set(tmp_path.iterdir())
    with pytest.raises(DataError, match="'image_004': clip holds NaN"):
        generate(pretrained(model), source, tmp_path / "out", SETTINGS, "a model")
    assert set(tmp_path.iterdir()) == before
