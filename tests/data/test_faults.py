"""Every kind of damage: what `verify` says, what a run does under `error` and under `skip`, what `repair` makes of it.

Samples are image000 to image009, in shards of 4, 4 and 2; what replaces a bad one is worked out here by the rule.
"""

from __future__ import annotations

import errno
import io
import json
import logging
import os
import re
import tarfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

import blip3o_ds.data.reading.dataset as shards_module
import blip3o_ds.data.reading.ring as ring_module
from blip3o_ds.data.format.index import ShardIndex, index_path
from blip3o_ds.data.format.manifest import Manifest
from blip3o_ds.data.format.writer import ShardWriter
from blip3o_ds.data.reading.bad_samples import BadSamples
from blip3o_ds.data.reading.dataset import EmbeddingDataset
from blip3o_ds.data.reading.loader import EmbeddingLoader
from blip3o_ds.data.reading.order import GlobalOrder
from blip3o_ds.data.reading.shard import ShardReader
from blip3o_ds.data.tools.repair import repair
from blip3o_ds.data.tools.verify import verify
from blip3o_ds.errors import DataError
from blip3o_ds.files import sha256_file

SIZES = (4, 4, 2)
STEPS, GLOBAL_BATCH = 5, 6
EVERY_KEY = [f"image{i:03d}" for i in range(10)]


def overwrite(path: Path, place: int, content: bytes) -> None:
    with open(path, "r+b") as file:
        file.seek(place)
        file.write(content)


def vouch(folder: Path, shard: int = 1) -> None:
    """Make checksums right again, as if the shard had been written with its fault."""
    path = folder / f"shard_{shard:05d}.tar"
    manifest = Manifest.load(folder)
    shards = list(manifest.shards)
    shards[shard] = replace(shards[shard], num_bytes=path.stat().st_size, sha256=sha256_file(path))
    replace(manifest, shards=tuple(shards)).save(folder)
    index = ShardIndex.load(index_path(path))
    replace(index, num_bytes=path.stat().st_size, sha256=sha256_file(path)).save(index_path(path))


def put_value(folder: Path, side: str, bits: bytes) -> None:
    path = folder / "shard_00001.tar"
    overwrite(path, int(ShardReader(path).index.tensors[side][1]), bits)
    vouch(folder)


def put_header(folder: Path, old: bytes, new: bytes) -> None:
    path = folder / "shard_00001.tar"
    start = int(ShardReader(path).index.members["tensors_offset"][1])
    overwrite(path, path.read_bytes().index(old, start), new)
    vouch(folder)


def cut(folder: Path) -> None:
    path = folder / "shard_00001.tar"
    start = int(ShardReader(path).index.members["tensors_offset"][2])
    path.write_bytes(path.read_bytes()[: start + 100])


def flip_a_bit(folder: Path) -> None:
    path = folder / "shard_00001.tar"
    place = int(ShardReader(path).index.tensors["clip"][1])
    overwrite(path, place, bytes([path.read_bytes()[place] ^ 1]))


def break_a_tar_header(folder: Path) -> None:
    path = folder / "shard_00001.tar"
    overwrite(path, int(ShardReader(path).index.members["tensors_offset"][1]) - 512, b"??")


def leave_out_a_member(folder: Path) -> None:
    path = folder / "shard_00001.tar"
    with tarfile.open(path) as tar:
        members = [(member, tar.extractfile(member).read()) for member in tar]
    with tarfile.open(path, "w") as tar:
        for member, content in members:
            if member.name != "image005.json":
                tar.addfile(member, io.BytesIO(content))


def repeat_a_shard(folder: Path) -> None:
    for suffix in ("", ".idx"):
        (folder / f"shard_00002.tar{suffix}").write_bytes((folder / f"shard_00000.tar{suffix}").read_bytes())
    manifest = Manifest.load(folder)
    shards = (*manifest.shards[:2], replace(manifest.shards[0], name="shard_00002.tar"))
    stats = {name: replace(s, count=12 * 5) for name, s in manifest.stats.items()}
    replace(manifest, shards=shards, stats=stats).save(folder)


def repeat_a_key(folder: Path) -> None:
    path = folder / "shard_00001.tar"
    reader = ShardReader(path)
    samples = [reader.read(i) for i in range(4)]
    writer = ShardWriter(path, reader.spec, {side: Ignore() for side in ("eva", "clip")})
    for key, sample in zip(["image004", "image005", "image005", "image007"], samples, strict=True):
        writer.write(key, sample.tensors, {})
    info = writer.finish()
    manifest = Manifest.load(folder)
    shards = list(manifest.shards)
    shards[1] = replace(shards[1], num_bytes=info.num_bytes, sha256=info.sha256)
    replace(manifest, shards=tuple(shards)).save(folder)


