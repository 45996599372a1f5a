"""The queue of runs: order, cancel, death of child and server, resume, and what it refuses."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from compress import processes, signing
from compress.errors import RequestError, RunError, StorageError
from compress.files import sha256
from compress.jobs import Queue, Status, compress_command
from compress.jobs_watch import Watch
from compress.request import Request

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


def child_of(queue: Queue, job_id: str) -> processes.Child:
    child = queue._row(job_id).child
    assert child is not None
    return child


def test_a_run_goes_from_queued_to_done_and_gives_out_its_files(queue: Queue) -> None:
    job_id = queue.submit(Request(**QUICK))
    status = wait(queue, job_id, "done")
    assert (status.fraction, status.stage, status.error, status.resumable) == (1.0, "report", None, False)
    assert status.title == "resnet18 on fashion-mnist, 50 % pruned, 8 bits"
    path = queue.artifact(job_id, "artifacts/quantized.onnxruntime.onnx")
    assert sha256(path) == queue.artifacts(job_id)["artifacts/quantized.onnxruntime.onnx"]["sha256"]
    assert "report: done" in queue.log_tail(job_id)


def test_progress_is_told_while_a_run_works(queue: Queue) -> None:
    job_id = queue.submit(Request(**ENDLESS))
    status = wait_for_stage(queue, job_id, "finetune")
    assert (status.state, status.stage_index, status.stage_count, status.stage_fraction) == ("running", 3, 8, 0.42)
    assert status.seconds_left == 75.0
    assert status.fraction == pytest.approx((2 + 0.42) / 8)
    assert status.message == "epoch 1 of 2, loss 0.31"
    with pytest.raises(RunError, match="This run is running: files can be downloaded when a run is done"):
        queue.artifacts(job_id)


def test_one_run_works_and_the_others_wait_in_order(queue: Queue) -> None:
    jobs = [queue.submit(Request(**ENDLESS, seed=seed)) for seed in range(3)]
    wait_for_stage(queue, jobs[0], "finetune")
    assert [queue.status(job).state for job in jobs] == ["running", "queued", "queued"]
    assert [queue.status(job).position for job in jobs] == [None, 1, 2]
    assert queue.cancel(jobs[1]).state == "cancelled"
    assert queue.status(jobs[2]).position == 1
    queue.cancel(jobs[0])
    wait(queue, jobs[2], "running")
    assert [status.job_id for status in queue.list()] == jobs[::-1]
    assert not (queue.folder(jobs[1]) / "environ.json").exists(), "a run cancelled while waiting must never start"


def test_submits_at_once_are_each_carried_out_once(queue: Queue) -> None:
    jobs: list[str] = []
    threads = [threading.Thread(target=lambda: jobs.append(queue.submit(Request(**QUICK)))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(jobs)) == 6
    for job in jobs:
        wait(queue, job, "done")
        starts = [
            line
            for line in (queue.folder(job) / "events.jsonl").read_text().splitlines()
            if '"baseline"' in line and "started" in line
        ]
        assert len(starts) == 1
    spans = sorted((queue.status(job).started, queue.status(job).finished) for job in jobs)
    assert all(before[1] <= after[0] for before, after in zip(spans, spans[1:], strict=False)), (
        "two runs worked at the same time"
    )


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


def test_a_refused_run_shows_its_sentence(queue: Queue) -> None:
    status = wait(queue, queue.submit(Request(model="resnet50", learning_rate=0.001)), "failed", "done")
    assert status.error == "The loss is not a number in epoch 1: choose a smaller learning_rate than <b>0.04</b>."


def test_a_refusal_before_the_first_stage_shows_its_sentence_too(queue: Queue) -> None:
    job_id = queue.submit(Request(model="resnet152"))
    assert wait(queue, job_id, "failed", "done").error == "The runtime tensorrt is not installed here: choose another."
    assert "Traceback of interest" in queue.log_tail(job_id)


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
from test_jobs import Queue, fake_command
with Queue(sys.argv[1], command=fake_command):
    print("ready", flush=True)
    time.sleep(600)
"""


def start_server(data_dir: Path) -> subprocess.Popen[str]:
    paths = [str(FAKE.parent), str(FAKE.parents[1])]
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


def test_a_child_that_was_started_but_not_recorded_is_ended_before_its_run_starts(data_dir: Path) -> None:
    client = Queue(data_dir, command=fake_command)
    job_id = client.submit(Request(**ENDLESS))
    folder = client.folder(job_id)
    stray = processes.start(
        fake_command(folder, False), folder=folder, console=folder / "console.txt", env=dict(os.environ)
    )
    wait_for_file(folder / "environ.json")
    with Queue(data_dir, command=fake_command):
        assert stray.wait(timeout=10) != 0
        wait(client, job_id, "done")  # resnet34 is done only with --resume: what the stray child left is gone on with


