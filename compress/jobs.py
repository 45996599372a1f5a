"""The queue of runs: a record in SQLite, one child process per run, cancel, resume; it outlives the server.

    <data>/queue.sqlite        the record: every run, its state, its process
    <data>/runs/<id>/          a run's folder (see compress.runs), with uploads/ and request.json put there at submit
    <data>/consoles/<id>.txt   what the run's process printed in its last attempt
    <data>/deleted/            runs on their way out; emptied
    <data>/kept/<id>           marks a run that is never removed to make room

Any number of processes may open the same queue (the web app, `python -m compress jobs`); the one that called `start`
first also carries the runs out. Children are not tied to it: when it dies they go on, and the next one watches them.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil
import sys
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from subprocess import Popen
from typing import Any

from compress import jobs_files, processes, retention, signing
from compress.errors import CompressError, RequestError, RunError, StorageError
from compress.files import sha256, storage_error, write_text
from compress.jobs_readonly import ReadOnly
from compress.jobs_record import ACTIVE, FINAL, QUEUED, DamagedRecord, Record, Row
from compress.jobs_watch import STALL_S, Watch
from compress.request import Request
from compress.runs import STAGES, manifest

log = logging.getLogger("compress.jobs")

DATA_DIR = Path("app-data")
"""Folder of the queue where ESPALIER_DATA does not name one."""
GRACE_S = 3.0
"""From SIGTERM to SIGKILL; with the second that the kernel needs, the device is free again within 5 s."""
OVERDUE = (
    "The run was ended because it worked for more than the {:g} minutes that this server allows. Resume it, which repeats no "
    "finished stage, or ask for fewer epochs."
)
TICK_S = 0.2
MIN_FREE_BYTES = 1 << 30
MAX_TITLE = 120
Command = Callable[[Path, bool], Sequence[str]]
"""(run folder, whether it is resumed) -> the words that start the child."""


@dataclass(frozen=True)
class Status:
    """What is known of a run now. Times are seconds since 1970, UTC; fractions are 0..1."""

    job_id: str
    title: str
    state: str
    """queued, running, cancelling, done, failed or cancelled."""
    position: int | None
    """Runs that come before it while it is queued, those running included."""
    stage: str | None
    stage_index: int
    """1 for the first stage; 0 before it."""
    stage_count: int
    stage_fraction: float
    fraction: float
    """Of the whole run, every stage counted alike."""
    seconds_left: float | None
    """Of this stage; null until it can be told."""
    message: str
    error: str | None
    resumable: bool
    created: float
    started: float | None
    finished: float | None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def compress_command(folder: Path, resume: bool) -> list[str]:
    # -P: the run's folder, which is the working directory, must not be searched for modules
    words = [
        sys.executable,
        "-P",
        "-m",
        "compress",
        "run",
        "--request",
        str(folder / "request.json"),
        "--out",
        str(folder),
    ]
    return [*words, "--resume"] if resume else words


class Queue:
    """Submit, watch, cancel and resume runs; see the module's text for who carries them out.

    Args:
        at_once: runs that work at the same time.
        max_queued: runs that may wait.
        max_per_owner: runs of one owner that may wait or work; None is any number.
        max_seconds: after which an attempt is ended, so that one run cannot keep the device; None is never.
        stall_s: a run that neither computes nor reports anything for so long is ended.
        keeping: which runs that are over are removed again.
        read_only_when_damaged: show the folders of runs, and refuse the rest, where the record is damaged.

    Raises:
        StorageError: the folder cannot be written, or its record is damaged.
    """

    def __init__(
        self,
        data_dir: str | Path,
        *,
        command: Command = compress_command,
        at_once: int = 1,
        max_queued: int = 20,
        max_per_owner: int | None = None,
        max_seconds: float | None = None,
        stall_s: float = STALL_S,
        keeping: retention.Limits = retention.Limits(),  # noqa: B008  (frozen)
        read_only_when_damaged: bool = False,
    ) -> None:
        self.data_dir = Path(data_dir).expanduser().resolve()
        self._runs, self._consoles = self.data_dir / "runs", self.data_dir / "consoles"
        self._deleted, self._kept = self.data_dir / "deleted", self.data_dir / "kept"
        try:
            for folder in (self._runs, self._consoles, self._deleted, self._kept):
                folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise storage_error(folder, error) from error
        self.trouble: str | None = None
        """Why runs cannot be carried out at the moment; None when all is well."""
        self._record = self._opened(read_only_when_damaged)
        self._command, self._at_once, self._max_queued = command, at_once, max_queued
        self._max_per_owner, self._max_seconds = max_per_owner, max_seconds
        self._children: dict[str, Popen[bytes]] = {}
        self._watch, self._sweeper, self._over_quota = Watch(stall_s), retention.Sweeper(keeping), False
        self.keeping = keeping
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None

    def _opened(self, read_only_when_damaged: bool) -> Record | ReadOnly:
        try:
            return Record(self.data_dir / "queue.sqlite")
        except DamagedRecord as error:
            if not read_only_when_damaged:
                raise
            self.trouble = f"{error} Until then finished runs can be looked at, and nothing can be started."
            log.error("%s", self.trouble)
            return ReadOnly(self._runs, self.trouble, title_of)

    # ---- what everybody may call --------------------------------------------------------------------------------

    def submit(self, request: Request, *, files: Mapping[str, str | Path] | None = None, owner: str = "") -> str:
        """Queues a run and returns its id, which cannot be guessed.

        Args:
            request: what to do.
            files: uploaded files by the field that they stand for (checkpoint, data, class_map). They are taken
                into the run's folder and may be deleted afterwards.
            owner: whom `max_per_owner` counts it for; empty is nobody.
        Raises:
            RunError: the queue is full, the owner has too many runs in it, or a file is not there.
            StorageError: no room for the run's files.
        """
        self._refuse_when_full()
        job_id = uuid.uuid4().hex
        folder = self._runs / job_id
        try:
            taken = jobs_files.take(files or {}, folder / "uploads")
            request = request.model_copy(update=taken)
            write_text(folder / "request.json", request.to_json())
            self._record.add(
                job_id,
                title_of(request),
                max_queued=self._max_queued,
                owner=owner,
                max_per_owner=self._max_per_owner,
            )
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        return job_id

    def status(self, job_id: str) -> Status:
        """Raises `RunError` when there is no such run."""
        return self._status(self._row(job_id))

    def list(self, limit: int = 50, search: str = "") -> list[Status]:
        """The latest runs whose title, state or id has every word of `search`, newest first."""
        return [self._status(row) for row in self._record.newest(limit, search.split())]

    def rename(self, job_id: str, title: str) -> None:
        """Raises `RunError` when there is no such run, and `RequestError` for a name that is empty or too long."""
        row = self._row(job_id)
        name = " ".join(title.split())
        if not 1 <= len(name) <= MAX_TITLE or not name.isprintable():
            raise RequestError("name", title[: 2 * MAX_TITLE], f"1 to {MAX_TITLE} characters")
        self._record.rename(row.job_id, name)

    def delete(self, job_id: str) -> None:
        """Removes a run that is over, with its uploads and results, for good.

        Raises:
            RunError: there is no such run, or it is not over.
            StorageError: its folder cannot be moved.
        """
        row = self._row(job_id)
        folder = self._runs / row.job_id

        def put_away() -> None:
            if folder.exists():
                folder.rename(self._deleted / row.job_id)

        try:
            gone = self._record.delete(row.job_id, put_away)
        except OSError as error:
            raise storage_error(folder, error) from error
        if not gone:
            raise RunError(f"This run is {row.state}: only a run that is over can be deleted. Cancel it first.")
        self._console(job_id).unlink(missing_ok=True)
        (self._kept / job_id).unlink(missing_ok=True)
        self._empty_deleted()

    def keep(self, job_id: str, kept: bool = True, *, share: float | None = None) -> None:
        """Keeps a run, because its link was shared, from being removed to make room; or no longer.

        Args:
            share: of the room for all runs, 0..1: what those that are kept may take together; None is any.

        Raises:
            RunError: there is no such run, or no room for it among those that are kept.
            StorageError: the mark cannot be written.
        """
        mark = self._kept / self._row(job_id).job_id

        def put() -> None:
            if kept and share is not None and not mark.exists():
                self._refuse_to_keep(job_id, share)
            mark.touch() if kept else mark.unlink(missing_ok=True)

        try:
            there = self._record.while_listed(job_id, put)
        except OSError as error:
            raise storage_error(mark, error) from error
        if not there:
            raise RunError("This run was removed just now, so it cannot be kept.")

    def is_kept(self, job_id: str) -> bool:
        """Raises `RunError` when there is no such run."""
        return (self._kept / self._row(job_id).job_id).exists()

    def owner(self, job_id: str) -> str:
        """Who submitted a run; empty where nobody told. Raises `RunError` when there is no such run."""
        return self._row(job_id).owner

    def _refuse_to_keep(self, job_id: str, share: float) -> None:
        if self.keeping.max_bytes is None:
            return
        sizes = [retention.folder_bytes(self._runs / name) for name in (job_id, *os.listdir(self._kept))]
        if sum(sizes) > share * self.keeping.max_bytes:
            raise RunError(
                f"This run cannot be kept: with it the runs that are kept would take {sum(sizes) / 1e9:.1f} GB, and this server "
                f"gives them {share * self.keeping.max_bytes / 1e9:.1f} GB. Let go of another one, or download this one."
            )

    def cancel(self, job_id: str) -> Status:
        """Ends a run that waits or works; when it returns, no process of it lives. Takes up to 5 s.

        Raises:
            RunError: there is no such run, it is over, or its process does not end.
        """
        row = self._row(job_id)
        if row.state in FINAL:
            raise RunError(f"This run is {row.state} already, so there is nothing to cancel.")
        row = self._record.ask_to_cancel(job_id)
        if row.state == "cancelling" and row.child is not None:
            if not processes.stop(row.child, GRACE_S):
                raise RunError(
                    "The run's process does not end, even when killed: it waits for the device or the disk. "
                    "Try again in a minute."
                )
            self._settle(row)
        return self.status(job_id)

    def resume(self, job_id: str) -> Status:
        """Queues a failed or cancelled run again; finished stages are not repeated.

        Raises:
            RunError: there is no such run, it is not over, it succeeded, or the queue is full.
        """
        row = self._row(job_id)
        if row.state not in ("failed", "cancelled"):
            raise RunError(f"Only a failed or cancelled run can be resumed; this one is {row.state}.")
        self._refuse_when_full()
        self._record.queue_again(job_id, max_queued=self._max_queued, max_per_owner=self._max_per_owner)
        return self.status(job_id)

    def request(self, job_id: str) -> Request:
        return Request.from_file(self.folder(job_id) / "request.json")

    def uploads(self, job_id: str) -> dict[str, Path]:
        """The uploaded files of a run by the field that they stand for."""
        folder, request = self.folder(job_id) / "uploads", self.request(job_id)
        given = {field: Path(getattr(request, field) or "") for field in jobs_files.UPLOAD_FIELDS}
        return {field: path for field, path in given.items() if path.is_relative_to(folder)}

    def folder(self, job_id: str) -> Path:
        """The run's folder. Raises `RunError` when there is no such run."""
        return self._runs / self._row(job_id).job_id

    def log_tail(self, job_id: str, max_bytes: int = 16_384) -> str:
        """The end of the run's log; for one that failed, of what its process printed as well."""
        row = self._row(job_id)
        text = jobs_files.tail(self._runs / job_id / "log.txt", max_bytes)
        if row.state == "failed":
            text += jobs_files.tail(self._console(job_id), max_bytes)
        return text

    def artifacts(self, job_id: str) -> dict[str, dict[str, Any]]:
        """The files of a finished run as its manifest lists them: name -> sha256, bytes, parent (if it has one).

        Raises:
            RunError: there is no such run, or it is not done.
            StorageError: its manifest is damaged, or not signed by this installation.
        """
        row = self._row(job_id)
        if row.state != "done":
            raise RunError(f"This run is {row.state}: files can be downloaded when a run is done.")
        try:
            return manifest(self._runs / job_id)
        except StorageError as error:
            log.error("files are not given out: %s", error)
            raise StorageError(
                "The manifest of this run is damaged or was not signed by this server: its files are not given out. "
                "Repeat the run."
            ) from error

    def artifact(self, job_id: str, name: str) -> Path:
        """A file of a finished run, after its hash was compared with the manifest.

        Raises:
            RunError: there is no such run or file, or the run is not done.
            StorageError: the file is not the one that the run wrote.
        """
        listed = self.artifacts(job_id)
        if name not in listed:
            raise RunError(f"This run has no file {name!r}; it has {', '.join(sorted(listed))}.")
        folder = self._runs / job_id
        path = (folder / name).resolve()
        if not path.is_relative_to(folder) or not path.is_file() or sha256(path) != listed[name].get("sha256"):
            raise StorageError(
                f"{name} was changed or removed after the run: its sha256 differs from the manifest, so it is "
                f"not given out."
            )
        return path

    # ---- carrying runs out --------------------------------------------------------------------------------------

    def start(self) -> Queue:
        """Starts the thread that carries out the runs, unless another process does so; then it waits for its turn.

        Raises:
            StorageError: the key that results are signed with cannot be read or made.
        """
        if self._thread is None and isinstance(self._record, Record):
            signing.prepare()
            self._stopping.clear()
            self._thread = threading.Thread(target=self._tend, name="compress-queue", daemon=True)
            self._thread.start()
        return self

    def close(self) -> None:
        """Stops carrying out runs. Children go on; the next process that calls `start` watches them."""
        self._stopping.set()
        if self._thread is not None:
            self._thread.join(timeout=10)
            self._thread = None

    def __enter__(self) -> Queue:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.close()

    def _tend(self) -> None:
        with self._record.leadership() as leads:
            checked = False
            while not self._stopping.wait(TICK_S):
                try:
                    if not leads():
                        continue
                    if not checked:
                        self._end_unrecorded_children()
                        self._empty_deleted()
                        checked = True
                    self._tick()
                    self.trouble = None
                except (CompressError, OSError) as error:  # told by /healthz; the next tick tries again
                    if str(error) != self.trouble:
                        log.error("runs cannot be carried out: %s", error)
                    self.trouble = str(error)

    def _tick(self) -> None:
        self._part_with_cancelled()
        if self._sweeper.is_due():
            self.make_room()
        for row in self._record.in_states(*ACTIVE):
            assert row.child is not None, "a run is recorded as working together with its child"
            if not processes.alive(row.child):
                if processes.stop(row.child, grace_s=0.0):  # what the child left behind
                    self._settle(row)
            elif row.state == "cancelling" and not 0 <= time.time() - (row.cancel_asked or 0.0) <= GRACE_S:
                processes.stop(row.child, grace_s=0.0)  # whoever asked is gone; also when the clock was put back
            elif self._watch.idle(row.job_id, row.child, self._events_size(row.job_id)) and processes.stop(
                row.child, GRACE_S
            ):
                self._settle(row, why=self._watch.sentence)
            elif self._is_overdue(row) and processes.stop(row.child, GRACE_S):
                self._settle(row, why=OVERDUE.format((self._max_seconds or 0) / 60))
        while len(self._record.in_states(*ACTIVE)) < self._at_once:
            if not self._record.start_next(self._start_child, self._events_size):
                return

    def _start_child(self, row: Row) -> processes.Child | str:
        """The started child, or the sentence why it could not be started."""
        folder = self._runs / row.job_id
        env = processes.environment(os.environ) | {
            "PYTHONPATH": str(Path(__file__).resolve().parents[1]),
            "PYTHONUNBUFFERED": "1",
        }
        try:
            process = processes.start(
                self._command(folder, row.attempt > 1 or jobs_files.has_begun(folder)),
                folder=folder,
                console=self._console(row.job_id),
                env=env,
            )
        except OSError as error:
            why = error.strerror or error
            return f"The run's process could not be started ({why}). Check the installation, then resume the run."
        self._children[row.job_id] = process
        child = processes.identify(process.pid)
        assert child is not None, "a child that was not waited for is at least a zombie"
        return child

    def _events_size(self, job_id: str) -> int:
        events = self._runs / job_id / "events.jsonl"
        return events.stat().st_size if events.exists() else 0

    def _is_overdue(self, row: Row) -> bool:
        assert row.child is not None
        limit = self._max_seconds
        return limit is not None and row.state == "running" and processes.age_s(row.child) > limit

    def _settle(self, row: Row, why: str | None = None) -> None:
        """Writes down how a run ended whose process is gone; `why` when it was ended from here."""
        process = self._children.pop(row.job_id, None)
        folder = self._runs / row.job_id
        returncode = process.wait(timeout=5) if process else None
        state, error = jobs_files.outcome(folder, row, returncode, jobs_files.tail(self._console(row.job_id), 4096))
        if row.child is not None:
            processes.reap(row.child.pid)
        self._watch.forget(row.job_id)
        if why and state != "done":
            state, error = "failed", why
        self._record.settle(row, state, error)

    def make_room(self) -> None:
        """Removes the runs that have expired; see `compress.retention`."""
        rows = self._record.newest(1_000_000)
        found = self._sweeper.look(
            rows,
            lambda job_id: retention.folder_bytes(self._runs / job_id),
            lambda job_id: (self._kept / job_id).exists(),
        )
        for job_id in found.expired:
            with contextlib.suppress(_Kept):
                if self._record.delete(job_id, lambda job_id=job_id: self._put_away_unless_kept(job_id)):
                    log.info("run %s has expired and was removed", job_id[:8])
                    self._console(job_id).unlink(missing_ok=True)
        self._empty_deleted()
        self._over_quota = found.over

    def _put_away_unless_kept(self, job_id: str) -> None:
        if (self._kept / job_id).exists():
            raise _Kept
        if (self._runs / job_id).exists():
            (self._runs / job_id).rename(self._deleted / job_id)

    def _part_with_cancelled(self) -> None:
        """Takes leave of children whose run another process cancelled, `compress jobs cancel` for example."""
        working = {row.job_id for row in self._record.in_states(*ACTIVE)}
        for job_id, process in list(self._children.items()):
            if job_id not in working and process.poll() is not None:
                self._children.pop(job_id, None)
                self._watch.forget(job_id)
                processes.reap(process.pid)

    def _end_unrecorded_children(self) -> None:
        """Ends children that a server started and could not write down, because it was killed in that moment."""
        for row in self._record.in_states(QUEUED):
            for pid in processes.find(str(self._runs / row.job_id / "request.json")):
                if (child := processes.identify(pid)) is not None:
                    processes.stop(child, GRACE_S)

    # ---- helpers ------------------------------------------------------------------------------------------------

    def _empty_deleted(self) -> None:
        for folder in self._deleted.iterdir():
            shutil.rmtree(folder, ignore_errors=True)  # what stays is tried again at the next start

    def _console(self, job_id: str) -> Path:
        return self._consoles / f"{job_id}.txt"

    def _row(self, job_id: str) -> Row:
        row = self._record.get(job_id) if re.fullmatch(r"[0-9a-f]{32}", job_id) else None
        if row is None:
            raise RunError(
                f"There is no run with the id {job_id[:64]!r}. Check the link, or choose a run from the list."
            )
        return row

    def _refuse_when_full(self) -> None:
        self._record.refuse_when_full(self._max_queued)
        if self._over_quota:
            raise StorageError(
                "The runs that are kept or at work take all the room that this server gives to runs. Try again later, or "
                "ask its administrator to remove some."
            )
        free = shutil.disk_usage(self.data_dir).free
        if free < MIN_FREE_BYTES:
            raise StorageError(
                f"Only {free / 1e9:.1f} GB of disk space is left and a run needs {MIN_FREE_BYTES / 1e9:.1f} "
                f"GB: delete files or old runs first."
            )

    def _status(self, row: Row) -> Status:
        event = (
            jobs_files.last_event(self._runs / row.job_id / "events.jsonl", row.events_offset, "stage")
            if row.attempt
            else {}
        )
        index, of = int(event.get("index", 0)), int(event.get("of", len(STAGES)))
        within = float(event.get("fraction", 0.0))
        done = row.state == "done"
        return Status(
            job_id=row.job_id,
            title=row.title,
            state=row.state,
            position=self._record.ahead_of(row),
            stage=event.get("stage"),
            stage_index=of if done else index,
            stage_count=of,
            stage_fraction=1.0 if done else within,
            fraction=1.0 if done else max(0.0, index - 1 + within) / of,
            seconds_left=event.get("seconds_left") if row.state == "running" else None,
            message=str(event.get("message", "")),
            error=row.error,
            resumable=row.state in ("failed", "cancelled"),
            created=row.created,
            started=row.started,
            finished=row.finished,
        )


class _Kept(Exception):
    """The run is kept since a moment ago."""


def title_of(request: Request) -> str:
    """A short name: the model, the data, and what is done to them."""
    data = request.data if request.data in ("none", "fashion-mnist") else Path(request.data).name
    done = []
    if request.prunes:
        done.append(f"{100 * request.sparsity:.0f} % pruned")
    if request.quantizes:
        done.append(f"{request.weight_bits} bits")
    elif request.half_precision:
        done.append("16 bits")
    return f"{request.model} on {'no data' if data == 'none' else data}, {', '.join(done)}"
