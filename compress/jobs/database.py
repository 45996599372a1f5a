"""The record of runs in SQLite: one row a run, every change one transaction, safe for many processes at once."""

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
"""Version -> the statement that makes the next version of it."""


@dataclass(frozen=True)
class Row:
    """A run as recorded. `turn` orders the queue; `attempt` counts starts; times are seconds since 1970."""

    job_id: str
    title: str
    state: str
    turn: int
    attempt: int
    events_offset: int
    """Size of events.jsonl when this attempt began: what comes before belongs to earlier attempts."""
    child: Child | None
    cancel_asked: float | None
    error: str | None
    created: float
    started: float | None
    finished: float | None
    owner: str
    """Who submitted it; empty where nobody told."""


class DamagedRecord(StorageError):
    """The record cannot be read, or is gone although there are runs."""


class Record:
    """Raises `StorageError` from every method when the file cannot be read or written.

    Args:
        known: that there are runs without a record, which is being made for them.
    """

    def __init__(self, path: Path, *, known: bool = False) -> None:
        self.path = path
        if not known and not (path.exists() and path.stat().st_size) and _has_runs(path):
            raise DamagedRecord(
                f"The record of runs {path} is gone, but there are folders of runs beside it. Put back a copy of it, or "
                "make a new one from the folders: python -m compress jobs recover."
            )
        with self._open() as db:
            version = db.execute("PRAGMA user_version").fetchone()[0]
            if version not in (0, VERSION, *_UPGRADES):
                raise StorageError(
                    f"{path} was written by another version of Espalier (format {version}, this one knows {VERSION}). "
                    "Use that version, or give another data folder."
                )
            if db.execute("PRAGMA quick_check(1)").fetchone()[0] != "ok":
                raise sqlite3.DatabaseError("its pages do not fit together")
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
        """Raises `RunError` when the queue, or what this owner may have in it, is full."""
        with self._change() as db:
            _refuse_when_full(db, max_queued)
            _refuse_greed(db, owner, max_per_owner)
            db.execute(
                "INSERT INTO runs (job_id, title, state, turn, created, owner) VALUES (?, ?, ?, ?, ?, ?)",
                (job_id, title, QUEUED, _next_turn(db), time.time(), owner),
            )

    def rename(self, job_id: str, title: str) -> None:
        with self._change() as db:
            db.execute("UPDATE runs SET title = ? WHERE job_id = ?", (title, job_id))

    def while_listed(self, job_id: str, act: Callable[[], object]) -> bool:
        """Calls `act` while nobody else can change the record. False, and no call, when there is no such run."""
        with self._change() as db:
            there = db.execute("SELECT 1 FROM runs WHERE job_id = ?", (job_id,)).fetchone() is not None
            if there:
                act()
            return there

    def delete(self, job_id: str, put_away: Callable[[], None]) -> bool:
        """Forgets a run that is over, in one transaction with `put_away`. False when it is not over."""
        with self._change() as db:
            found = db.execute("DELETE FROM runs WHERE job_id = ? AND state IN (?, ?, ?)", (job_id, *FINAL))
            if found.rowcount:
                put_away()
            return bool(found.rowcount)

    def queue_again(self, job_id: str, *, max_queued: int, max_per_owner: int | None = None) -> None:
        with self._change() as db:
            _refuse_when_full(db, max_queued)
            owner = db.execute("SELECT owner FROM runs WHERE job_id = ?", (job_id,)).fetchone()
            _refuse_greed(db, owner["owner"] if owner else "", max_per_owner)
            db.execute(
                "UPDATE runs SET state = ?, turn = ?, error = NULL, finished = NULL, cancel_asked = NULL, pid = NULL, "
                "birth = NULL "
                "WHERE job_id = ? AND state IN ('failed', 'cancelled')",
                (QUEUED, _next_turn(db), job_id),
            )

    def ask_to_cancel(self, job_id: str) -> Row | None:
        """Cancels a waiting run, marks a working one; returns it as it is afterwards, None when it is gone."""
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

    def start_next(self, start: Callable[[Row], Child | str], events_size: Callable[[str], int]) -> bool:
        """Starts the run whose turn it is, in one transaction with its record. False when none waits.

        `start` returns the child, or the sentence why there is none, which ends the run.
        """
        with self._change() as db:
            found = db.execute("SELECT * FROM runs WHERE state = ? ORDER BY turn LIMIT 1", (QUEUED,)).fetchone()
            if found is None:
                return False
            job_id, now = found["job_id"], time.time()
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

    def settle(self, row: Row, ended: Callable[[Row], tuple[str, str | None]]) -> None:
        """Ends the attempt that `row` shows; nothing happens when that was done already.

        `ended` gets the run as it is now, because somebody may have cancelled it meanwhile, and returns its final state and
        the sentence why.
        """
        with self._change() as db:
            found = db.execute(
                "SELECT * FROM runs WHERE job_id = ? AND attempt = ? AND state IN (?, ?)",
                (row.job_id, row.attempt, *ACTIVE),
            ).fetchone()
            if found is not None:
                db.execute(
                    "UPDATE runs SET state = ?, error = ?, finished = ? WHERE job_id = ?",
                    (*ended(_row(found)), time.time(), row.job_id),
                )

    def get(self, job_id: str) -> Row | None:
        with self._open() as db:
            return _get(db, job_id)

    def newest(self, limit: int, words: Sequence[str] = ()) -> list[Row]:
        """The latest runs that have each of `words` in their title or state, or at the start of their id, newest first."""
        one = "(instr(lower(title || ' ' || state), lower(?)) > 0 OR instr(job_id, lower(?)) = 1)"
        has = " AND ".join([one] * len(words))
        where = f"WHERE {has}" if words else ""
        with self._open() as db:
            return [
                _row(found)
                for found in db.execute(
                    f"SELECT * FROM runs {where} ORDER BY created DESC, turn DESC LIMIT ?",
                    (*(word for word in words for _ in range(2)), limit),
                )
            ]

    def in_states(self, *states: str) -> list[Row]:
        marks = ", ".join("?" * len(states))
        with self._open() as db:
            return [
                _row(found)
                for found in db.execute(f"SELECT * FROM runs WHERE state IN ({marks}) ORDER BY turn", states)
            ]

    def ahead_of(self, row: Row) -> int | None:
        """How many runs work or come before a waiting one; None for one that does not wait."""
        if row.state != QUEUED:
            return None
        with self._open() as db:
            return db.execute(
                "SELECT count(*) FROM runs WHERE state IN (?, ?) OR (state = ? AND turn < ?)",
                (*ACTIVE, QUEUED, row.turn),
            ).fetchone()[0]

    def refuse_when_full(self, max_queued: int) -> None:
        with self._open() as db:
            _refuse_when_full(db, max_queued)

    @classmethod
    def damage(cls, path: Path) -> str | None:
        """What is wrong with the record at `path`; None when it is sound."""
        try:
            cls(path)
        except DamagedRecord as error:
            return str(error)
        return None

    def insert(self, row: Row) -> None:
        """A run that is over, as somebody else knows it."""
        with self._change() as db:
            db.execute(
                "INSERT INTO runs (job_id, title, state, turn, attempt, error, created, started, finished) "
                "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (row.job_id, row.title, row.state, _next_turn(db), row.attempt, row.error, row.created, row.started,
                 row.finished),
            )  # fmt: skip

    def leadership(self) -> AbstractContextManager[Callable[[], bool]]:
        """A question that is answered True in one process at a time: the one that may carry runs out."""
        return self.lock(self.path)

    @staticmethod
    @contextmanager
    def lock(path: Path) -> Iterator[Callable[[], bool]]:
        """See `leadership`; also where the record at `path` is damaged."""
        held = path.with_name("queue.lock")
        try:
            lock = held.open("a")
        except OSError as error:
            raise storage_error(held, error) from error
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
                f"The record of runs {self.path} cannot be used now ({error}). Check the disk and the "
                f"folder's permissions."
            ) from error
        except sqlite3.DatabaseError as error:
            raise DamagedRecord(
                f"The record of runs {self.path} is damaged ({error}). Nothing was changed: put back a copy of it, or make "
                "a new one from the folders of the runs: python -m compress jobs recover."
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
            f"The queue is full: {waiting} runs are waiting and {max_queued} are allowed. Try again when one "
            f"has finished."
        )


def _refuse_greed(db: sqlite3.Connection, owner: str, limit: int | None) -> None:
    if limit is None or not owner:
        return
    states = (QUEUED, *ACTIVE)
    count = db.execute("SELECT count(*) FROM runs WHERE owner = ? AND state IN (?, ?, ?)", (owner, *states)).fetchone()[
        0
    ]
    if count >= limit:
        raise RunError(
            f"You have {count} runs waiting or working and this server allows {limit} for each visitor. "
            "Try again when one has finished, or cancel one."
        )


def _next_turn(db: sqlite3.Connection) -> int:
    return db.execute("SELECT coalesce(max(turn), 0) + 1 FROM runs").fetchone()[0]


def _get(db: sqlite3.Connection, job_id: str) -> Row | None:
    found = db.execute("SELECT * FROM runs WHERE job_id = ?", (job_id,)).fetchone()
    return None if found is None else _row(found)


def _row(found: sqlite3.Row) -> Row:
    values = dict(found)
    pid, birth = values.pop("pid"), values.pop("birth")
    return Row(child=None if pid is None else Child(pid, birth), **values)
