"""What the page's controls do: form values to a `Request`, the state of a run to what is shown of it.

A handler returns updates by component name; what it does not name stays as it is. Runs are carried out by the queue, so
most handlers take a look at the disk; those that check a request or classify an image wait seconds for a process of its own.
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
from compress.jobs import Queue, Status, retention
from compress.jobs.database import FINAL
from compress.report import Report, charts
from compress.report.tables import tables
from compress.request import Request
from compress.ui import views
from compress.ui.comparison import Comparison, report_of
from compress.ui.estimates import Count, Estimates, Structure
from compress.ui.form import HUB, UPLOAD, from_request, to_request
from compress.ui.phone import narrowed
from compress.ui.shell import Offer
from compress.ui.told import public, without_folders
from compress.ui.views import results, start
from compress.ui.views import runs as view_runs
from compress.ui.web.rights import Rights, run_key
from compress.ui.web.settings import Settings
from compress.ui.web.turns import Turns
from compress.ui.web.uploads import Uploads
from compress.ui.web.visitors import Context, Visit
from compress.ui.words import ENGLISH, texts, word

Updates = dict[str, Any]
Check = Callable[[Request], dict[str, Any]]
Classify = Callable[[Path, Path], dict[str, Any]]
"""(run folder, image) -> what `compress.classify.classify` says."""
CHARTS = ("size", "latency", "accuracy", "sqnr", "mixed", "channels", "training")
"""Of `compress.report.charts`, in the order of the page."""
MAX_LISTED = 30
UPLOAD_AGE_S = 24 * 3600.0
MAX_COMPARED = 200
VIEWS = ("start", "run", "compare")


class App:
    """The handlers, around one queue."""

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
        self.comparison, self.rights = Comparison(queue), Rights(queue, settings)
        largest = settings.max_upload_mb * 2**20
        self.uploads = Uploads(
            settings.uploads, most_bytes=2 * largest, most_bytes_in_all=16 * largest, age_s=UPLOAD_AGE_S
        )
        self.turns, self.counts = Turns(), Turns()
        self.estimates = Estimates(settings.data_dir / "estimates", count)

    # ---- the start view -----------------------------------------------------------------------------------------

    def open(self, visit: Visit, context: str) -> Updates:
        """The page was opened."""
        seen = Context.read(context)
        updates: Updates = {"look": seen.look, "runs": self._run_list(seen)}
        try:
            if seen.job:
                return updates | self._opened(visit, seen.job, seen.key, seen.look)
            if seen.compare is not None:
                return updates | self._compared(seen)
            if seen.again:
                updates |= self._filled(seen.again)
        except CompressError as error:
            updates |= {"notice": views.alert(str(error))}
        return updates | _only("start")

    def banner(self) -> Updates:
        """Why nothing can be carried out, above everything else; nothing when all is well."""
        return {"banner": views.alert(self.queue.trouble or "")}

    def submit(self, visit: Visit, values: Mapping[str, Any], again: str, look: str) -> Updates:
        try:
            request, files = self._asked(visit, values, again)
            job_id = self.queue.submit(request, files=files, owner=visit.who)
            return {"notice": ""} | self._opened(visit, job_id, run_key(job_id), look)
        except CompressError as error:
            return {"notice": views.alert(str(error))}

    def _asked(self, visit: Visit, values: Mapping[str, Any], again: str) -> tuple[Request, dict[str, Path]]:
        """The request of the form and its files: uploads, or those of the run `again`."""
        kept = self.queue.uploads(again) if again else {}
        request, files = to_request(values, kept)
        return request, {
            field: path if path == kept.get(field) else self.uploads.find(str(path), visit.who)
            for field, path in files.items()
        }

    def _filled(self, again: str) -> Updates:
        """The form with the settings of a run."""
        request, uploads = self.queue.request(again), self.queue.uploads(again)
        values: Updates = from_request(request)
        slider = gr.update(value=values["sparsity"], step=1 if float(values["sparsity"]).is_integer() else 0.0001)
        note = view_runs.filled_from(self.queue.status(again), uploads)
        return values | {"sparsity": slider, "again": again, "again_note": note}

    def preflight(self, visit: Visit, values: Mapping[str, Any], again: str) -> Updates:
        """The plan of a run, without starting it."""
        try:
            request, files = self._asked(visit, values, again)
            request = request.model_copy(update={field: str(path) for field, path in files.items()})
            return {"checked": start.checked(self.check(request)), "notice": ""}
        except CompressError as error:
            return {"checked": "", "notice": views.alert(str(error))}

    def meaning(self, values: Mapping[str, Any]) -> Updates:
        """What the settings at hand mean; a contradiction is shown at once, in place of it."""
        try:
            request, offer = self._meant(values)
        except RequestError as error:
            return {"meaning": views.alert(str(error))}
        outlook = offer and self.estimates.outlook(request, Structure.of(request, offer.input_size))
        return {"meaning": start.meaning(request, offer.parameters if offer else None, outlook)}

    def counted(self, values: Mapping[str, Any]) -> Updates:
        """`meaning`, after the model was counted if it was not yet; nothing new where that was done or cannot be."""
        try:
            request, offer = self._meant(values)
            if offer is None or self.estimates.known(structure := Structure.of(request, offer.input_size)):
                return {}
            self.estimates.count(structure)
        except CompressError:
            return {}  # the rough estimate stays, and is called so
        return self.meaning(values)

    def _meant(self, values: Mapping[str, Any]) -> tuple[Request, Offer | None]:
        """The request of a form whose files need not be there yet. Raises `RequestError`."""
        named = {"checkpoint_file": "x.pth", "data_file": "x.zip", "class_map": None, "hub": "owner/name"}
        request, _ = to_request(dict(values) | named)
        return request, next((offer for offer in self.models if offer.name == request.model), None)

    @staticmethod
    def sources(weights: str, images: str, model: str, arithmetic: str) -> Updates:
        """Shows the upload fields that belong to the choices, and a hint where the choices do not fit."""
        hint = ""
        if images == "fashion-mnist" and weights not in (UPLOAD, HUB) and (model != "resnet18" or weights == "random"):
            hint = (
                "These images go with the bundled resnet18. Another model needs a checkpoint that was trained on them."
            )
        elif images == "none":
            hint = "Without images nothing is trained: the report tells how far the answers move, and no accuracy."
        return {
            "checkpoint_file": gr.update(visible=weights == UPLOAD),
            "hub": gr.update(visible=weights == HUB),
            "data_file": gr.update(visible=images == UPLOAD),
            "bits": gr.update(visible=arithmetic == "integers"),
            "hint": f"<p>{hint}</p>" if hint else "",
        }

    def search(self, text: str, context: str) -> Updates:
        """The list of the runs that have every word; those that are ticked stay in it."""
        return {"runs": self._run_list(Context.read(context), text)}

    def _run_list(self, seen: Context, text: str = "") -> str:
        try:
            found = self._visible(seen, MAX_LISTED, text)
            kept = [run for job_id in seen.ticked if (run := self._find(job_id)) is not None]
        except StorageError as error:
            return views.alert(str(error))
        runs = list({run.job_id: run for run in (*kept, *found)}.values())
        return view_runs.run_list(runs, seen.ticked, searched=bool(text.strip()))

    def _visible(self, seen: Context, limit: int, text: str = "") -> list[Status]:
        """The runs that this visitor may see: all, or those begun in this browser; newest first."""
        if self.settings.lists_all_runs:
            return self.queue.list(limit, text)
        runs = [run for job_id in seen.mine[:limit] if (run := self._find(job_id)) is not None]
        words = text.lower().split()
        return [run for run in runs if all(word in f"{run.title} {run.state} {run.job_id}".lower() for word in words)]

    def _find(self, job_id: str) -> Status | None:
        try:
            return self.queue.status(job_id)
        except RunError:
            return None

    # ---- the run view -------------------------------------------------------------------------------------------

    def _opened(self, visit: Visit, job_id: str, key: str, look: str) -> Updates:
        status, uploads = self.queue.status(job_id), self.queue.uploads(job_id)
        request = view_runs.without_paths(self.queue.request(job_id), uploads)
        shown = {
            "timer": gr.Timer(active=True),
            "job": job_id,
            "key": key,
            "keeping": view_runs.keeping(self.queue.keeping),
            "title": status.title,
            "settings": view_runs.settings_of(request) + view_runs.copy_as(request, visit.address, uploads),
        }
        return _only("run") | shown | self.look(visit, job_id, key, "", look)

    def look(self, visit: Visit, job_id: str, key: str, seen: str, look: str) -> Updates:
        """What changed in a run since the look that returned `seen`."""
        if not job_id:
            return {}
        try:
            status, kept = public(self.queue.status(job_id)), self.queue.is_kept(job_id)
            mine = self.rights.may_change(job_id, key, visit.login)
            shown = {
                "head": views.run_head(status, kept=kept, mine=mine),
                "live": views.progress(status) + views.ending(status),
                "log": views.log_text(without_folders(self.queue.log_tail(job_id, console=False))),
                "links": view_runs.links(job_id, finished=status.state == "done"),
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
            "cancel": gr.update(visible=mine and not over, interactive=status.state != "cancelling"),
            "resume": gr.update(visible=mine and status.resumable),
            "manage": gr.update(visible=mine),
            "keep": gr.update(
                visible=self.queue.keeping != retention.Limits(),
                value=word("release_button" if kept else "keep_button"),
            ),
            "log_box": gr.update(open=status.state != "done"),
            "results": gr.update(visible=status.state == "done"),
            "delete": gr.update(interactive=over),
        }
        return updates | (self._results(job_id, look) if status.state == "done" else {})

    def cancel(self, visit: Visit, job_id: str, key: str, look: str) -> Updates:
        return self._act(self.queue.cancel, visit, job_id, key, look)

    def resume(self, visit: Visit, job_id: str, key: str, look: str) -> Updates:
        return self._act(self.queue.resume, visit, job_id, key, look)

    def rename(self, visit: Visit, job_id: str, key: str, look: str, title: str) -> Updates:
        return self._act(lambda job: self.queue.rename(job, title), visit, job_id, key, look)

    def keep(self, visit: Visit, job_id: str, key: str, look: str) -> Updates:
        """Keeps a run from being removed to make room, or no longer."""

        def change(job: str) -> None:
            self.queue.keep(job, not self.queue.is_kept(job), share=retention.KEPT_SHARE)

        return self._act(change, visit, job_id, key, look)

    def _act(self, action: Callable[[str], object], visit: Visit, job_id: str, key: str, look: str) -> Updates:
        notice = ""
        try:
            self.rights.refuse(job_id, key, visit.login)
            action(job_id)
        except CompressError as error:
            notice = views.alert(str(error))
        return self.look(visit, job_id, key, "", look) | {"run_notice": notice}

    def delete(self, visit: Visit, job_id: str, key: str) -> Updates:
        """Removes the run; the page goes back to the start when no job is left in it. Nothing without an id."""
        if not job_id:
            return {}
        try:
            self.rights.refuse(job_id, key, visit.login)
            self.queue.delete(job_id)
        except CompressError as error:
            return {"run_notice": views.alert(str(error))}
        return {"job": "", "timer": gr.Timer(active=False)}

    def try_image(self, visit: Visit, job_id: str, image: str | None) -> Updates:
        """An image of the visitor's through the original and the compressed model."""
        try:
            if not image:
                raise CompressError("No image was chosen: upload one first.")
            if any(run.stage == "measure" for run in self.queue.working()):
                raise RunError("A run is being measured now, and this would disturb it: try again in a minute.")
            self.queue.artifacts(job_id)  # raises for a run that is not done
            found = self.classify(self.queue.folder(job_id), self.uploads.find(image, visit.who))
            return {"tried": results.answers(found)}
        except CompressError as error:
            return {"tried": views.alert(str(error))}

    def restyle(self, job_id: str, look: str, context: str) -> Updates:
        """The charts again, for the page in its other colours."""
        seen = Context.read(context)
        if not job_id and seen.compare is not None:
            return self.comparison.chart(self._comparable(seen), look)
        status = self._find(job_id)
        if status is None or status.state != "done":
            return {}
        try:
            figures = _figures(report_of(self.queue, job_id), look)
        except CompressError:
            return {}  # the results already show the sentence
        return {f"plot_{key}": figures[key] for key in CHARTS if key in figures}

    def _results(self, job_id: str, look: str) -> Updates:
        try:
            report = report_of(self.queue, job_id)
            files = self.queue.artifacts(job_id)
        except CompressError as error:
            return {"verdict": views.alert(str(error))}
        figures, numbers = _figures(report, look), tables(report)
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
                updates[f"numbers_{key}"] = views.numbers(*numbers[key], name=texts()[ENGLISH][f"chart_{key}_title"])
        return updates

    # ---- runs side by side --------------------------------------------------------------------------------------

    def _compared(self, seen: Context) -> Updates:
        shown = self.comparison.updates(self._comparable(seen), seen.compare or (), seen.look)
        return _only("compare") | shown

    def _comparable(self, seen: Context) -> list[Status]:
        """The runs that the visitor may see and those in the address, newest first."""
        asked = [run for job_id in seen.compare or () if (run := self._find(job_id)) is not None]
        runs = {run.job_id: run for run in (*self._visible(seen, MAX_COMPARED), *asked)}
        return sorted(runs.values(), key=lambda run: -run.created)


def _figures(report: Report, look: str) -> dict[str, Figure]:
    """The charts for a page that looks like `look`: words of `dark` and `narrow`."""
    figures = charts.figures(report, dark="dark" in look)
    return {key: narrowed(figure) if "narrow" in look else figure for key, figure in figures.items()}


def _only(shown: str) -> Updates:
    """One of the views is to be seen, the others are not."""
    return {view: gr.update(visible=view == shown) for view in VIEWS}
