"""`python -m compress.jobs.supervisor EVENTS WORDS...` carries out WORDS for as long as standard input stays open.

On a node of a cluster nobody is left to end a run whose worker was killed. So the worker holds the other end of standard
input: when it dies, however it dies, the pipe closes, and the run is ended here with everything that it started.

EVENTS is the run's events.jsonl. It stays locked (flock) while the run lives, on whatever machine, so two attempts of one run
never work at the same time; that holds on every file system that keeps such locks for all nodes.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import platform
import select
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, NoReturn

from compress import processes
from compress.jobs.executor import STARTED
from compress.jobs.stall import STALL_S, Watch

GRACE_S = 1.5
"""From SIGTERM to SIGKILL: shorter than the grace of whoever submitted the run, which waits for its end."""
PATIENCE_S = 60.0
"""For the process of an attempt that was cut off to be gone."""
TICK_S = 0.1
STOPPED = 128 + signal.SIGTERM
"""Exit status when nobody wants the run any more."""


def hold(events: Path) -> IO[str] | None:
    """The file with its lock, which lasts until it is closed here and in every process that inherited it; None while
    another process has it. Raises OSError, also where the file system keeps no locks."""
    file = events.open("a", encoding="utf-8")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    except OSError:
        file.close()
        raise
    return file


def carry_out(words: Sequence[str], lock: IO[str], leash: IO[bytes], stall_s: float = STALL_S) -> int:
    """Runs WORDS in the working directory; what they print goes where this process prints.

    Args:
        lock: of the run's events, which its process inherits.
        leash: what ends the run when its other end is closed.

    Returns:
        The exit status as `subprocess` reports it: negative for the signal that ended the process; `STOPPED` when it was let go.
    """
    lock.write(json.dumps({"time": time.time(), "state": STARTED, "node": platform.node()}) + "\n")
    lock.flush()
    process = processes.start(words, folder=Path.cwd(), console=None, env=os.environ, keep=(lock.fileno(),))
    child = processes.identify(process.pid)
    assert child is not None, "a child that was not waited for is at least a zombie"
    watch, hangs, unwanted = Watch(stall_s), False, False
    try:
        while process.poll() is None and not hangs and not (unwanted := _let_go(leash, TICK_S)):
            hangs = watch.idle(child, os.fstat(lock.fileno()).st_size)
    finally:
        processes.stop(child, GRACE_S)  # also what it left behind
    if hangs:
        sys.stdout.write(f"Error: {watch.sentence}\n")
        return 1
    return STOPPED if unwanted else process.wait()


def wait_for_lock(events: Path, leash: IO[bytes]) -> IO[str] | None:
    """The lock of the run; None when another process keeps it too long, or nobody wants the run any more."""
    deadline = time.monotonic() + PATIENCE_S
    while (lock := hold(events)) is None and time.monotonic() < deadline and not _let_go(leash, TICK_S):
        pass
    return lock


def _let_go(leash: IO[bytes], seconds: float) -> bool:
    """Whether the other end of the pipe was closed, after waiting so long for it: nobody ever writes into it."""
    return bool(select.select([leash], [], [], seconds)[0])


def _work(events: Path, words: Sequence[str]) -> int:
    leash = sys.stdin.buffer
    try:
        lock = wait_for_lock(events, leash)
        if _let_go(leash, 0.0):
            return STOPPED
        if lock is None:
            sys.stdout.write(
                f"Error: Another process still works on this run in {events.parent}. Resume the run when it has ended.\n"
            )
            return 1
        code = carry_out(words, lock, leash)
    except OSError as error:
        sys.stdout.write(
            f"Error: The node {platform.node()} could not start the run in {events.parent} ({error.strerror or error}). Put that "
            "right, then resume the run.\n"
        )
        return 1
    _end(code)  # while `lock` is held: whoever gets it finds nothing of this attempt any more


def _drop(leash: IO[bytes]) -> None:
    """Being told to stop is being let go: nothing is raised in the middle of a start or an end, however often it is told."""
    end = os.open(os.devnull, os.O_RDONLY)
    signal.signal(signal.SIGTERM, lambda *_: os.dup2(end, leash.fileno()))


def _relay(child: int) -> NoReturn:
    signal.signal(signal.SIGTERM, lambda *_: os.kill(child, signal.SIGTERM))
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # from here on the id may belong to another process
    _end(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))


def _end(code: int) -> NoReturn:
    """Ends as the run ended, by the same signal if it was one."""
    sys.stdout.flush()
    if code < 0:
        with contextlib.suppress(OSError):  # SIGKILL needs no such leave
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


def main() -> None:
    """Two processes: Ray kills the children of a worker that it ends, so the one that holds the leash is none of them."""
    if child := os.fork():
        _relay(child)
    _drop(sys.stdin.buffer)
    _end(_work(Path(sys.argv[1]), sys.argv[2:]))


if __name__ == "__main__":
    main()
