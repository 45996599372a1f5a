"""The store of uploads: who finds one, names, quotas, disk space, and what stopped servers left."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from compress.errors import RequestError
from compress.ui.web.uploads import MOST_AT_ONCE, NoRoomError, Uploads


@pytest.fixture
def clock() -> list[float]:
    return [1000.0]


@pytest.fixture
def uploads(tmp_path: Path, clock: list[float]) -> Iterator[Uploads]:
    uploads = Uploads(
        tmp_path / "in", most_bytes=100, most_bytes_in_all=250, age_s=3600, floor_bytes=0, clock=lambda: clock[0]
    )
    uploads.open()
    yield uploads
    uploads.close()


def sent(uploads: Uploads, visitor: str = "a", content: bytes = b"w" * 40, name: str = "x.pth") -> str:
    upload = uploads.begin(visitor, name)
    try:
        uploads.write(upload, content)
        uploads.finish(upload)
    except NoRoomError:
        uploads.remove(upload)
        raise
    return upload.id


def test_an_upload_is_found_by_who_sent_it_alone(uploads: Uploads) -> None:
    mine = sent(uploads, "a")
    assert uploads.find(mine, "a").read_bytes() == b"w" * 40 and uploads.has(mine, "a")
    for visitor in ("b", "", "A"):
        assert not uploads.has(mine, visitor)
        with pytest.raises(RequestError, match="a file that was uploaded here"):
            uploads.find(mine, visitor)
    half = uploads.begin("a", "y.pth")
    assert not uploads.has(half.id, "a"), "not before it is whole"


def test_uploads_keep_nothing_of_a_name_but_its_end(uploads: Uploads, tmp_path: Path) -> None:
    for name in (
        "../../../evil.pth",
        "/etc/evil.pth",
        "..\\evil.pth",
        "...pth",
        "\x7f\x1b\n\u202e.pth",
        "n" * 300 + ".pth",
    ):
        path = uploads.find(sent(uploads, "a", b"w", name), "a")
        assert path.resolve().is_relative_to(tmp_path / "in") and re.fullmatch(r"[A-Za-z0-9_][\w.-]*", path.name), name
    for name in ("x.engine", "x.onnx", "x.html", "x.svg", "x", "x.pth.exe", "pth"):
        with pytest.raises(RequestError, match=r"expected one that ends in \.safetensors, \.pth, "):
            uploads.begin("a", name)


def test_each_visitor_and_all_together_have_a_quota(uploads: Uploads, clock: list[float]) -> None:
    first = sent(uploads, "a")
    sent(uploads, "a")
    with pytest.raises(NoRoomError, match="Your uploads would exceed"):
        sent(uploads, "a")
    sent(uploads, "b", b"w" * 100)
    with pytest.raises(NoRoomError, match="The uploads of all visitors have reached the limit"):
        sent(uploads, "c", b"w" * 71)
    clock[0] += 1000
    uploads.refuse_announced("a", 40)
    assert not uploads.has(first, "a"), "the oldest of the same visitor makes room once it is not young any more"
    sent(uploads, "a")
    clock[0] += 3601
    uploads.expire()
    assert not uploads.has(sent(uploads, "b"), "a") and len(uploads._uploads) == 1


def test_uploads_under_way_are_few_and_leave_the_disk_room(tmp_path: Path) -> None:
    free = [1000]
    uploads = Uploads(
        tmp_path / "in",
        most_bytes=500,
        most_bytes_in_all=500,
        age_s=60,
        floor_bytes=900,
        free_bytes=lambda folder: free[0],
    )
    uploads.open()
    with pytest.raises(NoRoomError, match="The disk of this server is nearly full"):
        uploads.refuse_announced("a", 200)
    for _ in range(MOST_AT_ONCE):
        begun = uploads.begin("a", "x.pth")
    with pytest.raises(NoRoomError, match="files of yours are being uploaded already"):
        uploads.begin("a", "x.pth")
    free[0] = 950
    with pytest.raises(NoRoomError, match="The disk of this server is nearly full"):
        uploads.write(begun, b"w" * 60)
    uploads.close()
    assert list((tmp_path / "in").iterdir()) == []


def test_what_servers_left_is_removed_at_the_next_start_and_what_lives_is_not(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    dead = Uploads(folder, most_bytes=100, most_bytes_in_all=100, age_s=60, floor_bytes=0)
    dead.open()
    left = sent(dead)
    os.close(dead._held)  # as if it was killed
    (folder / "tmp1234").write_bytes(b"of a version before")
    alive = Uploads(folder, most_bytes=100, most_bytes_in_all=100, age_s=60, floor_bytes=0)
    alive.open()
    mine = sent(alive)
    third = Uploads(folder, most_bytes=100, most_bytes_in_all=100, age_s=60, floor_bytes=0)
    third.open()
    assert alive.find(mine, "a").is_file() and not dead._uploads[left].path.exists()
    assert {path.name for path in folder.iterdir()} == {alive._own.name, third._own.name}
