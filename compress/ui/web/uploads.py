"""The uploads of visitors: files under random ids, each accessible only to the visitor who sent it.

    <data>/incoming/<server>/<id>/<name>      <server> is a folder of one server process, which holds a lock on it

No path comes from a visitor or reaches one: an upload is addressed by its id, and only by its sender.
"""

from __future__ import annotations

import fcntl
import os
import re
import secrets
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from compress.errors import CompressError, RequestError, StorageError
from compress.jobs import MIN_FREE_BYTES
from compress.jobs.folders import SUFFIXES

ID = r"[0-9a-f]{32}"
IMAGE_TYPES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
TAKEN = (*(suffix for suffixes in SUFFIXES.values() for suffix in suffixes), *IMAGE_TYPES)
"""Accepted file name suffixes. The content is checked when the file is opened."""
FLOOR_BYTES = 2 * MIN_FREE_BYTES
"""Disk space that uploads leave free; runs need MIN_FREE_BYTES of it."""
MOST_AT_ONCE = 4
"""Concurrent uploads of one visitor."""
MOST_FILES, MOST_FILES_IN_ALL = 100, 4000
YOUNG_S = 900.0
"""A younger upload is not removed to make space for another one of the same visitor."""


class NoRoomError(StorageError):
    """The upload exceeds the quota, or the disk is nearly full."""


@dataclass
class Upload:
    """A file of a visitor, complete or in transfer."""

    id: str
    path: Path
    visitor: str
    since: float
    """Monotonic time of its start."""
    bytes: int = 0
    whole: bool = False
    file: BinaryIO | None = field(default=None, repr=False)


