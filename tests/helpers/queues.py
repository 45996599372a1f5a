"""A queue of runs that train nothing, see fake_run.py, and how tests wait for them; conftest.py offers the fixtures."""

from __future__ import annotations

import os
import signal
import sqlite3
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from compress import processes
from compress.jobs import Queue, Status

FAKE = Path(__file__).with_name("fake_run.py")
QUICK = {"model": "resnet18", "learning_rate": 0.001}
ENDLESS = {"model": "resnet34", "learning_rate": 0.001}


def fake_command(folder: Path, resume: bool) -> list[str]:
    return [
        sys.executable,
        "-S",
        str(FAKE),
        str(folder),
        str(folder / "request.json"),
        *(["--resume"] if resume else []),
    ]


def staged_command(folder: Path, resume: bool) -> list[str]:
    """A run with the real stages and records; see staged_run.py for where its request makes it wait."""
    staged = FAKE.with_name("staged_run.py")
    words = [sys.executable, "-P", str(staged), str(folder), str(folder / "request.json")]
    return [*words, "--resume"] if resume else words


@pytest.fixture
def data_dir(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path / "data"
    for pid in processes._pids():  # nothing of a test may outlive it, however it failed
        if any(str(tmp_path).encode() in word for word in processes._arguments(pid)) and pid != os.getpid():
            os.kill(pid, signal.SIGKILL)


@pytest.fixture
def queue(data_dir: Path) -> Iterator[Queue]:
    with Queue(data_dir, command=fake_command) as queue:
        yield queue
        for status in queue.list():
            if status.state in ("queued", "running"):
                queue.cancel(status.job_id)


def wait(queue: Queue, job_id: str, *states: str, seconds: float = 15) -> Status:
    deadline = time.monotonic() + seconds
    while (status := queue.status(job_id)).state not in states:
        assert time.monotonic() < deadline, f"still {status} after {seconds} s, not {states}"
        time.sleep(0.02)
    return status


def wait_for_stage(queue: Queue, job_id: str, stage: str) -> Status:
    deadline = time.monotonic() + 15
    while (status := queue.status(job_id)).stage != stage or status.stage_fraction == 0:
        assert time.monotonic() < deadline and status.state in ("queued", "running"), f"{status} never reached {stage}"
        time.sleep(0.02)
    return status


def wait_for_file(path: Path) -> None:
    deadline = time.monotonic() + 15
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} was never written"
        time.sleep(0.02)


def wait_for_trouble(queue: Queue) -> str:
    deadline = time.monotonic() + 15
    while (trouble := queue.trouble) is None:
        assert time.monotonic() < deadline, "no trouble was told"
        time.sleep(0.02)
    return trouble


def child_of(queue: Queue, job_id: str) -> processes.Child:
    child = queue._row(job_id).child
    assert child is not None
    return child


def fail_commits(monkeypatch: pytest.MonkeyPatch, when: Callable[[], bool]) -> None:
    """From here on SQLite finds the disk full at every COMMIT for which `when` says so."""

    class Connection(sqlite3.Connection):
        def execute(self, words: str, *values: object) -> sqlite3.Cursor:
            if words == "COMMIT" and when():
                raise sqlite3.OperationalError("database or disk is full")
            return super().execute(words, *values)

    connect = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", lambda *args, **named: connect(*args, **named, factory=Connection))
