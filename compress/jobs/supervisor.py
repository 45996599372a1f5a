"""`python -m compress.jobs.supervisor EVENTS COMMAND...` runs COMMAND for as long as standard input stays open.

On a node of a cluster, nobody remains to end a run whose Ray worker was killed. So the worker holds the write end of the
pipe on standard input: when it dies, however it dies, the pipe closes, and the supervisor ends the run with its descendants.

EVENTS is the run's events.jsonl. It stays locked (flock) while the run is alive, on whatever machine, so two attempts of one
run never execute concurrently; this holds on every file system whose locks all nodes share.
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
from compress.jobs.stall import STALL_S, StallDetector

GRACE_S = 1.5
"""From SIGTERM to SIGKILL: shorter than the grace period of the process that submitted the run and waits for its end."""
LOCK_TIMEOUT_S = 60.0
"""Time for the process of an earlier, disconnected attempt to exit."""
TICK_S = 0.1
STOPPED = 128 + signal.SIGTERM
"""Exit status when the pipe was closed."""


def try_lock(events: Path) -> IO[str] | None:
    """Opens and locks `events`; None while another process holds the lock.

    The lock lasts until this process and every process that inherited the file have closed it. Raises OSError, also on a file
    system without locks.
    """
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


def execute(command: Sequence[str], lock: IO[str], pipe: IO[bytes], stall_s: float = STALL_S) -> int:
    """Runs `command` in the working directory; it prints to the output of this process.

    Args:
        lock: the locked events file, which the child inherits.
        pipe: the run ends when the other end of this pipe is closed.

    Returns:
        The exit status as `subprocess` reports it, negative for a signal; `STOPPED` when the pipe was closed.
    """
    lock.write(json.dumps({"time": time.time(), "state": STARTED, "node": platform.node()}) + "\n")
    lock.flush()
    process = processes.start(command, folder=Path.cwd(), console=None, env=os.environ, keep=(lock.fileno(),))
    child = processes.identify(process.pid)
    assert child is not None, "a child that was not waited for is at least a zombie"
    stalls, stalled, abandoned = StallDetector(stall_s), False, False
    try:
        while process.poll() is None and not stalled and not (abandoned := _pipe_closed(pipe, TICK_S)):
            stalled = stalls.is_stalled(child, os.fstat(lock.fileno()).st_size)
    finally:
        processes.stop(child, GRACE_S)  # with its remaining descendants
    if stalled:
        sys.stdout.write(f"Error: {stalls.message}\n")
        return 1
    return STOPPED if abandoned else process.wait()


def wait_for_lock(events: Path, pipe: IO[bytes]) -> IO[str] | None:
    """Waits for the lock of the run; None when another process holds it too long, or the pipe was closed."""
    deadline = time.monotonic() + LOCK_TIMEOUT_S
    while (lock := try_lock(events)) is None and time.monotonic() < deadline and not _pipe_closed(pipe, TICK_S):
        pass
    return lock


def _pipe_closed(pipe: IO[bytes], seconds: float) -> bool:
    """Waits up to `seconds` for the other end of the pipe to close; nothing is ever written into it."""
    return bool(select.select([pipe], [], [], seconds)[0])


def _work(events: Path, command: Sequence[str]) -> int:
    pipe = sys.stdin.buffer
    try:
        lock = wait_for_lock(events, pipe)
        if _pipe_closed(pipe, 0.0):
            return STOPPED
        if lock is None:
            sys.stdout.write(
                f"Error: Another process still executes this run in {events.parent}. Resume the run when it has ended.\n"
            )
            return 1
        code = execute(command, lock, pipe)
    except OSError as error:
        sys.stdout.write(
            f"Error: The node {platform.node()} could not start the run in {events.parent} ({error.strerror or error}). Correct "
            "that, then resume the run.\n"
        )
        return 1
    _end(code)  # while the lock is held, so that its next holder finds no process of this attempt


def _close_on_sigterm(pipe: IO[bytes]) -> None:
    """Makes SIGTERM close the pipe, because an exception could interrupt the start or the end of the child."""
    end = os.open(os.devnull, os.O_RDONLY)
    signal.signal(signal.SIGTERM, lambda *_: os.dup2(end, pipe.fileno()))


def _relay(child: int) -> NoReturn:
    """Forwards SIGTERM to the child and exits as it does."""
    signal.signal(signal.SIGTERM, lambda *_: os.kill(child, signal.SIGTERM))
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # from here on the process id may be reused
    _end(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))


def _end(code: int) -> NoReturn:
    """Exits with the status of the run, by the same signal if a signal ended it."""
    sys.stdout.flush()
    if code < 0:
        with contextlib.suppress(OSError):  # the handler of SIGKILL cannot be set
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


def main() -> None:
    """Forks once, because Ray kills the direct children of a worker that it ends, and the supervisor must survive that."""
    if child := os.fork():
        _relay(child)
    _close_on_sigterm(sys.stdin.buffer)
    _end(_work(Path(sys.argv[1]), sys.argv[2:]))


if __name__ == "__main__":
    main()
