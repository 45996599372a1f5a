"""Runs on a Ray cluster: the same run, in the same folder, executed by a node with the required CPUs and GPUs.

The submitting process stays alive while the run executes: it submits the order, forwards events, and ends the run when it is
ended itself. The death of a worker or node costs the current stage: Ray reschedules the order, and the run resumes in its
folder. This module never starts a cluster, and uses none without its token.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress import __version__, runs, signing
from compress.errors import RequestError, RunError
from compress.files import INSTALLATION, storage_error, write_text
from compress.jobs import folders, supervisor
from compress.jobs.executor import SUBMITTED, Command, compress_command
from compress.jobs.ray_node import Ended, Order, execute
from compress.request import CHECKPOINT_SOURCES, DATA_SOURCES, Request

ENVIRONMENT = ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_TLS_SERVER_CERT", "RAY_TLS_SERVER_KEY", "RAY_TLS_CA_CERT",
               "RAY_USE_TLS")  # fmt: skip
"""Environment variables that the submitting process inherits from the server; the process of the run gets none of them."""
ADDRESS = re.compile(r"([A-Za-z0-9.-]+|\[[0-9A-Fa-f:]+\]):[0-9]{1,5}")
RETRIES = 2
"""After the death of a worker or node, and separately after a node ran out of memory; a run that fails by itself is not retried."""
POLL_S = 0.2
CONNECT_S = 5.0
END_S = 2.5
"""Time to wait for a cancelled run, within the grace period of the queue. The supervisor ends one that takes longer."""


@dataclass(frozen=True)
class Cluster:
    """The cluster that executes runs, and the resources of one run. Raises `RequestError`."""

    address: str
    """HOST:PORT of the head's control service (GCS); the port is 6379 by default."""
    cpus: int = 1
    """CPUs reserved for a run."""
    gpus: float = 0.0
    """GPUs reserved for a run; 0.5 lets two runs share one. A run needs one for each training process, all on one node."""

    def __post_init__(self) -> None:
        if not ADDRESS.fullmatch(self.address):
            raise RequestError("cluster", self.address, "HOST:PORT of a running cluster's head, such as 10.0.0.1:6379")
        if not 1 <= self.cpus <= 1024:
            raise RequestError("cluster-cpus", self.cpus, "a whole number from 1 to 1024")
        if not (0 <= self.gpus <= 1 or self.gpus in range(2, 65)):
            raise RequestError("cluster-gpus", self.gpus, "a number from 0 to 1, or a whole number up to 64")


def cluster_command(where: Cluster) -> Command:
    """The command with which a queue starts the child that submits a run to `where`."""
    options = ["--cluster", where.address, "--cluster-cpus", str(where.cpus), "--cluster-gpus", str(where.gpus)]
    return lambda folder, resume: [*compress_command(folder, resume), *options]


def run_on(
    where: Cluster,
    request: Request,
    *,
    out: Path,
    resume: bool = False,
    notify: Callable[[dict[str, Any]], None] = lambda event: None,
    command: Command = compress_command,
) -> None:
    """Executes `request` on a cluster in the folder `out`, which every node must see under the same path.

    Args:
        resume: continue an interrupted run of the same request.
        notify: called with each event that the run writes to events.jsonl.
        command: builds the command line that the node starts.

    Raises:
        CompressError: the run failed; its folder then has no manifest and can be resumed.
    """
    _ray()
    out, request = out.resolve(), _with_absolute_paths(request)
    signing.prepare()
    runs.claim(out, request, resume=resume)
    write_text(out / "request.json", request.to_json())
    events = _Events(out / "events.jsonl")
    events.add({"time": time.time(), "state": SUBMITTED})
    with connected(where) as connection:
        attempt = connection.submit(out, command)
        try:
            while (ended := attempt.ended()) is None:
                time.sleep(POLL_S)
                events.forward(notify)
        except BaseException:
            attempt.cancel()
            raise
    events.forward(notify)
    _refuse_unless_done(ended, out)


class Connection:
    """A connection to a cluster that accepts any number of concurrent runs; made by `connected`."""

    def __init__(self, ray: Any, where: Cluster) -> None:
        self._ray, self._where = ray, where
        self._task = ray.remote(num_cpus=where.cpus, num_gpus=where.gpus, max_retries=RETRIES)(execute)

    def submit(self, folder: Path, command: Command = compress_command) -> Attempt:
        """Submits the run whose request.json lies in `folder`; it starts when a node has the resources."""
        request = (folder / "request.json").read_text(encoding="utf-8")
        order = Order(str(folder), request, __version__, signing.fingerprint(), command)
        return Attempt(self._ray, self._task.remote(order), folder)

    def refuse_when_too_small(self) -> None:
        """Raises `RunError` when no node could ever execute a run; Ray itself would wait for such a node silently."""
        where = self._where
        nodes = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        if not any(node.get("CPU", 0) >= where.cpus and node.get("GPU", 0) >= where.gpus for node in nodes):
            have = "; ".join(sorted({_resources(node.get("CPU", 0), node.get("GPU", 0)) for node in nodes}))
            raise RunError(
                f"No node of the cluster {where.address} has the {_resources(where.cpus, where.gpus)} of a run (its nodes have: "
                f"{have}). Request less, or add such a node."
            )


