"""A generated dataset: the source's shards, conditions, keys and captions, the same however it was made."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from blip3o_ds.baselines.fit import fit_baselines
from blip3o_ds.config import EvalConfig, FlowConfig, SamplerConfig
from blip3o_ds.data.format import parts
from blip3o_ds.data.format.manifest import Manifest
from blip3o_ds.data.normalization import Normalizer
from blip3o_ds.data.reading.dataset import EmbeddingDataset
from blip3o_ds.data.tools.convert import convert
from blip3o_ds.data.tools.verify import verify
from blip3o_ds.errors import ConfigError, DataError
from blip3o_ds.evaluation.generate import generate
from blip3o_ds.evaluation.report import evaluate
from blip3o_ds.flow.flow import Flow
from blip3o_ds.runs.pretrained import Pretrained
from tests.evaluation.conftest import linear_pairs, random_model

SETTINGS = EvalConfig(sampler=SamplerConfig(steps=3, seed=5), batch_size=3, max_samples=None)
RAW = Normalizer("minimal")


def altered(model: nn.Module, forward) -> nn.Module:
    """The same weights; `forward(usual, x, t, eva, drop)` takes the place of the `usual` forward pass."""
    other = copy.deepcopy(model)
    usual = other.forward
    other.forward = lambda *inputs: forward(usual, *inputs)
    return other


def read_all(folder):
    """Keys, eva [n, N, De], clip [n, N, Dc] and metadata of all samples in their order."""
    dataset = EmbeddingDataset(folder)
    places = [(shard, index) for shard, size in enumerate(dataset.shard_sizes) for index in range(size)]
    samples = [dataset.read(*place) for place in places]
    eva, clip = (torch.stack([sample[side] for sample in samples]) for side in ("eva", "clip"))
    return [sample.key for sample in samples], eva, clip, [dataset.meta(*place) for place in places]


def by_key(folder) -> dict[str, torch.Tensor]:
    keys, _, clip, _ = read_all(folder)
    return dict(zip(keys, clip, strict=True))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def source(make_dataset):
    """11 images in shards of 4, 4 and 3."""
    eva, clip, _ = linear_pairs(11, noise=0.5)
    return make_dataset(eva, clip, "source")


@pytest.fixture
def pretrained(source, config):
    """A function that puts a model, by default a random one, together with what generation needs."""

    def together(model=None, normalizer=RAW) -> Pretrained:
        model = random_model(config) if model is None else model
        baselines = fit_baselines(source, normalizer)
        flow = Flow.from_config(FlowConfig(prediction="sample"), baselines.prior)  # the network sees EVA as it is
        return Pretrained(model, flow, normalizer, baselines, config, 0, "ema")

    return together


@pytest.fixture
def run(source, pretrained, tmp_path):
    """`run("name")` generates from `source` into the folder `name`, which it returns with the result."""

    def run(name, model=None, data=source, settings=SETTINGS, label="a model", **how):
        return tmp_path / name, generate(pretrained(model), data, tmp_path / name, settings, label, **how)

    return run


def test_shards_conditions_keys_captions_and_order_are_those_of_the_source(source, run):
    out, result = run("out")

    facts = {"solver": "euler", "steps": 3, "guidance_scale": 1.0, "seed": 5}
    facts |= {"normalization": "minimal", "source": "a model"}
    counts = {"num_samples": 11, "written": 11, "shards_left": 0}
    assert result == {"dataset": str(out), **counts, "generated": facts}
    keys, eva, _, meta = read_all(out)
    expected_keys, expected_eva, _, expected_meta = read_all(source.location)
    assert keys == expected_keys
    assert torch.equal(eva, expected_eva)
    assert meta == [{**content, "generated": {**facts, "sample": 0}} for content in expected_meta]
    assert EmbeddingDataset(out).shard_sizes == source.shard_sizes == [4, 4, 3]
    assert EmbeddingDataset(out).manifest.extra["generated"] == facts
    assert verify(out).problems == []


def test_views_stay_views(source, pretrained, tmp_path, config):
    convert(source.location, tmp_path / "views", dtype="fp32", view_separator="_")
    views = EmbeddingDataset(tmp_path / "views")
    generate(pretrained(random_model(config)), views, tmp_path / "out", SETTINGS, "a model")
    assert EmbeddingDataset(tmp_path / "out").spec == views.spec
    assert views.spec.view_separator == "_"


@pytest.mark.parametrize(("of_the_source", "separator"), [(None, "_"), ("--", "--")])
def test_several_samples_of_an_image_are_its_views(source, pretrained, tmp_path, of_the_source, separator):
    convert(source.location, tmp_path / "views", dtype="fp32", view_separator=of_the_source)
    data = EmbeddingDataset(tmp_path / "views")

    generate(pretrained(), data, tmp_path / "out", SETTINGS, "a model", num_samples=2)

    spec, keys = EmbeddingDataset(tmp_path / "out").spec, read_all(tmp_path / "out")[0]
    assert spec == data.spec.with_views(separator, "here")
    assert keys == [f"{key}{separator}{k:04d}" for key in read_all(data.location)[0] for k in range(2)]
    assert [spec.image_of(key) for key in keys[::2]] == read_all(data.location)[0]
    assert verify(tmp_path / "out").problems == []


def test_the_number_of_a_view_goes_on_so_that_its_samples_are_views_of_the_same_image(
    make_dataset, pretrained, tmp_path
):
    eva, clip, _ = linear_pairs(3, noise=0.5)
    plain = make_dataset(eva, clip, "photos", ["photo_0012", "photo_0013", "other"])
    convert(plain.location, tmp_path / "views", dtype="fp32", view_separator="_")
    data = EmbeddingDataset(tmp_path / "views")

    generate(pretrained(), data, tmp_path / "out", SETTINGS, "a model", num_samples=2)

    spec, keys = EmbeddingDataset(tmp_path / "out").spec, read_all(tmp_path / "out")[0]
    assert keys == ["photo_00120000", "photo_00120001", "photo_00130000", "photo_00130001", "other_0000", "other_0001"]
    assert [spec.image_of(key) for key in keys] == ["photo"] * 4 + ["other"] * 2


@pytest.mark.parametrize("mode", ["minimal", "standardize"])
def test_what_is_generated_is_what_was_evaluated(source, pretrained, tmp_path, config, mode):
    normalizer = Normalizer.from_stats(mode, source.manifest.stats)
    loaded = pretrained(normalizer=normalizer)

    generate(loaded, source, tmp_path / "out", SETTINGS, "a model")
    result = evaluate(loaded, source, SETTINGS.model_copy(update={"batch_size": 4}))

    generated, true = read_all(tmp_path / "out")[2].double(), read_all(source.location)[2].double()
    assert result.readings["sampled"]["mse"] == pytest.approx(float((generated - true).square().mean()), rel=1e-5)


@pytest.mark.parametrize("num_samples", [1, 2])
@pytest.mark.parametrize("batch_size", [1, 4, 16])
def test_the_batch_size_changes_nothing(run, batch_size, num_samples):
    expected, _ = run("expected", num_samples=num_samples)
    out, _ = run("out", settings=SETTINGS.model_copy(update={"batch_size": batch_size}), num_samples=num_samples)

    assert read_all(out)[0] == read_all(expected)[0]
    torch.testing.assert_close(read_all(out)[2], read_all(expected)[2], rtol=0, atol=1e-5)


def test_an_image_has_the_same_embedding_in_another_order_and_company(make_dataset, source, run):
    order = torch.randperm(11, generator=torch.Generator().manual_seed(1))[:9]
    _, eva, clip, _ = read_all(source.location)
    moved = make_dataset(eva[order], clip[order], "moved", [f"image_{i:03d}" for i in order.tolist()])

    expected, found = by_key(run("whole")[0]), by_key(run("part", data=moved)[0])

    assert list(found) == [f"image_{i:03d}" for i in order.tolist()]
    for key, embedding in found.items():
        torch.testing.assert_close(embedding, expected[key], rtol=0, atol=1e-5)


@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_any_number_of_processes_makes_the_same_dataset(run, world_size):
    one, _ = run("one", num_samples=2)

    results = [run("many", num_samples=2, rank=rank, world_size=world_size)[1] for rank in range(world_size)]

    assert contents(one.parent / "many") == contents(one)
    assert sum(result["written"] for result in results) == 22
    last = min(world_size, 3) - 1  # there are three shards
    assert [result["num_samples"] for result in results] == [None] * last + [22] * (world_size - last)


def test_several_samples_of_an_image_follow_each_other_and_differ(source, config, run):
    batches = []

    def forward(usual, x, *inputs):
        batches.append(len(x))
        return usual(x, *inputs)

    out, result = run("out", altered(random_model(config), forward), num_samples=3)

    keys, eva, clip, meta = read_all(out)
    source_keys, source_eva, _, source_meta = read_all(source.location)
    assert keys == [f"{key}_{k:04d}" for key in source_keys for k in range(3)]
    assert torch.equal(eva, source_eva.repeat_interleave(3, dim=0))
    assert [m["generated"]["sample"] for m in meta] == [0, 1, 2] * 11
    assert [m["caption"] for m in meta] == [m["caption"] for m in source_meta for _ in range(3)]
    assert (result["num_samples"], EmbeddingDataset(out).shard_sizes) == (33, [12, 12, 9])
    assert max(batches) == SETTINGS.batch_size
    assert len(torch.unique(clip, dim=0)) == 33
    single = read_all(run("single")[0])[2]
    torch.testing.assert_close(clip[::3], single, rtol=0, atol=1e-5)  # the first is that of a single one
    assert verify(out).problems == []


def test_an_interrupted_call_is_continued_after_the_last_complete_shard(run, source, config):
    expected, _ = run("expected", num_samples=2)

    model, seventh = random_model(config), source.read(1, 2)["eva"]

    def interrupted(usual, x, t, eva, drop):
        if (eva == seventh).all((1, 2)).any():  # in the second of the three shards
            raise KeyboardInterrupt
        return usual(x, t, eva, drop)

    with pytest.raises(KeyboardInterrupt):
        run("out", altered(model, interrupted), num_samples=2)
    out = expected.parent / "out"
    assert [path.name for path in out.iterdir()] == [".parts"]
    assert [path.parent.name for path in out.rglob("*.tar")] == ["part_0000000"]
    assert not list(out.rglob("*.tmp"))

    _, result = run("out", model, num_samples=2)

    assert (result["written"], result["num_samples"]) == (14, 22)
    assert contents(out) == contents(expected)


def test_a_shard_that_was_complete_when_the_process_died_is_not_generated_again(run, monkeypatch):
    expected, _ = run("expected")
    write = parts.atomic_write_json

    def killed(path, content):
        if path.name == "part_0000001.json":
            raise KeyboardInterrupt
        write(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(parts, "atomic_write_json", killed)
        with pytest.raises(KeyboardInterrupt):
            run("out")

    out, result = run("out")

    assert result["written"] == 3
    assert contents(out) == contents(expected)


def test_a_finished_dataset_is_left_as_it_is(run):
    out, _ = run("out")
    before = contents(out)

    _, result = run("out")

    assert (result["written"], result["num_samples"], result["shards_left"]) == (0, 11, 0)
    assert contents(out) == before


def sampler(**changes) -> dict:
    return {"settings": SETTINGS.model_copy(update={"sampler": SETTINGS.sampler.model_copy(update=changes)})}


@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize(
    ("what", "changes"),
    [
        (r"seed \(5, now 6\);", sampler(seed=6)),
        (r"steps \(3, now 4\);", sampler(steps=4)),
        (r"solver \('euler', now 'heun'\);", sampler(solver="heun")),
        (r"guidance_scale \(1.0, now 2.0\);", sampler(guidance_scale=2.0)),
        (r"num_samples \(1, now 2\), view_separator \(None, now '_'\);", {"num_samples": 2}),
        (r"source \('a model', now 'another'\);", {"label": "another"}),
        (r"weights_sha256 \('\w+', now '\w+'\);", {"model": "other"}),
        (r"data \('11 samples in 3 shards, .*now '11 samples in 3 shards, .*'\);", {"data": "other"}),
    ],
)
def test_a_folder_begun_with_other_arguments_is_refused(run, make_dataset, config, what, changes, world_size):
    folder, _ = run("out", world_size=world_size)  # finished by one process, begun by one of three
    if changes.get("model"):
        changes = {"model": random_model(config, seed=1)}
    if changes.get("data"):
        changes = {"data": make_dataset(*linear_pairs(11, noise=0.5, seed=1)[:2], "other")}
    before = contents(folder)

    with pytest.raises(DataError, match=r"json: was started with another " + what):
        run("out", **changes)

    assert contents(folder) == before


def test_the_folder_of_another_dataset_is_refused(source, run):
    before = contents(Path(source.location))
    with pytest.raises(DataError, match=r"source/manifest\.json: another command wrote this dataset"):
        run("source")
    assert contents(Path(source.location)) == before


def test_a_copy_of_the_source_is_the_same_source(source, run, tmp_path):
    run("out", world_size=2)

    out, result = run("out", data=EmbeddingDataset(shutil.copytree(source.location, tmp_path / "copy")))

    assert (result["written"], result["num_samples"]) == (4, 11)
    assert Manifest.load(out).num_samples == 11


def test_a_model_that_diverges_on_an_image_is_an_error_that_names_it_and_makes_no_dataset(run, source, config):
    model, bad = random_model(config), source.read(1, 1)["eva"]

    def diverging(usual, x, t, eva, drop):
        return usual(x, t, eva, drop).masked_fill((eva == bad).all(2, keepdim=True), float("nan"))

    with pytest.raises(DataError, match=r"1 of 3 parts could not be written.*'image_005': clip holds NaN"):
        run("out", altered(model, diverging))

    out = Path(source.location).with_name("out")
    assert [path.name for path in out.iterdir()] == [".parts"]
    assert run("out", model)[1]["written"] == 4


def test_no_samples_is_wrong_usage(run, tmp_path):
    with pytest.raises(ConfigError, match="num_samples = 0"):
        run("out", num_samples=0)
    assert not (tmp_path / "out").exists()
