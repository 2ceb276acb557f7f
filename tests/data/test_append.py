"""`append` adds shards without touching them, refuses what does not fit, and leaves no trace where it fails."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from blip3o_ds.data.format.manifest import Manifest
from blip3o_ds.data.format.schema import DatasetSpec
from blip3o_ds.data.format.writer import DatasetWriter, sole_writer
from blip3o_ds.data.reading.dataset import EmbeddingDataset
from blip3o_ds.data.reading.order import GlobalOrder
from blip3o_ds.data.tools.append import append
from blip3o_ds.data.tools.repair import repair
from blip3o_ds.data.tools.split import split
from blip3o_ds.data.tools.verify import verify
from blip3o_ds.errors import DataError

SPEC = DatasetSpec.pair(4, "patch_only", 8, 4, "fp32", "eva", "clip")


def write(folder: Path, keys: range, spec: DatasetSpec = SPEC) -> Path:
    with DatasetWriter(folder, spec, samples_per_shard=3) as writer:
        for i in keys:
            generator = torch.Generator().manual_seed(i)
            eva = i + torch.randn(spec.shape("eva"), generator=generator)
            clip = torch.randn(spec.shape("clip"), generator=generator)
            writer.write(f"key{i}", {"eva": eva, "clip": clip}, {"n": i})
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".writer.lock"}


def test_appending_gives_what_writing_all_at_once_gives(tmp_path):
    whole = write(tmp_path / "whole", range(12))
    dst = write(tmp_path / "dst", range(6))
    sources = [write(tmp_path / "b", range(6, 9)), write(tmp_path / "c", range(9, 12))]

    result = append(dst, sources)

    assert result == {"shards_added": 2, "samples_added": 6, "shards": 4, "samples": 12}
    assert verify(dst).problems == []
    found, expected = Manifest.load(dst), Manifest.load(whole)
    assert found.shards == expected.shards
    assert np.allclose(found.stats["eva"].mean, expected.stats["eva"].mean, rtol=1e-12)
    assert np.allclose(found.stats["eva"].var, expected.stats["eva"].var, rtol=1e-12)
    assert [entry["name"] for entry in found.extra["appended"]] == ["b", "c"]
    assert (dst / "shard_00002.tar").samefile(tmp_path / "b" / "shard_00000.tar")


def test_shards_that_are_symbolic_links_are_appended_themselves(tmp_path):
    """As a snapshot of the hub's cache has them: `shard.tar -> ../blobs/3f2a`."""
    blobs = write(tmp_path / "blobs", range(6, 12))
    snapshot = tmp_path / "snapshots" / "main"
    snapshot.mkdir(parents=True)
    for path in blobs.iterdir():
        (snapshot / path.name).symlink_to(Path("../../blobs") / path.name)
    dst = write(tmp_path / "dst", range(6))

    append(dst, [snapshot])

    assert not any(path.is_symlink() for path in dst.iterdir())
    for path in snapshot.iterdir():
        path.unlink()
    assert verify(dst).problems == []
    assert len(EmbeddingDataset(dst)) == 12


def test_shards_are_copied_where_they_cannot_be_linked(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    dst, src = write(tmp_path / "dst", range(4)), write(tmp_path / "src", range(4, 8))
    append(dst, [src])
    assert verify(dst).problems == []
    assert not (dst / "shard_00002.tar").samefile(src / "shard_00000.tar")


def test_the_first_epoch_of_the_old_shards_is_the_same_before_and_after(tmp_path):
    dst = write(tmp_path / "dst", range(6))
    before = EmbeddingDataset(dst)
    append(dst, [write(tmp_path / "src", range(6, 12))])
    after = EmbeddingDataset(dst, max_shards=2)
    orders = [GlobalOrder(dataset.shard_sizes, 5, 2).slice(0, 12) for dataset in (before, after)]
    assert orders[0] == orders[1]


def damaged(folder: Path) -> Path:
    path = folder / "shard_00001.tar"
    path.write_bytes(path.read_bytes()[:-512])
    return folder


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda p: [write(p / "s", range(5, 9))],
            r"s/shard_00000\.tar: key 'key5' is in .*dst/shard_00001\.tar as well",
        ),
        (lambda p: [write(p / "s", range(6, 9))] * 2, "key 'key6' is in .* as well"),
        (lambda p: [write(p / "s", range(6, 9), SPEC.stored_as("bf16"))], r"spec is not that .*dtype: 'bf16'"),
        (lambda p: [damaged(write(p / "s", range(6, 12)))], r"s/shard_00001\.tar has \d+ bytes"),
        (lambda p: [write(p / "s", range(6, 9)), p / "absent"], r"absent/manifest\.json is missing"),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_changes(tmp_path, make, message):
    dst = write(tmp_path / "dst", range(6))
    before = contents(dst)
    with pytest.raises(DataError, match=message):
        append(dst, make(tmp_path))
    assert contents(dst) == before