class Attempt:
    """A submitted run."""

    def __init__(self, ray: Any, task: Any, folder: Path) -> None:
        self._ray, self._task, self._folder = ray, task, folder

    def ended(self) -> Ended | None:
        """How its process ended; None while it waits or runs.

        Raises:
            RunError: its workers or nodes died too often, or the connection to the cluster is lost.
        """
        ready, _ = self._ray.wait([self._task], timeout=0)
        if not ready:
            return None
        try:
            ended: Ended = self._ray.get(self._task)
            return ended
        except self._ray.exceptions.RayTaskError as error:
            raise RunError(
                f"Espalier does not start on a node of the cluster ({_first_line(error.cause)}). Install the same version, "
                "with its requirements, on every node."
            ) from error
        except self._ray.exceptions.OutOfMemoryError as error:
            raise RunError(
                f"The run was ended {RETRIES + 1} times because its node ran out of memory. Reserve more CPUs for a run "
                "(cluster-cpus), so that fewer runs share a node, then resume it: finished stages are not repeated."
            ) from error
        except self._ray.exceptions.RayError as error:
            raise RunError(
                f"The run was interrupted: its worker on the cluster died {RETRIES + 1} times, or the cluster was lost "
                f"({type(error).__name__}). Resume it: finished stages are not repeated."
            ) from error

    def cancel(self) -> None:
        """Ends the run; when this returns, none of its processes is alive, unless that takes longer than `END_S`."""
        deadline = time.monotonic() + END_S
        self._ray.cancel(self._task, force=True)
        self._ray.wait([self._task], timeout=END_S)
        with contextlib.suppress(OSError):  # the folder is not reachable any more
            while (lock := supervisor.try_lock(self._folder / "events.jsonl")) is None and time.monotonic() < deadline:
                time.sleep(POLL_S)
            if lock is not None:
                lock.close()


@contextlib.contextmanager
def connected(where: Cluster) -> Iterator[Connection]:
    """Connects to the cluster for the duration of the block.

    Raises:
        RunError: Ray is not installed, the cluster is unreachable or requires another token, or no node fits a run.
    """
    ray = _ray()
    _refuse_unless_reachable(where.address)
    handler = signal.getsignal(signal.SIGTERM)
    try:
        # Workers search the working directory for modules, so it must not be a folder that users can write to.
        with contextlib.chdir(INSTALLATION):
            ray.init(address=where.address, logging_level="error", log_to_driver=False, namespace="espalier")
    except ray.exceptions.AuthenticationError as error:
        raise RunError(
            f"There is no token for the cluster {where.address}. Set RAY_AUTH_TOKEN to its token, or RAY_AUTH_TOKEN_PATH to "
            "the file that contains it."
        ) from error
    except (ray.exceptions.RayError, ConnectionError, RuntimeError, ValueError, OSError) as error:
        raise RunError(
            f"This machine cannot join the cluster {where.address} ({_first_line(error)}). Either the token is wrong "
            "(RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH), or this machine is not one of its nodes: `ray start --address=HOST:PORT "
            "--num-cpus=0` adds it as a node that executes no runs."
        ) from error
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)  # Ray replaces it with its own
    try:
        connection = Connection(ray, where)
        connection.refuse_when_too_small()
        yield connection
    finally:
        ray.shutdown()


def _ray() -> Any:
    os.environ["RAY_AUTH_MODE"] = "token"  # read when Ray is imported
    os.environ["RAY_task_oom_retries"] = str(RETRIES)  # Ray's default is unlimited
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    try:
        import ray  # type: ignore[import-not-found, unused-ignore]  # an optional dependency
    except ImportError as error:
        raise RunError(
            "Ray is not installed, so no cluster can be used: pip install -r requirements-cluster.txt."
        ) from error
    return ray


def _refuse_unless_reachable(address: str) -> None:
    """Checks the connection first, because Ray would retry for a minute and then exit this process."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_S).close()
    except (OSError, OverflowError) as error:
        raise RunError(
            f"Nothing answers at {address} ({error}). Use the address of the cluster's head that `ray start --head` printed."
        ) from error


def _with_absolute_paths(request: Request) -> Request:
    """The request with absolute file paths, because the working directory differs on the node."""
    paths = {field: getattr(request, field) for field in folders.UPLOAD_FIELDS}
    return request.model_copy(
        update={field: str(Path(path).resolve()) for field, path in paths.items() if path and _is_relative_file(path)}
    )


def _is_relative_file(text: str) -> bool:
    path = Path(text)
    return not path.is_absolute() and path.exists() and text not in (*CHECKPOINT_SOURCES, *DATA_SOURCES)


def _refuse_unless_done(ended: Ended, folder: Path) -> None:
    if ended.returncode == 0:
        runs.manifest(folder)
        return
    before, _, last = ended.console.strip().rpartition("\n")
    if last.startswith(folders.REFUSAL):
        sys.stderr.write(f"{before}\n")
        raise RunError(last.removeprefix(folders.REFUSAL))
    sys.stderr.write(f"{ended.console}\n")
    raise RunError(folders.interrupted(ended.returncode))


def _resources(cpus: float, gpus: float) -> str:
    return f"{cpus:g} CPU{'s' * (cpus != 1)} and {gpus:g} GPU{'s' * (gpus != 1)}"


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}"


class _Events:
    """Appends to a run's events.jsonl, and follows the lines added since it was opened."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = path.stat().st_size if path.exists() else 0

    def add(self, event: dict[str, Any]) -> None:
        """Raises `StorageError`."""
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(event) + "\n")
        except OSError as error:
            raise storage_error(self._path, error) from error

    def forward(self, notify: Callable[[dict[str, Any]], None]) -> None:
        """Raises `StorageError` when the file cannot be read."""
        try:
            with self._path.open("rb") as file:
                file.seek(self._offset)
                lines = file.read().rpartition(b"\n")[0]
        except FileNotFoundError:
            return
        except OSError as error:
            raise storage_error(self._path, error) from error
        self._offset += len(lines) + bool(lines)
        for line in lines.splitlines():
            with contextlib.suppress(ValueError):
                notify(json.loads(line))
