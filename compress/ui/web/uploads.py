"""What visitors have uploaded: files under random ids, each for the visitor who sent it alone.

    <data>/incoming/<server>/<id>/<name>      <server> is one folder for each process that serves, which locks it while it lives

No path comes from a visitor or goes to one. An upload is named by its id, and found only by who sent it.
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
"""How the name of a file may end. What is in it is looked at when it is opened."""
FLOOR_BYTES = 2 * MIN_FREE_BYTES
"""Uploads leave so much of the disk free: runs need MIN_FREE_BYTES of it."""
MOST_AT_ONCE = 4
"""Uploads of one visitor under way."""
MOST_FILES, MOST_FILES_IN_ALL = 100, 4000
YOUNG_S = 900.0
"""An upload so young is not removed to make room for another one of the same visitor."""


class NoRoomError(StorageError):
    """The upload does not fit: too much was uploaded already, or the disk is nearly full."""


@dataclass
class Upload:
    """A file of a visitor's, complete or on its way."""

    id: str
    path: Path
    visitor: str
    since: float
    """Of a clock that nobody can set."""
    bytes: int = 0
    whole: bool = False
    file: BinaryIO | None = field(default=None, repr=False)


class Uploads:
    """The uploads of one server.

    Args:
        folder: of the uploads of all servers with this data folder.
        most_bytes: of one visitor together.
        most_bytes_in_all: of everybody together.
        age_s: after which an upload is removed.
        free_bytes: tells how much of the disk is free.
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
        """Makes this server's folder, and removes what servers left that do not live any more.

        Raises:
            StorageError: the folder cannot be made.
        """
        try:
            self._own.mkdir(parents=True, mode=0o700)
            self._held = os.open(self._own, os.O_RDONLY | os.O_DIRECTORY)
            fcntl.flock(self._held, fcntl.LOCK_EX)
            for entry in self._all.iterdir():
                if entry != self._own and not _lives(entry):
                    shutil.rmtree(entry, ignore_errors=True) if entry.is_dir() else entry.unlink(missing_ok=True)
        except OSError as error:
            raise StorageError(f"Uploads cannot be kept in {self._all} ({error.strerror or error}).") from error

    def close(self) -> None:
        """Removes every upload of this server; runs have their own."""
        with self._lock:
            self._uploads.clear()
            shutil.rmtree(self._own, ignore_errors=True)
            if self._held is not None:
                os.close(self._held)
                self._held = None

    # ---- while a file arrives ---------------------------------------------------------------------------------------

    def begin(self, visitor: str, name: str) -> Upload:
        """A place for a file that is about to arrive.

        Args:
            name: that the visitor's machine gives the file; nothing but its last part is used.

        Raises:
            RequestError: a file of another kind is not taken.
            NoRoomError: the visitor, all visitors together, or the disk have no room for it.
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
        """Adds to a file that arrives. Raises `NoRoomError`; the caller then gives the file up."""
        assert upload.file is not None, "nothing is added to a whole file"
        with self._lock:
            self._refuse_without_room(upload.visitor, len(data))
            upload.bytes += len(data)
        try:
            upload.file.write(data)
        except OSError as error:
            raise _unwritten(error) from error

    def finish(self, upload: Upload) -> None:
        """The file has arrived. Raises `NoRoomError`."""
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
            except OSError:  # what was not written yet has no room, and is not wanted any more
                upload.file = None
        shutil.rmtree(upload.path.parent, ignore_errors=True)

    def refuse_announced(self, visitor: str, coming: int) -> None:
        """Refuses a body of `coming` bytes before it was read. Raises `NoRoomError`."""
        with self._lock:
            self.expire()
            self._make_room(visitor, coming)
            self._refuse_without_room(visitor, coming)

    # ---- afterwards -------------------------------------------------------------------------------------------------

    def has(self, upload_id: object, visitor: str) -> bool:
        return self._of(upload_id, visitor) is not None

    def find(self, upload_id: object, visitor: str) -> Path:
        """The file. Raises `RequestError` for everything else that a visitor may give, which nothing looks at."""
        upload = self._of(upload_id, visitor)
        if upload is None or not upload.path.is_file():
            given = re.split(r"[/\\]", upload_id)[-1][:100] if isinstance(upload_id, str) else type(upload_id).__name__
            raise RequestError("file", given, "a file that was uploaded here: upload it again")
        return upload.path

    def expire(self) -> None:
        """Removes uploads that have been here for too long."""
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
                f"{MOST_AT_ONCE} files of yours are being uploaded already: wait until one of them is here."
            )
        if len(own) >= MOST_FILES:
            self._remove_oldest(own)
        if len(self._uploads) >= MOST_FILES_IN_ALL:
            raise NoRoomError("This server holds as many uploads as it can: try again in an hour.")

    def _make_room(self, visitor: str, coming: int) -> None:
        """The oldest uploads of a visitor make room for a new one; runs that took them keep them."""
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
                f"Your uploads would take more than the {_size(self._most_bytes)} that this server gives to each visitor: "
                f"start a run with those that are here, and try again in {YOUNG_S / 60:.0f} minutes."
            )
        if sum(upload.bytes for upload in self._uploads.values()) + coming > self._most_bytes_in_all:
            raise NoRoomError(
                "The uploads of all visitors take all the room that this server gives them: try again later."
            )
        if self._free_bytes(self._own) - coming < self._floor_bytes:
            raise NoRoomError("The disk of this server is nearly full, so it takes no upload now: try again later.")


def _lives(folder: Path) -> bool:
    """Whether the server that made the folder still holds its lock."""
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