class Ignore:
    def add(self, *_: object) -> None:
        pass


def take_another_index(folder: Path) -> None:
    (folder / "shard_00001.tar.idx").write_bytes((folder / "shard_00000.tar.idx").read_bytes())


@dataclass(frozen=True)
class Fault:
    damage: Callable[[Path], object]
    verify: str  # what it reports
    load: str | None = None  # the error of a run; None: nothing that a load looks at
    bad: tuple[str, ...] = ()  # keys that a run under `skip` does not read
    whole_shard: bool = False
    refused: str | None = None  # why repair leaves it alone
    dropped: tuple[str, ...] = ()  # keys that repair leaves out


WHOLE = dict(bad=("image004", "image005", "image006", "image007"), whole_shard=True)
ONE = dict(bad=("image005",), dropped=("image005",))
FAULTS = {
    "truncated": Fault(cut, r"00001\.tar: \d+ bytes", r"00001\.tar has", **WHOLE, dropped=("image006", "image007")),
    "flipped bit": Fault(flip_a_bit, r"00001\.tar: its SHA-256", refused="checksum is wrong and every sample"),
    "broken tar header": Fault(break_a_tar_header, r"00001\.tar: the tar cannot be read after 1 samples"),
    "missing member": Fault(
        leave_out_a_member,
        r"'image005': its \.json is missing",
        r"image00[67]: the safetensors header is damaged",
        bad=("image006", "image007"),  # the index points where they were; image005 has all that is read
        dropped=("image005",),
    ),
    "wrong dims": Fault(
        lambda f: put_header(f, b'"shape":[5,8]', b'"shape":[8,5]'),
        r"'image005': tensor eva is BF16 \[8, 5\], expected BF16 \[5, 8\]",
        r"image005: tensor eva is BF16 \[8, 5\]",
        **ONE,
    ),
    "wrong dtype": Fault(
        lambda f: put_header(f, b'"BF16"', b'"F16" '),
        r"'image005': tensor \w+ is F16",
        r"image005: tensor \w+ is F16",
        **ONE,
    ),
    "NaN": Fault(lambda f: put_value(f, "eva", b"\xc0\x7f"), "'image005': eva holds NaN", "image005: eva holds", **ONE),
    "infinity": Fault(
        lambda f: put_value(f, "clip", b"\x80\x7f"), "'image005': clip holds NaN", "image005: clip holds", **ONE
    ),
    "shard twice": Fault(
        repeat_a_shard, r"00002\.tar: key 'image000' appears in shard_00000\.tar", dropped=tuple(EVERY_KEY[:4])
    ),
    "key twice": Fault(
        repeat_a_key, r"00001\.tar: key 'image005' appears in", "'image005' comes twice", **WHOLE, dropped=("image005",)
    ),
    "shard gone": Fault(
        lambda f: (f / "shard_00001.tar").unlink(), "but missing", r"00001\.tar is missing", **WHOLE, refused="missing"
    ),
    "index gone": Fault(
        lambda f: (f / "shard_00001.tar.idx").unlink(), r"00001\.tar\.idx is missing", "idx is missing", **WHOLE
    ),
    "stale index": Fault(
        take_another_index, r"00001\.tar\.idx: its sample count, size", r"00001\.tar has|does not belong", **WHOLE
    ),
}
each_fault = pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)


def read(folder: Path, world: int, faults: BadSamples | None = None) -> dict[int, str]:
    """Key by position, of what the ranks of a run read in STEPS steps, each rank with a log of its own or `faults`."""
    keys: dict[int, str] = {}
    for rank in range(world):
        dataset = EmbeddingDataset(folder, bad_samples=faults or BadSamples("skip", "skip"))
        with EmbeddingLoader(
            dataset,
            GlobalOrder(dataset.shard_sizes, 3, 2),
            micro_batch_size=GLOBAL_BATCH // world,
            gradient_accumulation_steps=1,
            rank=rank,
            world_size=world,
        ) as loader:
            for _ in range(STEPS):
                for batch in loader.next_step():
                    assert torch.isfinite(batch["eva"].float()).all()
                    keys.update(zip(batch.positions.tolist(), batch.keys, strict=True))
    return keys


