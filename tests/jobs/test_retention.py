"""Which runs make room, which never do, and what a clock that jumps may not cause."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from queues import ENDLESS, QUICK, fake_command, wait, wait_for_stage

from compress.errors import RunError, StorageError
from compress.jobs import Queue
from compress.jobs.database import RUN_ID, JobRow
from compress.jobs.retention import (
    AFTER_JUMP_S,
    AFTER_START_S,
    DAY_S,
    KEPT_SHARE,
    SWEEP_INTERVAL_S,
    Limits,
    Sweeper,
    folder_bytes,
)
from compress.jobs.scheduler import _Kept
from compress.request import Request

pytestmark = pytest.mark.integration

NOW = 1_000 * DAY_S


class Clocks:
    def __init__(self) -> None:
        self.wall, self.steady = NOW, 50.0

    def pass_(self, seconds: float) -> None:
        self.wall += seconds
        self.steady += seconds

    def sweeper(self, **limits: float) -> Sweeper:
        return Sweeper(Limits(**limits), clock=lambda: self.wall, steady=lambda: self.steady)  # type: ignore[arg-type]


def row(job_id: str, state: str, days_ago: float) -> JobRow:
    moment = NOW - days_ago * DAY_S
    return JobRow(job_id, job_id, state, 0, 1, 0, None, None, None, moment, moment, moment, "")


ROWS = [row("running", "running", 90), row("queued", "queued", 90), row("cancelling", "cancelling", 90)] + [
    row(f"{state}-{days}", state, days)
    for state, days in (("done", 40), ("failed", 20), ("cancelled", 31), ("done", 1))
]


def test_what_is_over_and_old_expires_and_nothing_else() -> None:
    clocks = Clocks()
    sweeper = clocks.sweeper(keep_days=30)
    clocks.pass_(AFTER_START_S)
    assert set(sweeper.sweep(ROWS, lambda job: 1, lambda job: False).expired) == {"done-40", "cancelled-31"}
    assert sweeper.sweep(ROWS, lambda job: 1, lambda job: job == "done-40").expired == ("cancelled-31",)


def test_the_oldest_make_room_and_what_works_or_is_kept_never_does() -> None:
    sweeper = Clocks().sweeper(max_bytes=50)
    found = sweeper.sweep(ROWS, lambda job: 10, lambda job: job == "done-40")
    assert (found.expired, found.over_quota) == (("cancelled-31", "failed-20"), False)
    full = sweeper.sweep(ROWS, lambda job: 100, lambda job: job == "done-40")
    assert set(full.expired) == {"cancelled-31", "failed-20", "done-1"} and full.over_quota
    assert Clocks().sweeper(keep_days=1).sweep(ROWS, lambda job: 1 / 0, lambda job: True).expired == ()


@pytest.mark.parametrize("jump", [365 * DAY_S, -365 * DAY_S])
def test_a_clock_that_jumps_removes_nothing_for_a_day(jump: float) -> None:
    clocks = Clocks()
    sweeper = clocks.sweeper(keep_days=30)
    fresh = [row("fresh", "done", 0)]
    clocks.pass_(AFTER_START_S)
    clocks.wall += jump
    for _ in range(100):
        assert sweeper.sweep(fresh, lambda job: 1, lambda job: False).expired == ()
        clocks.pass_(SWEEP_INTERVAL_S)
    clocks.wall -= jump
    assert sweeper.sweep(ROWS, lambda job: 1, lambda job: False).expired == ()
    clocks.pass_(AFTER_JUMP_S)
    assert "done-40" in sweeper.sweep(ROWS, lambda job: 1, lambda job: False).expired


def test_a_wrong_clock_at_the_start_removes_nothing() -> None:
    clocks = Clocks()
    clocks.wall += 365 * DAY_S  # until it is set right
    sweeper = clocks.sweeper(keep_days=30)
    assert sweeper.sweep(ROWS, lambda job: 1, lambda job: False).expired == ()


def test_without_limits_nothing_is_looked_at() -> None:
    clocks = Clocks()
    assert not clocks.sweeper().is_due()
    limited = clocks.sweeper(keep_days=1)
    assert limited.is_due() and not limited.is_due()
    clocks.pass_(SWEEP_INTERVAL_S)
    assert limited.is_due()


def test_a_queue_over_its_room_keeps_what_is_shared_and_refuses_the_rest(data_dir: Path) -> None:
    with Queue(data_dir, command=fake_command) as queue:
        shared, old = (queue.submit(Request(**QUICK, sparsity=share)) for share in (0.3, 0.4))
        for job_id in (shared, old):
            wait(queue, job_id, "done")
        queue.keep(shared)
        working = queue.submit(Request(**ENDLESS))
        wait_for_stage(queue, working, "finetune")
    tight = Queue(data_dir, command=fake_command, keeping=Limits(max_bytes=1000))
    tight.make_room()
    assert {status.job_id: status.state for status in tight.list()} == {shared: "done", working: "running"}
    assert tight.artifact(shared, "report.json").is_file() and not (data_dir / "runs" / old).exists()
    assert list((data_dir / "runs" / ".deleted").iterdir()) == []
    with pytest.raises(StorageError, match="use all the disk space that this server reserves for runs"):
        tight.submit(Request(**QUICK))
    with pytest.raises(RunError, match="There is no run with the id"):
        tight.keep(old)
    tight.cancel(working)
    tight.keep(shared, False)
    tight.make_room()
    assert tight.list() == [] and list((data_dir / "runs").glob(RUN_ID)) == []


def test_a_run_that_is_kept_while_it_is_removed_stays(data_dir: Path) -> None:
    with Queue(data_dir, command=fake_command) as queue:
        job_id = queue.submit(Request(**QUICK))
        wait(queue, job_id, "done")
    queue.keep(job_id)
    with pytest.raises(_Kept):
        queue._store.delete(job_id, lambda: queue._scheduler._move_to_trash_unless_kept(job_id))
    assert queue.artifact(job_id, "report.json").is_file()


def test_nobody_waits_for_the_record_while_folders_are_walked(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    queue = Queue(data_dir, command=fake_command, keeping=Limits(max_bytes=1_000_000_000))
    job_id = queue.submit(Request(**QUICK))
    walks = []

    def walk(folder: Path) -> int:
        queue.rename(job_id, "somebody writes")
        walks.append(folder.name)
        return 1

    monkeypatch.setattr("compress.jobs.retention.folder_bytes", walk)
    queue.keep(job_id, share=KEPT_SHARE)
    assert walks == [job_id] and queue.is_kept(job_id)


def test_a_folder_that_goes_away_while_it_is_walked_counts_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("goes", "stays"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_bytes(b"12345")
    scandir = os.scandir

    def vanishing(path: str | Path) -> object:
        if Path(path).name == "goes":
            raise FileNotFoundError(path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", vanishing)
    assert folder_bytes(tmp_path) == 5


def test_visitors_keep_half_of_the_room_at_most_and_the_shell_any(data_dir: Path) -> None:  # noqa: F811
    with Queue(data_dir, command=fake_command) as queue:
        jobs = [queue.submit(Request(**QUICK, sparsity=share)) for share in (0.3, 0.4)]
        for job_id in jobs:
            wait(queue, job_id, "done")
    size = max(folder_bytes(data_dir / "runs" / job_id) for job_id in jobs)
    roomy = Queue(data_dir, command=fake_command, keeping=Limits(max_bytes=3 * size))
    roomy.keep(jobs[0], share=KEPT_SHARE)
    roomy.keep(jobs[0], share=KEPT_SHARE)
    with pytest.raises(
        RunError, match="kept runs would then use 0.0 GB, and this server allows 0.0 GB. Stop keeping"
    ):
        roomy.keep(jobs[1], share=KEPT_SHARE)
    assert (roomy.is_kept(jobs[0]), roomy.is_kept(jobs[1])) == (True, False)
    roomy.keep(jobs[1])
    roomy.keep(jobs[0], False, share=KEPT_SHARE)
    assert (roomy.is_kept(jobs[0]), roomy.is_kept(jobs[1])) == (False, True)
    Queue(data_dir, command=fake_command).keep(jobs[0], share=KEPT_SHARE)
    with pytest.raises(RunError, match="There is no run with the id"):
        roomy.is_kept("0" * 32)
