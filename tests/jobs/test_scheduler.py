"""How the scheduler executes runs: cancel, death of child and server, runs that stall or time out."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from places import PYTHONPATH
from queues import ENDLESS, QUICK, child_of, fake_command, wait, wait_for_stage

from compress import processes
from compress.errors import RunError
from compress.jobs import Queue, compress_command
from compress.jobs.stall import StallDetector
from compress.request import Request

pytestmark = pytest.mark.integration


def test_cancel_ends_the_run_and_its_processes_within_five_seconds(queue: Queue) -> None:
    job_id = queue.submit(Request(**ENDLESS))
    wait_for_stage(queue, job_id, "finetune")
    child = child_of(queue, job_id)
    begin = time.monotonic()
    status = queue.cancel(job_id)
    assert time.monotonic() - begin < 5
    assert (status.state, status.resumable, status.error) == ("cancelled", True, None)
    assert processes.living(child) == []
    with pytest.raises(RunError, match="This run is cancelled already, so there is nothing to cancel"):
        queue.cancel(job_id)


def test_cancel_kills_a_child_that_does_not_listen_and_its_children(queue: Queue) -> None:
    job_id = queue.submit(Request(model="mobilenet_v2", learning_rate=0.001))
    wait_for_stage(queue, job_id, "finetune")
    child, grandchild = child_of(queue, job_id), int((queue.folder(job_id) / "grandchild").read_text())
    assert set(processes.living(child)) == {child.pid, grandchild}
    begin = time.monotonic()
    assert queue.cancel(job_id).state == "cancelled"
    assert time.monotonic() - begin < 5
    assert processes.living(child) == []


def test_a_run_stopped_by_somebody_else_is_not_called_cancelled(queue: Queue) -> None:
    job_id = queue.submit(Request(**ENDLESS))
    wait_for_stage(queue, job_id, "finetune")
    os.kill(child_of(queue, job_id).pid, signal.SIGTERM)
    status = wait(queue, job_id, "failed")
    assert (
        status.error == "The run was interrupted. It was stopped from outside the queue. "
        "Resume it: finished stages are not repeated."
    )


def test_a_killed_child_is_interrupted_and_can_be_resumed(queue: Queue) -> None:
    job_id = queue.submit(Request(model="resnet101", learning_rate=0.001))
    status = wait(queue, job_id, "failed", "done")
    assert status.error == (
        "The run was interrupted. Its process was killed (signal 9, often because the machine ran out of memory). "
        "Resume it: finished stages are not repeated."
    )
    assert status.resumable
    assert queue.resume(job_id).error is None
    assert wait(queue, job_id, "failed", "done").state == "done"
    with pytest.raises(RunError, match="Only a failed or cancelled run can be resumed; this one is done"):
        queue.resume(job_id)


def test_a_killed_child_takes_what_it_started_with_it(queue: Queue) -> None:
    job_id = queue.submit(Request(model="mobilenet_v2", learning_rate=0.001))
    wait_for_stage(queue, job_id, "finetune")
    child = child_of(queue, job_id)
    os.kill(child.pid, signal.SIGKILL)
    assert "interrupted" in str(wait(queue, job_id, "failed").error)
    assert processes.living(child) == []


def test_the_child_sees_no_secret_of_the_server(queue: Queue, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_canary")
    monkeypatch.setenv("ESPALIER_PASSWORD", "canary")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    job_id = queue.submit(Request(**QUICK))
    wait(queue, job_id, "done")
    seen = json.loads((queue.folder(job_id) / "environ.json").read_text())
    assert "canary" not in json.dumps(seen)
    assert seen["CUDA_VISIBLE_DEVICES"] == "0"
    assert "PATH" in seen


SERVER = """
import sys, time
sys.path[:0] = {paths!r}
from queues import Queue, fake_command
with Queue(sys.argv[1], command=fake_command):
    print("ready", flush=True)
    time.sleep(600)
