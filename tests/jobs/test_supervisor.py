"""The supervisor ends a run when the other end of its pipe closes, and no second attempt runs beside it."""

from __future__ import annotations

import io
import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from places import ROOT

from compress import processes
from compress.jobs import supervisor

pytestmark = pytest.mark.integration

STUBBORN = """
import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(600)"])
open("pids", "w").write(f"{__import__('os').getpid()} {child.pid}\\n")
time.sleep(600)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path
    for pid in processes._pids():
        if any(str(tmp_path).encode() in word for word in processes._arguments(pid)) and pid != os.getpid():
            os.kill(pid, signal.SIGKILL)


def start(folder: Path, code: str) -> subprocess.Popen[str]:
    words = [sys.executable, "-P", "-m", "compress.jobs.supervisor", str(folder / "events.jsonl")]
    return subprocess.Popen(
        [*words, sys.executable, "-S", "-c", code, str(folder)],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_until(true: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 15
    while not true():
        assert time.monotonic() < deadline, f"not within 15 s: {what}"
        time.sleep(0.02)


def pids_of(folder: Path) -> list[int]:
    wait_until(lambda: (folder / "pids").exists() and (folder / "pids").read_text().endswith("\n"), "the run starts")
    return [int(pid) for pid in (folder / "pids").read_text().split()]


def lives(pid: int) -> bool:
    child = processes.identify(pid)
    return child is not None and processes.alive(child)


def is_free(folder: Path) -> bool:
    lock = supervisor.try_lock(folder / "events.jsonl")
    if lock is None:
        return False
    lock.close()
    return True


def test_a_run_ends_although_the_child_of_its_holder_was_killed_first(folder: Path) -> None:
    """Ray kills the children of a worker that it ends."""
    process = start(folder, STUBBORN)
    pids = pids_of(folder)
    process.kill()
    assert process.stdin is not None
    process.stdin.close()
    wait_until(lambda: not any(map(lives, pids)) and is_free(folder), "the run and its child end")


def test_what_the_run_prints_and_how_it_ends_is_passed_on(folder: Path) -> None:
    for code, expected in (
        ("print('hello')", 0),
        ("print('hello'); raise SystemExit(3)", 3),
        ("print('hello', flush=True); import os; os.kill(os.getpid(), 9)", -9),
        ("print('hello', flush=True); import os; os.kill(os.getpid(), 15)", -15),
    ):
        process = start(folder, code)
        assert process.wait(timeout=15) == expected
        assert process.stdout is not None and process.stdout.read() == "hello\n"
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    assert [event["state"] for event in events] == ["started"] * 4 and is_free(folder)


def test_a_run_ends_with_all_that_it_started_when_its_holder_dies(folder: Path) -> None:
    process = start(folder, STUBBORN)
    pids = pids_of(folder)
    assert process.stdin is not None and not is_free(folder)
    process.stdin.close()  # as the kernel does when the holder is killed
    begin = time.monotonic()
    wait_until(lambda: not any(map(lives, pids)), "the run and its child end")
    assert time.monotonic() - begin < 3
    assert process.wait(timeout=5) == supervisor.STOPPED and is_free(folder)


def test_the_supervisor_itself_may_be_told_to_stop(folder: Path) -> None:
    process = start(folder, STUBBORN)
    pids = pids_of(folder)
    process.terminate()
    assert process.wait(timeout=5) == supervisor.STOPPED
    assert not any(map(lives, pids)) and is_free(folder)


def test_the_supervisor_itself_may_be_told_to_stop_while_it_ends_the_run(folder: Path) -> None:
    process = start(folder, STUBBORN)
    pids = pids_of(folder)

    def told_again() -> bool:
        os.killpg(process.pid, signal.SIGTERM)  # both of its processes
        return process.poll() is not None

    wait_until(told_again, "it ends")
    assert process.returncode == supervisor.STOPPED
    assert not any(map(lives, pids)) and is_free(folder)


def test_no_second_attempt_works_beside_one_that_was_cut_off(folder: Path) -> None:
    first = start(folder, STUBBORN)
    pids = pids_of(folder)
    for supervisor_pid in [pid for pid in processes._pids() if b"compress.jobs.supervisor" in processes._arguments(pid)]:
        if str(folder / "events.jsonl").encode() in processes._arguments(supervisor_pid):
            os.kill(supervisor_pid, signal.SIGKILL)  # nobody is left who could end the run, but it keeps its lock
    first.wait()
    second = start(folder, "open('second', 'w')")
    time.sleep(1.0)
    assert not (folder / "second").exists() and all(map(lives, pids))
    os.killpg(pids[0], signal.SIGKILL)
    assert second.wait(timeout=15) == 0 and (folder / "second").exists()


def test_an_attempt_that_waits_too_long_for_the_other_says_so(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(supervisor, "LOCK_TIMEOUT_S", 0.3)
    other = supervisor.try_lock(folder / "events.jsonl")
    assert other is not None
    read, write = os.pipe()
    with os.fdopen(read, "rb") as held:
        monkeypatch.setattr(supervisor.sys, "stdin", io.TextIOWrapper(held))
        assert supervisor._work(folder / "events.jsonl", ["/bin/false"]) == 1
    os.close(write)
    other.close()
    assert capfd.readouterr().out == (
        f"Error: Another process still executes this run in {folder}. Resume the run when it has ended.\n"
    )


def test_a_full_disk_is_told_by_name(folder: Path) -> None:
    (folder / "events.jsonl").symlink_to("/dev/full")
    process = start(folder, "open('started', 'w')")
    assert process.wait(timeout=15) == 1 and not (folder / "started").exists()
    assert process.stdout is not None and process.stdout.read() == (
        f"Error: The node {platform.node()} could not start the run in {folder} (No space left on device). Correct that, then "
        "resume the run.\n"
    )


def test_a_run_that_nobody_wants_any_more_is_not_started(folder: Path) -> None:
    process = start(folder, "open('started', 'w')")
    assert process.stdin is not None
    process.stdin.close()
    assert process.wait(timeout=15) == 143 and not (folder / "started").exists()


def test_a_run_that_stands_still_is_ended(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    read, write = os.pipe()
    lock = supervisor.try_lock(folder / "events.jsonl")
    assert lock is not None
    with lock, os.fdopen(read, "rb") as held:
        words = [sys.executable, "-S", "-c", "import time; time.sleep(600)", str(folder)]
        assert supervisor.execute(words, lock, held, stall_s=1.5) == 1
    os.close(write)
    assert capfd.readouterr().out == (
        "Error: The run was stopped because it neither computed nor reported progress for 0.025 minutes. "
        "Resume it: finished stages are not repeated.\n"
    )
