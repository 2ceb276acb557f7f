"""Pictures in Debian packages: Qt resource files are read like folders, and a failure names package and remedy."""

from __future__ import annotations

import stat
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest

from blip3o_ds.encoders.packages import fetch_package, pictures_in, read_rcc
from blip3o_ds.errors import DataError

ZLIB, FOLDER, ZSTD = 1, 2, 4


def make_rcc(files: dict[str, tuple[bytes, int]], version: int = 3) -> bytes:
    """A resource file with one folder `art` that holds `files`: content and flags by name."""
    names, places = b"", {}
    for name in ["art", *files]:
        places[name] = len(names)
        names += struct.pack(">HI", len(name), 0) + name.encode("utf-16-be")
    extra = b"\0" * (8 if version >= 2 else 0)
    nodes = (
        struct.pack(">IHII", 0, FOLDER, 1, 1)
        + extra
        + struct.pack(">IHII", places["art"], FOLDER, len(files), 2)
        + extra
    )
    data = b""
    for name, (content, flags) in files.items():
        stored = struct.pack(">I", len(content)) + zlib.compress(content) if flags & ZLIB else content
        nodes += struct.pack(">IHII", places[name], flags, 0, len(data)) + extra
        data += struct.pack(">I", len(stored)) + stored
    header = 20 + (4 if version >= 3 else 0)
    offsets = (header + len(data) + len(names), header, header + len(data))
    return (b"qres" + struct.pack(">4I", version, *offsets)).ljust(header, b"\0") + data + names + nodes


@pytest.mark.parametrize("version", [1, 3])
def test_a_resource_file_gives_back_what_it_was_made_of(version):
    content = make_rcc({"plain.webp": (b"raw", 0), "ätsch.png": (b"packed" * 99, ZLIB)}, version)

    found = {path: read() for path, read in read_rcc(content, "x.rcc").items()}

    assert found == {"art/plain.webp": b"raw", "art/ätsch.png": b"packed" * 99}


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04" * 9, make_rcc({"a.png": (b"x", 0)})[:-20]])
def test_another_file_is_refused_by_name(content):
    with pytest.raises(DataError, match=r"x\.rcc: not a readable Qt resource file"):
        read_rcc(content, "x.rcc")


def test_zstd_is_refused_when_it_is_read():
    found = read_rcc(make_rcc({"a.png": (b"x", ZSTD)}), "x.rcc")

    with pytest.raises(DataError, match=r"x\.rcc:art/a\.png: compressed with zstd"):
        found["art/a.png"]()


def test_pictures_are_found_in_folders_and_resource_files_but_not_through_links(tmp_path):
    (tmp_path / "share").mkdir()
    (tmp_path / "share" / "b.JPG").write_bytes(b"b")
    (tmp_path / "share" / "notes.txt").write_bytes(b"n")
    (tmp_path / "share" / "link.jpg").symlink_to("b.JPG")
    (tmp_path / "share" / "a.rcc").write_bytes(make_rcc({"a.webp": (b"a", 0), "a.ogg": (b"o", 0)}))

    found = list(pictures_in("some-data", "1.0", tmp_path))

    assert [(picture.path, picture.read()) for picture in found] == [("art/a.webp", b"a"), ("share/b.JPG", b"b")]
    assert {(picture.package, picture.version) for picture in found} == {("some-data", "1.0")}


@pytest.fixture
def fake_apt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Put programs of this shell text in the place of apt-get and dpkg-deb."""

    def write(apt_get: str, dpkg_deb: str = "exit 0") -> None:
        for name, text in (("apt-get", apt_get), ("dpkg-deb", dpkg_deb)):
            program = tmp_path / "bin" / name
            program.parent.mkdir(exist_ok=True)
            program.write_text(f"#!/bin/sh\n{text}\n")
            program.chmod(program.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")

    return write


def test_a_package_is_downloaded_and_unpacked(tmp_path, fake_apt):
    fake_apt("touch some-data_1_all.deb", 'if [ "$1" = -f ]; then echo 1:1.0-2; else mkdir -p "$3/usr"; fi')

    version, root = fetch_package("some-data", tmp_path)

    assert version == "1:1.0-2"
    assert [path.name for path in root.iterdir()] == ["usr"]
    assert not list(tmp_path.rglob("*.deb"))


@pytest.mark.parametrize(
    "message", ["E: Unable to locate package some-data", "E: Failed to fetch http://mirror  Could not resolve 'mirror'"]
)
def test_a_package_that_cannot_be_had_is_named_with_the_reason_and_the_remedy(tmp_path, fake_apt, message):
    fake_apt(f'echo "W: something else" >&2; echo "{message}" >&2; exit 100')

    with pytest.raises(DataError, match="some-data could not be fetched") as caught:
        fetch_package("some-data", tmp_path)

    assert message in str(caught.value)
    assert "apt-get update" in str(caught.value)
    assert "something else" not in str(caught.value)


def test_a_system_without_apt_get_is_said_so(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))

    with pytest.raises(DataError, match=r"some-data: .*apt-get and dpkg-deb are not on this system"):
        fetch_package("some-data", tmp_path)