"""


def start_server(data_dir: Path) -> subprocess.Popen[str]:
    paths = PYTHONPATH.split(os.pathsep)
    server = subprocess.Popen(
        [sys.executable, "-c", SERVER.format(paths=paths), str(data_dir)], stdout=subprocess.PIPE, text=True
    )
    assert server.stdout is not None and server.stdout.readline() == "ready\n"
    return server


def kill(server: subprocess.Popen[str]) -> None:
    server.kill()
    server.wait()


def test_a_run_outlives_its_server_and_the_next_one_watches_it(data_dir: Path) -> None:
    client = Queue(data_dir, command=fake_command)  # never started: it only asks, as `jobs list` does
    server = start_server(data_dir)
    job_id, waiting = client.submit(Request(**ENDLESS)), client.submit(Request(**QUICK))
    wait_for_stage(client, job_id, "finetune")
    child = child_of(client, job_id)
    kill(server)
    assert processes.alive(child)
    with Queue(data_dir, command=fake_command):
        time.sleep(0.6)
        assert (client.status(job_id).state, client.status(waiting).position) == ("running", 1)
        assert child_of(client, job_id) == child, "the run was started a second time"
        assert client.cancel(job_id).state == "cancelled"
        wait(client, waiting, "done")


def test_a_run_that_died_with_its_server_is_interrupted(data_dir: Path) -> None:
    client = Queue(data_dir, command=fake_command)
    server = start_server(data_dir)
    job_id = client.submit(Request(**ENDLESS))
    wait_for_stage(client, job_id, "finetune")
    child = child_of(client, job_id)
    kill(server)
    os.killpg(child.pid, signal.SIGKILL)
    with Queue(data_dir, command=fake_command):
        status = wait(client, job_id, "failed")
    assert (
        status.error
        == "The run was interrupted. Its process ended without a result. Resume it: finished stages are not repeated."
    )
    assert status.resumable


def test_only_one_server_carries_runs_out(data_dir: Path, queue: Queue) -> None:
    wait(queue, queue.submit(Request(**QUICK)), "done")  # by now it leads
    with Queue(data_dir, command=lambda folder, resume: ["/bin/false"]):
        for _ in range(3):
            wait(queue, queue.submit(Request(**QUICK)), "done", "failed")
    assert {status.state for status in queue.list()} == {"done"}


def test_the_next_start_ends_what_a_killed_server_was_deleting_and_touches_nothing_else(data_dir: Path) -> None:
    with Queue(data_dir, command=fake_command) as queue:
        listed = queue.submit(Request(**QUICK))
        wait(queue, listed, "done")
    trash, formerly = data_dir / "runs" / ".deleted", data_dir / "deleted"
    (data_dir / "runs" / listed).rename(trash / listed)  # the server was killed before it could write that down
    for folder in (trash / ("0" * 32), formerly / ("1" * 32), trash / "not ours"):
        (folder / "artifacts").mkdir(parents=True)
    with Queue(data_dir, command=fake_command) as queue:
        wait(queue, queue.submit(Request(**QUICK)), "done")
        assert queue.artifact(listed, "report.json").is_file()
    assert [folder.name for folder in trash.iterdir()] == ["not ours"] and not formerly.exists()


def test_a_run_that_works_too_long_is_ended_and_can_be_resumed(data_dir: Path) -> None:
    with Queue(data_dir, command=fake_command, max_seconds=1.5) as queue:
        job_id = queue.submit(Request(**ENDLESS))
        failed = wait(queue, job_id, "failed")
        assert failed.error == (
            "The run was stopped because it exceeded the time limit of 0.025 minutes of this server. "
            "Resume it (finished stages are not repeated), or request fewer epochs."
        )
        assert failed.resumable
        for pid in processes._pids():
            assert not any(job_id.encode() in word for word in processes._arguments(pid)), "its process lives"
        queue.resume(job_id)
        assert wait(queue, job_id, "done").state == "done"


def test_a_command_that_cannot_start_fails_the_run(data_dir: Path) -> None:
    with Queue(data_dir, command=lambda folder, resume: ["/no/such/program"]) as queue:
        status = wait(queue, queue.submit(Request(**QUICK)), "failed")
    assert (
        status.error == "The run's process could not be started (No such file or directory). "
        "Check the installation, then resume the run."
    )


def test_a_run_whose_folder_was_removed_fails_and_the_next_one_starts(queue: Queue) -> None:
    working, lost, after = (queue.submit(Request(**values)) for values in (ENDLESS, QUICK, QUICK))
    wait(queue, working, "running")
    shutil.rmtree(queue.folder(lost))
    queue.cancel(working)
    assert wait(queue, lost, "failed").error is not None
    wait(queue, after, "done")


def test_a_run_that_stands_still_is_ended_and_one_that_computes_is_not(data_dir: Path) -> None:
    with Queue(data_dir, command=fake_command, stall_s=1.5) as queue:
        job_id = queue.submit(Request(**ENDLESS))
        wait_for_stage(queue, job_id, "finetune")
        child = child_of(queue, job_id)
        time.sleep(2.0)
        assert queue.status(job_id).state == "running", "it reports every 0.2 s"
        os.kill(child.pid, signal.SIGSTOP)
        assert wait(queue, job_id, "failed").error == (
            "The run was stopped because it neither computed nor reported progress for 0.025 minutes. "
            "Resume it: finished stages are not repeated."
        )
        assert processes.living(child) == []
        queue.resume(job_id)
        wait(queue, job_id, "done")


def test_what_a_run_does_is_told_from_standing_still(monkeypatch: pytest.MonkeyPatch) -> None:
    now, ticks = [0.0], [100]
    monkeypatch.setattr(processes, "cpu_ticks", lambda child: ticks[0])
    watch, child = StallDetector(300.0, clock=lambda: now[0]), processes.Child(1, "x")

    def look(at: float, events: int, used: int) -> bool:
        now[0], ticks[0] = at, used
        return watch.is_stalled(child, events)

    assert not look(0, 10, 100)
    assert not look(290, 10, 101)
    assert look(310, 10, 102), "a thread that looks at a clock now and then does not count"
    assert not look(320, 11, 102), "an event counts"
    assert not look(610, 11, 103)
    assert not look(625, 11, 140), "computing counts"
    assert not look(900, 11, 140)
    assert look(930, 11, 140)
    watch.forget(child)
    assert not look(2000, 11, 140), "what was parted with begins anew"


def test_a_clock_that_is_put_back_does_not_keep_a_cancelled_run_alive(
    queue: Queue, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id = queue.submit(Request(model="mobilenet_v2", learning_rate=0.001))
    wait_for_stage(queue, job_id, "finetune")
    queue._store.request_cancel(job_id)  # by a server that was killed right after it
    real = time.time
    monkeypatch.setattr("compress.jobs.scheduler.time.time", lambda: real() - 3600)
    wait(queue, job_id, "cancelled", seconds=5)


@pytest.mark.parametrize("why", [None, "The run hangs."])
def test_a_run_that_is_cancelled_while_it_ends_is_cancelled(data_dir: Path, why: str | None) -> None:
    queue = Queue(data_dir, command=fake_command)
    job_id = queue.submit(Request(**ENDLESS))
    queue._scheduler._tick()
    wait_for_stage(queue, job_id, "finetune")
    before = queue._row(job_id)
    assert before.state == "running" and before.child is not None
    queue._store.request_cancel(job_id)
    processes.stop(before.child, grace_s=3.0)
    queue._scheduler._settle(before, why)
    status = queue.status(job_id)
    assert (status.state, status.error) == ("cancelled", None)


def test_the_child_is_the_shell_command_of_the_same_run(tmp_path: Path) -> None:
    words = compress_command(tmp_path, False)
    assert words[0] == sys.executable and words[-7:] == [
        "-m",
        "compress",
        "run",
        "--request",
        str(tmp_path / "request.json"),
        "--out",
        str(tmp_path),
    ]
    assert compress_command(tmp_path, True) == [*words, "--resume"]
