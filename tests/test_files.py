"""A reader sees a whole file or none."""

import errno
import hashlib

import pytest

from blip3o_ds.files import atomic_folder, atomic_write, atomic_write_json, sha256_file


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "file.bin"
    path.write_bytes(b"old")

    def fill_the_disk():
        with atomic_write(path) as file:
            file.write(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        fill_the_disk()

    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_the_file_appears_only_when_the_block_ends(tmp_path):
    path = tmp_path / "file.bin"

    with atomic_write(path) as file:
        file.write(b"new")
        assert not path.exists()

    assert path.read_bytes() == b"new"


def test_a_folder_appears_only_when_the_block_ends(tmp_path):
    with atomic_folder(tmp_path / "new" / "folder") as folder:
        (folder / "file").write_text("content")
        assert not (tmp_path / "new" / "folder").exists()

    assert (tmp_path / "new" / "folder" / "file").read_text() == "content"
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["folder"]


def test_a_failed_folder_leaves_nothing(tmp_path):
    def fail():
        with atomic_folder(tmp_path / "folder") as folder:
            (folder / "file").write_text("half")
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        fail()

    assert not list(tmp_path.iterdir())


def test_a_folder_that_holds_something_is_refused_and_kept(tmp_path):
    (tmp_path / "old").write_text("old")

    with pytest.raises(FileExistsError, match="remove it or give another folder"), atomic_folder(tmp_path):
        pass

    assert (tmp_path / "old").read_text() == "old"


def test_nan_is_refused_in_json(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        atomic_write_json(tmp_path / "a.json", {"x": float("nan")})
    assert not list(tmp_path.iterdir())


def test_the_checksum_is_that_of_the_content(tmp_path):
    path = tmp_path / "file.bin"
    path.write_bytes(bytes(range(256)) * 100)

    assert sha256_file(path, chunk_bytes=1000) == hashlib.sha256(path.read_bytes()).hexdigest()