def expected(fault: Fault) -> dict[int, str]:
    """By the rule: the next sound sample of the shard, or the same index of the next shard."""
    keys = {}
    for position, (shard, index) in enumerate(GlobalOrder(SIZES, 3, 2).slice(0, STEPS * GLOBAL_BATCH)):
        if fault.whole_shard and shard == 1:
            shard, index = 2, index % 2
        while EVERY_KEY[4 * shard + index] in fault.bad:
            index = (index + 1) % SIZES[shard]
        keys[position] = EVERY_KEY[4 * shard + index]
    return keys


@each_fault
@pytest.mark.parametrize("workers", [1, 3])
def test_verify_names_it(dataset_dir, fault, workers):
    folder = dataset_dir(10)
    fault.damage(folder)
    problems = verify(folder, workers).problems
    assert any(re.search(fault.verify, problem) for problem in problems), problems
    assert problems == verify(folder, 2).problems


@each_fault
def test_a_run_stops_with_file_and_key_unless_told_otherwise(dataset_dir, fault):
    folder = dataset_dir(10)
    fault.damage(folder)
    if fault.load is None:  # a load does not see it
        assert len(read(folder, 1, BadSamples())) == STEPS * GLOBAL_BATCH
        return
    with pytest.raises(DataError, match=fault.load):
        read(folder, 1, BadSamples())
    other = BadSamples("skip", "error") if fault.whole_shard else BadSamples("error", "skip")
    with pytest.raises(DataError, match=fault.load):
        read(folder, 1, other)


@each_fault
def test_a_run_that_skips_reads_the_same_replacements_on_any_world_size(dataset_dir, fault):
    folder = dataset_dir(10)
    fault.damage(folder)
    runs = [read(folder, world) for world in (1, 2, 3)]
    assert runs[0].keys() == set(range(STEPS * GLOBAL_BATCH))
    assert runs[0] == runs[1] == runs[2]
    if fault.load is not None:
        assert runs[0] == expected(fault)


