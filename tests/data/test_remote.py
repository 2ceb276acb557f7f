"""Datasets behind a real HTTP server that is slow, busy, cuts connections and sends wrong bytes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import pytest
import torch

import blip3o_ds.data.reading.remote as remote_module
from blip3o_ds.data.format.manifest import Manifest
from blip3o_ds.data.reading.cache import CacheFull, ShardCache
from blip3o_ds.data.reading.dataset import EmbeddingDataset
from blip3o_ds.data.reading.loader import EmbeddingLoader
from blip3o_ds.data.reading.order import GlobalOrder
from blip3o_ds.data.reading.remote import RemoteFolder
from blip3o_ds.data.tools.split import split
from blip3o_ds.errors import DataError

GIB = 1 << 30
FAULTS = ("503", "cut", "wrong", "hang")


class Server:
    """Serves a folder; `faults[name]` is a list of what happens to the next requests for a file."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.faults: dict[str, list[str]] = {}
        self.latency = 0.0
        self.requests: Counter[str] = Counter()
        lock = threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                name = self.path.rpartition("/")[2]
                with lock:
                    server.requests[name] += 1
                    fault = server.faults[name].pop(0) if server.faults.get(name) else None
                time.sleep(server.latency)
                server.answer(self, name, fault)

            def log_message(self, *_: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.http.serve_forever, args=(0.01,))
        self.thread.start()
        self.url = f"http://127.0.0.1:{self.http.server_port}/set"

    def answer(self, request: BaseHTTPRequestHandler, name: str, fault: str | None) -> None:
        path = self.folder / name
        if fault == "503" or not path.is_file():
            request.send_error(503 if fault else 404)
            return
        content = path.read_bytes()
        if fault == "hang":
            time.sleep(1.0)
        if fault == "wrong":
            content = content[:-700] + bytes([content[-700] ^ 1]) + content[-699:]
        request.send_response(200)
        request.send_header("Content-Length", str(len(content)))
        request.end_headers()
        request.wfile.write(content[: len(content) // 2] if fault == "cut" else content)

    def close(self) -> None:
        self.http.shutdown()
        self.http.server_close()
        self.thread.join()


@pytest.fixture
def server(dataset_dir) -> Iterator[Server]:
    running = Server(dataset_dir(24, samples_per_shard=4))
    yield running
    running.close()


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_module, "FIRST_PAUSE_SECONDS", 0.01)


def read_all(dataset: EmbeddingDataset) -> dict[str, torch.Tensor]:
    samples = [dataset.read(shard, i) for shard, size in enumerate(dataset.shard_sizes) for i in range(size)]
    return {sample.key: sample["eva"] for sample in samples}


def assert_same(dataset: EmbeddingDataset, folder: Path) -> None:
    found, expected = read_all(dataset), read_all(EmbeddingDataset(folder))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in found)


def files_in(cache: Path) -> list[Path]:
    return [path for path in cache.rglob("*") if path.is_file() and not path.name.endswith(".lock")]


def test_a_remote_dataset_reads_as_the_folder_does(server, tmp_path):
    dataset = EmbeddingDataset(server.url, cache_dir=tmp_path / "cache")
    assert dict(server.requests) == {"manifest.json": 1}

    assert_same(dataset, server.folder)
    assert_same(EmbeddingDataset(server.url, cache_dir=tmp_path / "cache"), server.folder)

    shards = [f"shard_{i:05d}.tar{suffix}" for i in range(6) for suffix in ("", ".idx")]
    assert dict(server.requests) == {"manifest.json": 2, **dict.fromkeys(shards, 1)}
    assert sorted(path.name for path in files_in(tmp_path / "cache")) == sorted(shards)


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        *[(name, fault) for name in ("shard_00002.tar", "shard_00002.tar.idx") for fault in FAULTS],
        *[("manifest.json", fault) for fault in FAULTS if fault != "wrong"],  # nothing holds its checksum
    ],
)
def test_a_fault_on_the_way_is_tried_again(server, tmp_path, monkeypatch, name, fault):
    monkeypatch.setattr(remote_module, "TIMEOUT_SECONDS", 0.3)
    server.faults[name] = [fault, fault]

    assert_same(EmbeddingDataset(server.url, cache_dir=tmp_path / "cache"), server.folder)

    assert server.requests[name] == 3
    assert all(count == 1 for other, count in server.requests.items() if other != name)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("wrong", r"shard_00001\.tar: found SHA-256 [0-9a-f]{64}, the manifest says {sha256} \(attempt 6 of 6\)"),
        ("503", r"shard_00001\.tar: HTTP status 503 .*attempt 6 of 6"),
        ("cut", r"shard_00001\.tar: the connection was closed \d+ bytes before the end"),
    ],
)
def test_a_fault_that_stays_is_an_error_with_url_expected_and_found(server, tmp_path, fault, message):
    server.faults["shard_00001.tar"] = [fault] * 99
    dataset = EmbeddingDataset(server.url, cache_dir=tmp_path / "cache")
    message = message.replace("{sha256}", dataset.manifest.shards[1].sha256)
    dataset.read(0, 0)

    with pytest.raises(DataError, match=f"{re.escape(server.url)}/{message}"):
        dataset.read(1, 0)

    assert server.requests["shard_00001.tar"] == 6
    assert sorted(path.name for path in files_in(tmp_path / "cache")) == ["shard_00000.tar", "shard_00000.tar.idx"]
    server.faults.clear()
    assert_same(dataset, server.folder)


