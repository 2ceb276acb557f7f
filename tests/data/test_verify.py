"""`verify` finds each kind of damage and names it; `stats` and `inspect` show what numpy computes."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from blip3o_ds.data.format.index import ShardIndex, index_path
from blip3o_ds.data.format.schema import DatasetSpec, StorageDType
from blip3o_ds.data.format.writer import DatasetWriter
from blip3o_ds.data.reading.dataset import EmbeddingDataset
from blip3o_ds.data.reading.loader import read_batches
from blip3o_ds.data.tools.stats import inspect, stats
from blip3o_ds.data.tools.verify import verify
from blip3o_ds.errors import DataError
from blip3o_ds.files import sha256_file


def write_dataset(folder: Path, dtype: StorageDType = "bf16") -> Path:
    spec = DatasetSpec.pair(16, "patch_only", 12, 6, dtype, "eva", "clip")
    generator = torch.Generator().manual_seed(0)
    with DatasetWriter(folder, spec, samples_per_shard=4) as writer:
        for i in range(10):
            eva, clip = torch.randn(16, 12, generator=generator), torch.randn(16, 6, generator=generator)
            writer.write(f"key_{i}", {"eva": eva, "clip": clip}, {"caption": f"number {i}"})
    return folder


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32", "fp8-e4m3"])
def test_a_sound_dataset_has_no_problems(tmp_path: Path, dtype: StorageDType) -> None:
    report = verify(write_dataset(tmp_path / "data", dtype))

    assert report.ok
    assert json.loads(json.dumps(report.to_dict()))["num_samples"] == 10


def cut(folder: Path) -> None:
    path = folder / "shard_00001.tar"
    path.write_bytes(path.read_bytes()[:3000])


def flip_a_value(folder: Path) -> None:
    path = folder / "shard_00001.tar"
    content = bytearray(path.read_bytes())
    offset = content.index(b'"clip"') + 400
    content[offset] ^= 0x01
    path.write_bytes(content)


def put_nan(folder: Path) -> None:
    """As a writer with a fault would: checksums are right, the values are not."""
    path = folder / "shard_00001.tar"
    content = bytearray(path.read_bytes())
    start = content.index(b'"clip"')
    start += content[start:].index(b"}}") + 50
    start -= start % 2
    content[start : start + 2] = b"\xc0\x7f"
    old = sha256_file(path)
    path.write_bytes(content)
    manifest = folder / "manifest.json"
    manifest.write_text(manifest.read_text().replace(old, sha256_file(path)))
    replace(ShardIndex.load(index_path(path)), sha256=sha256_file(path)).save(index_path(path))


def remove_tar(folder: Path) -> None:
    (folder / "shard_00002.tar").unlink()


def remove_index(folder: Path) -> None:
    (folder / "shard_00002.tar.idx").unlink()


def swap_indices(folder: Path) -> None:
    first, second = folder / "shard_00000.tar.idx", folder / "shard_00001.tar.idx"
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)


def copy_a_shard(folder: Path) -> None:
    for suffix in ("", ".idx"):
        (folder / f"shard_00003.tar{suffix}").write_bytes((folder / f"shard_00000.tar{suffix}").read_bytes())


def list_a_shard_twice(folder: Path) -> None:
    copy_a_shard(folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["shards"].append({**manifest["shards"][0], "name": "shard_00003.tar"})
    manifest["num_samples"] += 4
    for side in ("eva", "clip"):
        manifest["stats"][side]["count"] += 4 * 16
    (folder / "manifest.json").write_text(json.dumps(manifest))


def shift_statistics(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["stats"]["clip"]["mean"][3] += 0.01
    (folder / "manifest.json").write_text(json.dumps(manifest))


def remove_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (cut, r"shard_00001\.tar: 3000 bytes"),
        (flip_a_value, r"shard_00001\.tar: its SHA-256"),
        (put_nan, r"shard_00001\.tar: sample 'key_4': (clip|eva) holds NaN"),
        (remove_tar, r"shard_00002\.tar: listed in the manifest, but missing"),
        (remove_index, r"shard_00002\.tar\.idx"),
        (swap_indices, r"shard_00000\.tar\.idx: its sample count, size or checksum"),
        (copy_a_shard, r"shard_00003\.tar: not listed"),
        (list_a_shard_twice, r"shard_00003\.tar: key 'key_0' appears in shard_00000\.tar"),
        (shift_statistics, r"manifest statistics of clip differ .* in 1 channels"),
        (remove_manifest, r"manifest\.json"),
    ],
)
def test_damage_is_found_and_named(tmp_path: Path, damage: Callable[[Path], None], problem: str) -> None:
    folder = write_dataset(tmp_path / "data")
    damage(folder)

    report = verify(folder)

    assert not report.ok
    assert any(re.search(problem, found) for found in report.problems), report.problems


def test_stats_are_those_of_numpy(tmp_path: Path) -> None:
    folder = write_dataset(tmp_path / "data")
    dataset = EmbeddingDataset(folder)
    (batch,) = read_batches(dataset, range(len(dataset)), 100)
    clip = batch["clip"].double().numpy().reshape(-1, 6)

    found = json.loads(json.dumps(stats(folder)))

    assert (found["samples"], found["tokens"], found["dtype"]) == (10, 160, "bf16")
    assert found["bytes"] == sum(path.stat().st_size for path in folder.glob("*.tar"))
    assert found["clip"]["mean"] == pytest.approx(clip.mean())
    assert found["clip"]["std_median"] == pytest.approx(np.median(clip.std(0)))
    assert found["clip"]["rms_token_norm"] == pytest.approx(np.sqrt((clip**2).sum(1).mean()))


def test_inspect_shows_the_set_and_one_sample(tmp_path: Path) -> None:
    folder = write_dataset(tmp_path / "data")
    sample = EmbeddingDataset(folder).read(1, 2)

    whole, one = inspect(folder), json.loads(json.dumps(inspect(folder, "key_6")))

    assert whole["first_keys"] == ["key_0", "key_1", "key_2", "key_3"]
    assert one["meta"] == {"caption": "number 6"}
    assert one["clip"]["shape"] == [16, 6]
    assert one["clip"]["token_norm_max"] == pytest.approx(np.linalg.norm(sample["clip"].double().numpy(), axis=1).max())
    with pytest.raises(DataError, match="'other'"):
        inspect(folder, "other")