class Uploads:
    """The uploads of one server.

    Args:
        folder: of the uploads of all servers with this data folder.
        most_bytes: quota of one visitor.
        most_bytes_in_all: quota of all visitors together.
        age_s: age at which an upload is removed.
        floor_bytes: disk space that uploads leave free.
        free_bytes: folder -> free disk space.
    """

    def __init__(
        self,
        folder: Path,
        *,
        most_bytes: int,
        most_bytes_in_all: int,
        age_s: float,
        floor_bytes: int = FLOOR_BYTES,
        clock: Callable[[], float] = time.monotonic,
        free_bytes: Callable[[Path], int] = lambda folder: shutil.disk_usage(folder).free,
    ) -> None:
        self._all, self._own = folder, folder / f"server-{secrets.token_hex(8)}"
        self._most_bytes, self._most_bytes_in_all = most_bytes, most_bytes_in_all
        self._age_s, self._floor_bytes, self._clock, self._free_bytes = age_s, floor_bytes, clock, free_bytes
        self._uploads: dict[str, Upload] = {}
        self._lock = threading.RLock()
        self._held: int | None = None

    def open(self) -> None:
        """Creates this server's folder, and removes the folders of servers that no longer run.

        Raises:
            StorageError: the folder cannot be created.
        """
        try:
            self._own.mkdir(parents=True, mode=0o700)
            self._held = os.open(self._own, os.O_RDONLY | os.O_DIRECTORY)
            fcntl.flock(self._held, fcntl.LOCK_EX)
            for entry in self._all.iterdir():
                if entry != self._own and not _lives(entry):
                    shutil.rmtree(entry, ignore_errors=True) if entry.is_dir() else entry.unlink(missing_ok=True)
        except OSError as error:
            raise StorageError(
                f"Uploads cannot be stored in {self._all} ({error.strerror or error}). Make the folder writable."
            ) from error

    def close(self) -> None:
        """Removes every upload of this server; runs have their own copies."""
        with self._lock:
            self._uploads.clear()
            shutil.rmtree(self._own, ignore_errors=True)
            if self._held is not None:
                os.close(self._held)
                self._held = None

    # ---- while a file arrives ---------------------------------------------------------------------------------------

    def begin(self, visitor: str, name: str) -> Upload:
        """Starts the upload of a file.

        Args:
            name: the file's name on the visitor's machine; only its last component is used.

        Raises:
            RequestError: the suffix is not accepted.
            NoRoomError: a quota is exceeded, or the disk is nearly full.
        """
        last = re.split(r"[/\\]", name)[-1]
        if Path(last).suffix.lower() not in TAKEN:
            raise RequestError("file", last[:100], f"one that ends in {', '.join(dict.fromkeys(TAKEN))}")
        kept = re.sub(r"[^A-Za-z0-9._-]", "_", last)[-100:].lstrip(".")
        with self._lock:
            self.expire()
            self._refuse_too_many(visitor)
            self._refuse_without_room(visitor, 0)
            upload_id = secrets.token_hex(16)
            path = self._own / upload_id / kept
            try:
                path.parent.mkdir(mode=0o700)
                file = path.open("xb")
            except OSError as error:
                shutil.rmtree(path.parent, ignore_errors=True)
                raise _unwritten(error) from error
            upload = Upload(upload_id, path, visitor, self._clock(), file=file)
            self._uploads[upload_id] = upload
            return upload

    def write(self, upload: Upload, data: bytes) -> None:
        """Appends to a file in transfer. Raises `NoRoomError`; the caller then removes the upload."""
        assert upload.file is not None, "nothing is added to a whole file"
        with self._lock:
            self._refuse_without_room(upload.visitor, len(data))
            upload.bytes += len(data)
        try:
            upload.file.write(data)
        except OSError as error:
            raise _unwritten(error) from error

    def finish(self, upload: Upload) -> None:
        """Completes an upload. Raises `NoRoomError`."""
        assert upload.file is not None, "a file is finished once"
        try:
            upload.file.close()
        except OSError as error:
            raise _unwritten(error) from error
        upload.file, upload.whole = None, True

    def remove(self, upload: Upload) -> None:
        with self._lock:
            self._uploads.pop(upload.id, None)
        if upload.file is not None:
            try:
                upload.file.close()
            except OSError:  # the buffered rest does not fit, and is discarded anyway
                upload.file = None
        shutil.rmtree(upload.path.parent, ignore_errors=True)

    def refuse_announced(self, visitor: str, coming: int) -> None:
        """Raises `NoRoomError` before a body of `coming` bytes is read that does not fit."""
        with self._lock:
            self.expire()
            self._make_room(visitor, coming)
            self._refuse_without_room(visitor, coming)

    # ---- afterwards -------------------------------------------------------------------------------------------------

    def has(self, upload_id: object, visitor: str) -> bool:
        return self._of(upload_id, visitor) is not None

    def find(self, upload_id: object, visitor: str) -> Path:
        """The path of an upload. Raises `RequestError` for anything that is not the id of an upload of this visitor."""
        upload = self._of(upload_id, visitor)
        if upload is None or not upload.path.is_file():
            name = re.split(r"[/\\]", upload_id)[-1][:100] if isinstance(upload_id, str) else type(upload_id).__name__
            raise RequestError("file", name, "a file that was uploaded here: upload it again")
        return upload.path

    def expire(self) -> None:
        """Removes uploads older than the age limit."""
        oldest = self._clock() - self._age_s
        with self._lock:
            for upload in [upload for upload in self._uploads.values() if upload.whole and upload.since < oldest]:
                self.remove(upload)

    def _of(self, upload_id: object, visitor: str) -> Upload | None:
        if not isinstance(upload_id, str) or not re.fullmatch(ID, upload_id):
            return None
        with self._lock:
            upload = self._uploads.get(upload_id)
        return upload if upload is not None and upload.whole and upload.visitor == visitor else None

    def _refuse_too_many(self, visitor: str) -> None:
        own = [upload for upload in self._uploads.values() if upload.visitor == visitor]
        if sum(not upload.whole for upload in own) >= MOST_AT_ONCE:
            raise NoRoomError(
                f"{MOST_AT_ONCE} files of yours are being uploaded already: wait until one of them is complete."
            )
        if len(own) >= MOST_FILES:
            self._remove_oldest(own)
        if len(self._uploads) >= MOST_FILES_IN_ALL:
            raise NoRoomError("This server has reached its limit of uploads: try again in an hour.")

    def _make_room(self, visitor: str, coming: int) -> None:
        """Removes the oldest uploads of a visitor to make space for a new one; runs have their own copies."""
        while True:
            own = [upload for upload in self._uploads.values() if upload.visitor == visitor]
            if sum(upload.bytes for upload in own) + coming <= self._most_bytes or not self._remove_oldest(own):
                return

    def _remove_oldest(self, uploads: list[Upload]) -> bool:
        old = [upload for upload in uploads if upload.whole and upload.since < self._clock() - YOUNG_S]
        if old:
            self.remove(min(old, key=lambda upload: upload.since))
        return bool(old)

    def _refuse_without_room(self, visitor: str, coming: int) -> None:
        own = sum(upload.bytes for upload in self._uploads.values() if upload.visitor == visitor)
        if own + coming > self._most_bytes:
            raise NoRoomError(
                f"Your uploads would exceed the {_size(self._most_bytes)} that this server allows each visitor: start a run "
                f"with the uploaded files, and try again in {YOUNG_S / 60:.0f} minutes."
            )
        if sum(upload.bytes for upload in self._uploads.values()) + coming > self._most_bytes_in_all:
            raise NoRoomError("The uploads of all visitors have reached the limit of this server: try again later.")
        if self._free_bytes(self._own) - coming < self._floor_bytes:
            raise NoRoomError("The disk of this server is nearly full, so it accepts no uploads now: try again later.")


def _lives(folder: Path) -> bool:
    """Whether the server that created the folder still holds its lock."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(descriptor)
    return False


def _unwritten(error: OSError) -> CompressError:
    return NoRoomError(f"The upload could not be stored on this server ({error.strerror or error}): try again later.")


def _size(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"