def test_only_one_server_carries_runs_out(data_dir: Path, queue: Queue) -> None:
    wait(queue, queue.submit(Request(**QUICK)), "done")  # by now it leads
    with Queue(data_dir, command=lambda folder, resume: ["/bin/false"]):
        for _ in range(3):
            wait(queue, queue.submit(Request(**QUICK)), "done", "failed")
    assert {status.state for status in queue.list()} == {"done"}


def test_an_id_that_was_given_out_again_is_not_mistaken_for_the_child() -> None:
    me = processes.identify(os.getpid())
    assert me is not None and processes.alive(me)
    stranger = processes.Child(me.pid, me.birth + "1")
    assert not processes.alive(stranger)
    assert processes.living(stranger) == []


def test_uploads_are_kept_with_the_run_under_a_harmless_name(queue: Queue, tmp_path: Path) -> None:
    upload = tmp_path / "..my <weights>.pth"
    upload.write_bytes(b"weights")
    job_id = queue.submit(Request(**QUICK), files={"checkpoint": upload})
    upload.unlink()
    kept = queue.folder(job_id) / "uploads/checkpoint/my__weights_.pth"
    assert kept.read_bytes() == b"weights"
    assert queue.request(job_id).checkpoint == str(kept)
    with pytest.raises(RunError, match="The file for data \\(gone.zip\\) is not there any more: upload it again"):
        queue.submit(Request(**QUICK), files={"data": tmp_path / "gone.zip"})
    with pytest.raises(RunError, match="No file can be given for 'model'"):
        queue.submit(Request(**QUICK), files={"model": kept})
    assert len(list((queue.data_dir / "runs").iterdir())) == 1, "a refused submit left files behind"


def test_a_full_queue_and_a_full_disk_are_refused(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    queue = Queue(data_dir, command=fake_command, max_queued=2)
    first = [queue.submit(Request(**QUICK)) for _ in range(2)]
    with pytest.raises(
        RunError, match="The queue is full: 2 runs are waiting and 2 are allowed. Try again when one has finished."
    ):
        queue.submit(Request(**QUICK))
    queue.cancel(first[0])
    queue.submit(Request(**QUICK))
    with pytest.raises(RunError, match="The queue is full"):
        queue.resume(first[0])
    monkeypatch.setattr("compress.jobs.MIN_FREE_BYTES", 1 << 60)
    with pytest.raises(StorageError, match="GB of disk space is left and a run needs"):
        Queue(data_dir / "other").submit(Request(**QUICK))


def test_unknown_runs_and_files_are_refused(queue: Queue) -> None:
    for job_id in ("", "../../etc", "0" * 32):
        with pytest.raises(RunError, match="There is no run with the id"):
            queue.status(job_id)
    job_id = queue.submit(Request(**QUICK))
    wait(queue, job_id, "done")
    for name in ("../../../queue.sqlite", "log.txt", "nothing"):
        with pytest.raises(RunError, match="This run has no file"):
            queue.artifact(job_id, name)


def test_a_changed_file_is_not_given_out(queue: Queue) -> None:
    job_id = queue.submit(Request(**QUICK))
    wait(queue, job_id, "done")
    name = "artifacts/quantized.onnxruntime.onnx"
    path = queue.artifact(job_id, name)
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)
    with pytest.raises(StorageError, match="was changed or removed after the run: its sha256 differs"):
        queue.artifact(job_id, name)
    (queue.folder(job_id) / "manifest.json").write_text("{")
    with pytest.raises(
        StorageError, match="The manifest of this run is damaged or was not signed by this server: its files"
    ):
        queue.artifact(job_id, name)


def test_a_manifest_cannot_lead_out_of_the_folder(queue: Queue) -> None:
    job_id = queue.submit(Request(**QUICK))
    wait(queue, job_id, "done")
    record = queue.data_dir / "secret"
    record.write_text("secret")
    manifest = queue.folder(job_id) / "manifest.json"
    listed = {"files": {"../../secret": {"sha256": sha256(record), "bytes": 6}}}
    manifest.write_text(json.dumps(listed))
    with pytest.raises(StorageError, match="was not signed by this server"):
        queue.artifact(job_id, "../../secret")
    manifest.write_text(signing.sealed("manifest.json", listed))
    with pytest.raises(StorageError, match="not given out"):
        queue.artifact(job_id, "../../secret")


