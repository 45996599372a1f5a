"""The queue of runs: a record in SQLite, one child process per run, cancel, resume; it outlives the server.

    <data>/queue.sqlite        the record: every run, its state, its process
    <data>/runs/<id>/          a run's folder (see compress.runs), with uploads/ and request.json put there at submit
    <data>/consoles/<id>.txt   what the run's process printed in its last attempt
    <data>/runs/.deleted/      runs on their way out
    <data>/kept/<id>           marks a run that is never removed to make room

Any number of processes may open the same queue (the web app, `python -m compress jobs`); the one that called `start`
first also carries the runs out (`compress.jobs.scheduler`). Children are not tied to it: when it dies they go on, and the
next one watches them.
"""

from __future__ import annotations

import logging
import re
import shutil
import uuid
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from compress.errors import RequestError, RunError, StorageError
from compress.files import sha256, storage_error, write_text
from compress.jobs import folders, retention
from compress.jobs.database import ACTIVE, FINAL, RUN_ID, DamagedRecord, Record, Row
from compress.jobs.executor import Command, Executor, compress_command
from compress.jobs.recovery import ReadOnly
from compress.jobs.scheduler import Carrier
from compress.jobs.stall import STALL_S
from compress.jobs.status import Status, status_of, title_of
from compress.request import Request
from compress.runs import manifest

log = logging.getLogger("compress.jobs")

DATA_DIR = Path("app-data")
"""Folder of the queue where ESPALIER_DATA does not name one."""
MIN_FREE_BYTES = 1 << 30
MAX_TITLE = 120


