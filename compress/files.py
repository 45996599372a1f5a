"""Files that are either whole or absent: written beside, synced, renamed."""

from __future__ import annotations

import errno
import hashlib
import os
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from compress.errors import StorageError

PACKAGE = Path(__file__).resolve().parent
"""The folder of the package `compress`."""
INSTALLATION = PACKAGE.parent
"""The folder that Python finds `compress` in; in a checkout, its root."""

PARTIAL = ".partial-"
"""Prefix of a file that is being written; such a file is never an artifact."""


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A temporary path in the same folder, with the same suffix, that becomes `path` when the block succeeds.

    Raises:
        StorageError: the folder cannot be written, or the disk is full. Nothing half-written stays.
    """
    partial = path.with_name(f"{PARTIAL}{uuid.uuid4().hex[:8]}-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        _sync(partial)
        os.replace(partial, path)
        _sync(path.parent)
    except OSError as error:
        raise storage_error(path, error) from error
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    with atomic(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_tensors(path: Path, tensors: Mapping[str, Any]) -> None:
    """`tensors` (contiguous, on the CPU) as one safetensors file. Raises `StorageError`."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    with atomic(path) as partial:
        try:
            save_file(dict(tensors), partial)
        except SafetensorError as error:  # it wraps the system's error, and keeps the number only in its text
            number = errno.ENOSPC if "os error 28" in str(error) else errno.EIO
            raise storage_error(path, OSError(number, str(error))) from error


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def storage_error(path: Path, error: OSError) -> StorageError:
    """The sentence for an operating system error while writing `path`."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StorageError(
            f"The disk is full: {path.name} could not be written to {path.parent}. Free some space and resume the run."
        )
    return StorageError(
        f"{path} could not be written ({error.strerror or error}). Choose a folder that can be written."
    )


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