def test_a_run_is_found_renamed_and_deleted_with_its_files(queue: Queue, data_dir: Path, tmp_path: Path) -> None:
    weights = tmp_path / "w.pth"
    weights.write_bytes(b"w")
    first = queue.submit(Request(**QUICK), files={"checkpoint": weights})
    second = queue.submit(Request(**QUICK, sparsity=0.3))
    for job_id in (first, second):
        wait(queue, job_id, "done")
    assert queue.uploads(first) == {"checkpoint": data_dir / "runs" / first / "uploads" / "checkpoint" / "w.pth"}
    assert queue.uploads(second) == {}
    queue.rename(first, "  the <first>\n try, 100%_ ")
    assert queue.status(first).title == "the <first> try, 100%_"
    assert [status.job_id for status in queue.list(search="FIRST done")] == [first]
    assert [status.job_id for status in queue.list(search="30 %")] == [second]
    assert [status.job_id for status in queue.list(search="%_")] == [first], "a search is no pattern"
    assert [status.job_id for status in queue.list(search=second[:9])] == [second]
    assert queue.list(search="failed") == []
    for name in ("", " \n", "x" * 121, "bell \a"):
        with pytest.raises(RequestError, match="name: got .* expected 1 to 120 characters"):
            queue.rename(first, name)
    queue.delete(first)
    for leftover in ("runs", "consoles", "deleted"):
        assert [entry.name for entry in (data_dir / leftover).iterdir() if first in entry.name] == []
    with pytest.raises(RunError, match="There is no run with the id"):
        queue.status(first)
    assert queue.status(second).state == "done" and weights.exists()


def test_only_a_run_that_is_over_can_be_deleted(queue: Queue, data_dir: Path) -> None:
    working, waiting = queue.submit(Request(**ENDLESS)), queue.submit(Request(**QUICK))
    wait(queue, working, "running")
    for job_id, state in ((working, "running"), (waiting, "queued")):
        with pytest.raises(RunError, match=f"This run is {state}: only a run that is over can be deleted"):
            queue.delete(job_id)
        assert (data_dir / "runs" / job_id / "request.json").is_file()


def test_a_folder_that_cannot_be_moved_keeps_its_run(queue: Queue, monkeypatch: pytest.MonkeyPatch) -> None:
    job_id = queue.submit(Request(**QUICK))
    wait(queue, job_id, "done")

    def refuse(self: Path, target: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(StorageError, match="Permission denied"):
        queue.delete(job_id)
    monkeypatch.undo()
    assert queue.status(job_id).state == "done" and "report.json" in queue.artifacts(job_id)


def test_what_a_killed_server_was_deleting_is_gone_after_the_next_start(data_dir: Path) -> None:
    Queue(data_dir)
    (data_dir / "deleted" / "half" / "artifacts").mkdir(parents=True)
    with Queue(data_dir, command=fake_command) as queue:
        wait(queue, queue.submit(Request(**QUICK)), "done")
    assert list((data_dir / "deleted").iterdir()) == []


def test_a_run_that_works_too_long_is_ended_and_can_be_resumed(data_dir: Path) -> None:
    with Queue(data_dir, command=fake_command, max_seconds=1.5) as queue:
        job_id = queue.submit(Request(**ENDLESS))
        failed = wait(queue, job_id, "failed")
        assert failed.error == (
            "The run was ended because it worked for more than the 0.025 minutes that this server allows. "
            "Resume it, which repeats no finished stage, or ask for fewer epochs."
        )
        assert failed.resumable
        for pid in processes._pids():
            assert not any(job_id.encode() in word for word in processes._arguments(pid)), "its process lives"
        queue.resume(job_id)
        assert wait(queue, job_id, "done").state == "done"


def test_one_visitor_cannot_fill_the_queue(data_dir: Path) -> None:
    queue = Queue(data_dir, max_per_owner=2)
    mine = [queue.submit(Request(seed=seed), owner="10.0.0.1") for seed in range(2)]
    with pytest.raises(RunError, match="You have 2 runs waiting or working and this server allows 2 for each visitor"):
        queue.submit(Request(seed=3), owner="10.0.0.1")
    queue.submit(Request(), owner="10.0.0.2")
    queue.cancel(mine[0])
    queue.submit(Request(seed=4), owner="10.0.0.1")
    with pytest.raises(RunError, match="for each visitor"):
        queue.resume(mine[0])
    for seed in range(3):
        queue.submit(Request(seed=seed))  # nobody told whose they are: the shell of the server itself


def test_a_record_of_the_version_before_is_taken_over(data_dir: Path) -> None:
    job_id = Queue(data_dir).submit(Request())
    with sqlite3.connect(data_dir / "queue.sqlite") as db:
        db.execute("ALTER TABLE runs DROP COLUMN owner")
        db.execute("PRAGMA user_version = 1")
    queue = Queue(data_dir, max_per_owner=1)
    assert queue.status(job_id).state == "queued"
    queue.submit(Request(), owner="somebody")
    with sqlite3.connect(data_dir / "queue.sqlite") as db:
        assert db.execute("PRAGMA user_version").fetchone() == (2,)


def test_a_record_of_another_version_and_an_unusable_folder_are_refused(data_dir: Path, tmp_path: Path) -> None:
    Queue(data_dir)
    with sqlite3.connect(data_dir / "queue.sqlite") as db:
        db.execute("PRAGMA user_version = 7")
    with pytest.raises(StorageError, match="was written by another version of Espalier \\(format 7"):
        Queue(data_dir)
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="could not be written"):
        Queue(tmp_path / "file")


