"""Starts, inspects and ends the attempts of a run.

An attempt is a child process on this machine. It outlives the server that started it: the next server reads its
`processes.Child` from the run database. If runs execute on a cluster, the child is the process that submits the run.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from subprocess import Popen
from typing import Any

from compress import processes
from compress.processes import Child, child_environment

SUBMITTED, STARTED = "submitted", "started"
"""States in the events of a run on a cluster: it waits for a node; a node has started it."""
HEAD_BYTES = 4096
"""The two events above lie within the first bytes of an attempt's events."""

Command = Callable[[Path, bool], Sequence[str]]
"""(run folder, whether it is resumed) -> the command line of the child."""


def compress_command(folder: Path, resume: bool) -> list[str]:
    # -P: the run's folder, which is the working directory, must not be searched for modules
    command = [
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
    return [*command, "--resume"] if resume else command


def _first_events(events: Path, offset: int) -> list[dict[str, Any]]:
    """The complete events within `HEAD_BYTES`; none without a file."""
    try:
        with events.open("rb") as file:
            file.seek(offset)
            head = file.read(HEAD_BYTES)
    except FileNotFoundError:
        return []
    events_read = []
    for line in head.splitlines():
        with contextlib.suppress(ValueError):
            events_read.append(json.loads(line))
    return [event for event in events_read if isinstance(event, dict)]


class Executor:
    """Attempts as child processes, each in a session of its own.

    Args:
        command: builds the command line of a child.
        passes: environment variables of this process that a child inherits besides those that locate libraries and
            devices.
    """

    def __init__(self, command: Command = compress_command, passes: Sequence[str] = ()) -> None:
        self._command, self._passes = command, passes
        self._own: dict[Child, Popen[bytes]] = {}
        """Children of this process, which has to reap them."""

    def start(self, folder: Path, console: Path, *, resume: bool) -> Child:
        """Starts an attempt of the run in `folder`, with its output redirected to `console`. Raises OSError."""
        env = child_environment() | {name: os.environ[name] for name in self._passes if name in os.environ}
        process = processes.start(self._command(folder, resume), folder=folder, console=console, env=env)
        child = processes.identify(process.pid)
        assert child is not None, "a child that was not waited for is at least a zombie"
        self._own[child] = process
        return child

    def alive(self, child: Child) -> bool:
        return processes.alive(child)

    def worked_s(self, child: Child, events: Path, offset: int) -> float:
        """Seconds since the start, without the time spent waiting for a node of a cluster.

        Args:
            offset: byte offset of the attempt's first event in the file `events`.
        """
        age_s = processes.age_s(child)
        states = {event["state"]: event for event in _first_events(events, offset) if "state" in event}
        if STARTED in states:
            return min(age_s, time.time() - float(states[STARTED]["time"]))
        return 0.0 if SUBMITTED in states else age_s

    def end(self, child: Child, grace_s: float = 0.0) -> bool:
        """Ends the child and its descendants, after `grace_s` seconds by force. True when none of them is alive."""
        return processes.stop(child, grace_s)

    def exit_code(self, child: Child) -> int | None:
        """Exit code of a child that has ended; None if another process started it."""
        process = self._own.get(child)
        return process.wait(timeout=5) if process else None

    def reap(self, child: Child) -> None:
        """Reaps a child that has ended, and forgets it."""
        self.exit_code(child)
        self._own.pop(child, None)
        processes.reap(child.pid)

    def ended(self) -> list[Child]:
        """Children of this process that have ended and were not reaped yet."""
        return [child for child, process in list(self._own.items()) if process.poll() is not None]

    def orphans(self, folder: Path) -> list[Child]:
        """Living attempts of the run in `folder`, whichever process started them."""
        pids = processes.find(str(folder / "request.json"))
        return [child for pid in pids if (child := processes.identify(pid)) is not None]
