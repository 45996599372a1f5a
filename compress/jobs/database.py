"""The run database in SQLite: one row per run, one transaction per change, safe for concurrent processes."""

from __future__ import annotations

import fcntl
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

from compress.errors import RunError, StorageError
from compress.files import storage_error
from compress.processes import Child

QUEUED = "queued"
ACTIVE = ("running", "cancelling")
FINAL = ("done", "failed", "cancelled")
RUN_ID = "[0-9a-f]" * 32
"""The id of a run, which is the name of its folder, as a pattern of `re` and of `glob`."""
VERSION = 2

_SCHEMA = f"""
CREATE TABLE IF NOT EXISTS runs (
    job_id TEXT PRIMARY KEY,
    title TEXT NOT NULL,
    state TEXT NOT NULL,
    turn INTEGER NOT NULL UNIQUE,
    attempt INTEGER NOT NULL DEFAULT 0,
    events_offset INTEGER NOT NULL DEFAULT 0,
    pid INTEGER,
    birth TEXT,
    cancel_asked REAL,
    error TEXT,
    created REAL NOT NULL,
    started REAL,
    finished REAL,
    owner TEXT NOT NULL DEFAULT ''
);
PRAGMA user_version = {VERSION};
"""
_UPGRADES = {1: "ALTER TABLE runs ADD COLUMN owner TEXT NOT NULL DEFAULT ''"}
"""Schema version -> the statement that upgrades it to the next one."""


@dataclass(frozen=True)
class JobRow:
    """A run as stored. `turn` orders the queue; `attempt` counts starts; times are seconds since 1970."""

    job_id: str
    title: str
    state: str
    turn: int
    attempt: int
    events_offset: int
    """Size of events.jsonl when this attempt began: what precedes it belongs to earlier attempts."""
    child: Child | None
    cancel_asked: float | None
    error: str | None
    created: float
    started: float | None
    finished: float | None
    owner: str
    """Who submitted it; empty if unknown."""


class DamagedStore(StorageError):
    """The run database cannot be read, or is missing although there are runs."""


