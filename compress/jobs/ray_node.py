"""The part of a run on a cluster that happens on the node: it is checked that the node fits, then the run's process starts.

Nothing in an order is code: the node starts its own installation of Espalier, with an argument list, on the run's folder.
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
from compress.jobs.executor import Command, child_environment

CONSOLE_BYTES = 16_384
"""Of what the run's process printed, that is sent back."""


@dataclass(frozen=True)
class Order:
    """A run to carry out in a folder that the nodes share with whoever submits it."""

    folder: str
    request: str
    """The request's JSON, as request.json in the folder holds it."""
    version: str
    """Of Espalier."""
    key: str | None
    """`compress.signing.fingerprint` of whoever submits it."""
    command: Command
    """A function of a module, which travels by its name."""


@dataclass(frozen=True)
class Ended:
    """How the run's process ended."""

    returncode: int
    """Negative for the signal that ended it."""
    console: str
    """The end of what it printed."""


def carry_out(order: Order) -> Ended:
    """Carries out a run, or goes on with it where an earlier attempt stopped; returns when its process has ended."""
    if refusal := unfit(order):
        return Ended(1, f"{folders.REFUSAL}{refusal}")
    folder = Path(order.folder)
    words = order.command(folder, folders.has_begun(folder))
    leash = [sys.executable, "-P", "-m", "compress.jobs.supervisor", str(folder / "events.jsonl"), *words]
    with open(os.memfd_create("console"), "w+b") as console:  # needs no disk, and goes with this process
        process = subprocess.Popen(  # noqa: S603  (a list of our own words, no shell)
            leash,
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


def unfit(order: Order) -> str | None:
    """The sentence why this node cannot carry out the order; None when it can."""
    node, saved = platform.node(), Path(order.folder) / "request.json"
    if os.environ.get("RAY_AUTH_MODE") != "token":
        return (
            f"The node {node} lets everybody in: start Ray with RAY_AUTH_MODE=token on every node, see docs/cluster.md."
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
        return f"The node {node} does not see the run in {order.folder}: give a folder that all nodes share."
    try:
        key = signing.fingerprint()
    except StorageError as error:
        return f"On the node {node}: {error}"
    if key != order.key:
        return (
            f"The node {node} signs results with another key: give every node the same file in {signing.KEY_VARIABLE}."
        )
    return None
