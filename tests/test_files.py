"""A reader sees a whole file or none."""

import errno
import hashlib

import pytest

from blip3o_ds.errors import CheckpointError
from blip3o_ds.files import (
    FileLock,
    HashingFile,
    atomic_folder,
    atomic_write,
    atomic_write_json,
    read_json,
    sha256_file,
)


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


def test_a_lock_keeps_others_out_until_it_is_released_and_its_file_stays(tmp_path):
    path = tmp_path / "file.lock"
    with FileLock(path):
        for shared in (False, True):
            with pytest.raises(BlockingIOError):
                FileLock(path, shared=shared, wait=False)
    readers = [FileLock(path, shared=True) for _ in range(2)]
    with pytest.raises(BlockingIOError):
        FileLock(path, wait=False)
    del readers
    FileLock(path, wait=False).release()
    assert path.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "is missing"),
        (b"{", "is not JSON"),
        (b"\xff", "is not JSON"),
        (b"[1]", "expected a JSON object, found 'list'"),
    ],
)
def test_json_that_cannot_be_read_is_the_error_asked_for_with_file_and_remedy(tmp_path, content, message):
    path = tmp_path / "settings.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"settings\.json:? {message}.*; copy it"):
        read_json(path, CheckpointError, "copy it")


def test_what_passes_through_a_file_is_hashed_and_counted(tmp_path):
    with open(tmp_path / "file", "wb") as raw:
        written = HashingFile(raw)
        written.write(b"ab")
        written.write(memoryview(b"cd"))
    with open(tmp_path / "file", "rb") as raw:
        read = HashingFile(raw)
        assert read.read(3) + read.read() == b"abcd"
    assert written.num_bytes == read.num_bytes == 4
    assert written.sha256 == read.sha256 == hashlib.sha256(b"abcd").hexdigest()
