"""The outside of an uploaded file, checked with the standard library before anything is unpacked or loaded.

Zip directories and safetensors headers are compared with allow-lists and budgets. `torch.load` alone accepts deflate
bombs and entries with a wrong checksum, so it only sees what has passed here.
"""

from __future__ import annotations

import io
import json
import math
import re
import struct
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress.checkpoints import refusals

MAX_DIRECTORY_BYTES_PER_ENTRY = 512
MAX_HEADER_BYTES = 4 * 2**20
MAX_TENSORS = 5_000
MAX_DIMENSIONS = 8

_DIRECTORY_ENTRY, _END_OF_DIRECTORY = b"PK\x01\x02", b"PK\x05\x06"
_END_OF_DIRECTORY_64, _LOCATOR_64 = b"PK\x06\x06", b"PK\x06\x07"
_LONGEST_END = 22 + 2**16 + 20 + 56
"""Bytes of the records at the end of a zip file with the longest comment."""
_SIMPLE_NAME = re.compile(r"[A-Za-z0-9_.]{1,80}")

_DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}
"""safetensors' names of number formats, and torch's."""
ITEM_BYTES = {
    "float64": 8,
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "int64": 8,
    "int32": 4,
    "int16": 2,
    "int8": 1,
    "uint8": 1,
    "bool": 1,
}


class Refused(Exception):
    """Why a container is not opened; the caller adds which file it was and what to do."""


class UnknownFormat(Refused):
    """The name of a number format that is not supported."""


class Compressed(Refused):
    """torch.save does not compress."""


@dataclass(frozen=True)
class TensorEntry:
    """A tensor as its file describes it."""

    dtype: str
    """torch's name without the `torch.`"""
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


@dataclass(frozen=True)
class SafetensorsHeader:
    tensors: Mapping[str, TensorEntry]
    metadata: Mapping[str, str]


def read_directory(path: Path, max_entries: int) -> tuple[zipfile.ZipInfo, ...]:
    """The entries of a zip file, none of them opened.

    Raises:
        Refused: no readable directory, too many entries, encryption, an unknown compression, or entries that overlap.
    """
    _check_entry_count(path, max_entries)
    try:
        with zipfile.ZipFile(path) as file:
            entries = tuple(file.infolist())
    except Exception as error:  # noqa: BLE001 - zipfile raises ten types on damaged bytes, each means the same here
        raise Refused("its zip directory is damaged") from error
    if len(entries) > max_entries:
        raise Refused(f"it holds more than {max_entries} entries")
    if any(entry.flag_bits & 0x1 for entry in entries):
        raise Refused("it is encrypted")
    if any(entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) for entry in entries):
        raise Refused("it uses a compression other than deflate")
    end = 0
    for entry in sorted(entries, key=lambda entry: entry.header_offset):
        if entry.header_offset < end:
            raise Refused("its entries overlap")
        end = entry.header_offset + 30 + len(entry.filename) + entry.compress_size
    if end > path.stat().st_size:
        raise Refused("its entries claim more bytes than the file has")
    return entries


def _check_entry_count(path: Path, max_entries: int) -> None:
    """Refuse by the directory's own bytes: to open one of 100,000 entries takes seconds and hundreds of megabytes."""
    directory = _directory(path, max_entries)
    at = count = 0
    while at < len(directory):
        if directory[at : at + 4] != _DIRECTORY_ENTRY or at + 46 > len(directory):
            raise Refused("its zip directory is damaged")
        at += 46 + sum(struct.unpack_from("<HHH", directory, at + 28))
        count += 1
        if count > max_entries:
            raise Refused(f"it holds more than {max_entries} entries")