class JobStore:
    """The table of runs. Every method raises `StorageError` when the file cannot be read or written.

    Args:
        known: create the database although there are folders of runs beside it; `recover` does so.
    """

    def __init__(self, path: Path, *, known: bool = False) -> None:
        self.path = path
        if not known and not (path.exists() and path.stat().st_size) and _has_runs(path):
            raise DamagedStore(
                f"The run database {path} is missing, but there are folders of runs beside it. Restore a backup of it, or "
                "rebuild it from the folders: python -m compress jobs recover."
            )
        with self._open() as db:
            version = db.execute("PRAGMA user_version").fetchone()[0]
            if version not in (0, VERSION, *_UPGRADES):
                raise StorageError(
                    f"{path} was written by another version of Espalier (format {version}; this version reads {VERSION}). "
                    "Use that version, or choose another data folder."
                )
            if db.execute("PRAGMA quick_check(1)").fetchone()[0] != "ok":
                raise sqlite3.DatabaseError("its pages are inconsistent")
            if version == 0:
                db.executescript(_SCHEMA)
        self._upgrade()

    def _upgrade(self) -> None:
        with self._change() as db:  # the version again, now that no other process can change it
            for version in range(db.execute("PRAGMA user_version").fetchone()[0], VERSION):
                db.execute(_UPGRADES[version])
                db.execute(f"PRAGMA user_version = {version + 1}")

    def add(
        self, job_id: str, title: str, *, max_queued: int, owner: str = "", max_per_owner: int | None = None
    ) -> None:
        """Adds a queued run. Raises `RunError` when the queue or the owner's quota is full."""
        with self._change() as db:
            _refuse_when_full(db, max_queued)
            _refuse_over_quota(db, owner, max_per_owner)
            db.execute(
                "INSERT INTO runs (job_id, title, state, turn, created, owner) VALUES (?, ?, ?, ?, ?, ?)",
                (job_id, title, QUEUED, _next_turn(db), time.time(), owner),
            )

    def rename(self, job_id: str, title: str) -> None:
        with self._change() as db:
            db.execute("UPDATE runs SET title = ? WHERE job_id = ?", (title, job_id))

    def if_listed(self, job_id: str, act: Callable[[], object]) -> bool:
        """Calls `act` inside a write transaction if the run exists, and returns whether it does."""
        with self._change() as db:
            exists = db.execute("SELECT 1 FROM runs WHERE job_id = ?", (job_id,)).fetchone() is not None
            if exists:
                act()
            return exists

    def delete(self, job_id: str, move_to_trash: Callable[[], None]) -> bool:
        """Deletes a run that has ended, in one transaction with `move_to_trash`. False when it has not ended."""
        with self._change() as db:
            cursor = db.execute("DELETE FROM runs WHERE job_id = ? AND state IN (?, ?, ?)", (job_id, *FINAL))
            if cursor.rowcount:
                move_to_trash()
            return bool(cursor.rowcount)

    def requeue(self, job_id: str, *, max_queued: int, max_per_owner: int | None = None) -> None:
        """Queues a failed or cancelled run again. Raises `RunError` as `add` does."""
        with self._change() as db:
            _refuse_when_full(db, max_queued)
            owner = db.execute("SELECT owner FROM runs WHERE job_id = ?", (job_id,)).fetchone()
            _refuse_over_quota(db, owner["owner"] if owner else "", max_per_owner)
            db.execute(
                "UPDATE runs SET state = ?, turn = ?, error = NULL, finished = NULL, cancel_asked = NULL, pid = NULL, "
                "birth = NULL "
                "WHERE job_id = ? AND state IN ('failed', 'cancelled')",
                (QUEUED, _next_turn(db), job_id),
            )

    def request_cancel(self, job_id: str) -> JobRow | None:
        """Cancels a queued run or marks a running one as cancelling; returns its new row, None when there is none."""
        now = time.time()
        with self._change() as db:
            db.execute(
                "UPDATE runs SET state = 'cancelled', finished = ? WHERE job_id = ? AND state = ?",
                (now, job_id, QUEUED),
            )
            db.execute(
                "UPDATE runs SET state = 'cancelling', cancel_asked = ? WHERE job_id = ? AND state = 'running'",
                (now, job_id),
            )
            return _get(db, job_id)

    def start_next(self, start: Callable[[JobRow], Child | str], events_size: Callable[[str], int]) -> bool:
        """Starts the next queued run and stores its process in one transaction. False when none is queued.

        `start` returns the child process, or the error message with which the run fails.
        """
        with self._change() as db:
            queued = db.execute("SELECT * FROM runs WHERE state = ? ORDER BY turn LIMIT 1", (QUEUED,)).fetchone()
            if queued is None:
                return False
            job_id, now = queued["job_id"], time.time()
            db.execute(
                "UPDATE runs SET state = 'running', attempt = attempt + 1, events_offset = ?, started = ? "
                "WHERE job_id = ?",
                (events_size(job_id), now, job_id),
            )
            outcome = start(_row(db.execute("SELECT * FROM runs WHERE job_id = ?", (job_id,)).fetchone()))
            if isinstance(outcome, Child):
                db.execute("UPDATE runs SET pid = ?, birth = ? WHERE job_id = ?", (outcome.pid, outcome.birth, job_id))
            else:
                db.execute(
                    "UPDATE runs SET state = 'failed', error = ?, finished = ? WHERE job_id = ?", (outcome, now, job_id)
                )
            return True

    def settle(self, row: JobRow, ended: Callable[[JobRow], tuple[str, str | None]]) -> None:
        """Stores the outcome of the attempt in `row`, unless it is stored already.

        `ended` receives the current row, because another process may have cancelled the run meanwhile, and returns the final
        state and the error message.
        """
        with self._change() as db:
            current = db.execute(
                "SELECT * FROM runs WHERE job_id = ? AND attempt = ? AND state IN (?, ?)",
                (row.job_id, row.attempt, *ACTIVE),
            ).fetchone()
            if current is not None:
                db.execute(
                    "UPDATE runs SET state = ?, error = ?, finished = ? WHERE job_id = ?",
                    (*ended(_row(current)), time.time(), row.job_id),
                )

    def get(self, job_id: str) -> JobRow | None:
        with self._open() as db:
            return _get(db, job_id)

    def newest(self, limit: int, words: Sequence[str] = ()) -> list[JobRow]:
        """The latest runs, newest first, whose title or state contains each of `words` or whose id starts with it."""
        matches = "(instr(lower(title || ' ' || state), lower(?)) > 0 OR instr(job_id, lower(?)) = 1)"
        where = f"WHERE {' AND '.join([matches] * len(words))}" if words else ""
        with self._open() as db:
            return [
                _row(values)
                for values in db.execute(
                    f"SELECT * FROM runs {where} ORDER BY created DESC, turn DESC LIMIT ?",
                    (*(word for word in words for _ in range(2)), limit),
                )
            ]

    def in_states(self, *states: str) -> list[JobRow]:
        marks = ", ".join("?" * len(states))
        with self._open() as db:
            return [
                _row(values)
                for values in db.execute(f"SELECT * FROM runs WHERE state IN ({marks}) ORDER BY turn", states)
            ]

    def ahead_of(self, row: JobRow) -> int | None:
        """How many runs are active or queued before this one; None if it is not queued."""
        if row.state != QUEUED:
            return None
        with self._open() as db:
            count = db.execute(
                "SELECT count(*) FROM runs WHERE state IN (?, ?) OR (state = ? AND turn < ?)",
                (*ACTIVE, QUEUED, row.turn),
            ).fetchone()[0]
        return int(count)

    def refuse_when_full(self, max_queued: int) -> None:
        with self._open() as db:
            _refuse_when_full(db, max_queued)

    @classmethod
    def damage(cls, path: Path) -> str | None:
        """What is wrong with the database at `path`; None when it is intact."""
        try:
            cls(path)
        except DamagedStore as error:
            return str(error)
        return None

    def insert(self, row: JobRow) -> None:
        """Adds a run that has ended."""
        with self._change() as db:
            db.execute(
                "INSERT INTO runs (job_id, title, state, turn, attempt, error, created, started, finished) "
                "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (row.job_id, row.title, row.state, _next_turn(db), row.attempt, row.error, row.created, row.started,
                 row.finished),
            )  # fmt: skip

    def leadership(self) -> AbstractContextManager[Callable[[], bool]]:
        """A function that returns True in one process at a time: the one that may execute runs."""
        return self.lock(self.path)

    @staticmethod
    @contextmanager
    def lock(path: Path) -> Iterator[Callable[[], bool]]:
        """`leadership` of the database at `path`, which may be damaged."""
        lock_path = path.with_name("queue.lock")
        try:
            lock = lock_path.open("a")
        except OSError as error:
            raise storage_error(lock_path, error) from error
        with lock:

            def leads() -> bool:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    return True
                except BlockingIOError:
                    return False

            yield leads

    @contextmanager
    def _change(self) -> Iterator[sqlite3.Connection]:
        with self._open() as db:
            db.execute("BEGIN IMMEDIATE")
            yield db
            db.execute("COMMIT")

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        db = None
        try:
            db = sqlite3.connect(self.path, timeout=10, isolation_level=None)
            db.row_factory = sqlite3.Row
            db.execute("PRAGMA journal_mode = WAL")
            db.execute("PRAGMA synchronous = FULL")
            yield db
        except sqlite3.OperationalError as error:
            raise StorageError(
                f"The run database {self.path} cannot be used now ({error}). Check the disk and the permissions of its "
                "folder."
            ) from error
        except sqlite3.DatabaseError as error:
            raise DamagedStore(
                f"The run database {self.path} is damaged ({error}). Nothing was changed: restore a backup of it, or rebuild "
                "it from the folders of the runs: python -m compress jobs recover."
            ) from error
        finally:
            if db is not None:
                db.close()  # rolls back what was not committed


