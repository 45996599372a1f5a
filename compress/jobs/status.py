"""The status of a run, from its row in the run database and the last event of its process."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from compress.jobs.database import JobRow
from compress.jobs.folders import last_event
from compress.request import Request
from compress.runs import STAGES


@dataclass(frozen=True)
class Status:
    """The current status of a run. Times are seconds since 1970, UTC; fractions are 0..1."""

    job_id: str
    title: str
    state: str
    """queued, running, cancelling, done, failed or cancelled."""
    position: int | None
    """Active runs and runs queued before it, while it is queued."""
    stage: str | None
    stage_index: int
    """1 for the first stage; 0 before it."""
    stage_count: int
    stage_fraction: float
    fraction: float
    """Of the whole run; every stage counts the same."""
    seconds_left: float | None
    """Estimate for the current stage; None until there is one."""
    message: str
    error: str | None
    resumable: bool
    created: float
    started: float | None
    finished: float | None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def status_of(row: JobRow, folder: Path, position: int | None) -> Status:
    """The status of the run in `folder`; `position` as in `Status`."""
    event = last_event(folder / "events.jsonl", row.events_offset, "stage") if row.attempt else {}
    index, of = int(event.get("index", 0)), int(event.get("of", len(STAGES)))
    within = float(event.get("fraction", 0.0))
    done = row.state == "done"
    return Status(
        job_id=row.job_id,
        title=row.title,
        state=row.state,
        position=position,
        stage=event.get("stage"),
        stage_index=of if done else index,
        stage_count=of,
        stage_fraction=1.0 if done else within,
        fraction=1.0 if done else max(0.0, index - 1 + within) / of,
        seconds_left=event.get("seconds_left") if row.state == "running" else None,
        message=str(event.get("message", "")),
        error=row.error,
        resumable=row.state in ("failed", "cancelled"),
        created=row.created,
        started=row.started,
        finished=row.finished,
    )


def title_of(request: Request) -> str:
    """A short title: the model, the data, and the compression."""
    data = request.data if request.data in ("none", "fashion-mnist") else Path(request.data).name
    steps = []
    if request.prunes:
        steps.append(f"{100 * request.sparsity:.0f} % pruned")
    if request.quantizes:
        steps.append(f"{request.weight_bits} bits")
    elif request.half_precision:
        steps.append("16 bits")
    return f"{request.model} on {'no data' if data == 'none' else data}, {', '.join(steps)}"
