"""A disk that gets full, and one that fails once, at every single write of a run, a submission, a file of weights."""

from __future__ import annotations

import errno
import json
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from staged_run import Staged

from compress import runs, signing
from compress.errors import CompressError, StorageError
from compress.files import PARTIAL, write_tensors
from compress.jobs import Queue
from compress.jobs.database import RUN_ID
from compress.jobs.folders import last_event
from compress.request import Request
from torture.failing_writes import Ended, Fault, carry_out
from torture.rows import Outcome, Row

FAULTS = ((errno.ENOSPC, True), (errno.EIO, False))
PART = 7
"""Continuous integration tries every PARTth write."""
WORDS = {
    errno.ENOSPC: ("The disk is full", "cannot be used now"),
    errno.EIO: ("could not be written", "cannot be used now"),
}


@dataclass(frozen=True)
class Trial:
    """Something that writes, and what must hold after it was disturbed."""

    name: str
    work: Callable[[Path], bool]
    """In the folder; whether it said that it succeeded."""
    wrong: Callable[[Path, Fault, Ended], list[str]]


def run(folder: Path, full: bool) -> Outcome:
    signing.prepare()
    counts, failures = [], []
    for trial in TRIALS:
        tried = 0
        for fault, wrong in _faults(trial, folder, 1 if full else PART):
            tried += 1
            failures += [f"{trial.name}, {fault}: {line}" for line in wrong]
        counts.append(f"{trial.name} {tried}")
    return Outcome(f"tried: {', '.join(counts)}; {len(failures)} went wrong", tuple(failures))


def _faults(trial: Trial, folder: Path, step: int) -> Iterator[tuple[Fault, list[str]]]:
    """Every fault, until there is no such write any more, and what was wrong after it."""
    for number, lasting in FAULTS:
        nth = 1
        while True:
            place, fault = folder / "place", Fault(nth, number, lasting)
            place.mkdir()
            ended = carry_out(lambda place=place: trial.work(place), place, fault)
            if ended.calls < nth:
                shutil.rmtree(place)
                break
            yield fault, trial.wrong(place, fault, ended)
            shutil.rmtree(place)
            nth += step


# ---- a run --------------------------------------------------------------------------------------------------------


def _run(place: Path) -> bool:
    why = Staged(place / "run", Request(model="resnet18"), resumed=False).carry_out()
    (place.parent / "why").write_text(why or "")  # outside of the failing disk
    return why is None


def _run_wrong(place: Path, fault: Fault, ended: Ended) -> list[str]:
    """One sentence, no manifest that does not hold, and a resumed run that succeeds."""
    folder, why = place / "run", (place.parent / "why").read_text()
    complete = (folder / runs.MANIFEST).exists()
    wrong = [] if ended.status in (0, 1) else [f"it ended with {ended.status}"]
    wrong += [] if ended.status == 0 or why.startswith(WORDS[fault.number]) or WORDS[fault.number][0] in why else [why]
    wrong += _verified(folder) if complete else []
    wrong += (
        [f"{why!r}, and yet it is complete"] if complete and ended.status and not _only_the_last_event(folder) else []
    )
    again = Staged(folder, Request(model="resnet18"), resumed=(folder / "request.json").exists()).carry_out()
    wrong += [f"resumed: {again}"] if again else []
    wrong += _verified(folder)
    return wrong + [f"{path.name} is left" for path in folder.rglob(f"{PARTIAL}*")]


def _verified(folder: Path) -> list[str]:
    try:
        return runs.verify(folder)
    except CompressError as error:
        return [str(error)]


def _only_the_last_event(folder: Path) -> bool:
    """The manifest was written, and only the event that says so was not."""
    return last_event(folder / "events.jsonl", 0, "state").get("state") != "done"


# ---- a submission -------------------------------------------------------------------------------------------------


def _submit(place: Path) -> bool:
    upload = place.parent / "weights.pth"
    upload.write_bytes(b"w" * 4096)
    try:
        job_id = Queue(place / "data").submit(Request(model="resnet18"), files={"checkpoint": upload})
    except StorageError as error:
        (place.parent / "why").write_text(str(error))
        return False
    (place.parent / "why").write_text(job_id)
    return True


def _submit_wrong(place: Path, fault: Fault, ended: Ended) -> list[str]:
    """What was said to be queued is there and whole; what was refused left nothing; the record is sound."""
    data, said = place / "data", (place.parent / "why").read_text()
    if ended.status not in (0, 1):
        return [f"it ended with {ended.status}"]
    try:
        queue = Queue(data)
        listed = [status.job_id for status in queue.list()]
    except CompressError as error:
        return [f"afterwards: {error}"]
    with sqlite3.connect(data / "queue.sqlite") as db:
        sound = db.execute("PRAGMA integrity_check").fetchone()[0]
    db.close()
    wrong = [] if sound == "ok" else [f"the record: {sound}"]
    folders = [path.name for path in (data / "runs").glob(RUN_ID)]
    if ended.status == 0:
        whole = json.loads((data / "runs" / said / "request.json").read_text())["checkpoint"]
        return wrong + (
            [] if listed == folders == [said] and Path(whole).stat().st_size == 4096 else ["it is not whole"]
        )
    wrong += [] if any(words in said for words in WORDS[fault.number]) else [said]
    return wrong + ([f"refused, and yet {listed} is listed and {folders} left"] if listed or folders else [])


# ---- a file of weights --------------------------------------------------------------------------------------------


def _weights(place: Path) -> bool:
    import torch

    try:
        write_tensors(place / "model.safetensors", {"weight": torch.zeros(40_000)})
    except StorageError as error:
        (place.parent / "why").write_text(str(error))
        return False
    return True


def _weights_wrong(place: Path, fault: Fault, ended: Ended) -> list[str]:
    left, said = [path.name for path in place.iterdir()], (place.parent / "why").read_text()
    if ended.status == 0:  # as when the folder, which is there, could not be made again
        return [] if (place / "model.safetensors").stat().st_size > 160_000 else ["it said that all was well"]
    wrong = [] if ended.status == 1 and WORDS[fault.number][0] in said else [f"it ended with {ended.status}: {said}"]
    # a folder that cannot be synced after the rename holds the whole file
    return wrong + ([f"{left} is left"] if [name for name in left if name.startswith(PARTIAL)] else [])


TRIALS = (
    Trial("a run", _run, _run_wrong),
    Trial("a submission", _submit, _submit_wrong),
    Trial("weights", _weights, _weights_wrong),
)
DISK = Row(
    "disk",
    "disk full from the Nth write on, and one I/O error at it, for every N",
    "one sentence, nothing partial listed, the record sound, resumed to the end",
    run,
)