def _has_runs(path: Path) -> bool:
    return any(path.with_name("runs").glob(RUN_ID))


def _refuse_when_full(db: sqlite3.Connection, max_queued: int) -> None:
    waiting = db.execute("SELECT count(*) FROM runs WHERE state = ?", (QUEUED,)).fetchone()[0]
    if waiting >= max_queued:
        raise RunError(
            f"The queue is full: {waiting} runs are waiting and {max_queued} are allowed. Try again when one has finished."
        )


def _refuse_over_quota(db: sqlite3.Connection, owner: str, limit: int | None) -> None:
    if limit is None or not owner:
        return
    query = "SELECT count(*) FROM runs WHERE owner = ? AND state IN (?, ?, ?)"
    count = db.execute(query, (owner, QUEUED, *ACTIVE)).fetchone()[0]
    if count >= limit:
        raise RunError(
            f"You have {count} queued or active runs and this server allows {limit} for each user. "
            "Try again when one has finished, or cancel one."
        )


def _next_turn(db: sqlite3.Connection) -> int:
    return int(db.execute("SELECT coalesce(max(turn), 0) + 1 FROM runs").fetchone()[0])


def _get(db: sqlite3.Connection, job_id: str) -> JobRow | None:
    values = db.execute("SELECT * FROM runs WHERE job_id = ?", (job_id,)).fetchone()
    return None if values is None else _row(values)


def _row(values: sqlite3.Row) -> JobRow:
    columns = dict(values)
    pid, birth = columns.pop("pid"), columns.pop("birth")
    return JobRow(child=None if pid is None else Child(pid, birth), **columns)
