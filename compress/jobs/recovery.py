"""Runs without their record: what their folders still tell when the record is damaged, and a new record made from that."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from compress import processes
from compress.errors import CompressError, RunError, StorageError
from compress.files import storage_error
from compress.jobs.database import RUN_ID, Record, Row
from compress.jobs.status import title_of
from compress.request import Request
from compress.runs import MANIFEST

UNKNOWN = (
    "The record of runs was damaged, so how this run ended is not known. Resume it: finished stages are not repeated."
)


class ReadOnly:
    """Stands in for `Record` as long as it is damaged; everything that would change something is refused."""

    def __init__(self, runs: Path, reason: str) -> None:
        self._runs, self.reason = runs, reason

    def get(self, job_id: str) -> Row | None:
        folder = self._runs / job_id
        return self._row(folder) if re.fullmatch(RUN_ID, job_id) and folder.is_dir() else None

    def newest(self, limit: int, words: Sequence[str] = ()) -> list[Row]:
        known = [row for entry in os.scandir(self._runs) if (row := self.get(entry.name)) is not None]
        rows = [
            row
            for row in known
            if all(w in f"{row.title} {row.state}".lower() or row.job_id.startswith(w) for w in map(str.lower, words))
        ]
        return sorted(rows, key=lambda row: row.created, reverse=True)[:limit]

    def in_states(self, *states: str) -> list[Row]:
        return [row for row in self.newest(len(os.listdir(self._runs))) if row.state in states]

    def ahead_of(self, row: Row) -> None:
        return None

    @contextmanager
    def leadership(self) -> Iterator[Callable[[], bool]]:
        yield lambda: False

    def _refuse(self, *_: Any, **__: Any) -> NoReturn:
        raise StorageError(self.reason)

    add = queue_again = ask_to_cancel = start_next = settle = refuse_when_full = rename = delete = while_listed = (
        _refuse
    )

    def _row(self, folder: Path) -> Row:
        saved = folder / "request.json"
        try:
            title = title_of(Request.from_file(saved))
        except CompressError:
            title = "a run whose request cannot be read"
        done = (folder / MANIFEST).is_file()
        working = not done and bool(processes.find(str(saved)))
        moment = folder.stat().st_mtime
        return Row(
            job_id=folder.name,
            title=title,
            state="done" if done else "running" if working else "failed",
            turn=0,
            attempt=1,
            events_offset=0,
            child=None,
            cancel_asked=None,
            error=None if done or working else UNKNOWN,
            created=moment,
            started=moment,
            finished=None if working else moment,
            owner="",
        )


def recover(data_dir: Path) -> tuple[int, Path | None]:
    """Makes a new record from the folders of the runs, and keeps the damaged one beside it.

    Returns:
        How many runs it lists, and where the damaged record is now; None when there was none.

    Raises:
        RunError: the record is not damaged, or a server or a run still works.
        StorageError: the files cannot be moved or written.
    """
    path, runs = data_dir / "queue.sqlite", (data_dir / "runs").resolve()
    damaged = Record.damage(path)
    if damaged is None:
        raise RunError(f"The record of runs {path} is sound, so there is nothing to recover.")
    found = ReadOnly(runs, damaged)
    with Record.lock(path) as leads:
        if not leads() or found.in_states("running"):
            raise RunError("The server or a run still works. End them first, then recover the record.")
        try:
            aside = _move_aside(path)
            record = Record(path, known=True)
            for row in reversed(found.newest(len(os.listdir(runs)))):
                record.insert(row)
        except OSError as error:
            raise storage_error(path, error) from error
    return len(record.newest(1_000_000)), aside


def _move_aside(path: Path) -> Path | None:
    aside = path.with_name(f"{path.name}.damaged-{time.strftime('%Y%m%d-%H%M%S')}")
    for suffix in ("-wal", "-shm", ""):
        part = path.with_name(path.name + suffix)
        if part.exists():
            part.rename(aside.with_name(aside.name + suffix))
    return aside if aside.exists() else None
