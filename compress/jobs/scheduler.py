"""The scheduler: a thread that starts the next queued run, supervises active ones, and applies the retention limits.

One process at a time does this for a queue; see `compress.jobs.database.JobStore.leadership`.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import threading
import time
from functools import partial

from compress import signing
from compress.errors import CompressError, RunError
from compress.jobs import folders as job_folders
from compress.jobs import retention
from compress.jobs.database import ACTIVE, QUEUED, JobRow, JobStore
from compress.jobs.executor import Executor
from compress.jobs.folders import Folders
from compress.jobs.recovery import RecoveryStore
from compress.jobs.stall import StallDetector
from compress.processes import Child

log = logging.getLogger("compress.jobs")

GRACE_S = 3.0
"""From SIGTERM to SIGKILL; with the second that the kernel needs, the device is free again within 5 s."""
TIMED_OUT = (
    "The run was stopped because it exceeded the time limit of {:g} minutes of this server. Resume it (finished stages are not "
    "repeated), or request fewer epochs."
)
UNKILLABLE = (
    "The run's process does not end, even when killed: it waits for the device or the disk. Try again in a minute."
)
CRASHED = "The scheduler stopped because of a bug in Espalier, which the server's log shows: restart the server."
SHORTAGES = (errno.EAGAIN, errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.ENOSPC, errno.EDQUOT)
"""Errors of the machine, not of the run: every queued run would fail with them."""
SHORTAGE = "No run can be started now ({}): free memory, disk space or processes; queued runs then start by themselves."
TICK_S = 0.2


class Scheduler:
    """Executes the runs of a store.

    Args:
        at_once: runs executed concurrently.
        max_seconds: time limit of an attempt; None is unlimited.
        stall_s: seconds without computation or progress after which a run is stopped.
        keeping: retention limits of finished runs.
    """

    def __init__(
        self,
        folders: Folders,
        store: JobStore | RecoveryStore,
        executor: Executor,
        *,
        at_once: int,
        max_seconds: float | None,
        stall_s: float,
        keeping: retention.Limits,
    ) -> None:
        self._folders, self._store, self._executor = folders, store, executor
        self._at_once, self._max_seconds = at_once, max_seconds
        self._stalls, self._sweeper = StallDetector(stall_s), retention.Sweeper(keeping)
        self._trouble = store.reason if isinstance(store, RecoveryStore) else None
        self.over_quota = False
        """The runs exceed their disk quota even after every removable one was deleted."""
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def trouble(self) -> str | None:
        """Why no run can be executed at the moment; None when the scheduler works."""
        if self._thread is not None and not self._thread.is_alive() and not self._stopping.is_set():
            return CRASHED
        return self._trouble

    def start(self) -> None:
        """Starts the thread, which stands by while another process executes the runs.

        Raises:
            StorageError: the signing key cannot be read or created.
        """
        if self._thread is None and isinstance(self._store, JobStore):
            signing.prepare()
            self._stopping.clear()
            self._thread = threading.Thread(target=self._loop, name="compress-queue", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Stops the thread. Child processes continue; the next process that calls `start` watches them."""
        self._stopping.set()
        if self._thread is not None:
            self._thread.join(timeout=10)
            self._thread = None

    def end(self, row: JobRow) -> None:
        """Ends all processes of a run that was just cancelled. Raises `RunError` when one does not end."""
        if row.state == "cancelled":  # it was queued
            self._end_orphans(row)
        elif row.state == "cancelling":
            assert row.child is not None, "a run becomes active in one transaction with its child"
            self._end(row.child)
            self._settle(row)

    def make_room(self) -> None:
        """Deletes expired runs; see `compress.jobs.retention`."""
        rows = self._store.newest(1_000_000)
        sweep = self._sweeper.sweep(
            rows,
            lambda job_id: retention.folder_bytes(self._folders.run(job_id)),
            lambda job_id: self._folders.kept(job_id).exists(),
        )
        for job_id in sweep.expired:
            with contextlib.suppress(_Kept):
                if self._store.delete(job_id, partial(self._move_to_trash_unless_kept, job_id)):
                    log.info("run %s has expired and was deleted", job_id[:8])
        self._folders.empty_trash(self._store.if_listed)
        self.over_quota = sweep.over_quota

    def _move_to_trash_unless_kept(self, job_id: str) -> None:
        if self._folders.kept(job_id).exists():
            raise _Kept
        self._folders.move_to_trash(job_id)

    def _loop(self) -> None:
        with contextlib.ExitStack() as lock:  # held through every error: another leader might not see our children
            leads, is_clean = None, False
            while not self._stopping.wait(TICK_S):
                try:
                    leads = leads or lock.enter_context(self._store.leadership())
                    if leads():
                        if not is_clean:
                            self._clean_up()
                        is_clean = True
                        self._tick()
                    self._trouble = None
                except (CompressError, OSError) as error:  # /healthz reports it; retried, as after a start
                    is_clean = False
                    if str(error) != self._trouble:
                        log.error("runs cannot be executed: %s", error)
                    self._trouble = str(error)

    def _clean_up(self) -> None:
        """Ends processes and removes files left by a server that was killed or could not write the database."""
        for row in self._store.in_states(QUEUED):
            self._end_orphans(row)
        self._folders.empty_trash(self._store.if_listed)

    def _tick(self) -> None:
        self._reap_cancelled()
        if self._sweeper.is_due():
            self.make_room()
        for row in self._store.in_states(*ACTIVE):
            assert row.child is not None, "a run becomes active in one transaction with its child"
            self._supervise(row, row.child)
        while len(self._store.in_states(*ACTIVE)) < self._at_once:
            if not self._store.start_next(self._start_child, self._folders.events_bytes):
                return

    def _supervise(self, row: JobRow, child: Child) -> None:
        """Settles a run that has ended; ends one that stalls, exceeds the time limit, or whose canceller died."""
        end = self._executor.end
        if not self._executor.alive(child):
            if end(child):  # its remaining descendants
                self._settle(row)
        elif row.state == "cancelling" and not 0 <= time.time() - (row.cancel_asked or 0.0) <= GRACE_S:
            end(child)  # the process that cancelled it died, or the clock was set back
        elif self._stalls.is_stalled(child, self._folders.events_bytes(row.job_id)) and end(child, GRACE_S):
            self._settle(row, reason=self._stalls.message)
        elif self._has_timed_out(row, child) and end(child, GRACE_S):
            self._settle(row, reason=TIMED_OUT.format((self._max_seconds or 0) / 60))

    def _start_child(self, row: JobRow) -> Child | str:
        """The started child, or the error message of the run. Raises `RunError` when no run can start now."""
        folder = self._folders.run(row.job_id)
        try:
            resume = row.attempt > 1 or job_folders.has_begun(folder)
            return self._executor.start(folder, self._folders.console(row.job_id), resume=resume)
        except OSError as error:
            cause = error.strerror or error
            if error.errno in SHORTAGES:
                raise RunError(SHORTAGE.format(cause)) from error
            return f"The run's process could not be started ({cause}). Check the installation, then resume the run."

    def _has_timed_out(self, row: JobRow, child: Child) -> bool:
        if self._max_seconds is None or row.state != "running":
            return False
        events = self._folders.run(row.job_id) / "events.jsonl"
        return self._executor.worked_s(child, events, row.events_offset) > self._max_seconds

    def _settle(self, row: JobRow, reason: str | None = None) -> None:
        """Stores how a run ended whose process is gone; `reason` if the scheduler ended it."""
        assert row.child is not None, "a run becomes active in one transaction with its child"
        returncode = self._executor.exit_code(row.child)
        console = job_folders.tail(self._folders.console(row.job_id), 4096)

        def ended(current: JobRow) -> tuple[str, str | None]:
            state, error = job_folders.outcome(self._folders.run(row.job_id), current, returncode, console)
            return state, reason if reason and state == "failed" else error

        self._store.settle(row, ended)
        self._executor.reap(row.child)  # last: if the database cannot be written, the exit code is needed again
        self._stalls.forget(row.child)

    def _reap_cancelled(self) -> None:
        """Reaps children whose run another process cancelled, `compress jobs cancel` for example."""
        active = {row.child for row in self._store.in_states(*ACTIVE)}
        for child in self._executor.ended():
            if child not in active:
                self._executor.reap(child)
                self._stalls.forget(child)

    def _end_orphans(self, row: JobRow) -> None:
        """Ends children that were started for the run but never stored, because the server was killed in between or the
        database could not be written. Raises `RunError` when one does not end."""
        for child in self._executor.orphans(self._folders.run(row.job_id)):
            self._end(child)

    def _end(self, child: Child) -> None:
        if not self._executor.end(child, GRACE_S):
            raise RunError(UNKILLABLE)


class _Kept(Exception):
    """Another process kept the run a moment ago."""