def _directory(path: Path, max_entries: int) -> bytes:
    """The directory as `zipfile` will read it, which goes by its size and place alone and not by the number it states."""
    with path.open("rb") as file:
        length = file.seek(0, io.SEEK_END)
        start = file.seek(max(0, length - _LONGEST_END))
        tail = file.read()
        at = tail.rfind(_END_OF_DIRECTORY)
        if at < 0 or len(tail) < at + 22:
            raise Refused(_why_no_zip(path))
        count, size = struct.unpack_from("<HI", tail, at + 10)
        # the larger record counts where its locator stands and points: the same letters in a comment are a comment
        if tail[max(0, at - 20) : at].startswith(_LOCATOR_64):
            at -= 20 + 56
            offset = struct.unpack_from("<Q", tail, at + 56 + 8)[0] if at >= 0 else -1
            if offset != start + at or not tail[at:].startswith(_END_OF_DIRECTORY_64):
                raise Refused("its zip directory is damaged")
            count, size = struct.unpack_from("<QQ", tail, at + 32)
        if count > max_entries or size > max_entries * MAX_DIRECTORY_BYTES_PER_ENTRY:
            raise Refused(f"it holds more than {max_entries} entries")
        if size > start + at:
            raise Refused("its zip directory is damaged")
        file.seek(start + at - size)
        return file.read(size)


def _why_no_zip(path: Path) -> str:
    with path.open("rb") as file:
        start = file.read(512)
    if not start:
        return "it is empty"
    if start.startswith(b"PK"):
        return "its zip directory is missing, as after an interrupted transfer"
    return f"it is {refusals.archive(start)}, not a zip" if refusals.archive(start) else "it is not a zip"


def checksum_failure(path: Path) -> str | None:
    """The name of the first entry whose bytes do not match their checksum."""
    with zipfile.ZipFile(path) as file:
        for entry in file.infolist():
            try:
                with file.open(entry) as stream:
                    while stream.read(2**20):
                        pass
            except Exception:  # noqa: BLE001 - as in `read_directory`
                return entry.filename
    return None


def printable(name: str) -> str:
    """`name` when it is a plain dotted name, else a harmless stand-in: it comes from an untrusted file."""
    return name if _SIMPLE_NAME.fullmatch(name) else "an unprintable name"


def read_safetensors_header(path: Path) -> SafetensorsHeader:
    """Check the header of a safetensors file, which holds no more than what this says.

    Raises:
        Refused: the header is damaged, too large, or does not describe the file's bytes exactly.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else -1
        if not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
            raise Refused("its header is missing, cut off, or larger than 4 MiB")
        raw = file.read(length)
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise Refused("its header is damaged") from error
    if not isinstance(header, dict):
        raise Refused("its header is damaged")
    metadata = header.pop("__metadata__", {})
    if len(header) > MAX_TENSORS:
        raise Refused(f"it holds more than {MAX_TENSORS} tensors")
    tensors = _check_layout(header, size - 8 - length)
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise Refused("its metadata is damaged")
    return SafetensorsHeader(tensors, metadata)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({key for key, _ in pairs}) != len(pairs):
        raise ValueError("duplicate key")
    return dict(pairs)


def _check_layout(header: dict[str, Any], data_bytes: int) -> dict[str, TensorEntry]:
    """Tensors must cover the data without overlap or hole."""
    spans, tensors = [], {}
    for name, entry in header.items():
        try:
            dtype, shape, (start, stop) = entry["dtype"], entry["shape"], entry["data_offsets"]
            whole = len(shape) <= MAX_DIMENSIONS and all(
                type(value) is int and 0 <= value < 2**63 for value in [*shape, start, stop]
            )  # before they are multiplied: a product of a million numbers takes minutes
        except (TypeError, KeyError, ValueError) as error:
            raise Refused("its header is damaged") from error
        if not isinstance(dtype, str):
            raise Refused("its header is damaged")
        if dtype not in _DTYPES:
            raise UnknownFormat(printable(dtype))
        tensors[name] = TensorEntry(_DTYPES[dtype], tuple(shape))
        if not whole or tensors[name].nbytes != stop - start:
            raise Refused(f"the size of {printable(name)} does not match its shape")
        spans.append((start, stop))
    end = 0
    for start, stop in sorted(spans):
        if start != end:
            raise Refused("its tensors overlap or leave holes")
        end = stop
    if end != data_bytes:
        raise Refused("it is cut off, or other bytes follow the tensors")
    return tensors
