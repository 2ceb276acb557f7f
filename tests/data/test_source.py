"""Where the shards of a split are looked for, from wherever its manifest was read."""

from __future__ import annotations

import re

import numpy as np
import pytest

from blip3o_ds.data.format.manifest import ChannelStats, Manifest, Selection
from blip3o_ds.data.format.schema import DatasetSpec
from blip3o_ds.data.reading.dataset import shards_location
from blip3o_ds.errors import DataError


def split_of(location: str) -> Manifest:
    stats = ChannelStats(np.zeros(1), np.zeros(1), 0)
    spec = DatasetSpec.pair(1, "patch_only", 1, 1, "bf16", "a", "b")
    return Manifest(spec, (), {"eva": stats, "clip": stats}, {}, Selection(location, 0.5, "eval"))


@pytest.mark.parametrize(
    ("location", "of", "expected"),
    [
        ("/data/split/eval", "../../whole", "/data/whole"),
        ("/data/split/eval", "/other/whole", "/other/whole"),
        ("https://host/sets/split/eval", "../../whole", "https://host/sets/whole"),
        ("https://host/sets/split/eval", "https://host/other", "https://host/other"),
        ("s3://bucket/split/eval/", "../../whole", "s3://bucket/whole"),
        ("https://host", "whole", "https://host/whole"),
        ("https://host/eval", "../../../../elsewhere.org/whole", "https://host/elsewhere.org/whole"),
        ("https://host/eval", "//elsewhere.org/whole", "https://host//elsewhere.org/whole"),
        ("https://host/eval", "/etc", "https://host/etc"),
    ],
)
def test_a_split_finds_its_parent_on_its_own_host(location, of, expected):
    assert shards_location(location, split_of(of)) == expected


ELSEWHERE = [
    ("/data/split/eval", "s3://bucket/whole"),
    ("/data/split/eval", "file:///etc"),
    ("/data/split/eval", "http://169.254.169.254/latest"),
    ("https://host/eval", "https://elsewhere.org/whole"),
    ("https://host/eval", "http://host/whole"),
    ("https://host/eval", "https://user:secret@host/whole"),
    ("https://host/eval", "https://host:81/whole"),
    ("https://host/eval", "file:///etc"),
    ("s3://bucket/eval", "s3://other/whole"),
    ("pipe:cat /x/{name}", "https://host/whole"),
]


@pytest.mark.parametrize(("location", "of"), ELSEWHERE)
def test_a_manifest_sends_its_reader_to_no_other_host_unless_the_user_trusts_it(location, of, monkeypatch):
    with pytest.raises(DataError, match=r"reads samples from .* elsewhere; if you trust .* BLIP3O_TRUSTED_URLS=") as e:
        shards_location(location, split_of(of))
    assert location in str(e.value)

    parent, _, name = of.rpartition("/")
    for trusted in (of, f"https://a.org/x {parent}/"):
        monkeypatch.setenv("BLIP3O_TRUSTED_URLS", trusted)
        assert shards_location(location, split_of(of)) == of
    for other in (f"{of}s", f"{parent}/{name[:-1]}", "https://a.org", ""):
        monkeypatch.setenv("BLIP3O_TRUSTED_URLS", other)
        with pytest.raises(DataError):
            shards_location(location, split_of(of))


@pytest.mark.parametrize("of", ["mine/../yours", "mine/%2e%2E/yours", "mine/..?x", "mine/..#x", "mine/%2e%2e%2fyours"])
def test_trust_does_not_reach_above_the_trusted_url(of, monkeypatch):
    monkeypatch.setenv("BLIP3O_TRUSTED_URLS", "https://host/mine")
    assert shards_location("/data/eval", split_of("https://host/mine/set"))
    with pytest.raises(DataError, match="elsewhere"):
        shards_location("/data/eval", split_of(f"https://host/{of}"))


def test_a_url_with_a_space_can_be_trusted(monkeypatch):
    with pytest.raises(DataError, match=r"BLIP3O_TRUSTED_URLS=https://host/my%20set"):
        shards_location("/data/eval", split_of("https://host/my set"))
    monkeypatch.setenv("BLIP3O_TRUSTED_URLS", "https://host/my%20set")
    assert shards_location("/data/eval", split_of("https://host/my set")) == "https://host/my set"


@pytest.mark.parametrize("of", ["http://[::1/x", "arrow_hdfs://evil:8020/set"])
@pytest.mark.parametrize("trusted", ["", "https://host/set"])
@pytest.mark.parametrize("location", ["https://host/eval", "s3://bucket/eval", "/data/split/eval"])
def test_what_is_no_url_is_an_error_of_the_data(of, location, trusted, monkeypatch):
    monkeypatch.setenv("BLIP3O_TRUSTED_URLS", trusted)
    with pytest.raises(DataError, match=rf"{re.escape(of)}: not a URL"):
        shards_location(location, split_of(of))


def test_a_pipe_cannot_follow_a_relative_parent():
    with pytest.raises(DataError, match=r"a relative path that a pipe cannot follow"):
        shards_location("pipe:cat /x/{name}", split_of("../whole"))
