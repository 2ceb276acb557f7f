"""Reading and writing datasets, with `tarfile`, `webdataset` and float64 sums as the oracles."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import tarfile

import numpy as np
import pytest
import safetensors.torch
import torch
import webdataset

import blip3o_ds.data.format.codec as codec_module
import blip3o_ds.data.format.writer as writer_module
import blip3o_ds.data.reading.shard as shard_module
from blip3o_ds.data.format.manifest import Manifest
from blip3o_ds.data.format.writer import DatasetWriter
from blip3o_ds.data.reading.dataset import EmbeddingDataset
from blip3o_ds.data.reading.shard import ShardReader
from blip3o_ds.errors import DataError
from blip3o_ds.files import atomic_write, sha256_file

TORCH_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".writer.lock"}


def named(key, eva, clip, meta):
    """A sample of the fixture as the writer takes it."""
    return key, {"eva": eva, "clip": clip}, meta


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_what_is_read_is_what_was_written(dataset_dir, samples, spec, dtype):
    spec = spec.stored_as(dtype)
    dataset = EmbeddingDataset(dataset_dir(6, 4, spec))

    assert dataset.shard_sizes == [4, 2]
    assert len(dataset) == 6
    for i, (key, eva, clip, meta) in enumerate(samples(6, spec)):
        sample = dataset.read(i // 4, i % 4)
        assert sample.key == key
        assert torch.equal(sample["eva"], eva.to(TORCH_DTYPES[dtype]))
        assert torch.equal(sample["clip"], clip.to(TORCH_DTYPES[dtype]))
        assert dataset.meta(i // 4, i % 4) == meta


def test_what_is_read_may_be_changed_in_place(dataset_dir):
    dataset = EmbeddingDataset(dataset_dir(4))
    before = dataset.read(0, 1)["eva"].clone()
    dataset.read(0, 1)["eva"].zero_()
    assert torch.equal(dataset.read(0, 1)["eva"], before)


def test_tarfile_reads_the_same_samples_in_order(dataset_dir, samples):
    dst = dataset_dir(4)
    with tarfile.open(dst / "shard_00000.tar") as tar:
        members = tar.getmembers()
        for i, (key, eva, clip, meta) in enumerate(samples(4)):
            assert [m.name for m in members[2 * i : 2 * i + 2]] == [f"{key}.safetensors", f"{key}.json"]
            tensors = safetensors.torch.load(tar.extractfile(members[2 * i]).read())
            assert torch.equal(tensors["eva"], eva.bfloat16())
            assert torch.equal(tensors["clip"], clip.bfloat16())
            assert json.load(tar.extractfile(members[2 * i + 1])) == meta
    assert all((m.mtime, m.uid, m.gid, m.mode) == (0, 0, 0, 0o644) for m in members)


def test_webdataset_reads_the_same_samples(dataset_dir, samples):
    dst = dataset_dir(4)
    found = list(webdataset.WebDataset(str(dst / "shard_00000.tar"), shardshuffle=False))
    assert [sample["__key__"] for sample in found] == [key for key, *_ in samples(4)]
    for sample, (_, eva, _, meta) in zip(found, samples(4), strict=True):
        assert torch.equal(safetensors.torch.load(sample["safetensors"])["eva"], eva.bfloat16())
        assert json.loads(sample["json"]) == meta


def test_keys_longer_than_a_tar_header_and_beyond_ascii_survive(tmp_path, spec, samples):
    key = "日本-" + "x" * 120
    with DatasetWriter(tmp_path / "d", spec) as writer:
        writer.write(*named(key, *samples(1)[0][1:]))
    found = list(webdataset.WebDataset(str(tmp_path / "d" / "shard_00000.tar"), shardshuffle=False))
    assert found[0]["__key__"] == key
    assert EmbeddingDataset(tmp_path / "d").read(0, 0).key == key


def test_statistics_are_those_of_the_stored_values_in_float64(dataset_dir, samples):
    manifest = Manifest.load(dataset_dir(11))
    for stats, column in ((manifest.stats["eva"], 1), (manifest.stats["clip"], 2)):
        values = torch.cat([sample[column] for sample in samples(11)]).bfloat16().double().numpy()
        assert stats.count == len(values)
        np.testing.assert_allclose(stats.mean, values.mean(0), rtol=1e-13, atol=1e-15)
        np.testing.assert_allclose(stats.var, values.var(0), rtol=1e-12)


def test_checksums_in_the_manifest_are_those_of_the_files(dataset_dir):
    dst = dataset_dir(6)
    for shard in Manifest.load(dst).shards:
        assert shard.sha256 == sha256_file(dst / shard.name)
        assert shard.num_bytes == (dst / shard.name).stat().st_size


def test_fp8_reads_as_bf16_close_to_the_source(dataset_dir, samples, spec):
    spec = spec.stored_as("fp8-e4m3")
    dataset = EmbeddingDataset(dataset_dir(2, 4, spec), token_layout="patch_only")
    for i, (_, eva, _, _) in enumerate(samples(2, spec)):
        found = dataset.read(0, i)["eva"]
        assert found.dtype == torch.bfloat16
        torch.testing.assert_close(found.float(), eva[1:], rtol=0.07, atol=0.01)


def test_patch_only_view_of_cls_patch_drops_token_0(dataset_dir, samples):
    dst = dataset_dir(3)
    view = EmbeddingDataset(dst, token_layout="patch_only")
    assert (view.spec.num_tokens, view.spec.token_layout) == (4, "patch_only")
    for i, (_, eva, clip, _) in enumerate(samples(3)):
        assert torch.equal(view.read(0, i)["eva"], eva[1:].bfloat16())
        assert torch.equal(view.read(0, i)["clip"], clip[1:].bfloat16())


@pytest.mark.parametrize(
    ("limits", "sizes"),
    [
        ({"max_shards": 2}, [4, 4]),
        ({"max_samples": 5}, [4, 1]),
        ({"max_samples": 8}, [4, 4]),
        ({"max_shards": 1, "max_samples": 3}, [3]),
        ({"max_samples": 99}, [4, 4, 2]),
    ],
)
def test_limits_keep_the_first_shards_and_samples(dataset_dir, limits, sizes):
    assert EmbeddingDataset(dataset_dir(10), **limits).shard_sizes == sizes


def test_a_resumed_writer_makes_the_same_bytes_as_an_uninterrupted_one(tmp_path, spec, samples, dataset_dir):
    whole = dataset_dir(10)

    class Stop(Exception):
        pass

    with contextlib.suppress(Stop), DatasetWriter(tmp_path / "resumed", spec, 4) as writer:
        for sample in samples(10)[:6]:
            writer.write(*named(*sample))
        raise Stop
    assert sorted(contents(tmp_path / "resumed")) == ["shard_00000.tar", "shard_00000.tar.idx"]
    (tmp_path / "resumed" / ".shard_00001.tar.999.tmp").write_bytes(b"left by a kill")
    (tmp_path / "resumed" / "shard_00001.tar").write_bytes(b"renamed, but killed before its index")
    with DatasetWriter(tmp_path / "resumed", spec, 4, resume=True) as writer:
        assert writer.done_keys() == {key for key, *_ in samples(4)}
        for sample in samples(10):
            if sample[0] not in writer.done_keys():
                writer.write(*named(*sample))

    assert contents(tmp_path / "resumed") == contents(whole)


def test_resuming_with_another_spec_is_refused(dataset_dir, spec):
    dst = dataset_dir(4)
    with pytest.raises(DataError, match=r"shard_00000\.tar.*dtype: 'bf16' != 'fp16'"):
        DatasetWriter(dst, spec.stored_as("fp16"), resume=True)


def test_a_folder_with_shards_is_not_begun_anew(dataset_dir, spec):
    dst = dataset_dir(4)
    with pytest.raises(DataError, match="already holds shards"):
        DatasetWriter(dst, spec)


def nan_in(values):
    values[2, 1] = float("nan")
    return values


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda k, e, c, m: ("a.b", e, c, m), "'a.b' must be text without"),
        (lambda k, e, c, m: ("a/b", e, c, m), "'a/b' must be text without"),
        (lambda k, e, c, m: ("image000", e, c, m), "'image000' comes twice"),
        (lambda k, e, c, m: (k, e[:, :-1], c, m), r"'image001': eva has shape \[5, 7\], expected \[5, 8\]"),
        (lambda k, e, c, m: (k, e, c[1:], m), r"'image001': clip has shape \[4, 4\], expected \[5, 4\]"),
        (lambda k, e, c, m: (k, e, nan_in(c), m), "'image001': clip holds NaN"),
        (lambda k, e, c, m: (k, e.int(), c, m), "'image001': eva has dtype torch.int32"),
        (lambda k, e, c, m: (k, e, c, {"caption": float("inf")}), "'image001': its metadata"),
        (lambda k, e, c, m: (k, e, c, {"caption": b"bytes"}), "'image001': its metadata"),
    ],
)
def test_a_bad_sample_is_refused_and_leaves_no_trace(tmp_path, spec, samples, spoil, message):
    good, bad, _ = samples(3)
    with DatasetWriter(tmp_path / "d", spec) as writer:
        writer.write(*named(*good))
        with pytest.raises(DataError, match=message):
            writer.write(*named(*spoil(*bad)))
        writer.write(*named(*samples(3)[2]))
    assert [key for key, *_ in (good, samples(3)[2])] == ShardReader(tmp_path / "d" / "shard_00000.tar").keys


def test_a_value_too_large_for_fp16_is_refused(tmp_path, spec, samples):
    key, eva, clip, meta = samples(1)[0]
    with (
        pytest.raises(DataError, match=r"eva reaches 7e\+04, more than fp16 holds"),
        DatasetWriter(tmp_path / "d", spec.stored_as("fp16")) as writer,
    ):
        writer.write(*named(key, eva.fill_(7e4), clip, meta))
    assert contents(tmp_path / "d") == {}


@pytest.mark.parametrize("limit", [2_000, 12_000, 16_000])
def test_a_full_disk_leaves_complete_shards_only(tmp_path, spec, samples, monkeypatch, limit):
    room = {"left": limit}

    class FullDisk(io.FileIO):
        def write(self, content):
            room["left"] -= len(content)
            if room["left"] < 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().write(content)

    @contextlib.contextmanager
    def small_disk(path):
        with atomic_write(path) as file:
            yield FullDisk(file.fileno(), "wb", closefd=False)

    monkeypatch.setattr(writer_module, "atomic_write", small_disk)
    dst = tmp_path / "d"

    def write_all():
        with DatasetWriter(dst, spec, 2) as writer:
            for sample in samples(8):
                writer.write(*named(*sample))

    with pytest.raises(DataError, match="No space left on device"):
        write_all()

    names = sorted(contents(dst))
    assert "manifest.json" not in names
    assert not any(name.endswith(".tmp") for name in names)
    assert [name for name in names if name.endswith(".idx")] == [
        f"{name}.idx" for name in names if name.endswith(".tar")
    ]
    for name in names:
        if name.endswith(".tar"):
            assert len(ShardReader(dst / name)) == 2


def test_a_failed_disk_is_not_forgotten_by_a_caller_who_goes_on(tmp_path, spec, samples, monkeypatch):
    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(writer_module.HashingFile, "write", fail)

    def go_on_after_a_failure():
        with DatasetWriter(tmp_path / "d", spec) as writer:
            with contextlib.suppress(DataError):
                writer.write(*named(*samples(2)[0]))
            monkeypatch.undo()
            with contextlib.suppress(DataError):
                writer.write(*named(*samples(2)[1]))

    with pytest.raises(DataError, match="No space left"):
        go_on_after_a_failure()
    assert contents(tmp_path / "d") == {}


def test_an_index_that_cannot_be_written_takes_its_tar_along(tmp_path, spec, samples, monkeypatch):
    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(writer_module.ShardIndex, "save", fail)
    with pytest.raises(DataError, match="No space left"), DatasetWriter(tmp_path / "d", spec) as writer:
        writer.write(*named(*samples(1)[0]))
    assert contents(tmp_path / "d") == {}


def test_a_dataset_without_samples_is_refused(tmp_path, spec):
    with pytest.raises(DataError, match="no sample was written"), DatasetWriter(tmp_path / "d", spec):
        pass
    assert contents(tmp_path / "d") == {}


def test_a_truncated_shard_is_refused_by_name(dataset_dir):
    path = dataset_dir(6) / "shard_00001.tar"
    path.write_bytes(path.read_bytes()[:-512])
    dataset = EmbeddingDataset(path.parent)
    dataset.read(0, 0)
    with pytest.raises(DataError, match=r"shard_00001\.tar has .* bytes, expected .*truncated"):
        dataset.read(1, 0)
    with pytest.raises(DataError, match=r"shard_00001\.tar has"):
        ShardReader(path)


@pytest.mark.parametrize(("name", "message"), [("shard_00001.tar", "missing"), ("shard_00001.tar.idx", "missing")])
def test_a_missing_file_is_named(dataset_dir, name, message):
    dst = dataset_dir(6)
    (dst / name).unlink()
    with pytest.raises(DataError, match=f"{name} is {message}"):
        EmbeddingDataset(dst).read(1, 0)


def test_a_damaged_index_is_named(dataset_dir):
    path = dataset_dir(6) / "shard_00000.tar.idx"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(DataError, match=r"shard_00000\.tar\.idx"):
        EmbeddingDataset(path.parent).read(0, 0)


def test_a_shard_of_another_dataset_is_refused(dataset_dir, tmp_path, spec, samples):
    dst = dataset_dir(6)
    with DatasetWriter(tmp_path / "other", spec, 4) as writer:
        for key, _, clip, meta in samples(6):
            writer.write(*named(key, clip.repeat(1, 2), clip, meta))
    for name in ("shard_00001.tar", "shard_00001.tar.idx"):
        (dst / name).write_bytes((tmp_path / "other" / name).read_bytes())
    with pytest.raises(DataError, match=r"shard_00001\.tar: its index does not belong"):
        EmbeddingDataset(dst).read(1, 0)


def test_a_damaged_sample_header_is_named_by_shard_and_key(dataset_dir):
    path = dataset_dir(4) / "shard_00000.tar"
    content = bytearray(path.read_bytes())
    start = int(ShardReader(path).index.members["tensors_offset"][2])
    content[start + 12] ^= 1
    path.write_bytes(content)
    dataset = EmbeddingDataset(path.parent)
    dataset.read(0, 1)
    with pytest.raises(DataError, match=r"shard_00000\.tar: sample image002: "):
        dataset.read(0, 2)


def test_a_stored_nan_is_named_by_shard_and_key(dataset_dir):
    path = dataset_dir(4) / "shard_00000.tar"
    content = bytearray(path.read_bytes())
    start = int(ShardReader(path).index.tensors["clip"][3])
    content[start : start + 2] = b"\xc0\x7f"  # a NaN in bf16
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"shard_00000\.tar: sample image003: clip holds NaN"):
        EmbeddingDataset(path.parent).read(0, 3)


def test_more_shards_than_may_be_open_are_read_all_the_same(dataset_dir, samples, monkeypatch):
    monkeypatch.setattr("blip3o_ds.data.reading.dataset._OPEN_SHARDS", 2)
    dataset = EmbeddingDataset(dataset_dir(10, 1))
    for _ in range(2):
        for i, (_, eva, _, _) in enumerate(samples(10)):
            assert torch.equal(dataset.read(i, 0)["eva"], eva.bfloat16())
    assert len(dataset._open_shards) == 2


def test_any_flipped_byte_of_an_index_is_noticed(dataset_dir):
    path = dataset_dir(4) / "shard_00000.tar.idx"
    content = path.read_bytes()
    for place in range(0, len(content), 7):
        path.write_bytes(content[:place] + bytes([content[place] ^ 0x01]) + content[place + 1 :])
        with pytest.raises(DataError, match=r"shard_00000\.tar\.idx"):
            ShardReader(path.with_suffix(""))


def test_a_read_that_comes_in_pieces_is_put_together(dataset_dir, samples, monkeypatch):
    reader = ShardReader(dataset_dir(4) / "shard_00000.tar")
    whole = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, views, offset: whole(fd, [memoryview(views[0])[:7]], offset))
    sample = reader.read(2)
    assert torch.equal(sample["eva"], samples(4)[2][1].bfloat16())
    assert torch.equal(sample["clip"], samples(4)[2][2].bfloat16())


@pytest.mark.parametrize("name", ["eva", "clip"])
def test_a_large_tensor_is_read_and_checked_piece_by_piece(dataset_dir, samples, monkeypatch, name):
    monkeypatch.setattr(codec_module, "_PIECE_BYTES", 16)
    path = dataset_dir(4) / "shard_00000.tar"
    sample = ShardReader(path).read(2)
    assert torch.equal(sample["eva"], samples(4)[2][1].bfloat16())
    assert torch.equal(sample["clip"], samples(4)[2][2].bfloat16())
    with open(path, "r+b") as file:  # the last value, which lies in the last piece
        file.seek(int(ShardReader(path).index.tensors[name][2]) + sample[name].nbytes - 2)
        file.write(b"\x80\xff")
    with pytest.raises(DataError, match=rf"shard_00000\.tar: sample image002: {name} holds NaN or infinity"):
        ShardReader(path).read(2)


def test_a_read_that_the_system_refuses_names_the_sample(dataset_dir, monkeypatch):
    reader = ShardReader(dataset_dir(4) / "shard_00000.tar")

    def refuse(*_):
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    monkeypatch.setattr(os, "preadv", refuse)
    with pytest.raises(DataError, match=r"shard_00000\.tar: sample image002: reading failed: Stale file handle"):
        reader.read(2)


def test_the_whole_of_a_sample_that_is_not_in_memory_is_asked_for(dataset_dir, monkeypatch):
    path = dataset_dir(4) / "shard_00000.tar"
    reader = ShardReader(path)
    asked = []
    monkeypatch.setattr(os, "posix_fadvise", lambda fd, start, size, advice: asked.extend(range(start, start + size)))
    monkeypatch.setattr(reader, "_advice_bytes", 100)
    assert not reader.will_need(1)
    assert asked == []  # it was written a moment ago
    monkeypatch.setattr(reader, "_is_cached", lambda offset: False)
    assert reader.will_need(1)
    start, size = (int(reader.index.members[name][1]) for name in ("tensors_offset", "tensors_size"))
    assert asked == list(range(start, start + size))


def test_advice_is_as_long_as_the_system_s_readahead(tmp_path):
    assert shard_module._readahead_bytes(os.makedev(4095, 1)) == 128 * 1024  # there is no such device
    found = shard_module._readahead_bytes(tmp_path.stat().st_dev)
    assert found >= 128 * 1024
    assert found % 1024 == 0


def test_a_header_whose_tensors_leave_a_gap_is_refused(spec):
    offsets = {"clip": 100, "eva": 100 + 5 * 4 * 2 + 8}
    with pytest.raises(DataError, match=r"where: tensor eva starts at byte 148 .* expected 140"):
        shard_module._in_file_order(spec, 100, offsets, "where")
