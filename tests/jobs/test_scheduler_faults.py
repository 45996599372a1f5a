"""Faults that stop the scheduler: reported, nothing started twice, and recovered from."""

from __future__ import annotations

import errno
import os
import subprocess
from pathlib import Path

import pytest
from queues import ENDLESS, QUICK, child_of, fail_commits, fake_command, wait, wait_for_file, wait_for_trouble

from compress import processes
from compress.errors import RunError, StorageError
from compress.jobs import Queue
from compress.request import Request

pytestmark = pytest.mark.integration


def unrecorded_child(folder: Path) -> subprocess.Popen[bytes]:
    """As a server leaves it that was killed between starting it and writing it down."""
    child = processes.start(
        fake_command(folder, False), folder=folder, console=folder / "console.txt", env=dict(os.environ)
    )
    wait_for_file(folder / "environ.json")
    return child


def test_a_child_that_was_started_but_not_recorded_is_ended_before_its_run_starts(data_dir: Path) -> None:
    client = Queue(data_dir, command=fake_command)
    job_id = client.submit(Request(**ENDLESS))
    folder = client.folder(job_id)
    stray = unrecorded_child(folder)
    with Queue(data_dir, command=fake_command):
        assert stray.wait(timeout=10) != 0
        wait(client, job_id, "done")  # resnet34 is done only with --resume: what the stray child left is gone on with


def test_a_child_that_could_not_be_recorded_is_ended_before_its_run_starts_again(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[Path] = []

    def endless(folder: Path, resume: bool) -> list[str]:
        started.append(folder)
        return fake_command(folder, False)

    failing = iter([True])
    fail_commits(monkeypatch, lambda: len(started) == 1 and next(failing, False))
    with Queue(data_dir, command=endless) as queue:
        job_id = queue.submit(Request(**ENDLESS))
        wait(queue, job_id, "running")
        assert len(started) == 2
        assert processes.find(str(queue.folder(job_id) / "request.json")) == [child_of(queue, job_id).pid]
        assert [child.pid for child in queue._scheduler._executor._own] == [child_of(queue, job_id).pid], "a zombie"
        queue.cancel(job_id)


def test_cancelling_a_waiting_run_ends_a_child_that_was_not_recorded(data_dir: Path) -> None:
    queue = Queue(data_dir, command=fake_command)
    job_id = queue.submit(Request(**ENDLESS))
    folder = queue.folder(job_id)
    stray = unrecorded_child(folder)
    assert queue.cancel(job_id).state == "cancelled"
    assert processes.find(str(folder / "request.json")) == []
    stray.wait()


def test_nothing_starts_while_a_child_that_was_not_recorded_does_not_end(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue = Queue(data_dir, command=fake_command)
    job_id = queue.submit(Request(**QUICK))
    executor = queue._scheduler._executor
    monkeypatch.setattr(executor, "orphans", lambda folder: [processes.Child(1, "waits for the disk")])
    monkeypatch.setattr(executor, "end", lambda child, grace_s: False)
    with queue:
        assert "does not end, even when killed: it waits for the device or the disk" in wait_for_trouble(queue)
        assert queue.status(job_id).state == "queued"
        with pytest.raises(RunError, match="The run's process does not end, even when killed"):
            queue.cancel(job_id)
        monkeypatch.undo()


def test_a_machine_that_is_short_of_something_fails_no_run(data_dir: Path) -> None:
    short = [True]

    def command(folder: Path, resume: bool) -> list[str]:
        if short:
            raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        return fake_command(folder, resume)

    with Queue(data_dir, command=command) as queue:
        jobs = [queue.submit(Request(**QUICK)) for _ in range(2)]
        assert wait_for_trouble(queue) == (
            "No run can be started now (Resource temporarily unavailable): free memory, disk space or processes; "
            "queued runs then start by themselves."
        )
        assert {queue.status(job_id).state for job_id in jobs} == {"queued"}
        short.clear()
        for job_id in jobs:
            wait(queue, job_id, "done")


def test_how_a_run_ended_is_still_known_when_the_record_can_be_written_again(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue = Queue(data_dir, command=fake_command)
    job_id = queue.submit(Request(model="resnet101", learning_rate=0.001))
    failing = iter([True])

    def has_died() -> bool:
        child = queue._row(job_id).child
        return child is not None and not processes.alive(child)

    fail_commits(monkeypatch, lambda: has_died() and next(failing, False))
    with queue:
        assert "Its process was killed (signal 9" in str(wait(queue, job_id, "failed").error)
    assert next(failing, None) is None, "no COMMIT failed"


def test_trouble_is_told_and_passes(queue: Queue, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise StorageError("The disk is full.")

    monkeypatch.setattr(queue._scheduler, "_tick", full)
    assert wait_for_trouble(queue) == "The disk is full."
    with queue._store.leadership() as leads:
        assert not leads(), "a server that does not see our children would call them dead"
    monkeypatch.undo()
    wait(queue, queue.submit(Request(**QUICK)), "done")
    assert queue.trouble is None


def test_a_lock_that_cannot_be_opened_is_told_and_tried_again(data_dir: Path) -> None:
    lock = data_dir / "queue.lock"
    lock.mkdir(parents=True)
    with Queue(data_dir, command=fake_command) as queue:
        assert wait_for_trouble(queue) == (
            f"{lock} could not be written (Is a directory). Choose a folder that can be written."
        )
        lock.rmdir()
        wait(queue, queue.submit(Request(**QUICK)), "done")
        assert queue.trouble is None


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_fault_that_ends_the_thread_is_told_and_leaves_the_queue_to_another_server(
    data_dir: Path, queue: Queue, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(queue._scheduler, "_tick", lambda: 1 / 0)
    assert wait_for_trouble(queue) == (
        "The scheduler stopped because of a bug in Espalier, which the server's log shows: restart the server."
    )
    with Queue(data_dir, command=fake_command) as other:
        wait(other, other.submit(Request(**QUICK)), "done")
