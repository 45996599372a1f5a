"""What carries out an attempt of a run: starts it, knows whether it still lives, ends it.

An attempt is a child process of this machine. It outlives the server that started it: the next server gets its
`processes.Child` from the record and asks here about it. Where runs work on a cluster, the child is what submits them.
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
"""States in the events of a run on a cluster: it waits for a node; a node has begun with it."""
HEAD_BYTES = 4096
"""An attempt's events begin with these two."""

Command = Callable[[Path, bool], Sequence[str]]
"""(run folder, whether it is resumed) -> the words that start the child."""


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


def _first_events(events: Path, offset: int) -> list[dict[str, Any]]:
    """Those whole within `HEAD_BYTES`; none without a file."""
    try:
        with events.open("rb") as file:
            file.seek(offset)
            head = file.read(HEAD_BYTES)
    except FileNotFoundError:
        return []
    found = []
    for line in head.splitlines():
        with contextlib.suppress(ValueError):
            found.append(json.loads(line))
    return [event for event in found if isinstance(event, dict)]


class Executor:
    """Attempts as child processes, each in a session of its own.

    Args:
        command: how a child is started.
        passes: names of variables of this process's environment that a child needs besides those that find its
            libraries and devices.
    """

    def __init__(self, command: Command = compress_command, passes: Sequence[str] = ()) -> None:
        self._command, self._passes = command, passes
        self._own: dict[Child, Popen[bytes]] = {}
        """Those started here, of which this process has to take leave."""

    def start(self, folder: Path, console: Path, *, resume: bool) -> Child:
        """Begins an attempt of the run in `folder`; what it prints goes to `console`. Raises OSError."""
        env = child_environment() | {name: os.environ[name] for name in self._passes if name in os.environ}
        process = processes.start(self._command(folder, resume), folder=folder, console=console, env=env)
        child = processes.identify(process.pid)
        assert child is not None, "a child that was not waited for is at least a zombie"
        self._own[child] = process
        return child

    def alive(self, child: Child) -> bool:
        return processes.alive(child)

    def worked_s(self, child: Child, events: Path, offset: int) -> float:
        """Seconds since it was started, without those that it waited for a node of a cluster.

        Args:
            offset: where its own events begin in the file `events`, in bytes.
        """
        age_s = processes.age_s(child)
        states = {event["state"]: event for event in _first_events(events, offset) if "state" in event}
        if STARTED in states:
            return min(age_s, time.time() - states[STARTED]["time"])
        return 0.0 if SUBMITTED in states else age_s

    def end(self, child: Child, grace_s: float = 0.0) -> bool:
        """Ends it, after `grace_s` seconds by force, and what it started. True when nothing of it lives any more."""
        return processes.stop(child, grace_s)

    def exit_code(self, child: Child) -> int | None:
        """Of one that has ended; None when another process had started it."""
        process = self._own.get(child)
        return process.wait(timeout=5) if process else None

    def part(self, child: Child) -> None:
        """Takes leave of one that has ended."""
        self.exit_code(child)
        self._own.pop(child, None)
        processes.reap(child.pid)

    def ended(self) -> list[Child]:
        """Those started here that have ended and were not taken leave of."""
        return [child for child, process in list(self._own.items()) if process.poll() is not None]

    def strays(self, folder: Path) -> list[Child]:
        """Attempts of the run in `folder` that live, whoever started them."""
        found = processes.find(str(folder / "request.json"))
        return [child for pid in found if (child := processes.identify(pid)) is not None]
