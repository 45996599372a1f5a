"""The run queue: a SQLite database, one child process per run, cancel, resume. Runs survive a restart of the server.

    <data>/queue.sqlite        the run database: every run, its state, its process
    <data>/runs/<id>/          a run's folder (see compress.runs), with uploads/ and request.json put there at submit
    <data>/consoles/<id>.txt   what the run's process printed in its last attempt
    <data>/runs/.deleted/      the trash: deleted runs whose files are being removed
    <data>/kept/<id>           marks a run that retention never removes

Any number of processes may open the same queue (the web app, `python -m compress jobs`); the one that called `start`
first also executes the runs (`compress.jobs.scheduler`). Child processes do not depend on it: when it dies they continue,
and the next scheduler takes over watching them.
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
from compress.jobs.database import ACTIVE, FINAL, RUN_ID, DamagedStore, JobRow, JobStore
from compress.jobs.executor import Command, Executor, compress_command
from compress.jobs.recovery import RecoveryStore
from compress.jobs.scheduler import Scheduler
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
    """Submit, watch, cancel and resume runs; the module docstring says which process executes them.

    Args:
        command: builds the command line of a run's child process.
        passes: environment variables that the child inherits from this process, see `Executor`.
        at_once: runs executed concurrently.
        max_queued: runs that may wait.
        max_per_owner: runs of one owner that may wait or run; None is unlimited.
        max_seconds: time limit of an attempt, so that one run cannot occupy the device; None is unlimited.
        stall_s: seconds without computation or progress after which a run is stopped.
        keeping: retention limits of finished runs.
        read_only_when_damaged: if the database is damaged, list runs from their folders and refuse everything else.

    Raises:
        StorageError: the folder cannot be written, or the run database is damaged.
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
        self._store = self._opened(read_only_when_damaged)
        self._max_queued, self._max_per_owner, self.keeping = max_queued, max_per_owner, keeping
        self._scheduler = Scheduler(
            self._folders,
            self._store,
            Executor(command, passes),
            at_once=at_once,
            max_seconds=max_seconds,
            stall_s=stall_s,
            keeping=keeping,
        )

    @property
    def trouble(self) -> str | None:
        """Why no run can be executed at the moment; None when the scheduler works."""
        return self._scheduler.trouble

    def _opened(self, read_only_when_damaged: bool) -> JobStore | RecoveryStore:
        try:
            return JobStore(self.data_dir / "queue.sqlite")
        except DamagedStore as error:
            if not read_only_when_damaged:
                raise
            reason = f"{error} Until then finished runs can be viewed, and no run can be started."
            log.error("%s", reason)
            return RecoveryStore(self._folders.runs, reason)

    # ---- from any process ---------------------------------------------------------------------------------------

    def submit(self, request: Request, *, files: Mapping[str, str | Path] | None = None, owner: str = "") -> str:
        """Queues a run and returns its id, which cannot be guessed.

        Args:
            request: the compression job.
            files: uploaded files by request field (checkpoint, data, class_map). They are linked or copied into the
                run's folder and may be deleted afterwards.
            owner: the user whose quota (`max_per_owner`) the run counts against; empty is none.

        Raises:
            RunError: the queue or the owner's quota is full, or a file is missing.
            StorageError: the disk has no space for the run's files.
        """
        self._refuse_when_full()
        job_id = uuid.uuid4().hex
        folder = self._folders.run(job_id)
        try:
            taken = folders.take(files or {}, folder / "uploads")
            request = request.model_copy(update=taken)
            write_text(folder / "request.json", request.to_json())
            self._store.add(
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
        """The latest runs, newest first, whose title or state contains every word of `search` or whose id starts with it."""
        return [self._status(row) for row in self._store.newest(limit, search.split())]

    def working(self) -> Sequence[Status]:
        """The runs being executed now."""
        return [self._status(row) for row in self._store.in_states(*ACTIVE)]

    def rename(self, job_id: str, title: str) -> None:
        """Raises `RunError` when there is no such run, and `RequestError` for a name that is empty or too long."""
        row = self._row(job_id)
        name = " ".join(title.split())
        if not 1 <= len(name) <= MAX_TITLE or not name.isprintable():
            raise RequestError("name", title[: 2 * MAX_TITLE], f"1 to {MAX_TITLE} characters")
        self._store.rename(row.job_id, name)

    def delete(self, job_id: str) -> None:
        """Deletes a finished, failed or cancelled run with its uploads and results; this cannot be undone.

        Raises:
            RunError: there is no such run, or it has not ended.
            StorageError: its folder cannot be moved.
        """
        row = self._row(job_id)
        try:
            deleted = self._store.delete(row.job_id, lambda: self._folders.move_to_trash(row.job_id))
        except OSError as error:
            raise storage_error(self._folders.run(row.job_id), error) from error
        finally:
            self._folders.empty_trash(self._store.if_listed)
        if not deleted:
            raise RunError(f"This run is {row.state}: only a run that has ended can be deleted. Cancel it first.")

    def keep(self, job_id: str, kept: bool = True, *, share: float | None = None) -> None:
        """Exempts a run from retention, because its link was shared, or ends the exemption.

        Args:
            kept: True exempts the run, False makes it removable again.
            share: fraction of the disk quota for runs, 0..1, that kept runs may use together; None is unlimited.

        Raises:
            RunError: there is no such run, or the kept runs would exceed their share.
            StorageError: the mark cannot be written.
        """
        mark = self._folders.kept(self._row(job_id).job_id)
        size = cache(lambda name: retention.folder_bytes(self._folders.run(name)))

        def refuse() -> None:
            if kept and share is not None and self.keeping.max_bytes is not None and not mark.exists():
                kept_bytes = sum(map(size, (job_id, *self._folders.all_kept())))
                retention.refuse_to_keep(kept_bytes, share * self.keeping.max_bytes)

        def write_mark() -> None:
            refuse()  # again: another process may have kept a run meanwhile
            mark.touch() if kept else mark.unlink(missing_ok=True)

        refuse()  # walks folders, which takes long, so it comes before the database is locked
        try:
            exists = self._store.if_listed(job_id, write_mark)
        except OSError as error:
            raise storage_error(mark, error) from error
        if not exists:
            raise RunError("This run was removed just now, so it cannot be kept.")

    def is_kept(self, job_id: str) -> bool:
        """Raises `RunError` when there is no such run."""
        return self._folders.kept(self._row(job_id).job_id).exists()

    def owner(self, job_id: str) -> str:
        """Who submitted a run; empty if unknown. Raises `RunError` when there is no such run."""
        return self._row(job_id).owner

    def cancel(self, job_id: str) -> Status:
        """Stops a queued or running run; when this returns, none of its processes is alive. Takes up to 5 s.

        Raises:
            RunError: there is no such run, it has ended, or its process does not end.
        """
        row = self._row(job_id)
        if row.state in FINAL:
            raise RunError(f"This run is {row.state} already, so there is nothing to cancel.")
        self._scheduler.end(_listed(job_id, self._store.request_cancel(job_id)))
        return self.status(job_id)

    def resume(self, job_id: str) -> Status:
        """Queues a failed or cancelled run again; finished stages are not repeated.

        Raises:
            RunError: there is no such run, it has not ended, it succeeded, or the queue is full.
        """
        row = self._row(job_id)
        if row.state not in ("failed", "cancelled"):
            raise RunError(f"Only a failed or cancelled run can be resumed; this one is {row.state}.")
        self._refuse_when_full()
        self._store.requeue(job_id, max_queued=self._max_queued, max_per_owner=self._max_per_owner)
        return self.status(job_id)

    def request(self, job_id: str) -> Request:
        return Request.from_file(self.folder(job_id) / "request.json")

    def uploads(self, job_id: str) -> dict[str, Path]:
        """The uploaded files of a run by request field."""
        folder, request = self.folder(job_id) / "uploads", self.request(job_id)
        paths = {field: Path(getattr(request, field) or "") for field in folders.UPLOAD_FIELDS}
        return {field: path for field, path in paths.items() if path.is_relative_to(folder)}

    def folder(self, job_id: str) -> Path:
        """The run's folder. Raises `RunError` when there is no such run."""
        return self._folders.run(self._row(job_id).job_id)

    def log_tail(self, job_id: str, max_bytes: int = 16_384, *, console: bool = True) -> str:
        """The end of the run's log, and of its console output if it failed.

        Args:
            console: include console output, which can contain tracebacks and paths of this machine.
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
            log.error("files of a run are withheld: %s", error)
            raise StorageError(
                "The manifest of this run is damaged or was not signed by this server, so its files cannot be downloaded. "
                "Repeat the run."
            ) from error

    def artifact(self, job_id: str, name: str) -> Path:
        """A file of a finished run, after comparing its hash with the manifest.

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
                f"{name} was changed or removed after the run (its sha256 differs from the manifest), so it cannot be "
                "downloaded. Repeat the run."
            )
        return path

    # ---- execution ----------------------------------------------------------------------------------------------

    def start(self) -> Queue:
        """Starts the scheduler thread, which stands by while another process executes the runs.

        Raises:
            StorageError: the signing key cannot be read or created.
        """
        self._scheduler.start()
        return self

    def close(self) -> None:
        """Stops the scheduler. Child processes continue; the next process that calls `start` watches them."""
        self._scheduler.close()

    def __enter__(self) -> Queue:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.close()

    def make_room(self) -> None:
        """Deletes expired runs; see `compress.jobs.retention`."""
        self._scheduler.make_room()

    # ---- helpers ------------------------------------------------------------------------------------------------

    def _row(self, job_id: str) -> JobRow:
        return _listed(job_id, self._store.get(job_id) if re.fullmatch(RUN_ID, job_id) else None)

    def _refuse_when_full(self) -> None:
        self._store.refuse_when_full(self._max_queued)
        if self._scheduler.over_quota:
            raise StorageError(
                "Kept and active runs use all the disk space that this server reserves for runs. Try again later, or ask the "
                "administrator to remove some."
            )
        free = shutil.disk_usage(self.data_dir).free
        if free < MIN_FREE_BYTES:
            raise StorageError(
                f"Only {free / 1e9:.1f} GB of disk space is free and a run needs {MIN_FREE_BYTES / 1e9:.1f} GB: delete "
                "files or old runs first."
            )

    def _status(self, row: JobRow) -> Status:
        return status_of(row, self._folders.run(row.job_id), self._store.ahead_of(row))


def _listed(job_id: str, row: JobRow | None) -> JobRow:
    if row is None:
        raise RunError(f"There is no run with the id {job_id[:64]!r}. Check the link, or choose a run from the list.")
    return row
