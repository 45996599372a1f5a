"""Carrying runs out: the thread that starts the run whose turn it is, watches those at work, and makes room.

One process at a time does this for a queue; see `compress.jobs.database.Record.leadership`.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import threading
import time

from compress import signing
from compress.errors import CompressError, RunError
from compress.jobs import folders as job_folders
from compress.jobs import retention
from compress.jobs.database import ACTIVE, QUEUED, Record, Row
from compress.jobs.executor import Executor
from compress.jobs.folders import Folders
from compress.jobs.recovery import ReadOnly
from compress.jobs.stall import Watch
from compress.processes import Child

log = logging.getLogger("compress.jobs")

GRACE_S = 3.0
"""From SIGTERM to SIGKILL; with the second that the kernel needs, the device is free again within 5 s."""
OVERDUE = (
    "The run was ended because it worked for more than the {:g} minutes that this server allows. Resume it, which repeats no "
    "finished stage, or ask for fewer epochs."
)
UNENDING = (
    "The run's process does not end, even when killed: it waits for the device or the disk. Try again in a minute."
)
DEAD = "Runs are not carried out any more because of a fault in Espalier, which the server's log shows: restart the server."
SHORTAGES = (errno.EAGAIN, errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.ENOSPC, errno.EDQUOT)
"""Of the machine, not of the run: every run that waits would fail of it."""
SHORT = (
    "No run can be started now ({}): free memory, disk space or processes; the runs that wait start by themselves then."
)
TICK_S = 0.2


class Carrier:
    """Carries out the runs of a record.

    Args:
        at_once: runs that work at the same time.
        max_seconds: after which an attempt is ended; None is never.
        stall_s: a run that neither computes nor reports anything for so long is ended.
        keeping: which runs that are over are removed again.
    """

    def __init__(
        self,
        folders: Folders,
        record: Record | ReadOnly,
        executor: Executor,
        *,
        at_once: int,
        max_seconds: float | None,
        stall_s: float,
        keeping: retention.Limits,
    ) -> None:
        self._folders, self._record, self._executor = folders, record, executor
        self._at_once, self._max_seconds = at_once, max_seconds
        self._watch, self._sweeper = Watch(stall_s), retention.Sweeper(keeping)
        self._trouble = record.reason if isinstance(record, ReadOnly) else None
        self.over_quota = False
        """The runs take more room than they may, even after all that may go has gone."""
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def trouble(self) -> str | None:
        """Why runs cannot be carried out at the moment; None when all is well."""
        if self._thread is not None and not self._thread.is_alive() and not self._stopping.is_set():
            return DEAD
        return self._trouble

    def start(self) -> None:
        """Starts the thread, unless another process carries the runs out; then it waits for its turn.

        Raises:
            StorageError: the key that results are signed with cannot be read or made.
        """
        if self._thread is None and isinstance(self._record, Record):
            signing.prepare()
            self._stopping.clear()
            self._thread = threading.Thread(target=self._tend, name="compress-queue", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Stops the thread. Children go on; the next process that calls `start` watches them."""
        self._stopping.set()
        if self._thread is not None:
            self._thread.join(timeout=10)
            self._thread = None

    def end(self, row: Row) -> None:
        """Ends all processes of a run that was cancelled just now. Raises `RunError` when one does not end."""
        if row.state == "cancelled":  # it waited
            self._end_unrecorded(row)
        elif row.state == "cancelling":
            assert row.child is not None, "a run is recorded as working together with its child"
            self._end(row.child)
            self._settle(row)

    def make_room(self) -> None:
        """Removes the runs that have expired; see `compress.jobs.retention`."""
        rows = self._record.newest(1_000_000)
        found = self._sweeper.look(
            rows,
            lambda job_id: retention.folder_bytes(self._folders.run(job_id)),
            lambda job_id: self._folders.kept(job_id).exists(),
        )
        for job_id in found.expired:
            with contextlib.suppress(_Kept):
                if self._record.delete(job_id, lambda job_id=job_id: self._put_away_unless_kept(job_id)):
                    log.info("run %s has expired and was removed", job_id[:8])
        self._folders.empty_deleted(self._record.while_listed)
        self.over_quota = found.over

    def _put_away_unless_kept(self, job_id: str) -> None:
        if self._folders.kept(job_id).exists():
            raise _Kept
        self._folders.put_away(job_id)

    def _tend(self) -> None:
        with contextlib.ExitStack() as lock:  # held through every trouble: whoever got it might not see our children
            leads, is_clean = None, False
            while not self._stopping.wait(TICK_S):
                try:
                    leads = leads or lock.enter_context(self._record.leadership())
                    if leads():
                        if not is_clean:
                            self._clean_up()
                        is_clean = True
                        self._tick()
                    self._trouble = None
                except (CompressError, OSError) as error:  # told by /healthz; tried again, as after a start
                    is_clean = False
                    if str(error) != self._trouble:
                        log.error("runs cannot be carried out: %s", error)
                    self._trouble = str(error)

    def _clean_up(self) -> None:
        """Ends and removes what a server left that was killed, or could not write the record."""
        for row in self._record.in_states(QUEUED):
            self._end_unrecorded(row)
        self._folders.empty_deleted(self._record.while_listed)

    def _tick(self) -> None:
        self._part_with_cancelled()
        if self._sweeper.is_due():
            self.make_room()
        for row in self._record.in_states(*ACTIVE):
            assert row.child is not None, "a run is recorded as working together with its child"
            self._look_after(row, row.child)
        while len(self._record.in_states(*ACTIVE)) < self._at_once:
            if not self._record.start_next(self._start_child, self._folders.events_bytes):
                return

    def _look_after(self, row: Row, child: Child) -> None:
        """Settles a run that has ended, and ends one that hangs, takes too long, or whose canceller is gone."""
        end = self._executor.end
        if not self._executor.alive(child):
            if end(child):  # what the child left behind
                self._settle(row)
        elif row.state == "cancelling" and not 0 <= time.time() - (row.cancel_asked or 0.0) <= GRACE_S:
            end(child)  # whoever asked is gone; also when the clock was put back
        elif self._watch.idle(child, self._folders.events_bytes(row.job_id)) and end(child, GRACE_S):
            self._settle(row, why=self._watch.sentence)
        elif self._is_overdue(row, child) and end(child, GRACE_S):
            self._settle(row, why=OVERDUE.format((self._max_seconds or 0) / 60))

    def _start_child(self, row: Row) -> Child | str:
        """The started child, or the sentence why it could not be started. Raises `RunError` when none can start now."""
        folder = self._folders.run(row.job_id)
        try:
            resume = row.attempt > 1 or job_folders.has_begun(folder)
            return self._executor.start(folder, self._folders.console(row.job_id), resume=resume)
        except OSError as error:
            why = error.strerror or error
            if error.errno in SHORTAGES:
                raise RunError(SHORT.format(why)) from error
            return f"The run's process could not be started ({why}). Check the installation, then resume the run."

    def _is_overdue(self, row: Row, child: Child) -> bool:
        if self._max_seconds is None or row.state != "running":
            return False
        events = self._folders.run(row.job_id) / "events.jsonl"
        return self._executor.worked_s(child, events, row.events_offset) > self._max_seconds

    def _settle(self, row: Row, why: str | None = None) -> None:
        """Writes down how a run ended whose process is gone; `why` when it was ended from here."""
        assert row.child is not None, "a run is recorded as working together with its child"
        returncode = self._executor.exit_code(row.child)
        console = job_folders.tail(self._folders.console(row.job_id), 4096)

        def ended(now: Row) -> tuple[str, str | None]:
            state, error = job_folders.outcome(self._folders.run(row.job_id), now, returncode, console)
            return state, why if why and state == "failed" else error

        self._record.settle(row, ended)
        self._executor.part(row.child)  # not before: when the record fails, the exit code is asked for again
        self._watch.forget(row.child)

    def _part_with_cancelled(self) -> None:
        """Takes leave of children whose run another process cancelled, `compress jobs cancel` for example."""
        working = {row.child for row in self._record.in_states(*ACTIVE)}
        for child in self._executor.ended():
            if child not in working:
                self._executor.part(child)
                self._watch.forget(child)

    def _end_unrecorded(self, row: Row) -> None:
        """Ends children that were started for a run and not written down: the server was killed in that moment, or the
        record could not be written. Raises `RunError` when one does not end."""
        for child in self._executor.strays(self._folders.run(row.job_id)):
            self._end(child)

    def _end(self, child: Child) -> None:
        if not self._executor.end(child, GRACE_S):
            raise RunError(UNENDING)


class _Kept(Exception):
    """The run is kept since a moment ago."""
