"""The view of runs side by side: which runs are in it, their figures, and the chart over all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import gradio as gr
from pydantic import ValidationError

from compress.errors import CompressError, StorageError
from compress.jobs import Queue
from compress.jobs.status import Status
from compress.report import Report
from compress.report.comparison import Entry, entry_of
from compress.report.comparison_charts import accuracy_against_latency
from compress.ui import views
from compress.ui.narrow import fit_narrow
from compress.ui.views import compare
from compress.ui.views import runs as view_runs

MOST_COLUMNS = 8
"""Runs side by side; more would not be read."""


def report_of(queue: Queue, job_id: str) -> Report:
    """Raises `CompressError` when the run is not done, or its report cannot be read."""
    path = queue.artifact(job_id, "report.json")
    try:
        return Report.from_file(path)
    except ValidationError as error:
        raise StorageError(
            f"The report of this run cannot be shown: it was written by another version "
            f"({error.error_count()} fields differ)."
        ) from error


class Comparison:
    """Remembers the figures of finished runs: they do not change any more."""

    def __init__(self, queue: Queue) -> None:
        self._queue = queue
        self._entries: dict[str, Entry] = {}

    def updates(self, runs: Sequence[Status], chosen: Sequence[str], viewport: str) -> dict[str, Any]:
        """What the view shows.

        Args:
            runs: that the visitor may see, newest first; those that are not done are left out.
            chosen: ids of the runs to be set side by side.
        """
        finished = [run for run in runs if run.state == "done"]
        entries = {run.job_id: self._entry(run) for run in finished}
        alerts = [
            views.alert(f"{run.title}: {entries[run.job_id]}")
            for run in finished
            if run.job_id in chosen and isinstance(entries[run.job_id], str)
        ]
        readable = [entry for entry in entries.values() if isinstance(entry, Entry)]
        columns = [entry for entry in readable if entry.job_id in chosen]
        if len(columns) > MOST_COLUMNS:
            alerts.append(views.alert(f"{len(columns)} runs are ticked; the table shows the latest {MOST_COLUMNS}."))
        figure = self._figure(readable, viewport)
        return {
            "compare_table": "".join(alerts) + compare.side_by_side(columns[:MOST_COLUMNS]),
            "compare_chart": gr.update(visible=figure is not None),
            "plot_compare": figure if figure is not None else gr.skip(),
            "numbers_compare": compare.points(readable) if readable else "",
            "compare_runs": view_runs.run_list(finished, set(chosen), button="Show the ticked side by side"),
        }

    def chart(self, runs: Sequence[Status], viewport: str) -> dict[str, Any]:
        """The chart alone, for the page in its other colours."""
        readable = [entry for run in runs if run.state == "done" if isinstance(entry := self._entry(run), Entry)]
        figure = self._figure(readable, viewport)
        return {} if figure is None else {"plot_compare": figure}

    def _figure(self, entries: Sequence[Entry], viewport: str) -> Any:
        figure = accuracy_against_latency(entries, _links(entries), dark="dark" in viewport)
        return fit_narrow(figure) if figure is not None and "narrow" in viewport else figure

    def _entry(self, run: Status) -> Entry | str:
        """The figures of a finished run under its present name, or the sentence why there are none."""
        if run.job_id not in self._entries:
            try:
                self._entries[run.job_id] = entry_of(run.job_id, run.title, report_of(self._queue, run.job_id))
            except CompressError as error:
                return str(error)
        return replace(self._entries[run.job_id], title=run.title)


def _links(entries: Sequence[Entry]) -> Mapping[str, str]:
    return {entry.job_id: f"?job={entry.job_id}" for entry in entries}
