"""Zips of images: read in place like folders, or refused as a whole."""

from __future__ import annotations

import stat
import struct
import time
import zipfile
from pathlib import Path

import pytest
import torch
from image_files import class_entries, encoded, open_at, photo, replaced, zipped

from compress.errors import DataError


@pytest.mark.parametrize("root", ["", "pets/", "upload/pets/"])
def test_a_zip_reads_like_a_folder_without_writing_anything(root, tmp_path, monkeypatch):
    litter = {"__MACOSX/pets/cat/._0.png": b"x", f"{root}cat/.DS_Store": b"x", f"{root}Thumbs.db": b"x"}
    path = zipped(tmp_path / "pets.zip", class_entries(root) | litter)
    monkeypatch.setattr(zipfile.ZipFile, "extract", None)
    monkeypatch.setattr(zipfile.ZipFile, "extractall", None)
    dataset = open_at(path)
    assert dataset.class_names == ("cat", "dog") and (len(dataset.train), len(dataset.test)) == (20, 4)
    assert [item.name for item in tmp_path.iterdir()] == ["pets.zip"]
    assert torch.equal(dataset.train.pixels, replaced(dataset.train).take(torch.arange(20)))


def test_a_zip_of_loose_images_is_unlabelled(tmp_path):
    path = zipped(tmp_path / "a.zip", {f"photos/{number}.png": encoded(photo(number)) for number in range(12)})
    assert open_at(path).kind == "unlabelled"


def with_link(path: Path) -> None:
    zipped(path, class_entries())
    with zipfile.ZipFile(path, "a") as file:
        link = zipfile.ZipInfo("cat/link.png")
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        file.writestr(link, "/etc/passwd")


def encrypted(path: Path) -> None:
    zipped(path, class_entries())
    content = bytearray(path.read_bytes())
    at = content.index(b"PK\x01\x02")
    content[at + 8] |= 1
    path.write_bytes(bytes(content))


def overlapping(path: Path) -> None:
    zipped(path, class_entries())
    content = bytearray(path.read_bytes())
    first = content.index(b"PK\x01\x02")
    second = content.index(b"PK\x01\x02", first + 4)
    content[second + 42 : second + 46] = content[first + 42 : first + 46]
    path.write_bytes(bytes(content))


def claiming_many(path: Path) -> None:
    zipped(path, class_entries())
    content = bytearray(path.read_bytes())
    at = content.rindex(b"PK\x05\x06")
    content[at + 8 : at + 12] = struct.pack("<HH", 20_001, 20_001)
    path.write_bytes(bytes(content))


def extra(name: str, content: bytes = b"x"):
    return lambda path: zipped(path, class_entries() | {name: content})


@pytest.mark.parametrize(
    "write, words",
    [
        (extra("../evil.png"), "leads out of the folder"),
        (extra("/etc/evil.png"), "leads out of the folder"),
        (extra("cat/../../evil.png"), "leads out of the folder"),
        (extra("C:evil.png"), "leads out of the folder"),
        (extra("cat\\..\\evil.png"), "leads out of the folder"),
        (extra("cat/more.zip"), "another archive"),
        (extra("cat/more.tar.gz"), "another archive"),
        (extra("CAT/0.PNG"), "same name"),
        (extra("a/b/c/d/e/f/g/h.png"), "deeper than 6"),
        (extra("cat/" + "x" * 260 + ".png"), "longer than 255"),
        (extra("cat/bomb.bmp", b"\0" * 3_000_000), "more than 200 times its size"),
        (with_link, "symbolic link"),
        (encrypted, "encrypted"),
        (overlapping, "entries overlap"),
        (lambda path: path.write_bytes(zipped(path, class_entries()).read_bytes()[:-30]), "zip directory is missing"),
        (lambda path: path.write_bytes(b"Rar!\x1a\x07\x01"), "it is a RAR archive, not a zip"),
        (lambda path: path.write_bytes(b"7z\xbc\xaf\x27\x1c\0\4"), "it is a 7z archive, not a zip"),
        (lambda path: path.write_bytes(b""), "it is empty"),
        (lambda path: path.write_bytes(b"cats and dogs"), "it is not a zip"),
        (claiming_many, "more than 20000 entries"),
    ],
)
def test_hostile_zips_are_refused_as_a_whole(write, words, tmp_path):
    path = tmp_path / "upload.zip"
    write(path)
    started = time.perf_counter()
    with pytest.raises(DataError, match=f"upload.zip is not a usable zip of images: .*{words}"):
        open_at(path)
    assert time.perf_counter() - started < 5
    assert [item.name for item in tmp_path.iterdir()] == ["upload.zip"]


def test_budgets_count_before_anything_is_unpacked(tmp_path, monkeypatch):
    path = zipped(tmp_path / "upload.zip", class_entries())
    monkeypatch.setattr("compress.data.archives.MAX_UNPACKED_BYTES", 10_000)
    with pytest.raises(DataError, match="would unpack to more than 4 GiB"):
        open_at(path)
    monkeypatch.setattr("compress.data.archives.MAX_ZIP_BYTES", 10_000)
    with pytest.raises(DataError, match="larger than 1 GiB"):
        open_at(path)


def test_a_lying_size_inside_a_zip_is_a_damaged_image(tmp_path):
    path = zipped(tmp_path / "upload.zip", class_entries())
    content = bytearray(path.read_bytes())
    at = content.index(b"PK\x01\x02")
    content[at + 24 : at + 28] = struct.pack("<I", 100)
    path.write_bytes(bytes(content))
    with pytest.raises(DataError, match=r"cat/0.png \(damaged inside the zip\)|1 unusable"):
        dataset = open_at(path)
        raise DataError(" ".join(dataset.notes))