def test_a_command_that_cannot_start_fails_the_run(data_dir: Path) -> None:
    with Queue(data_dir, command=lambda folder, resume: ["/no/such/program"]) as queue:
        status = wait(queue, queue.submit(Request(**QUICK)), "failed")
    assert (
        status.error == "The run's process could not be started (No such file or directory). "
        "Check the installation, then resume the run."
    )


def test_a_run_that_stands_still_is_ended_and_one_that_computes_is_not(data_dir: Path) -> None:
    with Queue(data_dir, command=fake_command, stall_s=1.5) as queue:
        job_id = queue.submit(Request(**ENDLESS))
        wait_for_stage(queue, job_id, "finetune")
        child = child_of(queue, job_id)
        time.sleep(2.0)
        assert queue.status(job_id).state == "running", "it reports every 0.2 s"
        os.kill(child.pid, signal.SIGSTOP)
        assert wait(queue, job_id, "failed").error == (
            "The run neither computed nor reported anything for 0.025 minutes and was ended. "
            "Resume it: finished stages are not repeated."
        )
        assert processes.living(child) == []
        queue.resume(job_id)
        wait(queue, job_id, "done")


def test_what_a_run_does_is_told_from_standing_still(monkeypatch: pytest.MonkeyPatch) -> None:
    now, ticks = [0.0], [100]
    monkeypatch.setattr(processes, "cpu_ticks", lambda child: ticks[0])
    watch, child = Watch(300.0, clock=lambda: now[0]), processes.Child(1, "x")

    def look(at: float, events: int, used: int) -> bool:
        now[0], ticks[0] = at, used
        return watch.idle("run", child, events)

    assert not look(0, 10, 100)
    assert not look(290, 10, 101)
    assert look(310, 10, 102), "a thread that looks at a clock now and then does not count"
    assert not look(320, 11, 102), "an event counts"
    assert not look(610, 11, 103)
    assert not look(625, 11, 140), "computing counts"
    assert not look(900, 11, 140)
    assert look(930, 11, 140)
    watch.forget("run")
    assert not look(2000, 11, 140), "a new attempt begins anew"


def test_a_clock_that_is_put_back_does_not_keep_a_cancelled_run_alive(
    queue: Queue, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id = queue.submit(Request(model="mobilenet_v2", learning_rate=0.001))
    wait_for_stage(queue, job_id, "finetune")
    queue._record.ask_to_cancel(job_id)  # by a server that was killed right after it
    real = time.time
    monkeypatch.setattr("compress.jobs.time.time", lambda: real() - 3600)
    wait(queue, job_id, "cancelled", seconds=5)


def test_trouble_is_told_and_passes(queue: Queue, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise StorageError("The disk is full.")

    monkeypatch.setattr(queue, "_tick", full)
    deadline = time.monotonic() + 5
    while queue.trouble is None and time.monotonic() < deadline:
        time.sleep(0.02)
    assert queue.trouble == "The disk is full."
    monkeypatch.undo()
    wait(queue, queue.submit(Request(**QUICK)), "done")
    assert queue.trouble is None


def test_half_written_events_and_long_logs_do_not_disturb(queue: Queue) -> None:
    job_id = queue.submit(Request(**ENDLESS))
    wait_for_stage(queue, job_id, "finetune")
    folder = queue.folder(job_id)
    with (folder / "events.jsonl").open("a") as file:
        file.write('{"stage": "meas')
    assert queue.status(job_id).stage == "finetune"
    with (folder / "log.txt").open("a") as file:
        file.write("é" * 40_000 + "\n" + "last line\n")
    assert len(queue.log_tail(job_id, 1000)) <= 1000
    assert "last line\n" in queue.log_tail(job_id, 1000)


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
