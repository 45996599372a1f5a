"""Runs one after another through one server, and what they leave in it: processes, handles, memory, files."""

from __future__ import annotations

import ctypes
import gc
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

from places import TESTS

from compress import processes
from compress.jobs import Queue
from compress.request import Request
from torture.kills import settled, until
from torture.rows import Outcome, Row

ALL, PART = 200, 30
WARM_UP = 10
FLAT = 1.05
KINDS = ("resnet18", "resnet18", "resnet18", "resnet50", "resnet101", "mobilenet_v2")
"""What fake_run.py makes of them: three succeed, one refuses, one is killed, one is cancelled together with a worker."""
FAKE = TESTS / "helpers" / "fake_run.py"
_PR_SET_CHILD_SUBREAPER = 36


@dataclass(frozen=True)
class Taken:
    """What this process and its folders hold."""

    handles: int
    memory_bytes: int
    zombies: int
    temporary: frozenset[str]

    @classmethod
    def now(cls, temporary: Path) -> Taken:
        gc.collect()
        return cls(
            handles=_resting_handles(),
            memory_bytes=int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE"),
            zombies=len(_zombies()),
            temporary=frozenset(os.listdir(temporary)),
        )


def _resting_handles() -> int:
    """The fewest handles within two seconds: the queue's thread opens its record, three files, five times a second."""
    counts = []
    for _ in range(40):
        counts.append(len(os.listdir("/proc/self/fd")))
        time.sleep(0.05)
    return min(counts)


def run(folder: Path, full: bool) -> Outcome:
    count, wrong = ALL if full else PART, []
    temporary = folder / "temporary"
    temporary.mkdir()
    with inherits_orphans(), temporary_files_in(temporary), Queue(folder / "data", command=_command) as queue:
        for number in range(count):
            if number == WARM_UP:
                before = Taken.now(temporary)
            wrong += _one(queue, KINDS[number % len(KINDS)])
        until(lambda: not _zombies())
        after = Taken.now(temporary)
        left = [pid for pid in processes._pids() if _belongs(pid, folder)]
    wrong += [f"{after.zombies} zombies"] if after.zombies else []
    wrong += [f"processes {left} are left"] if left else []
    wrong += (
        [f"handles: {before.handles} before, {after.handles} after"] if after.handles > FLAT * before.handles else []
    )
    grown = after.memory_bytes / before.memory_bytes
    wrong += [f"memory grew {grown:.2f} times"] if grown > FLAT else []
    strangers = sorted(after.temporary - before.temporary)
    wrong += [f"temporary files {strangers} are left"] if strangers else []
    wrong += [f"half-written files {halves} are left"] if (halves := list(folder.rglob(".partial-*"))) else []
    return Outcome(
        f"{count} runs; {after.zombies} zombies, handles {before.handles} to {after.handles}, memory x{grown:.3f}",
        tuple(wrong),
    )


def _one(queue: Queue, model: str) -> list[str]:
    job_id = queue.submit(Request(model=model, learning_rate=0.0001))
    expected = {"resnet18": "done", "mobilenet_v2": "cancelled"}.get(model, "failed")
    if model == "mobilenet_v2":
        until((queue.folder(job_id) / "grandchild").exists)
        Queue(queue.data_dir).cancel(job_id)  # as `compress jobs cancel` does it, beside the server
    status = settled(queue, job_id)
    return [] if status.state == expected else [f"{model} is {status.state}: {status.error}"]


def _command(folder: Path, resume: bool) -> list[str]:
    return [sys.executable, "-S", str(FAKE), str(folder), str(folder / "request.json"), *(["--resume"] * resume)]


@contextmanager
def inherits_orphans() -> Iterator[None]:
    """Makes this process the parent of orphaned grandchildren, as the first process of a container is."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    try:
        yield
    finally:
        libc.prctl(_PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)


@contextmanager
def temporary_files_in(folder: Path) -> Iterator[None]:
    """Of this process and its children: other programs write into the machine's own folder."""
    with mock.patch.object(tempfile, "tempdir", str(folder)), mock.patch.dict(os.environ, TMPDIR=str(folder)):
        yield


def _zombies() -> list[int]:
    return [
        pid
        for pid in processes._pids()
        if (fields := processes._stat(pid)) is not None and fields[0] == "Z" and int(fields[1]) == os.getpid()
    ]


def _belongs(pid: int, folder: Path) -> bool:
    return pid != os.getpid() and any(str(folder).encode() in word for word in processes._arguments(pid))


RUNS = Row(
    "runs",
    "200 runs in a row through one server: done, refused, killed, cancelled",
    "0 zombies, 0 processes and temporary files left, memory and handles flat within 5 %",
    run,
)
