"""The folders of a queue, and the files of a run that the queue reads and writes: progress, outcome, uploads."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from compress.errors import RunError
from compress.files import storage_error
from compress.jobs.database import RUN_ID, JobRow
from compress.runs import MANIFEST, MAY_PREEXIST

UPLOAD_FIELDS = ("checkpoint", "data", "class_map")
"""Fields of a request that may name an uploaded file."""
SUFFIXES = {"checkpoint": (".safetensors", ".pth", ".pt", ".bin"), "data": (".zip",), "class_map": (".json",)}
"""Accepted file name suffixes. The content is checked when the file is opened; engines and ONNX files are never accepted."""
REFUSAL = "Error: "
"""Prefix of the last line that `python -m compress` prints when it fails."""


class Folders:
    """The folders of a queue, as `compress.jobs` lists them.

    `runs` may be a link to a folder shared with the nodes of a cluster; the run database stays on a disk of this machine.
    Raises `StorageError` when they cannot be created.
    """

    def __init__(self, data_dir: Path) -> None:
        self.runs = _made(_made(data_dir) / "runs").resolve()
        self.trash = _made(self.runs / ".deleted")  # inside `runs`, because a rename must stay on one file system
        self._former_trash = data_dir / "deleted"  # the trash of earlier versions
        self._consoles, self._kept = _made(data_dir / "consoles"), _made(data_dir / "kept")

    def run(self, job_id: str) -> Path:
        return self.runs / job_id

    def console(self, job_id: str) -> Path:
        return self._consoles / f"{job_id}.txt"

    def kept(self, job_id: str) -> Path:
        """The mark of a run that retention never removes."""
        return self._kept / job_id

    def all_kept(self) -> list[str]:
        return [mark.name for mark in self._kept.iterdir()]

    def events_bytes(self, job_id: str) -> int:
        events = self.run(job_id) / "events.jsonl"
        return events.stat().st_size if events.exists() else 0

    def move_to_trash(self, job_id: str) -> None:
        """Moves the run's folder to the trash. Raises OSError."""
        try:
            self.run(job_id).rename(self.trash / job_id)
        except FileNotFoundError:  # already removed by hand; the rest of the run is deleted as well
            (self.trash / job_id).mkdir()

    def empty_trash(self, if_listed: Callable[[str, Callable[[], object]], bool]) -> None:
        """Removes the files of deleted runs; restores a run that is still listed because the database could not be written.

        Args:
            if_listed: `JobStore.if_listed`.
        """
        for folder in (*self.trash.glob(RUN_ID), *self._former_trash.glob(RUN_ID)):
            if not if_listed(folder.name, partial(folder.rename, self.run(folder.name))):
                self.console(folder.name).unlink(missing_ok=True)
                self.kept(folder.name).unlink(missing_ok=True)
                shutil.rmtree(folder, ignore_errors=True)  # retried the next time
        if self._former_trash.is_dir() and not any(self._former_trash.iterdir()):
            self._former_trash.rmdir()


def _made(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise storage_error(folder, error) from error
    return folder


def outcome(folder: Path, row: JobRow, returncode: int | None, console: str) -> tuple[str, str | None]:
    """(final state, error message). The manifest is written last, so its presence alone means `done`."""
    if (folder / MANIFEST).is_file():
        return "done", None
    if row.state == "cancelling":
        return "cancelled", None
    last = last_event(folder / "events.jsonl", row.events_offset, "state")
    if last.get("state") == "failed" and last.get("error"):
        return "failed", str(last["error"])
    if (refusal := console.strip().rpartition("\n")[2]).startswith(REFUSAL):
        return "failed", refusal.removeprefix(REFUSAL)
    return "failed", interrupted(returncode, stopped=last.get("state") == "cancelled")


def interrupted(returncode: int | None, *, stopped: bool = False) -> str:
    """The error message of a run whose process ended without reporting one.

    Args:
        returncode: as `subprocess` reports it, negative for a signal; None if unknown.
        stopped: the process was terminated from outside.
    """
    cause = "Its process ended without a result"
    if stopped:
        cause = "It was stopped from outside the queue"
    elif returncode is not None and returncode < 0:
        memory = ", often because the machine ran out of memory" if returncode == -9 else ""
        cause = f"Its process was killed (signal {-returncode}{memory})"
    elif returncode:
        cause = f"Its process ended with exit code {returncode}; its output is in the run's file under consoles on the server"
    return f"The run was interrupted. {cause}. Resume it: finished stages are not repeated."


def has_begun(folder: Path) -> bool:
    """Whether an attempt has written here, perhaps one of a server that was killed before it could store it."""
    return any(entry.name not in MAY_PREEXIST for entry in folder.iterdir())


def take(files: Mapping[str, str | Path], uploads: Path) -> dict[str, str]:
    """Links or copies the files into `uploads`, so that they outlive their original place; field -> new path."""
    taken = {}
    try:
        uploads.mkdir(parents=True)
    except OSError as error:
        raise storage_error(uploads, error) from error
    for field, path in files.items():
        source = Path(path)
        if field not in UPLOAD_FIELDS:
            raise RunError(f"{field!r} accepts no file; upload files for {', '.join(UPLOAD_FIELDS)} only.")
        if not source.is_file():
            raise RunError(f"The file for {field} ({source.name}) no longer exists: upload it again.")
        if source.suffix.lower() not in SUFFIXES[field]:
            allowed = ", ".join(SUFFIXES[field])
            raise RunError(f"The file for {field} ({source.name}) has an unsupported suffix: use one of {allowed}.")
        name = re.sub(r"[^A-Za-z0-9._-]", "_", source.name)[-100:].lstrip(".") or "file"
        target = uploads / field / name
        try:
            target.parent.mkdir()
            try:
                os.link(source.resolve(), target)
            except OSError:  # another file system
                shutil.copyfile(source, target)
        except OSError as error:
            raise storage_error(target, error) from error
        taken[field] = str(target)
    return taken


def last_event(path: Path, offset: int, key: str) -> dict[str, Any]:
    """The latest event after byte `offset` that has `key`, or an empty dict. Skips a partially written line."""
    for line in reversed(tail(path, 65_536, offset).splitlines()):
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict) and key in event:
            return event
    return {}


def tail(path: Path, max_bytes: int, offset: int = 0) -> str:
    """The last complete lines of a text file after byte `offset`, at most `max_bytes`; empty without a file."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            begin = max(offset, size - max_bytes, 0)
            file.seek(begin)
            data = file.read(max_bytes)
    except FileNotFoundError:
        return ""
    if begin > offset:
        data = data[data.find(b"\n") + 1 :]
    return data.decode("utf-8", errors="replace")
