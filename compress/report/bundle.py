"""All files of a finished run as one zip that is made while it is sent, so that nothing is stored twice."""

from __future__ import annotations

import time
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, cast

SUMS = "SHA256SUMS"
CHUNK = 1 << 20
"""Bytes read at a time."""


class _Sink:
    """A file that can only be written to, and emptied."""

    def __init__(self) -> None:
        self._chunks: list[bytes] = []

    def write(self, data: bytes) -> int:
        self._chunks.append(bytes(data))
        return len(data)

    def flush(self) -> None:
        pass

    def taken(self) -> bytes:
        """What was written since the last call."""
        taken = b"".join(self._chunks)
        self._chunks.clear()
        return taken


def stream(files: Mapping[str, Path], hashes: Mapping[str, str], root: str) -> Iterator[bytes]:
    """The zip, piece by piece. Entries are not compressed again: weights hardly shrink, and copying is fast.

    Args:
        files: name in the zip -> file.
        hashes: name -> sha256, as the run's manifest lists them; they go along as SHA256SUMS for `sha256sum -c`.
        root: folder that holds everything in the zip.
    """
    sink = _Sink()
    with zipfile.ZipFile(cast("IO[bytes]", sink), "w", zipfile.ZIP_STORED) as archive:
        sums = "".join(f"{digest}  {name}\n" for name, digest in sorted(hashes.items()))
        archive.writestr(zipfile.ZipInfo(f"{root}/{SUMS}", time.localtime()[:6]), sums)
        for name, path in files.items():
            entry = zipfile.ZipInfo.from_file(path, f"{root}/{name}")
            with path.open("rb") as source, archive.open(entry, "w", force_zip64=True) as target:
                while chunk := source.read(CHUNK):
                    target.write(chunk)
                    yield sink.taken()
    yield sink.taken()
