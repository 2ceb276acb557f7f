"""The manifest: what it accepts and how it refuses."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from blip3o_ds.data.format.index import ShardIndex, index_path
from blip3o_ds.data.format.manifest import Manifest, Selection
from blip3o_ds.data.format.schema import DatasetSpec
from blip3o_ds.errors import DataError


def spec_of(num_tokens, token_layout):
    return DatasetSpec.pair(num_tokens, token_layout, 8, 4, "bf16", "a", "b")


@pytest.mark.parametrize(("tokens", "layout", "grid"), [(256, "patch_only", 16), (257, "cls_patch", 16)])
def test_grid_size_leaves_the_cls_token_out(tokens, layout, grid):
    assert spec_of(tokens, layout).grid_size == grid


@pytest.mark.parametrize(("tokens", "layout"), [(257, "patch_only"), (256, "cls_patch"), (0, "patch_only")])
def test_tokens_that_fill_no_grid_are_refused(tokens, layout):
    with pytest.raises(DataError, match="num_tokens"):
        spec_of(tokens, layout)


def test_a_cls_token_can_be_dropped_but_not_invented():
    assert spec_of(257, "cls_patch").viewed_as("patch_only") == spec_of(256, "patch_only")
    with pytest.raises(DataError, match="cannot be read as cls_patch"):
        spec_of(256, "patch_only").viewed_as("cls_patch")


def test_a_manifest_survives_saving_and_loading(dataset_dir, tmp_path):
    manifest = Manifest.load(dataset_dir(6))

    manifest.save(tmp_path)
    again = Manifest.load(tmp_path)

    assert (again.spec, again.shards, again.extra) == (manifest.spec, manifest.shards, manifest.extra)
    assert again.num_samples == 6
    assert again.stats["eva"].mean.tolist() == manifest.stats["eva"].mean.tolist()
    assert again.stats["clip"].var.tolist() == manifest.stats["clip"].var.tolist()


def test_a_digest_is_of_the_samples_and_not_of_their_place_or_statistics(dataset_dir, tmp_path):
    folder = dataset_dir(6)
    manifest, moved = Manifest.load(folder), Path(shutil.copytree(folder, tmp_path / "moved"))
    assert Manifest.load(moved).digest == manifest.digest
    assert replace(manifest, stats={}, extra={"a": 1}).digest == manifest.digest

    first, *rest = manifest.shards
    train, evaluation = (Selection("../whole", 0.5, part) for part in ("train", "eval"))
    others = [
        replace(manifest, shards=(*rest, first)),
        replace(manifest, shards=tuple(rest)),
        replace(manifest, shards=(replace(first, sha256="0" * 64), *rest)),
        replace(manifest, spec=replace(manifest.spec, view_separator="_")),
        replace(manifest, selection=train),
        replace(manifest, selection=evaluation),
        replace(manifest, selection=replace(train, fraction=0.25)),
    ]
    assert len({manifest.digest, *(other.digest for other in others)}) == 1 + len(others)
    elsewhere = replace(manifest, selection=replace(train, of="/elsewhere"))
    assert elsewhere.digest == replace(manifest, selection=train).digest


def test_a_missing_manifest_names_the_commands_that_make_one(tmp_path):
    with pytest.raises(DataError, match=r"manifest\.json is missing.*data convert"):
        Manifest.load(tmp_path)


def set_version(content):
    content["format_version"] = 7


def drop_dim(content):
    del content["spec"]["eva_dim"]


def miscount(content):
    content["num_samples"] = 5


def shorten_mean(content):
    content["stats"]["clip"]["mean"] = [0.0]


def miscount_tokens(content):
    content["stats"]["eva"]["count"] = 1


def misname_dtype(content):
    content["spec"]["dtype"] = "int4"


def leave_folder(content):
    content["shards"][0]["name"] = "../shard_00000.tar"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (set_version, "format_version is 7"),
        (drop_dim, r"spec\.eva_dim is missing"),
        (miscount, "num_samples is 5.*add up to 6"),
        (shorten_mean, r"stats\.clip\.mean holds 1 channels"),
        (miscount_tokens, r"stats\.eva\.count is 1"),
        (misname_dtype, "dtype must be one of"),
        (leave_folder, r"shards\[\]\.name"),
    ],
)
def test_a_wrong_manifest_is_refused_by_file_and_field(dataset_dir, spoil, message):
    path = dataset_dir(6) / "manifest.json"
    content = json.loads(path.read_text())
    spoil(content)
    path.write_text(json.dumps(content))

    with pytest.raises(DataError, match=f"manifest.json.*{message}"):
        Manifest.load(path.parent)


FILES = ["", "..", ".tar", ".hidden.tar", "/etc/x.tar", "a/b.tar", "in_use.lock", "a.tar\n", "manifest.json", "a" * 200]
DIGESTS = ["", "../victim", "/tmp/victim", "0" * 63, "0" * 65, "A" * 64, "g" * 64, "0" * 64 + "\n", "../" * 21 + "a"]


@pytest.mark.parametrize(
    ("field", "value"), [*(("name", value) for value in FILES), *(("sha256", value) for value in DIGESTS)]
)
def test_what_becomes_a_files_name_is_checked_where_it_is_read(dataset_dir, field, value):
    path = dataset_dir(6) / "manifest.json"
    content = json.loads(path.read_text())
    content["shards"][0][field] = value
    path.write_text(json.dumps(content))

    with pytest.raises(DataError, match=rf"manifest.json: shards\[\].{field} must be"):
        Manifest.load(path.parent)


def test_an_index_of_a_shard_without_a_right_sha256_is_refused(dataset_dir):
    path = index_path(dataset_dir(2) / "shard_00000.tar")
    replace(ShardIndex.load(path), sha256="../victim").save(path)

    with pytest.raises(DataError, match=r"shard_00000\.tar\.idx: sha256 must be 64"):
        ShardIndex.load(path)


def test_a_manifest_that_is_not_json_is_refused(tmp_path):
    (tmp_path / "manifest.json").write_text('{"format_version": 1')
    with pytest.raises(DataError, match=r"manifest\.json is not JSON"):
        Manifest.load(tmp_path)