@each_fault
def test_repair_mends_it_or_leaves_the_folder_as_it_was(dataset_dir, fault):
    folder = dataset_dir(10)
    samples = {key: EmbeddingDataset(folder).read(*divmod(i, 4)) for i, key in enumerate(EVERY_KEY)}
    fault.damage(folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    if fault.refused:
        with pytest.raises(DataError, match=f"00001.*{fault.refused}.*nothing was changed"):
            repair(folder)
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
        return

    report = repair(folder)

    assert [entry["key"] for entry in report.dropped] == list(fault.dropped)
    assert verify(folder).problems == []
    dataset = EmbeddingDataset(folder)
    places = [(shard, index) for shard, size in enumerate(dataset.shard_sizes) for index in range(size)]
    found = [dataset.read(*place) for place in places]
    assert report.samples == len(found) == len({sample.key for sample in found})
    if fault.damage not in (repeat_a_shard, repeat_a_key):
        assert [s.key for s in found] == [key for key in EVERY_KEY if key not in fault.dropped]
        assert all(torch.equal(s["eva"], samples[s.key]["eva"]) for s in found)
    assert not repair(folder).manifest_rewritten


def test_what_is_skipped_is_counted_and_written_down_once_with_file_and_key(dataset_dir, tmp_path, caplog):
    folder = dataset_dir(10)
    put_value(folder, "eva", b"\xc0\x7f")
    (folder / "shard_00002.tar").unlink()
    faults = BadSamples("skip", "skip")
    faults.write_to(tmp_path / "bad_samples.jsonl", 3)
    with caplog.at_level(logging.WARNING):
        read(folder, 2, faults)

    lines = [json.loads(line) for line in (tmp_path / "bad_samples.jsonl").read_text().splitlines()]
    assert sorted((line["rank"], line["shard"], line["key"]) for line in lines if line["key"]) == [
        (3, "shard_00001.tar", "image005")
    ]
    assert [line["shard"] for line in lines if line["key"] is None] == ["shard_00002.tar"]
    assert sorted(line["error"] for line in lines) == sorted(r.getMessage().split(": ", 1)[1] for r in caplog.records)
    places = GlobalOrder(SIZES, 3, 2).slice(0, STEPS * GLOBAL_BATCH)
    assert faults.num_replaced >= sum(place == (1, 1) or place[0] == 2 for place in places)


def test_lines_of_many_writers_stay_whole(tmp_path):
    def write(rank: int) -> None:
        log = BadSamples("skip", "skip")
        log.write_to(tmp_path / "bad_samples.jsonl", rank)
        for i in range(50):
            log.add("shard", f"{rank}-{i}", DataError("x" * 5000))

    threads = [threading.Thread(target=write, args=(rank,)) for rank in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    lines = (tmp_path / "bad_samples.jsonl").read_text().splitlines()
    assert len({json.loads(line)["key"] for line in lines}) == len(lines) == 200


def test_a_shard_that_vanishes_under_a_run_is_replaced_from_then_on(dataset_dir, monkeypatch):
    folder = dataset_dir(10)
    dataset = EmbeddingDataset(folder, bad_samples=BadSamples("skip", "skip"))
    whole = os.preadv
    gone: list[int] = []

    def read_or_fail(descriptor, *rest):
        if descriptor in gone:
            raise OSError(errno.ESTALE, "Stale file handle")
        return whole(descriptor, *rest)

    monkeypatch.setattr(os, "preadv", read_or_fail)
    assert dataset.read(1, 2).key == "image006"
    gone.append(dataset._opened(1).reader._file.fileno())
    assert [dataset.read(1, i).key for i in (2, 0, 3)] == ["image008", "image008", "image009"]
    assert dataset.bad_samples.num_replaced == 3


def test_where_every_shard_is_bad_a_run_that_skips_ends_with_an_error(dataset_dir):
    folder = dataset_dir(10)
    for path in folder.glob("*.tar"):
        path.unlink()
    with pytest.raises(DataError, match="none of its samples can be read"):
        read(folder, 1)


def test_a_slow_file_is_named_once(dataset_dir, monkeypatch, caplog):
    monkeypatch.setattr(shards_module, "SLOW_READ_SECONDS", 0.01)
    dataset = EmbeddingDataset(dataset_dir(10))
    read_into = ShardReader.read_into

    def slowly(reader, *arguments):
        time.sleep(0.02 if reader.path.name == "shard_00001.tar" else 0)
        return read_into(reader, *arguments)

    monkeypatch.setattr(ShardReader, "read_into", slowly)
    for index in range(4):
        dataset.read(1, index)
    messages = [record.getMessage() for record in caplog.records if "shard_00001.tar: a read takes" in record.message]
    assert len(messages) == 1


def test_a_read_that_does_not_end_is_named_while_it_lasts(dataset_dir, monkeypatch, caplog):
    monkeypatch.setattr(ring_module, "SLOW_READ_SECONDS", 0.05)
    folder = dataset_dir(10)
    answered = threading.Event()
    monkeypatch.setattr(EmbeddingDataset, "will_need", lambda *_: False)
    read_into = ShardReader.read_into

    def hang(reader, *arguments):
        if reader.path.name == "shard_00001.tar":
            answered.wait(20)
        return read_into(reader, *arguments)

    monkeypatch.setattr(ShardReader, "read_into", hang)
    run = threading.Thread(target=read, args=(folder, 1, BadSamples()))
    run.start()
    deadline = time.monotonic() + 20
    while not any("shard_00001.tar: a read takes" in r.getMessage() for r in caplog.records):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert run.is_alive()
    answered.set()
    run.join()


def test_a_repair_that_finds_no_space_leaves_the_dataset_as_it_was(dataset_dir, monkeypatch):
    folder = dataset_dir(10)
    put_value(folder, "eva", b"\xc0\x7f")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(ShardIndex, "save", fail)
    with pytest.raises(OSError, match="No space"):
        repair(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_repair_says_what_no_checksum_vouches_for(dataset_dir):
    folder = dataset_dir(10)
    cut(folder)
    assert repair(folder).unvouched == 2


def test_repair_brings_a_manifest_up_to_date_that_is_older_than_a_shard(dataset_dir):
    folder = dataset_dir(10)
    old = (folder / "manifest.json").read_bytes()
    put_value(folder, "eva", b"\x00\x00")
    repair(folder)
    assert verify(folder).ok
    (folder / "manifest.json").write_bytes(old)
    assert not verify(folder).ok
    assert repair(folder).manifest_rewritten
    assert verify(folder).ok


def test_fp8_is_written_again_to_the_bit(dataset_dir, spec):
    folder = dataset_dir(10, spec=spec.stored_as("fp8-e4m3"))
    stored = [EmbeddingDataset(folder).read(1, i) for i in range(4)]
    cut(folder)
    repair(folder)
    for i in range(2):
        assert torch.equal(EmbeddingDataset(folder).read(1, i)["eva"], stored[i]["eva"])
        assert torch.equal(EmbeddingDataset(folder).read(1, i)["clip"], stored[i]["clip"])


@pytest.mark.parametrize("location", ["https://host/set", "split"])
def test_repair_refuses_what_has_no_shards_of_its_own(dataset_dir, tmp_path, location):
    from blip3o_ds.data.tools.split import split

    split(dataset_dir(10), tmp_path / "parts", 0.5)
    with pytest.raises(DataError, match="repair"):
        repair(tmp_path / "parts" / "eval" if location == "split" else location)
