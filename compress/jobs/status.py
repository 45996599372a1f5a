"""What is told of a run: from its row in the record, and from what its process reported last."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from compress.jobs.database import Row
from compress.jobs.folders import last_event
from compress.request import Request
from compress.runs import STAGES


@dataclass(frozen=True)
class Status:
    """What is known of a run now. Times are seconds since 1970, UTC; fractions are 0..1."""

    job_id: str
    title: str
    state: str
    """queued, running, cancelling, done, failed or cancelled."""
    position: int | None
    """Runs that come before it while it is queued, those running included."""
    stage: str | None
    stage_index: int
    """1 for the first stage; 0 before it."""
    stage_count: int
    stage_fraction: float
    fraction: float
    """Of the whole run, every stage counted alike."""
    seconds_left: float | None
    """Of this stage; null until it can be told."""
    message: str
    error: str | None
    resumable: bool
    created: float
    started: float | None
    finished: float | None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def status_of(row: Row, folder: Path, position: int | None) -> Status:
    """What is known of the run in `folder`; see `Status` for its position."""
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
    """A short name: the model, the data, and what is done to them."""
    data = request.data if request.data in ("none", "fashion-mnist") else Path(request.data).name
    done = []
    if request.prunes:
        done.append(f"{100 * request.sparsity:.0f} % pruned")
    if request.quantizes:
        done.append(f"{request.weight_bits} bits")
    elif request.half_precision:
        done.append("16 bits")
    return f"{request.model} on {'no data' if data == 'none' else data}, {', '.join(done)}"
