"""Image sources: what a folder and a tar are read as, and that nothing is lost in silence."""

from __future__ import annotations

import io
import json
import tarfile

import numpy as np
import pytest
import webdataset
from PIL import Image

from blip3o_ds.encoders.images import decode_image, iterate_images
from blip3o_ds.errors import DataError


def test_folder_gives_sorted_records_with_captions(write_folder, make_png):
    folder = write_folder(
        {
            "b.png": make_png(1),
            "a/x.png": make_png(2),
            "a/x.txt": b" a cat \n",
            "b.json": b'{"caption": "a dog", "score": NaN}',
            "notes.txt": b"not a picture",
            ".hidden.png": b"",
        }
    )

    records = list(iterate_images(folder))

    assert [record.key for record in records] == ["a_x", "b"]
    assert [record.load()[1]["caption"] for record in records] == ["a cat", "a dog"]
    assert records[1].load()[1]["score"] is None
    assert records[-1].progress == 1.0


def test_tar_is_read_as_webdataset_reads_it(write_tar, make_png):
    path = write_tar(
        "00000.tar",
        {f"{n:03d}.{kind}": content for n in range(3) for kind, content in _sample(n, make_png).items()},
    )

    records = list(iterate_images(path))
    oracle = list(webdataset.WebDataset(str(path), shardshuffle=False))

    assert [record.key for record in records] == [sample["__key__"] for sample in oracle]
    for record, sample in zip(records, oracle, strict=True):
        image, meta = record.load()
        assert np.array_equal(np.asarray(image), np.asarray(Image.open(io.BytesIO(sample["png"]))))
        assert meta["caption"] == sample["txt"].decode()
        assert meta["width"] == json.loads(sample["json"])["width"]


def _sample(n: int, make_png) -> dict[str, bytes]:
    return {"png": make_png(n), "txt": f"picture {n}".encode(), "json": b'{"width": 40, "caption": "other"}'}


def test_loading_is_lazy(write_folder):
    folder = write_folder({"a.png": b"not a picture at all"})

    record = next(iterate_images(folder))

    with pytest.raises(OSError, match="cannot identify"):
        record.load()


def test_keys_are_safe_and_unique(write_tar, write_folder, tmp_path, make_png):
    write_tar("tars/one.v2.tar", {"d/1.png": make_png(1), "d/2.png": make_png(2)})
    write_tar("tars/two.tar", {"./d/1.png": make_png(3), "d 1.png": make_png(4)})
    folder = write_folder({"a.b.png": make_png(1), "a_b.png": make_png(2), "a/b.jpg": make_png(3)})

    from_tars = [record.key for record in iterate_images(tmp_path / "tars")]
    from_folder = [record.key for record in iterate_images(folder)]

    assert from_tars == ["one_v2_d_1", "one_v2_d_2", "two_d_1", "two_d_1_2"]
    assert sorted(from_folder) == ["a_b", "a_b_2", "a_b_3"]
    assert not any(character in key for key in from_tars + from_folder for character in "./ ")


def test_picture_is_upright_and_rgb():
    grey = Image.fromarray(np.array([[0, 255, 9]], dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees
    buffer = io.BytesIO()
    grey.save(buffer, "png", exif=exif)

    image = decode_image(buffer.getvalue())

    assert (image.size, image.mode) == ((1, 3), "RGB")


@pytest.mark.parametrize("damage", ["cut", "overwritten"])
def test_damaged_tar_is_an_error_that_names_it(write_tar, damage, make_png):
    path = write_tar("bad.tar", {f"{n}.png": make_png(n) for n in range(4)})
    with tarfile.open(path) as archive:
        third = archive.getmembers()[2]
    content = bytearray(path.read_bytes())
    if damage == "cut":
        content = content[: third.offset + 100]
    else:
        content[third.offset : third.offset + 512] = b"\xff" * 512
    path.write_bytes(content)

    with pytest.raises(DataError, match=r"bad\.tar"):
        list(iterate_images(path))


def test_source_without_pictures_or_with_both_kinds_is_refused(write_folder, write_tar, tmp_path, make_png):
    write_folder({"a.txt": b""}, "empty")
    write_folder({"a.png": make_png(0)}, "both")
    write_tar("both/b.tar", {"b.png": make_png(1)})

    for name, message in (("empty", "no image found"), ("both", "holds both"), ("absent", "expected a folder")):
        with pytest.raises(DataError, match=message):
            iterate_images(tmp_path / name)
