"""Small files that would take minutes or gigabytes: refused at once, by what they are and not by a time limit."""

from __future__ import annotations

import json
import struct
import time
import zipfile
from pathlib import Path

import pytest
import torch
from checkpoint_files import edit_zip, safetensors_bytes, small_state
from image_files import class_entries, zipped

from compress.checkpoints import containers, inspection, pickles
from compress.checkpoints.containers import Refused
from compress.checkpoints.pickles import interpret
from compress.errors import CheckpointError

PRIME = 2**61 - 1
"""Every multiple of it has the hash 0."""


def number(value: int) -> bytes:
    raw = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(raw)]) + raw


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def pickled(code: bytes) -> bytes:
    return b"\x80\x02" + code + b"."


def dictionary(*keys: bytes) -> bytes:
    return pickled(b"}(" + b"".join(key + b"N" for key in keys) + b"u")


def refused(data: bytes, words: str, seconds: float = 1.0) -> None:
    started = time.process_time()
    with pytest.raises(Refused, match=words):
        interpret(data)
    assert time.process_time() - started < seconds


@pytest.mark.parametrize(
    "key",
    [
        lambda index: number(index * PRIME),
        lambda index: number(-index * PRIME),
        lambda index: b"G" + struct.pack(">d", float(index * PRIME)),
    ],
)
def test_numbers_of_one_hash_are_no_keys(key):
    """80,000 of them took 77 s of computing."""
    refused(dictionary(*(key(index) for index in range(1, 5_000))), "names an entry by (a number outside|neither)", 3.0)


@pytest.mark.parametrize(
    "key", [b"N", b"\x88", b")", b"K\x01\x85", b"}", b"]", number(2**20), number(-1), b"G" + struct.pack(">d", 1.0)]
)
@pytest.mark.parametrize("by_one", [False, True])
def test_what_is_no_text_and_no_small_number_is_no_key(key, by_one):
    refused(pickled(b"}" + key + b"Ns") if by_one else dictionary(key), "its index of tensors names an entry by")


def test_keys_are_looked_at_before_any_is_stored(monkeypatch):
    monkeypatch.setattr(pickles, "_refuse_key", lambda key: None)
    with pytest.raises(Refused, match="damaged"):  # a list cannot be hashed: so it came that far
        interpret(dictionary(b"]"))


def test_an_optimizer_may_count_its_parameters():
    assert interpret(dictionary(b"K\x00", b"K\x01", text("w"))).value == {0: None, 1: None, "w": None}


LONG_TUPLE = b"(" + b"K\x01" * 100_000 + b"tq\x00"


@pytest.mark.parametrize(
    "call",
    [
        b"ctorch\nSize\nh\x00\x85R",
        b"ccollections\nOrderedDict\nh\x00R",
        b"ctorch._utils\n_rebuild_tensor_v2\nh\x00R",
        b"ctorch._utils\n_rebuild_parameter\nh\x00R",
    ],
)
def test_a_long_tuple_is_not_walked_once_per_call(call):
    refused(pickled(LONG_TUPLE + call * 1_000), "its index of tensors is damaged", 2.0)


def test_a_long_shape_is_not_walked_once_per_tensor():
    storage = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu") + b"K\x01tQ"
    tensor = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + b"K\x00h\x00h\x00\x89ccollections\nOrderedDict\n)RtR"
    refused(pickled(LONG_TUPLE + tensor * 500), "its index of tensors is damaged", 2.0)


def test_places_of_the_memo_are_numbered_in_order():
    refused(pickled(b"Nr" + struct.pack("<I", pickles.MAX_OPCODES)), "damaged")


@pytest.mark.parametrize(
    "code",
    [
        b"(" * 200_000 + b"t" * 90_000,
        b"]" * 100_000 + b"a" * 99_999,
        b")" + b"\x85" * 200_000,
        b"L" + b"9" * 500_000 + b"L\n",
        b"\x8b" + struct.pack("<i", 500_000) + b"\x7f" * 500_000,
        text("x" * 500_000) * 2 + b"\x86",
        b"]q\x00" + b"h\x00h\x00a" * 60_000,
    ],
)
def test_nesting_long_numbers_and_loops_end_soon(code):
    started = time.process_time()
    try:
        interpret(pickled(code))
    except Refused:
        pass
    assert time.process_time() - started < 6


# ---- zips -------------------------------------------------------------------------------------------------------------


def many(path: Path, count: int) -> Path:
    """A zip with `count` entries, which are all the same bytes but for their names in the directory."""
    local = b"PK\x03\x04" + bytes(26)
    entry = b"PK\x01\x02" + bytes(24) + struct.pack("<HHH", 5, 0, 0) + bytes(8) + struct.pack("<I", 0)
    directory = b"".join(entry + b"%05d" % index for index in range(count))
    end = b"PK\x05\x06" + bytes(4) + struct.pack("<HHIIH", 1, 1, len(directory), len(local), 0)
    path.write_bytes(local + directory + end)
    return path


