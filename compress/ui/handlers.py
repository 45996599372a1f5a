"""The handlers of the page's events: form values to a `Request`, the status of a run to what the page shows.

A handler returns updates by component name; other components stay unchanged. The queue executes runs, so most handlers only
read files; those that check a request or classify an image wait seconds for a child process.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import gradio as gr
from plotly.graph_objects import Figure

from compress.errors import CompressError, RequestError, RunError, StorageError
from compress.jobs import Queue, retention
from compress.jobs.database import FINAL
from compress.jobs.status import Status
from compress.report import Report, charts
from compress.report.tables import tables
from compress.request import Request
from compress.ui import views
from compress.ui.backend import Offer
from compress.ui.comparison import Comparison, report_of
from compress.ui.errors import public, without_folders
from compress.ui.estimates import Count, Estimates, Structure
from compress.ui.form import HUB, UPLOAD, from_request, to_request
from compress.ui.narrow import fit_narrow
from compress.ui.texts import ENGLISH, all_texts, text
from compress.ui.views import results, start
from compress.ui.views import runs as view_runs
from compress.ui.web.fair_queue import FairQueue
from compress.ui.web.permissions import Permissions, run_key
from compress.ui.web.settings import Settings
from compress.ui.web.uploads import Uploads
from compress.ui.web.visitors import PageState, Visitor

Updates = dict[str, Any]
Check = Callable[[Request], dict[str, Any]]
Classify = Callable[[Path, Path], dict[str, Any]]
"""(run folder, image) -> the result of `compress.classify.classify`."""
CHARTS = ("size", "latency", "accuracy", "sqnr", "mixed", "channels", "training")
"""Keys of `compress.report.charts`, in the order of the page."""
MAX_LISTED = 30
UPLOAD_AGE_S = 24 * 3600.0
MAX_COMPARED = 200
VIEWS = ("start", "run", "compare")


class App:
    """The handlers of one queue."""

    def __init__(
        self,
        queue: Queue,
        check: Check,
        settings: Settings,
        models: Sequence[Offer],
        classify: Classify,
        count: Count,
    ) -> None:
        self.queue, self.check, self.settings, self.classify = queue, check, settings, classify
        self.models = tuple(models)
        self.comparison, self.permissions = Comparison(queue), Permissions(queue, settings)
        largest = settings.max_upload_mb * 2**20
        self.uploads = Uploads(
            settings.uploads, most_bytes=2 * largest, most_bytes_in_all=16 * largest, age_s=UPLOAD_AGE_S
        )
        self.check_queue, self.count_queue = FairQueue(), FairQueue()
        self.estimates = Estimates(settings.data_dir / "estimates", count)

    # ---- the start view -----------------------------------------------------------------------------------------

    def open(self, visitor: Visitor, context: str) -> Updates:
        """Shows the view that the page's address names."""
        state = PageState.read(context)
        updates: Updates = {"viewport": state.viewport, "runs": self._run_list(state)}
        try:
            if state.job:
                return updates | self._run_view(visitor, state.job, state.key, state.viewport)
            if state.compare is not None:
                return updates | self._comparison_view(state)
            if state.again:
                updates |= self._prefilled(state.again)
        except CompressError as error:
            updates |= {"notice": views.alert(str(error))}
        return updates | _only("start")

    def banner(self) -> Updates:
        """Why no run can be executed, at the top of the page; empty when the scheduler works."""
        return {"banner": views.alert(self.queue.trouble or "")}

    def submit(self, visitor: Visitor, values: Mapping[str, Any], again: str, viewport: str) -> Updates:
        try:
            request, files = self._request_from_form(visitor, values, again)
            job_id = self.queue.submit(request, files=files, owner=visitor.id)
            return {"notice": ""} | self._run_view(visitor, job_id, run_key(job_id), viewport)
        except CompressError as error:
            return {"notice": views.alert(str(error))}

    def _request_from_form(
        self, visitor: Visitor, values: Mapping[str, Any], again: str
    ) -> tuple[Request, dict[str, Path]]:
        """The form's request and its files, which are uploads or files of the run `again`."""
        kept = self.queue.uploads(again) if again else {}
        request, files = to_request(values, kept)
        return request, {
            field: path if path == kept.get(field) else self.uploads.find(str(path), visitor.id)
            for field, path in files.items()
        }

    def _prefilled(self, again: str) -> Updates:
        """The form filled with the settings of a run."""
        request, uploads = self.queue.request(again), self.queue.uploads(again)
        values: Updates = from_request(request)
        slider = gr.update(value=values["sparsity"], step=1 if float(values["sparsity"]).is_integer() else 0.0001)
        note = view_runs.filled_from(self.queue.status(again), uploads)
        return values | {"sparsity": slider, "again": again, "again_note": note}

    def preflight(self, visitor: Visitor, values: Mapping[str, Any], again: str) -> Updates:
        """Shows the plan of a run without starting it."""
        try:
            request, files = self._request_from_form(visitor, values, again)
            request = request.model_copy(update={field: str(path) for field, path in files.items()})
            return {"checked": start.check_result(self.check(request)), "notice": ""}
        except CompressError as error:
            return {"checked": "", "notice": views.alert(str(error))}

    def explain(self, values: Mapping[str, Any]) -> Updates:
        """Explains what the current settings will do, or shows why they contradict each other."""
        try:
            request, offer = self._tentative_request(values)
        except RequestError as error:
            return {"meaning": views.alert(str(error))}
        if offer is None:
            return {"meaning": start.explain(request, None)}
        estimate = self.estimates.estimate(request, Structure.of(request, offer.input_size))
        return {"meaning": start.explain(request, offer.parameters, estimate)}

    def explain_counted(self, values: Mapping[str, Any]) -> Updates:
        """Counts the model's layers if that is still to be done, then explains the settings with the counts."""
        try:
            request, offer = self._tentative_request(values)
            if offer is None or self.estimates.known(structure := Structure.of(request, offer.input_size)):
                return {}
            self.estimates.count(structure)
        except CompressError:
            return {}  # the rough estimate stays, labelled as one
        return self.explain(values)

    def _tentative_request(self, values: Mapping[str, Any]) -> tuple[Request, Offer | None]:
        """The request of a form whose files may still be missing. Raises `RequestError`."""
        placeholders = {"checkpoint_file": "x.pth", "data_file": "x.zip", "class_map": None, "hub": "owner/name"}
        request, _ = to_request(dict(values) | placeholders)
        return request, next((offer for offer in self.models if offer.name == request.model), None)

    @staticmethod
    def source_fields(weights: str, images: str, model: str, arithmetic: str) -> Updates:
        """Shows the upload fields of the selected sources, and a hint if the sources do not match."""
        hint = ""
        if images == "fashion-mnist" and weights not in (UPLOAD, HUB) and (model != "resnet18" or weights == "random"):
            hint = "These images match the bundled resnet18. Another model needs a checkpoint that was trained on them."
        elif images == "none":
            hint = "Without images nothing is trained, and the report shows how much the outputs change instead of accuracy."
        return {
            "checkpoint_file": gr.update(visible=weights == UPLOAD),
            "hub": gr.update(visible=weights == HUB),
            "data_file": gr.update(visible=images == UPLOAD),
            "bits": gr.update(visible=arithmetic == "integers"),
            "hint": f"<p>{hint}</p>" if hint else "",
        }

    def search(self, text: str, context: str) -> Updates:
        """Lists the runs that contain every word of `text`, and the ticked ones."""
        return {"runs": self._run_list(PageState.read(context), text)}

    def _run_list(self, state: PageState, text: str = "") -> str:
        try:
            matches = self._visible(state, MAX_LISTED, text)
            kept = [run for job_id in state.ticked if (run := self._find(job_id)) is not None]
        except StorageError as error:
            return views.alert(str(error))
        runs = list({run.job_id: run for run in (*kept, *matches)}.values())
        return view_runs.run_list(runs, state.ticked, searched=bool(text.strip()))

    def _visible(self, state: PageState, limit: int, text: str = "") -> list[Status]:
        """The runs that this visitor may see, newest first: all, or those started in this browser."""
        if self.settings.lists_all_runs:
            return self.queue.list(limit, text)
        runs = [run for job_id in state.mine[:limit] if (run := self._find(job_id)) is not None]
        words = text.lower().split()
        return [run for run in runs if all(word in f"{run.title} {run.state} {run.job_id}".lower() for word in words)]

    def _find(self, job_id: str) -> Status | None:
        try:
            return self.queue.status(job_id)
        except RunError:
            return None

    # ---- the run view -------------------------------------------------------------------------------------------

    def _run_view(self, visitor: Visitor, job_id: str, key: str, viewport: str) -> Updates:
        status, uploads = self.queue.status(job_id), self.queue.uploads(job_id)
        request = view_runs.without_paths(self.queue.request(job_id), uploads)
        shown = {
            "timer": gr.Timer(active=True),
            "job": job_id,
            "key": key,
            "keeping": view_runs.keeping(self.queue.keeping),
            "title": status.title,
            "settings": view_runs.settings_of(request) + view_runs.copy_as(request, visitor.address, uploads),
        }
        return _only("run") | shown | self.refresh(visitor, job_id, key, "", viewport)

    def refresh(self, visitor: Visitor, job_id: str, key: str, fingerprint: str, viewport: str) -> Updates:
        """What changed in a run since the refresh that returned `fingerprint`."""
        if not job_id:
            return {}
        try:
            status, kept = public(self.queue.status(job_id)), self.queue.is_kept(job_id)
            mine = self.permissions.may_change(job_id, key, visitor.login)
            shown = {
                "head": views.run_head(status, kept=kept, mine=mine),
                "live": views.progress(status) + views.ending(status),
                "log": views.log_text(without_folders(self.queue.log_tail(job_id, console=False))),
                "links": view_runs.links(job_id, finished=status.state == "done"),
            }
        except CompressError as error:
            return {"live": views.alert(str(error))}
        digest = hashlib.sha256(json.dumps(shown).encode()).hexdigest()[:16]
        if digest == fingerprint:
            return {}
        ended = status.state in FINAL
        updates = shown | {
            "fingerprint": digest,
            "timer": gr.Timer(active=not ended),
            "cancel": gr.update(visible=mine and not ended, interactive=status.state != "cancelling"),
            "resume": gr.update(visible=mine and status.resumable),
            "manage": gr.update(visible=mine),
            "keep": gr.update(
                visible=self.queue.keeping != retention.Limits(),
                value=text("release_button" if kept else "keep_button"),
            ),
            "log_box": gr.update(open=status.state != "done"),
            "results": gr.update(visible=status.state == "done"),
            "delete": gr.update(interactive=ended),
        }
        return updates | (self._results(job_id, viewport) if status.state == "done" else {})

    def cancel(self, visitor: Visitor, job_id: str, key: str, viewport: str) -> Updates:
        return self._act(self.queue.cancel, visitor, job_id, key, viewport)

    def resume(self, visitor: Visitor, job_id: str, key: str, viewport: str) -> Updates:
        return self._act(self.queue.resume, visitor, job_id, key, viewport)

    def rename(self, visitor: Visitor, job_id: str, key: str, viewport: str, title: str) -> Updates:
        return self._act(lambda job: self.queue.rename(job, title), visitor, job_id, key, viewport)

    def keep(self, visitor: Visitor, job_id: str, key: str, viewport: str) -> Updates:
        """Exempts a run from retention, or ends the exemption."""

        def change(job: str) -> None:
            self.queue.keep(job, not self.queue.is_kept(job), share=retention.KEPT_SHARE)

        return self._act(change, visitor, job_id, key, viewport)

    def _act(self, action: Callable[[str], object], visitor: Visitor, job_id: str, key: str, viewport: str) -> Updates:
        notice = ""
        try:
            self.permissions.refuse(job_id, key, visitor.login)
            action(job_id)
        except CompressError as error:
            notice = views.alert(str(error))
        return self.refresh(visitor, job_id, key, "", viewport) | {"run_notice": notice}

    def delete(self, visitor: Visitor, job_id: str, key: str) -> Updates:
        """Deletes a run; the page returns to the start view when its job is empty. Does nothing without an id."""
        if not job_id:
            return {}
        try:
            self.permissions.refuse(job_id, key, visitor.login)
            self.queue.delete(job_id)
        except CompressError as error:
            return {"run_notice": views.alert(str(error))}
        return {"job": "", "timer": gr.Timer(active=False)}

    def try_image(self, visitor: Visitor, job_id: str, image: str | None) -> Updates:
        """Classifies an uploaded image with the original and the compressed model."""
        try:
            if not image:
                raise CompressError("No image was selected: upload one first.")
            if any(run.stage == "measure" for run in self.queue.working()):
                raise RunError("A benchmark is running now, which this would disturb: try again in a minute.")
            self.queue.artifacts(job_id)  # raises for a run that is not done
            result = self.classify(self.queue.folder(job_id), self.uploads.find(image, visitor.id))
            return {"tried": results.classification(result)}
        except CompressError as error:
            return {"tried": views.alert(str(error))}

    def restyle(self, job_id: str, viewport: str, context: str) -> Updates:
        """Redraws the charts for the new colours of the page."""
        state = PageState.read(context)
        if not job_id and state.compare is not None:
            return self.comparison.chart(self._comparable(state), viewport)
        status = self._find(job_id)
        if status is None or status.state != "done":
            return {}
        try:
            figures = _figures(report_of(self.queue, job_id), viewport)
        except CompressError:
            return {}  # the results view already shows the error
        return {f"plot_{key}": figures[key] for key in CHARTS if key in figures}

    def _results(self, job_id: str, viewport: str) -> Updates:
        try:
            report = report_of(self.queue, job_id)
            files = self.queue.artifacts(job_id)
        except CompressError as error:
            return {"verdict": views.alert(str(error))}
        figures, numbers = _figures(report, viewport), tables(report)
        updates: Updates = {
            "verdict": results.verdict(report) + results.findings(report),
            "summary": views.table(*numbers["summary"], name="Original and compressed model compared")
            + results.machine(report),
            "files": results.downloads(job_id, files) + results.usage(job_id, report, files),
        }
        for key in CHARTS:
            updates[f"chart_{key}"] = gr.update(visible=key in figures)
            if key in figures:
                updates[f"plot_{key}"] = figures[key]
                updates[f"numbers_{key}"] = views.numbers(
                    *numbers[key], name=all_texts()[ENGLISH][f"chart_{key}_title"]
                )
        return updates

    # ---- runs side by side --------------------------------------------------------------------------------------

    def _comparison_view(self, state: PageState) -> Updates:
        shown = self.comparison.updates(self._comparable(state), state.compare or (), state.viewport)
        return _only("compare") | shown

    def _comparable(self, state: PageState) -> list[Status]:
        """The runs that the visitor may see and those in the address, newest first."""
        linked = [run for job_id in state.compare or () if (run := self._find(job_id)) is not None]
        runs = {run.job_id: run for run in (*self._visible(state, MAX_COMPARED), *linked)}
        return sorted(runs.values(), key=lambda run: -run.created)


def _figures(report: Report, viewport: str) -> dict[str, Figure]:
    """The charts for a page with this viewport."""
    figures = charts.figures(report, dark="dark" in viewport)
    return {key: fit_narrow(figure) if "narrow" in viewport else figure for key, figure in figures.items()}


def _only(shown: str) -> Updates:
    """Shows one of the views and hides the others."""
    return {view: gr.update(visible=view == shown) for view in VIEWS}
