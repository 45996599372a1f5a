"""Finished runs side by side: their figures and settings as one table, and which of them none other beats."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from compress.report import Report
from compress.report.tables import Table, fastest, smallest_file

NOT_KNOWN = "—"


@dataclass(frozen=True)
class Entry:
    """What is compared of one finished run; None where it was not measured."""

    job_id: str
    title: str
    architecture: str
    images: str
    """The test images: runs on other images cannot be compared by accuracy."""
    machine: str
    """What times depend on: runs on other machines cannot be compared by latency."""
    labelled: bool
    """False where accuracy is agreement with the run's own original."""
    accuracy: float | None
    """Fraction 0..1 of the deployed file."""
    accuracy_ci95: tuple[float, float] | None
    accuracy_lost: float | None
    """Points against the original."""
    p50_ms: float | None
    """One image through `through`."""
    through: str | None
    """Runtime and precision."""
    speedup: float | None
    """Over the fastest real fp32 of the original in the same run."""
    file_bytes: int | None
    size_ratio: float | None
    parameters: int
    macs: int
    request: dict[str, Any]

    @property
    def kind(self) -> tuple[str, str]:
        """Entries of one kind can be compared by accuracy and latency."""
        return self.images, self.machine


def entry_of(job_id: str, title: str, report: Report) -> Entry:
    last = report.variants[-1]
    measured = report.verdict.runtime and fastest(report, last.name, runtime=report.verdict.runtime)
    here, data = report.environment, report.data
    answer = "" if data.labelled else ", agreement with the original"
    return Entry(
        job_id=job_id,
        title=title,
        architecture=report.architecture,
        images=f"{last.n_test:,} images of {data.source} at {data.input_size} × {data.input_size}{answer}",
        machine=f"{here.gpu or here.cpu}, {here.threads} thread{'s' if here.threads != 1 else ''}",
        labelled=data.labelled,
        accuracy=last.accuracy,
        accuracy_ci95=last.accuracy_ci95,
        accuracy_lost=report.verdict.accuracy_drop_points,
        p50_ms=measured.p50_ms if measured else None,
        through=f"{measured.runtime}, {measured.precision}" if measured else None,
        speedup=report.verdict.speedup_vs_fastest_fp32,
        file_bytes=smallest_file(last),
        size_ratio=report.verdict.size_ratio,
        parameters=last.parameters,
        macs=last.macs,
        request=report.request,
    )


def front(entries: Sequence[Entry]) -> tuple[Entry, ...]:
    """The Pareto front of each kind: entries with no other of their kind that is at least as accurate and as fast, and
    better in one of the two. Ordered by latency; entries without either figure are left out.
    """
    measured = [entry for entry in entries if entry.accuracy is not None and entry.p50_ms is not None]
    best = [entry for entry in measured if not any(_beats(other, entry) for other in measured)]
    return tuple(sorted(best, key=lambda entry: (entry.kind, entry.p50_ms)))


def _beats(other: Entry, entry: Entry) -> bool:
    if other.kind != entry.kind:
        return False
    gains = (other.accuracy or 0) - (entry.accuracy or 0), (entry.p50_ms or 0) - (other.p50_ms or 0)
    return min(gains) >= 0 and max(gains) > 0


def table(entries: Sequence[Entry]) -> Table:
    """One column for each run, headed by its title; below the figures the settings that are not the same in all."""
    rows = [(name, *(show(entry) for entry in entries)) for name, show in _FIGURES.items()]
    fields = {name for entry in entries for name in entry.request}
    for field in sorted(fields):
        values = [_setting(entry.request.get(field)) for entry in entries]
        if len(set(values)) > 1:
            rows.append((field.replace("_", " ").capitalize(), *values))
    return ("Figure", *(entry.title for entry in entries)), rows


def best_in(name: str, entries: Sequence[Entry]) -> set[str]:
    """Ids of the runs with the best figure of a row, where the row has a better and a worse and all can be compared."""
    if name not in _BETTER or len(entries) < 2 or len({_scope(name, entry) for entry in entries}) > 1:
        return set()
    value, sign = _BETTER[name]
    found = {entry.job_id: getattr(entry, value) for entry in entries if getattr(entry, value) is not None}
    if len(set(found.values())) < 2:
        return set()
    top = max(sign * figure for figure in found.values())
    return {job_id for job_id, figure in found.items() if sign * figure == top}


def _scope(name: str, entry: Entry) -> str:
    return entry.images if name == "Accuracy" else entry.machine if name == "Batch 1, p50" else ""


def accuracy_words(entry: Entry) -> str:
    if entry.accuracy is None:
        return NOT_KNOWN
    text = f"{100 * entry.accuracy:.1f} %"
    if entry.accuracy_ci95:
        text += f" ({100 * entry.accuracy_ci95[0]:.1f} to {100 * entry.accuracy_ci95[1]:.1f})"
    return text


def latency_words(entry: Entry) -> str:
    return _number(entry.p50_ms, "{:.2f} ms")


def _number(value: float | None, form: str, scale: float = 1.0) -> str:
    return NOT_KNOWN if value is None else form.format(value / scale)


def _setting(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key}={item}" for key, item in value.items()) or NOT_KNOWN
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or NOT_KNOWN
    if isinstance(value, str) and "/" in value:
        return value.rpartition("/")[2]  # an upload is known by its name
    return NOT_KNOWN if value is None else str(value)


_FIGURES: dict[str, Callable[[Entry], str]] = {
    "Accuracy": accuracy_words,
    "Points lost": lambda entry: _number(entry.accuracy_lost, "{:.1f}"),
    "Batch 1, p50": latency_words,
    "Through": lambda entry: entry.through or "not measured here",
    "Faster": lambda entry: _number(entry.speedup, "{:.1f}×"),
    "File": lambda entry: _number(entry.file_bytes, "{:.2f} MB", 1e6),
    "Smaller": lambda entry: _number(entry.size_ratio, "{:.1f}×"),
    "Parameters": lambda entry: _number(entry.parameters, "{:.2f} M", 1e6),
    "MACs": lambda entry: _number(entry.macs, "{:.1f} M", 1e6),
    "Architecture": lambda entry: entry.architecture,
    "Tested on": lambda entry: entry.images,
    "Machine": lambda entry: entry.machine,
}
_BETTER = {
    "Accuracy": ("accuracy", 1),
    "Points lost": ("accuracy_lost", -1),
    "Batch 1, p50": ("p50_ms", -1),
    "Faster": ("speedup", 1),
    "File": ("file_bytes", -1),
    "Smaller": ("size_ratio", 1),
    "Parameters": ("parameters", -1),
    "MACs": ("macs", -1),
}
"""Row -> (attribute, 1 where more is better and -1 where less is)."""
