"""What the page's controls do: form values to a `Request`, the state of a run to what is shown of it.

A handler returns updates by component name; what it does not name stays as it is. None of them takes longer than a
look at the disk: runs are carried out by the queue.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import gradio as gr
from plotly.graph_objects import Figure
from pydantic import ValidationError

from compress import charts
from compress.errors import CompressError, RequestError, RunError, StorageError
from compress.jobs import Queue, Status
from compress.jobs_record import FINAL
from compress.report import Report
from compress.request import Request
from compress.tables import tables
from compress.ui import views
from compress.ui.form import UPLOAD, to_request
from compress.ui.phone import narrowed
from compress.ui.settings import Settings
from compress.ui.shell import Offer

Updates = dict[str, Any]
Check = Callable[[Request], dict[str, Any]]
CHARTS = {
    "size": ("Size", "How much of the model is left."),
    "latency": ("Speed", "Time for one image, as it was measured again and again; further left is faster."),
    "accuracy": (
        "Accuracy, step by step",
        "What every step cost, each answered by the file and runtime named below it.",
    ),
    "sqnr": (
        "Noise that each layer adds",
        "Signal to noise of each layer's weights, and of its output given the inputs that it has there: fake-quantized "
        "against float, and each file against fake-quantized, where equal is 144.5 dB. Lower is noisier.",
    ),
    "mixed": ("Mixed precision", "What widening the most sensitive layers gives back, before any training."),
    "channels": ("Channels of each layer", "What was cut, and what stays because other layers depend on it."),
    "training": ("Training", "How the smaller model recovered."),
}
"""Title and sentence of each chart of `compress.charts`."""
MAX_LISTED = 30


class App:
    """The handlers, around one queue."""

    def __init__(self, queue: Queue, check: Check, settings: Settings, models: Sequence[Offer]) -> None:
        self.queue, self.check, self.settings = queue, check, settings
        self.models = tuple(models)

    # ---- the start view -----------------------------------------------------------------------------------------

    def open(self, context: str) -> Updates:
        """The page was opened. `context` is the browser's JSON: job (of the address), mine (runs begun there), look."""
        seen = _context(context)
        updates: Updates = {"look": seen["look"], "runs": self._run_list(seen["mine"])}
        if not seen["job"]:
            return updates | {"start": gr.update(visible=True), "run": gr.update(visible=False)}
        try:
            self.queue.status(seen["job"])
        except CompressError as error:
            return updates | {"start": gr.update(visible=True), "notice": views.alert(str(error))}
        return updates | self._opened(seen["job"], seen["look"])

    def banner(self) -> Updates:
        """Why nothing can be carried out, above everything else; nothing when all is well."""
        return {"banner": views.alert(self.queue.trouble or "")}

    def submit(self, values: Mapping[str, Any], look: str) -> Updates:
        try:
            request, files = to_request(values)
            job_id = self.queue.submit(request, files={field: self.uploaded(path) for field, path in files.items()})
        except CompressError as error:
            return {"notice": views.alert(str(error))}
        return {"notice": ""} | self._opened(job_id, look)

    def preflight(self, values: Mapping[str, Any]) -> Updates:
        """The plan of a run, without starting it."""
        try:
            request, files = to_request(values)
            request = request.model_copy(update={field: str(self.uploaded(path)) for field, path in files.items()})
            return {"checked": views.checked(self.check(request)), "notice": ""}
        except CompressError as error:
            return {"checked": "", "notice": views.alert(str(error))}

    def meaning(self, values: Mapping[str, Any]) -> Updates:
        """What the settings at hand mean; a contradiction is shown at once, in place of it."""
        named = dict(values) | {"weights": "auto", "images": "none", "class_map": None}
        try:
            request, _ = to_request(named)
        except RequestError as error:
            return {"meaning": views.alert(str(error))}
        parameters = next((offer.parameters for offer in self.models if offer.name == values["model"]), None)
        return {"meaning": views.meaning(request, parameters)}

    @staticmethod
    def sources(weights: str, images: str, model: str, arithmetic: str) -> Updates:
        """Shows the upload fields that belong to the choices, and a hint where the choices do not fit."""
        hint = ""
        if images == "fashion-mnist" and weights != UPLOAD and (model != "resnet18" or weights == "random"):
            hint = (
                "These images go with the bundled resnet18. Another model needs a checkpoint that was trained on them."
            )
        elif images == "none":
            hint = "Without images nothing is trained: the report tells how far the answers move, and no accuracy."
        return {
            "checkpoint_file": gr.update(visible=weights == UPLOAD),
            "data_file": gr.update(visible=images == UPLOAD),
            "bits": gr.update(visible=arithmetic == "integers"),
            "hint": f"<p>{hint}</p>" if hint else "",
        }

    def uploaded(self, path: str | Path) -> Path:
        """The path of an upload. Raises `RequestError` for any other path: visitors do not name the server's files."""
        resolved = Path(path).resolve()
        if not resolved.is_relative_to(self.settings.uploads) or not resolved.is_file():
            raise RequestError("file", Path(path).name, "a file that was uploaded here: upload it again")
        return resolved

    def _run_list(self, mine: Sequence[str]) -> str:
        try:
            if self.settings.lists_all_runs:
                return views.run_list(self.queue.list(MAX_LISTED))
            return views.run_list(
                [status for job_id in mine[:MAX_LISTED] if (status := self._find(job_id)) is not None]
            )
        except StorageError as error:
            return views.alert(str(error))

    def _find(self, job_id: str) -> Status | None:
        try:
            return self.queue.status(job_id)
        except RunError:
            return None

    # ---- the run view -------------------------------------------------------------------------------------------

    def _opened(self, job_id: str, look: str) -> Updates:
        shown = {
            "start": gr.update(visible=False),
            "run": gr.update(visible=True),
            "timer": gr.Timer(active=True),
            "job": job_id,
        }
        return shown | {"settings": views.settings_of(self.queue.request(job_id))} | self.look(job_id, "", look)

    def look(self, job_id: str, seen: str, look: str) -> Updates:
        """What changed in a run since the look that returned `seen`."""
        if not job_id:
            return {}
        try:
            status = self.queue.status(job_id)
            shown = {
                "head": views.run_head(status),
                "live": views.progress(status) + views.ending(status),
                "log": views.log_text(self.queue.log_tail(job_id)),
            }
        except CompressError as error:
            return {"live": views.alert(str(error))}
        sign = hashlib.sha256(json.dumps(shown).encode()).hexdigest()[:16]
        if sign == seen:
            return {}
        over = status.state in FINAL
        updates = shown | {
            "seen": sign,
            "timer": gr.Timer(active=not over),
            "cancel": gr.update(visible=not over, interactive=status.state != "cancelling"),
            "resume": gr.update(visible=status.resumable),
            "log_box": gr.update(open=status.state != "done"),
            "results": gr.update(visible=status.state == "done"),
        }
        return updates | (self._results(job_id, look) if status.state == "done" else {})

    def cancel(self, job_id: str, look: str) -> Updates:
        return self._act(self.queue.cancel, job_id, look)

    def resume(self, job_id: str, look: str) -> Updates:
        return self._act(self.queue.resume, job_id, look)

    def _act(self, action: Callable[[str], Status], job_id: str, look: str) -> Updates:
        try:
            action(job_id)
        except CompressError as error:
            return self.look(job_id, "", look) | {"run_notice": views.alert(str(error))}
        return self.look(job_id, "", look) | {"run_notice": ""}

    def restyle(self, job_id: str, look: str) -> Updates:
        """The charts again, for the page in its other colours."""
        status = self._find(job_id)
        if status is None or status.state != "done":
            return {}
        try:
            figures = _figures(self._report(job_id), look)
        except CompressError:
            return {}  # the results already show the sentence
        return {f"plot_{key}": figures[key] for key in CHARTS if key in figures}

    def _results(self, job_id: str, look: str) -> Updates:
        try:
            report = self._report(job_id)
            files = self.queue.artifacts(job_id)
        except CompressError as error:
            return {"verdict": views.alert(str(error))}
        figures, numbers = _figures(report, look), tables(report)
        updates: Updates = {
            "verdict": views.verdict(report) + views.findings(report),
            "summary": views.table(*numbers["summary"], name="Original and compressed model compared")
            + views.machine(report),
            "files": views.downloads(job_id, files),
        }
        for key, (title, _) in CHARTS.items():
            updates[f"chart_{key}"] = gr.update(visible=key in figures)
            if key in figures:
                updates[f"plot_{key}"] = figures[key]
                updates[f"numbers_{key}"] = views.numbers(*numbers[key], name=title)
        return updates

    def _report(self, job_id: str) -> Report:
        path = self.queue.artifact(job_id, "report.json")
        try:
            return Report.from_file(path)
        except ValidationError as error:
            raise StorageError(
                f"The report of this run cannot be shown: it was written by another version "
                f"({error.error_count()} fields differ)."
            ) from error


def _figures(report: Report, look: str) -> dict[str, Figure]:
    """The charts for a page that looks like `look`: words of `dark` and `narrow`."""
    figures = charts.figures(report, dark="dark" in look)
    return {key: narrowed(figure) if "narrow" in look else figure for key, figure in figures.items()}


def _context(text: str) -> dict[str, Any]:
    """What the browser told, with only what has the right form."""
    try:
        given = json.loads(text or "{}")
    except ValueError:
        given = {}
    given = given if isinstance(given, dict) else {}
    mine = given.get("mine")
    return {
        "job": str(given.get("job") or ""),
        "look": str(given.get("look") or ""),
        "mine": [job for job in mine if isinstance(job, str)] if isinstance(mine, list) else [],
    }
