"""The folders of a queue, and what it reads from and puts into a run's folder: progress, how it ended, uploads."""

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
from compress.jobs.database import RUN_ID, Row
from compress.runs import MANIFEST, MAY_PREEXIST

UPLOAD_FIELDS = ("checkpoint", "data", "class_map")
"""Fields of a request that may name an uploaded file."""
SUFFIXES = {"checkpoint": (".safetensors", ".pth", ".pt", ".bin"), "data": (".zip",), "class_map": (".json",)}
"""What an upload may be called. What is in it is looked at when it is opened; engines and ONNX files are never taken."""
REFUSAL = "Error: "
"""How the last line begins that `python -m compress` prints when it refuses."""


class Folders:
    """Where a queue keeps what belongs to a run; `compress.jobs` tells what is where.

    `runs` may be a link to a folder that the nodes of a cluster see, while the record stays on a disk of this machine.
    Raises `StorageError` when they cannot be made.
    """

    def __init__(self, data_dir: Path) -> None:
        self.runs = _made(_made(data_dir) / "runs").resolve()
        self.deleted = _made(self.runs / ".deleted")  # on the same disk, and nobody else's, also where `runs` is a link
        self._formerly_deleted = data_dir / "deleted"  # where versions before this one put runs away
        self._consoles, self._kept = _made(data_dir / "consoles"), _made(data_dir / "kept")

    def run(self, job_id: str) -> Path:
        return self.runs / job_id

    def console(self, job_id: str) -> Path:
        return self._consoles / f"{job_id}.txt"

    def kept(self, job_id: str) -> Path:
        """The mark of a run that is never removed to make room."""
        return self._kept / job_id

    def all_kept(self) -> list[str]:
        return [mark.name for mark in self._kept.iterdir()]

    def events_bytes(self, job_id: str) -> int:
        events = self.run(job_id) / "events.jsonl"
        return events.stat().st_size if events.exists() else 0

    def put_away(self, job_id: str) -> None:
        """Takes the run's folder out of the list of runs. Raises OSError."""
        try:
            self.run(job_id).rename(self.deleted / job_id)
        except FileNotFoundError:  # somebody removed it; the rest of the run goes as well
            (self.deleted / job_id).mkdir()

    def empty_deleted(self, while_listed: Callable[[str, Callable[[], object]], bool]) -> None:
        """Removes all that is left of runs that were put away; one that is still listed, because the record could not be
        written, comes back.

        Args:
            while_listed: of the record.
        """
        for folder in (*self.deleted.glob(RUN_ID), *self._formerly_deleted.glob(RUN_ID)):
            if not while_listed(folder.name, partial(folder.rename, self.run(folder.name))):
                self.console(folder.name).unlink(missing_ok=True)
                self.kept(folder.name).unlink(missing_ok=True)
                shutil.rmtree(folder, ignore_errors=True)  # what stays is tried again the next time
        if self._formerly_deleted.is_dir() and not any(self._formerly_deleted.iterdir()):
            self._formerly_deleted.rmdir()


def _made(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise storage_error(folder, error) from error
    return folder


def outcome(folder: Path, row: Row, returncode: int | None, console: str) -> tuple[str, str | None]:
    """(final state, the sentence why). The manifest is written last, so its presence alone means `done`."""
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
    """The sentence for a run whose process ended without saying why.

    Args:
        returncode: as `subprocess` reports it, negative for a signal; None where it is not known.
        stopped: somebody told the process to end.
    """
    why = "Its process ended without a result"
    if stopped:
        why = "It was stopped from outside the queue"
    elif returncode is not None and returncode < 0:
        cause = ", often because the machine ran out of memory" if returncode == -9 else ""
        why = f"Its process was killed (signal {-returncode}{cause})"
    elif returncode:
        why = f"Its process ended with exit code {returncode}; what it printed is in the run's file under consoles on the server"
    return f"The run was interrupted. {why}. Resume it: finished stages are not repeated."


def has_begun(folder: Path) -> bool:
    """An attempt was made here, perhaps by a server that was killed before it could write that down."""
    return any(entry.name not in MAY_PREEXIST for entry in folder.iterdir())


def take(files: Mapping[str, str | Path], uploads: Path) -> dict[str, str]:
    """Links or copies the files into `uploads`, so that they outlive the place they came from; field -> new path."""
    taken = {}
    try:
        uploads.mkdir(parents=True)
    except OSError as error:
        raise storage_error(uploads, error) from error
    for field, given in files.items():
        source = Path(given)
        if field not in UPLOAD_FIELDS:
            raise RunError(f"No file can be given for {field!r}; files are taken for {', '.join(UPLOAD_FIELDS)}.")
        if not source.is_file():
            raise RunError(f"The file for {field} ({source.name}) is not there any more: upload it again.")
        if source.suffix.lower() not in SUFFIXES[field]:
            allowed = ", ".join(SUFFIXES[field])
            raise RunError(
                f"The file for {field} ({source.name}) is of a kind that is not taken; these are: {allowed}."
            )
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
    """The latest event after byte `offset` that has `key`, or an empty one. A half-written line is passed over."""
    for line in reversed(tail(path, 65_536, offset).splitlines()):
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict) and key in event:
            return event
    return {}


def tail(path: Path, max_bytes: int, offset: int = 0) -> str:
    """The last complete lines of a text file, at most `max_bytes`, none from before `offset`; empty without a file."""
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