class Queue:
    """Submit, watch, cancel and resume runs; see the module's text for who carries them out.

    Args:
        command: how the child of a run is started.
        passes: names of variables that the child gets from the environment of this process, see `Executor`.
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
        passes: Sequence[str] = (),
        at_once: int = 1,
        max_queued: int = 20,
        max_per_owner: int | None = None,
        max_seconds: float | None = None,
        stall_s: float = STALL_S,
        keeping: retention.Limits = retention.Limits(),  # noqa: B008  (frozen)
        read_only_when_damaged: bool = False,
    ) -> None:
        self.data_dir = Path(data_dir).expanduser().resolve()
        self._folders = folders.Folders(self.data_dir)
        self._record = self._opened(read_only_when_damaged)
        self._max_queued, self._max_per_owner, self.keeping = max_queued, max_per_owner, keeping
        self._carrier = Carrier(
            self._folders,
            self._record,
            Executor(command, passes),
            at_once=at_once,
            max_seconds=max_seconds,
            stall_s=stall_s,
            keeping=keeping,
        )

    @property
    def trouble(self) -> str | None:
        """Why runs cannot be carried out at the moment; None when all is well."""
        return self._carrier.trouble

    def _opened(self, read_only_when_damaged: bool) -> Record | ReadOnly:
        try:
            return Record(self.data_dir / "queue.sqlite")
        except DamagedRecord as error:
            if not read_only_when_damaged:
                raise
            reason = f"{error} Until then finished runs can be looked at, and nothing can be started."
            log.error("%s", reason)
            return ReadOnly(self._folders.runs, reason)

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
        folder = self._folders.run(job_id)
        try:
            taken = folders.take(files or {}, folder / "uploads")
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
        """The latest runs that have each word of `search` in their title or state, or at the start of their id, newest first."""
        return [self._status(row) for row in self._record.newest(limit, search.split())]

    def working(self) -> list[Status]:
        """The runs that work now."""
        return [self._status(row) for row in self._record.in_states(*ACTIVE)]

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
        try:
            gone = self._record.delete(row.job_id, lambda: self._folders.put_away(row.job_id))
        except OSError as error:
            raise storage_error(self._folders.run(row.job_id), error) from error
        finally:
            self._folders.empty_deleted(self._record.while_listed)
        if not gone:
            raise RunError(f"This run is {row.state}: only a run that is over can be deleted. Cancel it first.")

    def keep(self, job_id: str, kept: bool = True, *, share: float | None = None) -> None:
        """Keeps a run, because its link was shared, from being removed to make room; or no longer.

        Args:
            share: of the room for all runs, 0..1: what those that are kept may take together; None is any.

        Raises:
            RunError: there is no such run, or no room for it among those that are kept.
            StorageError: the mark cannot be written.
        """
        mark = self._folders.kept(self._row(job_id).job_id)
        size = cache(lambda name: retention.folder_bytes(self._folders.run(name)))

        def refuse() -> None:
            if kept and share is not None and self.keeping.max_bytes is not None and not mark.exists():
                wanted = sum(map(size, (job_id, *self._folders.all_kept())))
                retention.refuse_to_keep(wanted, share * self.keeping.max_bytes)

        def put() -> None:
            refuse()  # again, for what was kept meanwhile
            mark.touch() if kept else mark.unlink(missing_ok=True)

        refuse()  # no other process waits for the record while folders are walked here
        try:
            there = self._record.while_listed(job_id, put)
        except OSError as error:
            raise storage_error(mark, error) from error
        if not there:
            raise RunError("This run was removed just now, so it cannot be kept.")

    def is_kept(self, job_id: str) -> bool:
        """Raises `RunError` when there is no such run."""
        return self._folders.kept(self._row(job_id).job_id).exists()

    def owner(self, job_id: str) -> str:
        """Who submitted a run; empty where nobody told. Raises `RunError` when there is no such run."""
        return self._row(job_id).owner

    def cancel(self, job_id: str) -> Status:
        """Ends a run that waits or works; when it returns, no process of it lives. Takes up to 5 s.

        Raises:
            RunError: there is no such run, it is over, or its process does not end.
        """
        row = self._row(job_id)
        if row.state in FINAL:
            raise RunError(f"This run is {row.state} already, so there is nothing to cancel.")
        self._carrier.end(_listed(job_id, self._record.ask_to_cancel(job_id)))
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
        given = {field: Path(getattr(request, field) or "") for field in folders.UPLOAD_FIELDS}
        return {field: path for field, path in given.items() if path.is_relative_to(folder)}

    def folder(self, job_id: str) -> Path:
        """The run's folder. Raises `RunError` when there is no such run."""
        return self._folders.run(self._row(job_id).job_id)

    def log_tail(self, job_id: str, max_bytes: int = 16_384, *, console: bool = True) -> str:
        """The end of the run's log; for one that failed, of what its process printed as well.

        Args:
            console: with what the process printed, which can hold tracebacks and paths of this machine.
        """
        row = self._row(job_id)
        text = folders.tail(self._folders.run(job_id) / "log.txt", max_bytes)
        if row.state == "failed" and console:
            text += folders.tail(self._folders.console(job_id), max_bytes)
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
            return manifest(self._folders.run(job_id))
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
        folder = self._folders.run(job_id)
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
        self._carrier.start()
        return self

    def close(self) -> None:
        """Stops carrying out runs. Children go on; the next process that calls `start` watches them."""
        self._carrier.close()

    def __enter__(self) -> Queue:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.close()

    def make_room(self) -> None:
        """Removes the runs that have expired; see `compress.jobs.retention`."""
        self._carrier.make_room()

    # ---- helpers ------------------------------------------------------------------------------------------------

    def _row(self, job_id: str) -> Row:
        return _listed(job_id, self._record.get(job_id) if re.fullmatch(RUN_ID, job_id) else None)

    def _refuse_when_full(self) -> None:
        self._record.refuse_when_full(self._max_queued)
        if self._carrier.over_quota:
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
        return status_of(row, self._folders.run(row.job_id), self._record.ahead_of(row))


def _listed(job_id: str, row: Row | None) -> Row:
    if row is None:
        raise RunError(f"There is no run with the id {job_id[:64]!r}. Check the link, or choose a run from the list.")
    return row
