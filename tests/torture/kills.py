"""Kill -9 at every point of a run: victim x stage x moment; see staged_run.py for the moments.

Victims: the process of the run; the supervisor, which carries runs out; the whole web app, which does so too; and the
run together with its supervisor, as when a machine is switched off.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from app_server import AppServer
from places import PYTHONPATH, TESTS
from staged_run import MOMENTS, seed_of

from compress import processes, runs
from compress.errors import RunError
from compress.files import PARTIAL
from compress.jobs import Queue, Status
from compress.request import Request
from compress.runs import STAGES
from torture.rows import Outcome, Row

VICTIMS = ("run", "supervisor", "both", "web app")
RESTARTED_S = 60.0
"""Within which a run goes on, or is reported failed, after the restart."""
PATIENCE_S = 90.0
SUPERVISOR = """
import sys, time
sys.path[:0] = {paths!r}
from torture.kills import Queue, command
with Queue(sys.argv[1], command=command):
    print("ready", flush=True)
    time.sleep(600)
"""


@dataclass(frozen=True)
class Point:
    victim: str
    stage: str
    moment: str

    def __str__(self) -> str:
        return f"{self.victim} killed at {self.stage}, {self.moment}"


@dataclass(frozen=True)
class Found:
    wrong: list[str]
    seconds: float
    """From the restart to the run going on, or being reported failed."""


def command(folder: Path, resume: bool) -> list[str]:
    words = [sys.executable, "-P", str(TESTS / "helpers" / "staged_run.py"), str(folder), str(folder / "request.json")]
    return [*words, "--resume"] if resume else words


def points(full: bool) -> list[Point]:
    """All of them, or one for each stage and each of the three victims that start quickly, moments in turn."""
    if full:
        return [Point(victim, stage, moment) for victim in VICTIMS for stage in STAGES for moment in MOMENTS]
    return [
        Point(victim, stage, MOMENTS[(number + turn) % len(MOMENTS)])
        for turn, victim in enumerate(VICTIMS[:3])
        for number, stage in enumerate(STAGES)
    ]


def run(folder: Path, full: bool) -> Outcome:
    tried, found = points(full), []
    for victim in dict.fromkeys(point.victim for point in tried):
        data = folder / victim.replace(" ", "-")
        (data / "points").mkdir(parents=True)
        with supervised(data, victim) as server:
            found += [try_out(Queue(data, command=command), server, point) for point in tried if point.victim == victim]
    wrong = [f"{point}: {line}" for point, result in zip(tried, found, strict=True) for line in result.wrong]
    slowest = max(result.seconds for result in found)
    return Outcome(
        f"{len(tried)} points; {sum(not result.wrong for result in found)} as they must be, slowest {slowest:.1f} s after "
        "the restart",
        tuple(wrong),
    )


class Supervisor:
    """A process that carries runs out and does nothing else."""

    def __init__(self, data: Path) -> None:
        self.data = data
        self.start()

    def start(self) -> None:
        words = [sys.executable, "-c", SUPERVISOR.format(paths=PYTHONPATH.split(os.pathsep)), str(self.data)]
        self.process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None and self.process.stdout.readline() == "ready\n"

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def close(self) -> None:
        self.kill()
        assert self.process.stdout is not None
        self.process.stdout.close()


@contextmanager
def supervised(data: Path, victim: str) -> Iterator[Supervisor | AppServer]:
    """What carries runs out in `data`; none of it, nor of the runs, outlives the block."""
    server = AppServer(data, ESPALIER_FAKE="staged_run.py") if victim == "web app" else Supervisor(data)
    try:
        yield server
    finally:
        server.close()
        for pid in of_folder(data):
            os.kill(pid, signal.SIGKILL)


def try_out(queue: Queue, server: Supervisor | AppServer | None, point: Point) -> Found:
    """Kills the victim at the point, starts it again, and looks at all that must hold then.

    Args:
        server: what carries runs out; not needed where only the run is killed.
    """
    told = queue.data_dir / "points"
    before = set(processes._pids())
    job_id = queue.submit(Request(model="resnet18", seed=seed_of(point.stage, point.moment)))
    reached = told / f"{job_id}.reached"
    if not until(reached.exists):
        return Found([f"the point was not reached: {queue.status(job_id)}"], 0.0)
    child = queue._row(job_id).child
    assert child is not None
    wrong = not_listed(queue, job_id)
    if point.victim != "run":
        assert server is not None
        server.kill()
    if point.victim in ("run", "both"):
        os.kill(child.pid, signal.SIGKILL)
    wrong += not_listed(queue, job_id)
    (told / f"{job_id}.go").touch()
    restarted = time.monotonic()
    if point.victim != "run":
        assert server is not None
        server.start()
    wrong += ended_as_it_must(queue, job_id, point)
    seconds = time.monotonic() - restarted
    wrong += [f"it took {seconds:.0f} s after the restart"] if seconds > RESTARTED_S else []
    return Found(wrong + carried_out(told / f"{job_id}.done", point) + left_over(queue, job_id, child, before), seconds)


def ended_as_it_must(queue: Queue, job_id: str, point: Point) -> list[str]:
    status = settled(queue, job_id)
    if point.victim in ("run", "both"):
        interrupted = status.state == "failed" and "The run was interrupted" in str(status.error) and status.resumable
        if not interrupted:
            return [f"not reported as interrupted, but {status.state}: {status.error}"]
        queue.resume(job_id)
        status = settled(queue, job_id)
    if status.state != "done":
        return [f"not done in the end, but {status.state}: {status.error}"]
    listed, folder = queue.artifacts(job_id), queue.folder(job_id)
    wrong = [] if len(listed) == len(STAGES) + 1 else [f"{len(listed)} files are listed"]
    wrong += [f"{name} is half written and listed" for name in listed if PARTIAL in name]
    for name in listed:
        queue.artifact(job_id, name)
    return wrong + runs.verify(folder)


def carried_out(done: Path, point: Point) -> list[str]:
    """Stages before the point once, the one at the point again unless it was recorded, those behind it once."""
    times = {stage: done.read_text().split().count(stage) for stage in STAGES}
    expected = dict.fromkeys(STAGES, 1)
    if point.victim in ("run", "both") and point.moment in ("middle", "written"):
        expected[point.stage] = 2
    return [] if times == expected else [f"stages were carried out {times} times"]


def not_listed(queue: Queue, job_id: str) -> list[str]:
    """Nothing of a run may be given out before it is complete."""
    try:
        listed = queue.artifacts(job_id)
    except RunError:
        return []
    return [f"{len(listed)} files are listed while it works"]


def left_over(queue: Queue, job_id: str, child: processes.Child, before: set[int]) -> list[str]:
    """Processes and half-written files that must not be there."""
    alive = [pid for pid in of_folder(queue.folder(job_id)) if pid not in before]
    wrong = [f"processes {alive + processes.living(child)} are left"] if alive or processes.living(child) else []
    halves = [path.name for path in queue.folder(job_id).rglob(f"{PARTIAL}*")]
    return wrong + ([f"{halves} are left"] if halves else [])


def settled(queue: Queue, job_id: str) -> Status:
    until(lambda: queue.status(job_id).state in ("done", "failed", "cancelled"))
    return queue.status(job_id)


def until(holds: Callable[[], bool]) -> bool:
    """Waits for it; whether it came about."""
    deadline = time.monotonic() + PATIENCE_S
    while not holds():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def of_folder(folder: Path) -> list[int]:
    """Living processes that have the folder, or something in it, among their arguments."""
    return [
        pid
        for pid in processes._pids()
        if pid != os.getpid()
        and any(str(folder).encode() in word for word in processes._arguments(pid))
        and (fields := processes._stat(pid)) is not None
        and fields[0] not in processes.DEAD
    ]


KILLS = Row(
    "kills",
    "kill -9 of run, supervisor, both or web app at 4 moments of 8 stages",
    "0 runs lost, 0 partial artifacts listed, 0 processes left; goes on at that stage or is failed within 60 s",
    run,
)
