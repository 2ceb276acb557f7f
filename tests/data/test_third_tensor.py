"""A third tensor in a sample, a text's embedding with its own number of tokens: one more entry where it is written.

Nothing below names it but the writer, the checks of its values, and the fields of the files.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from blip3o_ds.data.format.codec import decode, encode
from blip3o_ds.data.format.index import ShardIndex
from blip3o_ds.data.format.manifest import Manifest
from blip3o_ds.data.format.schema import DatasetSpec, TensorSpec
from blip3o_ds.data.format.writer import DatasetWriter
from blip3o_ds.data.normalization import Normalizer
from blip3o_ds.data.reading.dataset import EmbeddingDataset
from blip3o_ds.data.reading.loader import EmbeddingLoader, read_batches
from blip3o_ds.data.reading.order import GlobalOrder
from blip3o_ds.data.tools.append import append
from blip3o_ds.data.tools.convert import convert
from blip3o_ds.data.tools.repair import repair
from blip3o_ds.data.tools.split import split
from blip3o_ds.data.tools.stats import inspect, stats
from blip3o_ds.data.tools.verify import verify
from blip3o_ds.errors import DataError

SHAPES = {"eva": (5, 8), "clip": (5, 4), "text": (77, 32)}


def spec_with(text_dtype: str) -> DatasetSpec:
    pair = DatasetSpec.pair(5, "cls_patch", 8, 4, "bf16", "an-eva", "a-clip")
    text = TensorSpec(32, text_dtype, "a-text-encoder", "condition", num_tokens=77)
    return replace(pair, tensors={**pair.tensors, "text": text})


def tensors_of(number: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(number)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def write(folder: Path, numbers: range, spec: DatasetSpec) -> Path:
    with DatasetWriter(folder, spec, samples_per_shard=4) as writer:
        for number in numbers:
            writer.write(f"image{number:03d}", tensors_of(number), {"caption": f"number {number}"})
    return folder


def as_read(number: int, spec: DatasetSpec) -> dict[str, torch.Tensor]:
    return {name: decode(*encode(x, spec.tensors[name].dtype)) for name, x in tensors_of(number).items()}


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, values in found.items():
        assert values.dtype == expected[name].dtype
        assert torch.equal(values, expected[name])


@pytest.fixture(params=["fp32", "fp16", "fp8-e4m3"])
def spec(request: pytest.FixtureRequest) -> DatasetSpec:
    return spec_with(request.param)


@pytest.fixture
def folder(tmp_path: Path, spec: DatasetSpec) -> Path:
    return write(tmp_path / "set", range(10), spec)


def test_the_files_say_version_2_and_name_every_tensor(folder, spec):
    content = json.loads((folder / "manifest.json").read_text())
    assert content["format_version"] == 2
    text = {"dim": 32, "dtype": spec.tensors["text"].dtype, "encoder": "a-text-encoder", "role": "condition"}
    assert content["spec"]["tensors"]["text"] == {**text, "num_tokens": 77}
    assert {name: entry["count"] for name, entry in content["stats"].items()} == {"eva": 50, "clip": 50, "text": 770}
    assert Manifest.load(folder).spec == spec
    index = ShardIndex.load(folder / "shard_00000.tar.idx")
    assert index.spec == spec
    assert index.moments["text"].count == 4 * 77


def test_the_usual_pair_stays_version_1(tmp_path):
    spec = spec_with("bf16")
    pair = replace(spec, tensors={name: spec.tensors[name] for name in ("eva", "clip")})
    with DatasetWriter(tmp_path / "set", pair) as writer:
        writer.write("a", {name: x for name, x in tensors_of(0).items() if name != "text"}, {})
    content = json.loads((tmp_path / "set" / "manifest.json").read_text())
    assert content["format_version"] == 1
    assert list(content["spec"]) == [
        *("num_tokens", "token_layout", "eva_dim", "clip_dim", "dtype", "condition_encoder", "target_encoder")
    ]


def test_a_reader_gets_it_in_its_own_dtype_and_shape(folder, spec):
    dataset = EmbeddingDataset(folder)
    for number in range(10):
        assert_same(dataset.read(*dataset.place(number)).tensors, as_read(number, spec))


def test_dropping_the_cls_token_leaves_its_tokens_alone(folder, spec):
    sample = EmbeddingDataset(folder, token_layout="patch_only").read(0, 1)
    expected = as_read(1, spec)
    assert_same(sample.tensors, {"eva": expected["eva"][1:], "clip": expected["clip"][1:], "text": expected["text"]})


def test_the_loader_hands_it_out_in_batches(folder, spec):
    dataset = EmbeddingDataset(folder, token_layout="patch_only")
    order = GlobalOrder(dataset.shard_sizes, seed=3)
    sizes = dict(micro_batch_size=2, gradient_accumulation_steps=1, rank=0, world_size=1)
    with EmbeddingLoader(dataset, order, **sizes) as loader:
        for _ in range(5):
            batch = next(loader.next_step()).decode()
            assert batch["text"].shape == (2, 77, 32)
            for row, key in enumerate(batch.keys):
                expected = as_read(int(key.removeprefix("image")), spec)
                assert torch.equal(batch["text"][row], expected["text"])
                assert torch.equal(batch["eva"][row], expected["eva"][1:])
    (batch,) = read_batches(dataset, [3, 7], batch_size=2)
    assert torch.equal(batch["text"][1], as_read(7, spec)["text"])


def test_verify_finds_it_sound_or_names_it(folder):
    assert verify(folder).problems == []
    content = json.loads((folder / "manifest.json").read_text())
    content["stats"]["text"]["mean"][5] += 1
    (folder / "manifest.json").write_text(json.dumps(content))
    assert [problem.split(": ", 1)[1] for problem in verify(folder).problems] == [
        "manifest statistics of text differ from those of the data in 1 channels"
    ]


def test_repair_rebuilds_an_index_and_leaves_a_bad_sample_out(folder, spec):
    path = folder / "shard_00001.tar.idx"
    before = path.read_bytes()
    index = ShardIndex.load(path)
    path.unlink()
    assert repair(folder).indexes_rebuilt == 1
    assert path.read_bytes() == before

    with open(folder / "shard_00001.tar", "r+b") as file:
        file.seek(int(index.tensors["text"][2]))
        file.write(b"\xff" * 4)  # NaN in every dtype
    report = repair(folder)
    assert [entry["key"] for entry in report.dropped] == ["image006"]
    assert "text holds NaN" in report.dropped[0]["error"]
    assert verify(folder).problems == []
    dataset = EmbeddingDataset(folder)
    assert_same(dataset.read(*dataset.place(6)).tensors, as_read(7, spec))


def test_append_and_split_carry_it(folder, spec, tmp_path):
    append(folder, [write(tmp_path / "more", range(10, 14), spec)])
    assert verify(folder).problems == []
    split(folder, tmp_path / "parts", 0.4)
    counts = [Manifest.load(tmp_path / "parts" / part).stats["text"].count for part in ("train", "eval")]
    assert sum(counts) == 14 * 77
    for part in ("train", "eval"):
        assert verify(tmp_path / "parts" / part).problems == []


def test_append_refuses_samples_without_it(folder, tmp_path):
    spec = spec_with("fp32")
    pair = replace(spec, tensors={name: spec.tensors[name] for name in ("eva", "clip")})
    with DatasetWriter(tmp_path / "pair", pair) as writer:
        writer.write("a", {name: x for name, x in tensors_of(0).items() if name != "text"}, {})
    with pytest.raises(DataError, match=r"tensors\.text\.dim: None != 32"):
        append(folder, [tmp_path / "pair"])


def test_stats_and_inspect_show_it(folder):
    assert stats(folder)["text"].keys() == stats(folder)["eva"].keys()
    assert inspect(folder, "image003")["text"]["shape"] == [77, 32]


def test_convert_stores_all_tensors_in_the_dtype_asked_for(folder, spec, tmp_path):
    result = convert(folder, tmp_path / "recast", dtype="bf16", token_layout="patch_only")
    assert result["source_dtype"] == {"eva": "bf16", "clip": "bf16", "text": spec.tensors["text"].dtype}
    assert result["cost"].keys() == SHAPES.keys()
    sample = EmbeddingDataset(tmp_path / "recast").read(0, 2)
    assert torch.equal(sample["text"], as_read(2, spec)["text"].bfloat16())
    assert torch.equal(sample["eva"], as_read(2, spec)["eva"][1:])


def test_a_run_trains_on_samples_that_hold_it(tmp_path, launch):
    pair = DatasetSpec.pair(16, "patch_only", 12, 8, "fp32", "an-eva", "a-clip")
    spec = replace(pair, tensors={**pair.tensors, "text": spec_with("fp16").tensors["text"]})
    generator = torch.Generator().manual_seed(0)
    with DatasetWriter(tmp_path / "set", spec) as writer:
        for number in range(8):
            tensors = {name: torch.randn(spec.shape(name), generator=generator) for name in spec.tensors}
            writer.write(f"image{number}", tensors, {})
    run = launch(tmp_path / "set", tmp_path / "out", None, {"train.max_steps": 2, "data.normalization": "standardize"})
    assert run.returncode == 0, run.output
    assert len(run.metrics()) == 2


def test_standardising_uses_its_own_statistics(folder):
    dataset = EmbeddingDataset(folder)
    text = torch.stack([dataset.read(*dataset.place(i))["text"].float() for i in range(10)])
    normalizer = Normalizer.from_stats("standardize", dataset.manifest.stats)
    found = normalizer({"text": text})["text"]
    torch.testing.assert_close(found.mean((0, 1)), torch.zeros(32), atol=1e-4, rtol=0)
    torch.testing.assert_close(normalizer.inverse("text", found), text, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("text"), r"'a': holds the tensors clip, eva, expected clip, eva, text"),
        (lambda t: t.update(other=t["eva"]), r"holds the tensors clip, eva, other, text, expected clip, eva, text"),
        (lambda t: t.update(text=t["text"][1:]), r"text has shape \[76, 32\], expected \[77, 32\]"),
        (lambda t: t["text"].fill_(float("nan")), r"text holds NaN"),
    ],
)
def test_a_sample_with_other_tensors_is_refused(tmp_path, change, message):
    tensors = tensors_of(0)
    change(tensors)
    with pytest.raises(DataError, match=message), DatasetWriter(tmp_path / "d", spec_with("fp32")) as writer:
        writer.write("a", tensors, {})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t["text"].pop("role"), r"spec\.tensors\.text\.role is missing"),
        (lambda t: t["text"].update(role="teacher"), r"tensors\.text\.role must be one of condition, target"),
        (lambda t: t["text"].update(dim=0), r"tensors\.text\.dim must be a positive integer"),
        (lambda t: t["text"].update(dtype="int4"), r"tensors\.text\.dtype must be one of"),
        (lambda t: t["text"].update(colour="red"), r"spec\.tensors\.text\.colour is unknown"),
        (lambda t: t.update({"eva_scale": t["text"]}), r"name must be .* not end with _scale.*; found 'eva_scale'"),
        (lambda t: t.update({"a/b": t["text"]}), r"name must be .*; found 'a/b'"),
        (lambda t: t.update(text=[]), r"spec\.tensors\.text must be a dict"),
        (lambda t: t.clear(), r"tensors must name at least one tensor"),
    ],
)
def test_a_wrong_specification_is_refused_by_file_and_field(tmp_path, change, message):
    path = write(tmp_path / "set", range(1), spec_with("fp32")) / "manifest.json"
    content = json.loads(path.read_text())
    change(content["spec"]["tensors"])
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match=rf"manifest\.json: .*{message}"):
        Manifest.load(path.parent)
