"""Recovery from a damaged run database: a read-only list of runs from their folders, and a database rebuilt from it."""

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
from compress.jobs.database import RUN_ID, JobRow, JobStore
from compress.jobs.status import title_of
from compress.request import Request
from compress.runs import MANIFEST

UNKNOWN = (
    "How this run ended is unknown because the run database was damaged. Resume it: finished stages are not repeated."
)


class RecoveryStore:
    """Replaces a damaged `JobStore`: lists runs from their folders and refuses every change with `StorageError`."""

    def __init__(self, runs: Path, reason: str) -> None:
        self._runs, self.reason = runs, reason

    def get(self, job_id: str) -> JobRow | None:
        folder = self._runs / job_id
        return self._row(folder) if re.fullmatch(RUN_ID, job_id) and folder.is_dir() else None

    def newest(self, limit: int, words: Sequence[str] = ()) -> list[JobRow]:
        terms = [word.lower() for word in words]
        rows = [
            row
            for entry in os.scandir(self._runs)
            if (row := self.get(entry.name)) is not None
            and all(term in f"{row.title} {row.state}".lower() or row.job_id.startswith(term) for term in terms)
        ]
        return sorted(rows, key=lambda row: row.created, reverse=True)[:limit]

    def in_states(self, *states: str) -> list[JobRow]:
        return [row for row in self.newest(len(os.listdir(self._runs))) if row.state in states]

    def ahead_of(self, row: JobRow) -> None:
        return None

    @contextmanager
    def leadership(self) -> Iterator[Callable[[], bool]]:
        yield lambda: False

    def _refuse(self, *_: Any, **__: Any) -> NoReturn:
        raise StorageError(self.reason)

    add = requeue = request_cancel = start_next = settle = refuse_when_full = rename = delete = if_listed = _refuse

    def _row(self, folder: Path) -> JobRow:
        saved = folder / "request.json"
        try:
            title = title_of(Request.from_file(saved))
        except CompressError:
            title = "a run with an unreadable request"
        done = (folder / MANIFEST).is_file()
        running = not done and bool(processes.find(str(saved)))
        moment = folder.stat().st_mtime
        return JobRow(
            job_id=folder.name,
            title=title,
            state="done" if done else "running" if running else "failed",
            turn=0,
            attempt=1,
            events_offset=0,
            child=None,
            cancel_asked=None,
            error=None if done or running else UNKNOWN,
            created=moment,
            started=moment,
            finished=None if running else moment,
            owner="",
        )


def recover(data_dir: Path) -> tuple[int, Path | None]:
    """Rebuilds the run database from the folders of the runs, and keeps the damaged one beside it.

    Returns:
        The number of runs that it lists, and the new path of the damaged database; None if it was missing.

    Raises:
        RunError: the database is intact, or a server or a run is still active.
        StorageError: the files cannot be moved or written.
    """
    path, runs = data_dir / "queue.sqlite", (data_dir / "runs").resolve()
    damaged = JobStore.damage(path)
    if damaged is None:
        raise RunError(f"The run database {path} is intact, so there is nothing to recover.")
    readable = RecoveryStore(runs, damaged)
    with JobStore.lock(path) as leads:
        if not leads() or readable.in_states("running"):
            raise RunError("The server or a run is still active. Stop it first, then recover the run database.")
        try:
            aside = _move_aside(path)
            store = JobStore(path, known=True)
            for row in reversed(readable.newest(len(os.listdir(runs)))):
                store.insert(row)
        except OSError as error:
            raise storage_error(path, error) from error
    return len(store.newest(1_000_000)), aside


def _move_aside(path: Path) -> Path | None:
    aside = path.with_name(f"{path.name}.damaged-{time.strftime('%Y%m%d-%H%M%S')}")
    for suffix in ("-wal", "-shm", ""):
        file = path.with_name(path.name + suffix)
        if file.exists():
            file.rename(aside.with_name(aside.name + suffix))
    return aside if aside.exists() else None
