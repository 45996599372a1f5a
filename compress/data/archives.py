"""Where image files come from: a folder, or a zip file that is read in place and never extracted.

Both give names relative to the data's root and the bytes of one file at a time. Names from a zip are only compared and
shown, nothing is written under them.
"""

from __future__ import annotations

import os
import re
import stat
import threading
import unicodedata
import zipfile
from pathlib import Path
from typing import Protocol

from compress import naming
from compress.checkpoints.containers import Refused, read_directory
from compress.data.images import MAX_FILE_BYTES, Unreadable
from compress.errors import DataError

MAX_ZIP_BYTES = 2**30
MAX_ENTRIES = 20_000
MAX_UNPACKED_BYTES = 4 * 2**30
MAX_RATIO = 200
"""Largest unpacked over packed size of an entry; photographs are near 1, flat drawings near 100."""
MAX_DEPTH, MAX_NAME_BYTES = 6, 255
_ARCHIVES = (".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".7z", ".rar", ".zst")
_BY_SYSTEMS = ("__macosx", "thumbs.db", "desktop.ini")
_UNSAFE_NAME = re.compile(r"^/|^[A-Za-z]:|\\|(^|/)\.\.(/|$)")


class Files(Protocol):
    """Files below a root."""

    names: tuple[str, ...]
    """Relative, with forward slashes, sorted; without what operating systems leave behind."""

    def read(self, name: str) -> bytes:
        """Raises Unreadable when this one file cannot be used."""


def open_files(source: Path) -> Files:
    """Raises DataError when `source` is neither a folder nor a safe zip file."""
    if source.is_dir():
        return Folder(source)
    refuse_missing(source)
    return Zip(source)


def refuse_missing(source: Path) -> None:
    """Raises `DataError` when there is neither a folder nor a file."""
    if not source.exists():
        raise DataError(f"There is no data at {source}: give fashion-mnist, a folder, a .zip, or none.")


class Folder:
    """A folder on this machine; links are followed, as its owner made them."""

    def __init__(self, root: Path) -> None:
        self._root = root
        files = []
        for folder, folders, names in os.walk(root, followlinks=True, onerror=_refuse_unlisted):
            folders[:] = sorted(name for name in folders if not _is_litter(name))
            if len(Path(folder).relative_to(root).parts) > MAX_DEPTH:
                raise DataError(
                    f"{root} is nested more than {MAX_DEPTH} folders deep: give the one that holds the class folders."
                )
            for name in [*folders, *names]:
                if not _is_litter(name) and (flaw := naming.flaw(name)):
                    raise DataError(f"{root} holds {naming.shown(name)}, whose name holds {flaw}: rename it.")
            files += [Path(folder, name).relative_to(root).as_posix() for name in names if not _is_litter(name)]
        self.names = tuple(sorted(files))

    def read(self, name: str) -> bytes:
        path = self._root / name
        try:
            if path.stat().st_size > MAX_FILE_BYTES:
                raise Unreadable(f"larger than {MAX_FILE_BYTES >> 20} MiB")
            return path.read_bytes()
        except OSError as error:
            raise Unreadable(f"cannot be read: {error.strerror}") from error


class Zip:
    """An uploaded zip file; one folder that everything is in is taken as the root."""

    def __init__(self, path: Path) -> None:
        if path.stat().st_size > MAX_ZIP_BYTES:
            raise DataError(f"{path.name} is larger than 1 GiB: send fewer or smaller images.")
        try:
            entries = _accepted(read_directory(path, MAX_ENTRIES))
        except Refused as reason:
            raise DataError(
                f"{path.name} is not a usable zip of images: {reason}. Zip the folder of images again."
            ) from reason
        root = _common_root(list(entries))
        self._entries = {name.removeprefix(root): entry for name, entry in entries.items()}
        self._file, self._lock = zipfile.ZipFile(path), threading.Lock()
        self.names = tuple(sorted(self._entries))

    def read(self, name: str) -> bytes:
        entry = self._entries[name]
        if entry.file_size > MAX_FILE_BYTES:
            raise Unreadable(f"larger than {MAX_FILE_BYTES >> 20} MiB")
        try:
            with self._lock, self._file.open(entry) as stream:
                return stream.read(entry.file_size + 1)
        except Exception as error:  # noqa: BLE001 - zipfile raises ten types on damaged bytes, each means the same
            raise Unreadable("damaged inside the zip") from error


def _accepted(entries: tuple[zipfile.ZipInfo, ...]) -> dict[str, zipfile.ZipInfo]:
    """Every file entry by its name; raises Refused on anything that an honest zip of images does not have."""
    accepted: dict[str, zipfile.ZipInfo] = {}
    keys: set[str] = set()
    if sum(entry.file_size for entry in entries) > MAX_UNPACKED_BYTES:
        raise Refused("it would unpack to more than 4 GiB")
    for entry in entries:
        _check_name(entry)
        if stat.S_ISLNK(entry.external_attr >> 16):
            raise Refused("it holds a symbolic link")
        if entry.is_dir() or any(_is_litter(part) for part in entry.filename.split("/")):
            continue
        if entry.filename.lower().endswith(_ARCHIVES):
            raise Refused("it holds another archive")
        if entry.file_size > MAX_RATIO * max(entry.compress_size, 1):
            raise Refused(f"an entry unpacks to more than {MAX_RATIO} times its size")
        key = unicodedata.normalize("NFC", entry.filename).casefold()
        if key in keys:
            raise Refused("two entries have the same name")
        keys.add(key)
        accepted[entry.filename] = entry
    return accepted


def _check_name(entry: zipfile.ZipInfo) -> None:
    if _UNSAFE_NAME.search(entry.orig_filename):
        raise Refused("an entry's name leads out of the folder")
    if flaw := naming.flaw(entry.orig_filename) or naming.flaw(entry.filename):
        raise Refused(f"the name {naming.shown(entry.orig_filename)} holds {flaw}, so rename that file")
    if len(entry.filename.encode()) > MAX_NAME_BYTES or entry.filename.rstrip("/").count("/") > MAX_DEPTH:
        raise Refused(f"an entry's name is longer than {MAX_NAME_BYTES} bytes or deeper than {MAX_DEPTH} folders")


def _common_root(names: list[str]) -> str:
    """The one top folder that every name is in, with its slash; archivers put it there. Split folders stay."""
    tops = {name.partition("/")[0] for name in names}
    nested = names and all("/" in name for name in names)
    top = tops.pop() if len(tops) == 1 and nested else ""
    return f"{top}/" if top and top.lower() not in ("train", "test", "val", "valid") else ""


def _is_litter(name: str) -> bool:
    return name.startswith(".") or name.lower() in _BY_SYSTEMS


def _refuse_unlisted(error: OSError) -> None:
    raise DataError(f"{error.filename} cannot be listed ({error.strerror}): check its permissions.") from error
