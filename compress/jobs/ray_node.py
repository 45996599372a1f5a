"""The Ray task that executes a run on a node: checks that the node is suitable, then starts the run's process.

An order contains no code: the node starts its own installation of Espalier, with an argument list, on the run's folder.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from compress import __version__, signing
from compress.errors import StorageError
from compress.jobs import folders
from compress.jobs.executor import Command
from compress.processes import child_environment

CONSOLE_BYTES = 16_384
"""Console output of the run's process that is sent back: the last bytes of it."""


@dataclass(frozen=True)
class Order:
    """A run to execute in a folder that the nodes share with the submitting machine."""

    folder: str
    request: str
    """The request's JSON, as request.json in the folder holds it."""
    version: str
    """Version of Espalier."""
    key: str | None
    """`compress.signing.fingerprint` of the submitting machine."""
    command: Command
    """A module-level function, which is pickled by name."""


@dataclass(frozen=True)
class Ended:
    """How the run's process ended."""

    returncode: int
    """Negative for the signal that ended it."""
    console: str
    """The end of its output."""


def execute(order: Order) -> Ended:
    """Executes a run, or resumes it where an earlier attempt stopped; returns when its process has ended."""
    if refusal := why_unfit(order):
        return Ended(1, f"{folders.REFUSAL}{refusal}")
    folder = Path(order.folder)
    command = order.command(folder, folders.has_begun(folder))
    supervisor = [sys.executable, "-P", "-m", "compress.jobs.supervisor", str(folder / "events.jsonl"), *command]
    with open(os.memfd_create("console"), "w+b") as console:  # in memory, freed with this process
        process = subprocess.Popen(  # noqa: S603  (an argument list, no shell)
            supervisor,
            cwd=folder,
            env=child_environment(),
            stdin=subprocess.PIPE,
            stdout=console,
            stderr=console,
            start_new_session=True,
        )
        returncode = process.wait()
        console.seek(max(0, console.seek(0, os.SEEK_END) - CONSOLE_BYTES))
        return Ended(returncode, console.read().decode("utf-8", errors="replace"))


def why_unfit(order: Order) -> str | None:
    """The error message why this node cannot execute the order; None when it can."""
    node, saved = platform.node(), Path(order.folder) / "request.json"
    if os.environ.get("RAY_AUTH_MODE") != "token":
        return (
            f"The node {node} accepts unauthenticated connections: start Ray with RAY_AUTH_MODE=token on every node, see "
            "docs/cluster.md."
        )
    if order.version != __version__:
        return (
            f"The node {node} has Espalier {__version__}, not {order.version}: install the same version on every node."
        )
    try:
        same = saved.read_text(encoding="utf-8") == order.request
    except OSError:
        same = False
    if not same:
        return f"The node {node} cannot see the run in {order.folder}: use a folder that all nodes share."
    try:
        key = signing.fingerprint()
    except StorageError as error:
        return f"On the node {node}: {error}"
    if key != order.key:
        return f"The node {node} signs results with a different key: set {signing.KEY_VARIABLE} to the same file on every node."
    return None