def with_large_record(path: Path, count: int, *, in_comment: bool = False) -> None:
    """The record of a large zip, which states `count` entries, at its place or in the comment."""
    data = bytearray(path.read_bytes())
    at = data.rindex(b"PK\x05\x06")
    size, offset = struct.unpack_from("<II", data, at + 12)
    record = b"PK\x06\x06" + struct.pack("<QHHIIQQQQ", 44, 45, 45, 0, 0, count, count, size, offset)
    if in_comment:
        data[at + 20 : at + 22] = struct.pack("<H", len(record))
        data += record
    else:
        data[at:at] = record + b"PK\x06\x07" + struct.pack("<IQI", 0, at, 1)
    path.write_bytes(bytes(data))


def test_a_directory_is_counted_by_its_bytes_and_not_by_what_it_says(tmp_path, monkeypatch):
    path = many(tmp_path / "a.zip", 20_001)
    monkeypatch.setattr(zipfile, "ZipFile", None)
    with pytest.raises(Refused, match="more than 20000 entries"):
        containers.read_directory(path, 20_000)


def test_a_large_record_in_the_comment_is_a_comment(tmp_path, monkeypatch):
    path = many(tmp_path / "a.zip", 20_001)
    with_large_record(path, 3, in_comment=True)
    monkeypatch.setattr(zipfile, "ZipFile", None)
    with pytest.raises(Refused, match="more than 20000 entries"):
        containers.read_directory(path, 20_000)
    monkeypatch.undo()
    honest = zipped(tmp_path / "b.zip", class_entries())
    with_large_record(honest, 10**9, in_comment=True)
    assert len(containers.read_directory(honest, 20_000)) == 24


def test_a_large_record_counts_at_its_locator(tmp_path):
    path = zipped(tmp_path / "a.zip", class_entries())
    with_large_record(path, 24)
    assert len(containers.read_directory(path, 20_000)) == 24
    path = zipped(tmp_path / "b.zip", class_entries())
    with_large_record(path, 20_001)
    with pytest.raises(Refused, match="more than 20000 entries"):
        containers.read_directory(path, 20_000)


@pytest.mark.parametrize("change", [lambda at: (at, 8), lambda at: (at + 56 + 8, 1), lambda at: (at + 40, 7)])
def test_a_large_record_that_contradicts_its_locator_is_damage(change, tmp_path):
    path = zipped(tmp_path / "a.zip", class_entries())
    with_large_record(path, 24)
    data = bytearray(path.read_bytes())
    where, value = change(data.rindex(b"PK\x06\x06"))
    data[where + 1] ^= value
    path.write_bytes(bytes(data))
    with pytest.raises(Refused, match="directory is damaged|more than 20000"):
        containers.read_directory(path, 20_000)


def test_a_mark_of_the_byte_order_is_not_read_when_it_is_long(tmp_path):
    torch.save(small_state(), tmp_path / "honest.pth")
    path = tmp_path / "a.pth"
    edit_zip(tmp_path / "honest.pth", path, lambda name, data: b"little" * 10 if name.endswith("byteorder") else data)
    with pytest.raises(CheckpointError, match="big-endian"):
        inspection.inspect(path)


# ---- safetensors ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": [[["F32"]]], "shape": [1], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": {"a": 1}, "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [2**61] * 9, "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [1.0], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [True], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [1], "data_offsets": {"a": 0, "b": 4}},
        {"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 4]},
        [1],
        None,
    ],
)
def test_odd_entries_of_a_header_are_damage(entry, tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(safetensors_bytes({"w": entry}, bytes(4)))
    with pytest.raises(CheckpointError, match="header is damaged|does not match its shape"):
        inspection.inspect(path)


@pytest.mark.parametrize(
    "header",
    [
        b'{"w":{"dtype":' + b"[" * 900 + b"]" * 900 + b',"shape":[1],"data_offsets":[0,4]}}',
        b'{"w":{"dtype":"F32","shape":[' + b"9" * 5_000 + b'],"data_offsets":[0,4]}}',
        b'{"w":{"dtype":"F32","shape":[' + b"1," * 500_000 + b'1],"data_offsets":[0,4]}}',
        b'{"__metadata__":' + json.dumps({"a": {"b": "c"}}).encode() + b"}",
        b'{"__metadata__":["a"]}',
        b'{"a":1,' * 100_000 + b'"b":1' + b"}" * 100_000,
    ],
)
def test_deep_and_long_headers_are_refused_at_once(header, tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(safetensors_bytes(header, bytes(4)))
    started = time.process_time()
    with pytest.raises(CheckpointError):
        inspection.inspect(path)
    assert time.process_time() - started < 2