def test_a_file_that_is_not_there_is_asked_for_once(server, tmp_path):
    (server.folder / "shard_00001.tar").unlink()
    with pytest.raises(DataError, match=r"shard_00001\.tar: HTTP status 404"):
        EmbeddingDataset(server.url, cache_dir=tmp_path / "cache").read(1, 0)
    assert server.requests["shard_00001.tar"] == 1


READER = """
import json, sys
from blip3o_ds.data.reading.dataset import EmbeddingDataset
url, cache, start = sys.argv[1:]
dataset = EmbeddingDataset(url, cache_dir=cache)
order = list(range(len(dataset.shard_sizes)))
dataset.prefetch(order[int(start):])
places = [(s, i) for s in order for i in range(dataset.shard_sizes[s])]
print(json.dumps([dataset.read(*place)["eva"].float().sum().item() for place in places]))
"""


@pytest.mark.slow
def test_two_processes_download_each_shard_once_between_them(server, tmp_path):
    server.latency = 0.05
    command = [sys.executable, "-c", READER, server.url, str(tmp_path / "cache")]

    readers = [subprocess.Popen([*command, start], stdout=subprocess.PIPE, text=True) for start in ("0", "3")]
    sums = [json.loads(reader.communicate(timeout=100)[0].splitlines()[-1]) for reader in readers]

    expected = [eva.float().sum().item() for eva in read_all(EmbeddingDataset(server.folder)).values()]
    assert sums == [expected, expected]
    assert server.requests.pop("manifest.json") == 2
    assert server.requests == Counter({f"shard_{i:05d}.tar{suffix}": 1 for i in range(6) for suffix in ("", ".idx")})


