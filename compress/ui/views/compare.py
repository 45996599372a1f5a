"""HTML of runs side by side."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from compress.report import comparison
from compress.report.comparison import Entry
from compress.ui import views

NOTHING = "Tick two or more finished runs below to see them side by side."


def side_by_side(entries: Sequence[Entry]) -> str:
    """The table of `compress.report.comparison`, its columns linked to their runs and the best figure of a row marked."""
    if not entries:
        return f'<p class="soft">{NOTHING}</p>'
    _, rows = comparison.table(entries)
    heads = [f'<a href="?job={entry.job_id}">{escape(entry.title)}</a>' for entry in entries]
    body = []
    for name, *cells in rows:
        best = comparison.best_in(name, entries)
        body.append(
            f'<th scope="row">{escape(name)}</th>'
            + "".join(_cell(cell, entry.job_id in best) for cell, entry in zip(cells, entries, strict=True))
        )
    notes = "".join(f"<p>{escape(note)}</p>" for note in _cautions(entries))
    table = views.html_table(("Figure", *heads), body, "Runs side by side", kind="side-by-side", escaped=True)
    return f'{table}<div class="soft">{notes}</div>'


def points(entries: Sequence[Entry]) -> str:
    """The numbers of the chart, each point with its number and the link to its run."""
    front = comparison.front(entries)
    rows = []
    for number, entry in enumerate(entries, start=1):
        link = f'<a href="?job={entry.job_id}">{escape(entry.title)}</a>'
        figures = (
            comparison.accuracy_words(entry),
            comparison.latency_words(entry),
            entry.through or "not measured here",
        )
        on_front = "yes" if entry in front else "no"
        cells = "".join(f"<td>{escape(text)}</td>" for text in (*figures, entry.images, entry.machine, on_front))
        rows.append(f'<th scope="row">{number}</th><td>{link}</td>{cells}')
    headers = ("Point", "Run", "Accuracy", "Batch 1, p50", "Through", "Tested on", "Machine", "Unbeaten")
    return views.folded(
        "The numbers of this chart", views.html_table(headers, rows, "Accuracy and latency of all runs")
    )


def _cell(text: str, best: bool) -> str:
    if best:
        return f'<td class="best"><b>{escape(text)}</b><span class="unseen"> (best)</span></td>'
    return f"<td>{escape(text)}</td>"


def _cautions(entries: Sequence[Entry]) -> list[str]:
    """What cannot be compared between these runs, and why."""
    notes = []
    if len({entry.images for entry in entries}) > 1:
        notes.append("These runs were tested on different images, so their accuracies cannot be compared.")
    if len({entry.machine for entry in entries}) > 1:
        notes.append("These runs were measured on different machines, so their times cannot be compared.")
    return notes