def test_a_split_is_not_appended_to_nor_appended(tmp_path):
    whole = write(tmp_path / "whole", range(12))
    split(whole, tmp_path / "split", 0.5)
    for arguments in ((tmp_path / "split" / "train", [whole]), (whole, [tmp_path / "split" / "eval"])):
        with pytest.raises(DataError, match="a split of"):
            append(*arguments)


def test_a_failure_on_the_way_leaves_the_dataset_as_it_was(tmp_path, monkeypatch):
    dst, src = write(tmp_path / "dst", range(6)), write(tmp_path / "src", range(6, 12))
    before, link = contents(dst), os.link

    def fail_late(source, target):
        if target.name == "shard_00003.tar.idx":
            raise OSError(errno.ENOSPC, "No space left on device")
        link(source, target)

    monkeypatch.setattr(os, "link", fail_late)
    with pytest.raises(OSError, match="No space left"):
        append(dst, [src])
    assert contents(dst) == before


def test_an_append_that_was_killed_can_be_repeated(tmp_path):
    dst, src = write(tmp_path / "dst", range(6)), write(tmp_path / "src", range(6, 12))
    (dst / "shard_00002.tar").write_bytes(b"half")  # the manifest does not name it
    append(dst, [src])
    assert verify(dst).problems == []


def test_while_one_process_writes_into_a_folder_no_other_does(tmp_path):
    dst, other = write(tmp_path / "dst", range(3)), write(tmp_path / "b", range(3, 6))
    hold = "import sys, time; from pathlib import Path; from blip3o_ds.data.format.writer import sole_writer\n"
    hold += "with sole_writer(Path(sys.argv[1])): print(flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", hold, str(dst)], stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        before = contents(dst)
        for write_too in (
            lambda: append(dst, [other]),
            lambda: repair(dst),
            lambda: DatasetWriter(dst, SPEC, samples_per_shard=3, resume=True),
        ):
            with pytest.raises(DataError, match=rf"{dst}: another process is writing"):
                write_too()
        assert contents(dst) == before
        process.kill()
    assert append(dst, [other])["samples_added"] == 3
    assert [path.name for path in dst.glob(".*")] == [".writer.lock"]


def test_a_writer_lets_go_of_the_folder_however_it_ends(tmp_path):
    dst = tmp_path / "dst"
    interrupted = DatasetWriter(dst, SPEC)
    with pytest.raises(KeyboardInterrupt), interrupted:
        raise KeyboardInterrupt
    empty = DatasetWriter(dst, SPEC)
    with pytest.raises(DataError, match="no sample was written"), empty:
        pass
    finished = DatasetWriter(dst, SPEC)
    with finished:
        finished.write("a", {"eva": torch.zeros(4, 8), "clip": torch.zeros(4, 4)}, {})
    with pytest.raises(DataError, match="another specification") as refused:
        DatasetWriter(dst, SPEC.stored_as("bf16"), resume=True)
    with pytest.raises(DataError, match="already holds shards") as refused_too:
        DatasetWriter(dst, SPEC)
    with sole_writer(dst):
        assert refused.tb is not None  # and in it the writer is still in memory
        assert refused_too.tb is not None


def test_a_forked_process_does_not_keep_the_folder(tmp_path):
    with sole_writer(tmp_path):
        child = os.fork()
        if child == 0:
            signal.pause()
    try:
        with sole_writer(tmp_path):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_a_lock_on_a_file_that_is_gone_is_taken_again(tmp_path, monkeypatch):
    path, flock = tmp_path / ".writer.lock", fcntl.flock
    removed = []

    def lock(descriptor, kind):
        flock(descriptor, kind)
        if not removed:
            removed.append(path.unlink())

    monkeypatch.setattr(fcntl, "flock", lock)
    with sole_writer(tmp_path):
        assert path.exists()
    assert removed


def test_where_a_file_system_has_no_locks_writing_goes_on(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    assert len(EmbeddingDataset(write(tmp_path / "dst", range(3)))) == 3
    assert [path.name for path in (tmp_path / "dst").glob(".*")] == [".writer.lock"]
