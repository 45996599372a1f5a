"""Files that are whole or absent, also after the power went."""

from __future__ import annotations

import errno
import os

import pytest

from compress import files
from compress.errors import StorageError


def test_content_is_on_the_disk_before_its_name_is_and_the_name_before_it_counts(tmp_path, monkeypatch):
    steps = []
    replace, fsync = os.replace, os.fsync

    def synced(descriptor):
        fsync(descriptor)
        steps.append(("on the disk", os.path.realpath(f"/proc/self/fd/{descriptor}")))

    def named(old, new):
        replace(old, new)
        steps.append(("named", str(new)))

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", named)
    path = tmp_path / "a.json"
    with files.atomic(path) as partial:
        partial.write_text("x")

    assert steps == [("on the disk", str(partial)), ("named", str(path)), ("on the disk", str(tmp_path))]


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_file_that_cannot_be_kept_leaves_the_former_one(failing, tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    files.write_text(path, "before")

    def fails(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, failing, fails)
    with pytest.raises(StorageError, match="could not be written"):
        files.write_text(path, "after")
    assert path.read_text() == "before" and [entry.name for entry in tmp_path.iterdir()] == ["a.json"]