def test_threads_of_one_process_download_a_shard_once(server, tmp_path):
    server.latency = 0.1
    dataset = EmbeddingDataset(server.url, cache_dir=tmp_path / "cache")
    threads = [threading.Thread(target=dataset.read, args=(0, i % 4)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert server.requests["shard_00000.tar"] == 1


def shard_bytes(server: Server) -> int:
    return sum((server.folder / f"shard_00000.tar{suffix}").stat().st_size for suffix in ("", ".idx"))


def test_the_least_recently_used_shards_make_room(server, tmp_path):
    room = 3.5 * shard_bytes(server)
    cache = ShardCache(tmp_path / "cache", room / GIB)
    remote, shards = RemoteFolder(server.url), Manifest.load(server.folder).shards

    for number in (0, 1, 2, 0, 3, 4):
        cache.get(remote, shards[number]).close()
        time.sleep(0.02)  # file times have a coarse clock
        assert sum(path.stat().st_size for path in files_in(tmp_path / "cache")) <= room

    assert sorted(path.name for path in files_in(tmp_path / "cache") if path.suffix == ".tar") == [
        f"shard_0000{number}.tar" for number in (0, 3, 4)
    ]


def test_shards_in_use_are_never_evicted(server, tmp_path):
    cache = ShardCache(tmp_path / "cache", 2.5 * shard_bytes(server) / GIB)
    remote, shards = RemoteFolder(server.url), Manifest.load(server.folder).shards
    leases = [cache.get(remote, shards[number]) for number in (0, 1)]

    with pytest.raises(CacheFull, match=r"are in use, and shard_00002\.tar needs .* GiB that data\.cache_gb allows"):
        cache.get(remote, shards[2])
    assert all(lease.path.exists() for lease in leases)
    leases[0].close()
    cache.get(remote, shards[2])

    assert not leases[0].path.exists()
    assert leases[1].path.exists()


def test_a_killed_download_leaves_nothing_that_counts_for_long(server, tmp_path):
    folder = tmp_path / "cache" / "blip3o-ds-shards" / ("dead" * 8)
    folder.mkdir(parents=True)
    (folder / "shard.tar.part").write_bytes(bytes(3 * shard_bytes(server)))
    cache = ShardCache(tmp_path / "cache", 3.5 * shard_bytes(server) / GIB)

    cache.get(RemoteFolder(server.url), Manifest.load(server.folder).shards[0])

    assert list(folder.glob("*.part")) == []


def test_eviction_spares_what_the_user_keeps_beside_the_shards(server, tmp_path):
    room = 1.5 * shard_bytes(server)
    kept = [tmp_path / "cache" / "thesis" / "text.tex", tmp_path / "cache" / "model.pt"]
    kept += [tmp_path / "cache" / "blip3o-ds-shards" / name for name in ("notes/text", "dead/text", "text")]
    for path in kept:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(2 * int(room)))
        os.utime(path, (0, 0))

    dataset = EmbeddingDataset(server.url, cache_dir=tmp_path / "cache", cache_gb=room / GIB)

    assert_same(dataset, server.folder)
    assert all(path.stat().st_size == 2 * int(room) for path in kept)


def test_a_cached_shard_that_was_removed_is_fetched_again(server, tmp_path):
    assert_same(EmbeddingDataset(server.url, cache_dir=tmp_path / "cache"), server.folder)
    for path in files_in(tmp_path / "cache"):
        path.unlink()
    assert_same(EmbeddingDataset(server.url, cache_dir=tmp_path / "cache"), server.folder)
    assert server.requests["shard_00003.tar"] == 2


def test_a_dataset_larger_than_the_cache_is_read_whole(server, tmp_path):
    room = 2.5 * shard_bytes(server)
    dataset = EmbeddingDataset(server.url, cache_dir=tmp_path / "cache", cache_gb=room / GIB)
    for _ in range(2):
        assert_same(dataset, server.folder)
    assert sum(path.stat().st_size for path in files_in(tmp_path / "cache")) <= room
    assert server.requests["shard_00000.tar"] == 2


def test_the_loader_finds_the_next_window_fetched(server, tmp_path):
    dataset = EmbeddingDataset(server.url, cache_dir=tmp_path / "cache")
    order = GlobalOrder(dataset.shard_sizes, seed=3, window_shards=2)
    sizes = {"micro_batch_size": 4, "gradient_accumulation_steps": 1, "rank": 0, "world_size": 1}
    with EmbeddingLoader(dataset, order, **sizes, prefetch=1) as loader:
        loader.next_step()
        deadline = time.monotonic() + 10
        expected = {dataset.manifest.shards[shard].name for shard in order.shards_near(0)}
        while {path.name for path in files_in(tmp_path / "cache") if path.suffix == ".tar"} < expected:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        keys = [key for _ in range(5) for batch in loader.next_step() for key in batch.keys]
    dataset.close()

    names = {key: (int(key[5:]) // 4, int(key[5:]) % 4) for key in keys}
    assert list(names.values()) == order.slice(4, 24)
    assert max(count for name, count in server.requests.items()) == 1


def test_a_pipe_reads_what_its_command_prints(server, tmp_path):
    dataset = EmbeddingDataset(f"pipe:cat {server.folder}/{{name}}", cache_dir=tmp_path / "cache")
    assert_same(dataset, server.folder)


def test_a_pipe_that_fails_is_an_error_with_its_status(server, tmp_path):
    with pytest.raises(DataError, match=r"pipe:exit 3 manifest\.json: .*3"):
        EmbeddingDataset("pipe:exit 3 {name}", cache_dir=tmp_path / "cache")
    with pytest.raises(DataError, match=r"as \{name\}"):
        EmbeddingDataset("pipe:cat manifest.json", cache_dir=tmp_path / "cache")


def test_other_schemes_go_through_fsspec(server, tmp_path):
    memory = fsspec.filesystem("memory")
    memory.put(str(server.folder), "/remote/set", recursive=True)
    assert_same(EmbeddingDataset("memory://remote/set", cache_dir=tmp_path / "cache"), server.folder)
    with pytest.raises(DataError, match=r"memory://remote/absent/manifest\.json"):
        EmbeddingDataset("memory://remote/absent", cache_dir=tmp_path / "cache")
    with pytest.raises(DataError, match=r"nothing://host/manifest\.json: Protocol not known"):
        EmbeddingDataset("nothing://host", cache_dir=tmp_path / "cache")


def test_the_parts_of_a_url_are_read_once_the_user_trusts_it(server, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # where the cache is
    split(server.url, tmp_path / "parts", 0.5)
    assert f"BLIP3O_TRUSTED_URLS={server.url}" in caplog.text
    with pytest.raises(DataError, match="is elsewhere; if you trust"):
        EmbeddingDataset(tmp_path / "parts/train")

    monkeypatch.setenv("BLIP3O_TRUSTED_URLS", server.url)

    parts = [read_all(EmbeddingDataset(tmp_path / "parts" / part)) for part in ("train", "eval")]
    assert sorted([*parts[0], *parts[1]]) == sorted(read_all(EmbeddingDataset(server.folder)))


@pytest.mark.parametrize(
    "url", ["simplecache::https://host/set", "zip://set::s3://bucket/a.zip", "reference://::file:///x"]
)
def test_a_chain_of_file_systems_is_refused(url):
    with pytest.raises(DataError, match="chained file systems"):
        RemoteFolder(url)
    RemoteFolder("http://[2001:db8::1]/set")


def test_a_command_that_prints_too_much_is_an_error(server, tmp_path):
    shard = Manifest.load(server.folder).shards[0]
    remote = RemoteFolder(f"pipe:cat {server.folder}/{{name}} /dev/zero")
    (tmp_path / "part").write_bytes(b"")
    with pytest.raises(DataError, match=f"found more than the {shard.num_bytes} bytes .*attempt 6 of 6"):
        remote.download(shard.name, tmp_path / "part", shard.num_bytes, shard.sha256)
