"""The queue of runs: order, progress, files, and what it refuses; test_scheduler.py kills and cancels."""

from __future__ import annotations

import json
import shutil
import sqlite3
import threading
from pathlib import Path

import pytest
from queues import ENDLESS, QUICK, fail_commits, fake_command, wait, wait_for_stage

from compress import signing
from compress.errors import RequestError, RunError, StorageError
from compress.files import sha256
from compress.jobs import Queue
from compress.jobs.database import RUN_ID
from compress.request import Request

pytestmark = pytest.mark.integration


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


def test_a_refused_run_shows_its_sentence(queue: Queue) -> None:
    status = wait(queue, queue.submit(Request(model="resnet50", learning_rate=0.001)), "failed", "done")
    assert status.error == "The loss is not a number in epoch 1: choose a smaller learning_rate than <b>0.04</b>."


def test_a_refusal_before_the_first_stage_shows_its_sentence_too(queue: Queue) -> None:
    job_id = queue.submit(Request(model="resnet152"))
    assert wait(queue, job_id, "failed", "done").error == "The runtime tensorrt is not installed here: choose another."
    assert "Traceback of interest" in queue.log_tail(job_id)


def test_uploads_are_kept_with_the_run_under_a_harmless_name(queue: Queue, tmp_path: Path) -> None:
    upload = tmp_path / "..my <weights>.pth"
    upload.write_bytes(b"weights")
    job_id = queue.submit(Request(**QUICK), files={"checkpoint": upload})
    upload.unlink()
    kept = queue.folder(job_id) / "uploads/checkpoint/my__weights_.pth"
    assert kept.read_bytes() == b"weights"
    assert queue.request(job_id).checkpoint == str(kept)
    with pytest.raises(RunError, match="The file for data \\(gone.zip\\) no longer exists: upload it again"):
        queue.submit(Request(**QUICK), files={"data": tmp_path / "gone.zip"})
    with pytest.raises(RunError, match="'model' accepts no file"):
        queue.submit(Request(**QUICK), files={"model": kept})
    assert len(list((queue.data_dir / "runs").glob(RUN_ID))) == 1, "a refused submit left files behind"


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
    with pytest.raises(StorageError, match="GB of disk space is free and a run needs"):
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
    with pytest.raises(StorageError, match="was changed or removed after the run \\(its sha256 differs"):
        queue.artifact(job_id, name)
    (queue.folder(job_id) / "manifest.json").write_text("{")
    with pytest.raises(
        StorageError, match="The manifest of this run is damaged or was not signed by this server, so its files"
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
    with pytest.raises(StorageError, match="cannot be downloaded"):
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
    assert [status.job_id for status in queue.list(search="30 % pruned")] == [second]
    assert [status.job_id for status in queue.list(search="%_")] == [first], "a search is no pattern"
    assert [status.job_id for status in queue.list(search=second[:9])] == [second]
    assert queue.list(search=second[1:10]) == [], "two digits are somewhere in one id of nine"
    assert queue.list(search="failed") == []
    for name in ("", " \n", "x" * 121, "bell \a"):
        with pytest.raises(RequestError, match="name: got .* expected 1 to 120 characters"):
            queue.rename(first, name)
    queue.keep(first)
    queue.delete(first)
    assert [entry for entry in data_dir.rglob("*") if first in entry.name] == []
    with pytest.raises(RunError, match="There is no run with the id"):
        queue.status(first)
    assert queue.status(second).state == "done" and weights.exists()


def test_only_a_run_that_is_over_can_be_deleted(queue: Queue, data_dir: Path) -> None:
    working, waiting = queue.submit(Request(**ENDLESS)), queue.submit(Request(**QUICK))
    wait(queue, working, "running")
    for job_id, state in ((working, "running"), (waiting, "queued")):
        with pytest.raises(RunError, match=f"This run is {state}: only a run that has ended can be deleted"):
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


def test_a_run_that_could_not_be_forgotten_stays_whole(queue: Queue, monkeypatch: pytest.MonkeyPatch) -> None:
    job_id = queue.submit(Request(**QUICK))
    wait(queue, job_id, "done")
    queue.keep(job_id)
    trash = queue._folders.trash / job_id
    fail_commits(monkeypatch, trash.exists)
    with pytest.raises(StorageError, match="cannot be used now .database or disk is full."):
        queue.delete(job_id)
    assert queue.status(job_id).state == "done" and queue.artifact(job_id, "report.json").is_file()
    assert queue.is_kept(job_id) and "report: done" in queue.log_tail(job_id)


def test_a_run_that_is_deleted_while_it_is_cancelled_is_told_to_be_gone(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue = Queue(data_dir, command=fake_command)
    job_id = queue.submit(Request(**QUICK))
    waiting = queue._row(job_id)
    queue.cancel(job_id)
    queue.delete(job_id)
    monkeypatch.setattr(queue._store, "get", lambda _: waiting)
    with pytest.raises(RunError, match="There is no run with the id .* Check the link, or choose a run from the list."):
        queue.cancel(job_id)


def test_a_run_whose_folder_was_removed_can_be_deleted(queue: Queue, data_dir: Path) -> None:
    job_id = queue.submit(Request(**QUICK))
    wait(queue, job_id, "done")
    shutil.rmtree(queue.folder(job_id))
    queue.delete(job_id)
    assert queue.list() == [] and [entry for entry in data_dir.rglob("*") if job_id in entry.name] == []


def test_one_visitor_cannot_fill_the_queue(data_dir: Path) -> None:
    queue = Queue(data_dir, max_per_owner=2)
    mine = [queue.submit(Request(seed=seed), owner="10.0.0.1") for seed in range(2)]
    with pytest.raises(RunError, match="You have 2 queued or active runs and this server allows 2 for each user"):
        queue.submit(Request(seed=3), owner="10.0.0.1")
    queue.submit(Request(), owner="10.0.0.2")
    queue.cancel(mine[0])
    queue.submit(Request(seed=4), owner="10.0.0.1")
    with pytest.raises(RunError, match="for each user"):
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
