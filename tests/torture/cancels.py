"""Cancel at every point of a run, while it listens and while it is stuck in a call that does not return."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from staged_run import MOMENTS, seed_of

from compress import processes
from compress.jobs import Queue
from compress.request import Request
from compress.runs import STAGES
from torture.kills import command, of_folder, settled, until
from torture.rows import Outcome, Row

FREE_S = 5.0
SHARE = 0.95


def run(folder: Path, full: bool) -> Outcome:
    told, times, wrong = folder / "points", [], []
    told.mkdir()
    with Queue(folder, command=command) as queue:
        for number, stage in enumerate(STAGES):
            for turn, moment in enumerate(MOMENTS):
                for stuck in (False, True):
                    if full or (turn, stuck) == (number % len(MOMENTS), number % 2 == 0):
                        seconds, lines = cancel(queue, told, stage, moment, stuck)
                        times.append(seconds)
                        wrong += [f"{stage}, {moment}{', stuck' * stuck}: {line}" for line in lines]
    times.sort()
    percentile = times[min(len(times) - 1, int(SHARE * len(times)))]
    wrong += [f"p95 is {percentile:.1f} s"] if percentile > FREE_S else []
    return Outcome(f"{len(times)} points; p95 {percentile:.1f} s, slowest {times[-1]:.1f} s", tuple(wrong))


def cancel(queue: Queue, told: Path, stage: str, moment: str, stuck: bool) -> tuple[float, list[str]]:
    """Seconds until no process of the run lived, and what was wrong: it must be cancelled, and go on when resumed."""
    job_id = queue.submit(Request(model="resnet18", seed=seed_of(stage, moment)))
    if not until((told / f"{job_id}.reached").exists):
        return 0.0, [f"the point was not reached: {queue.status(job_id)}"]
    child = queue._row(job_id).child
    assert child is not None
    if stuck:
        os.kill(child.pid, signal.SIGSTOP)  # as one that does not return to Python: SIGTERM waits
    started = time.monotonic()
    status = queue.cancel(job_id)
    seconds = time.monotonic() - started
    wrong = [] if status.state == "cancelled" else [f"it is {status.state}: {status.error}"]
    left = processes.living(child) + of_folder(queue.folder(job_id))
    wrong += [f"processes {left} are left"] if left else []
    queue.resume(job_id)
    after = settled(queue, job_id)
    return seconds, wrong + ([] if after.state == "done" else [f"resumed, it is {after.state}: {after.error}"])


CANCEL = Row(
    "cancel",
    "cancel at 4 moments of 8 stages, listening and stuck",
    "no process of it left after 5 s at p95; resumed to the end",
    run,
)
