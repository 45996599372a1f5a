"""Which component calls which handler. No event here is part of the API, and none waits in Gradio's queue unless it says so."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import gradio as gr

from compress.ui import sharing
from compress.ui.events import connect
from compress.ui.handlers import CHARTS, App, Updates

Parts = dict[str, Any]
"""Component name -> component."""
NO_VALUE = "hint"
"""The one component among the form's fields that holds no setting."""
FILES = ("checkpoint_file", "data_file", "class_map")
COUNTED = ("model", "weights", "images", "input_size", "channel_multiple")
"""Fields on which the layer counts of the estimate depend."""


def connect_all(page: gr.Blocks, app: App, parts: Parts, names: list[str]) -> None:
    """Connects every event of the page.

    Args:
        parts: all components by name.
        names: the names of the form's fields.
    """
    connections = _Connections(page, app, parts, names)
    connections.opening()
    connections.form()
    connections.run()
    connections.lists()
    connections.theme()


class _Connections:
    def __init__(self, page: gr.Blocks, app: App, parts: Parts, names: list[str]) -> None:
        self._page, self._app, self._parts = page, app, parts
        self._names = [name for name in names if name != NO_VALUE]
        self._form = [parts[name] for name in self._names]
        self._run = [parts["job"], parts["key"]]

    def opening(self) -> None:
        """What happens when the page loads."""
        app, page = self._app, self._page
        filled = [name for name in self._names if name not in FILES]
        outputs = [*_SHOWN, *_COMPARED, "again", "again_note", *filled]
        context = [self._parts["context"]]
        self._on(page.load, app.open, context, outputs, visited=True, js="() => espalier.context()")
        self._on(page.load, app.banner, [], ["banner"])
        self._count_after(self._on(page.load, self._explain, self._form, ["meaning"]))

    def form(self) -> None:
        """Explaining, checking and submitting the form's settings."""
        app, parts = self._app, self._parts
        submitted = self._on(
            parts["submit"].click,
            lambda visitor, again, viewport, *form: app.submit(visitor, self._values(form), again, viewport),
            [parts["again"], parts["viewport"], *self._form],
            list(_SHOWN),
            visited=True,
            trigger_mode="once",
        )
        submitted.then(None, self._run, None, js="(job, key) => espalier.opened(job, key)")
        self._on(
            parts["preflight"].click,
            lambda visitor, again, *form: app.preflight(visitor, self._values(form), again),
            [parts["again"], *self._form],
            ["checked", "notice"],
            visited=True,
            fair_queue=app.check_queue,
            refused="checked",
            show_progress_on=parts["checked"],
            **_SLOW,
        )
        choices = [parts[name] for name in ("weights", "images", "model", "arithmetic")]
        for choice in choices:
            self._on(choice.change, app.source_fields, choices, ["checkpoint_file", "hub", "data_file", "bits", "hint"])
        for name in self._names:
            if name not in FILES:
                change = parts[name].change
                explained = self._on(change, self._explain, self._form, ["meaning"], trigger_mode="always_last")
                if name in COUNTED:
                    self._count_after(explained)

    def run(self) -> None:
        """Watching, changing, trying and publishing a run."""
        app, parts, run, shown = self._app, self._parts, self._run, list(_SHOWN)
        where = [*run, parts["viewport"]]
        once = {"visited": True, "trigger_mode": "once"}
        self._on(parts["timer"].tick, app.refresh, [*run, parts["fingerprint"], parts["viewport"]], shown, **once)
        for name, act in (("cancel", app.cancel), ("resume", app.resume), ("keep", app.keep)):
            self._on(parts[name].click, act, where, shown, **once)
        self._on(parts["rename"].click, app.rename, [*where, parts["title"]], shown, **once)
        confirm = "(job, key) => [espalier.sure() ? job : '', key]"
        deleted = self._on(parts["delete"].click, app.delete, run, ["job", "timer", "run_notice"], js=confirm, **once)
        deleted.then(None, [parts["job"]], None, js="job => espalier.left(job)", api_visibility="private")
        self._on(
            parts["try"].click,
            app.try_image,
            [parts["job"], parts["image"]],
            ["tried"],
            visited=True,
            fair_queue=app.check_queue,
            refused="tried",
            show_progress_on=parts["tried"],
            **_SLOW,
        )
        parts["publish"].click(
            sharing.publisher(app.queue, app.settings),
            [parts[name] for name in ("job", "repository", "public", "pull_request")],
            [parts["shared"]],
            api_visibility="private",
            show_progress_on=parts["shared"],
            **_SLOW | {"concurrency_limit": 1},
        )

    def lists(self) -> None:
        """Searching the list of runs."""
        inputs = [self._parts["search"], self._parts["context"]]
        js = "text => [text, espalier.context()]"
        change = self._parts["search"].change
        searched = self._on(change, self._app.search, inputs, ["runs"], js=js, trigger_mode="always_last")
        searched.then(None, None, None, js="() => espalier.retick()", api_visibility="private")

    def theme(self) -> None:
        """Redrawing the charts in the other colours."""
        parts = self._parts
        toggle = {"js": "() => espalier.toggle()", "api_visibility": "private"}
        toggled = parts["theme"].click(None, None, [parts["viewport"]], **toggle)
        self._on(
            toggled.then,
            self._app.restyle,
            [parts["job"], parts["viewport"], parts["context"]],
            ["plot_compare", *(f"plot_{key}" for key in CHARTS)],
            js="(job, viewport) => [job, viewport, espalier.context()]",
        )

    def _on(
        self, event: Any, handler: Callable[..., Updates], inputs: list[Any], outputs: list[str], **options: Any
    ) -> Any:
        return connect(event, handler, inputs, outputs, self._parts, **options)

    def _values(self, form: tuple[Any, ...]) -> Mapping[str, Any]:
        """Field name -> value."""
        return dict(zip(self._names, form, strict=True))

    def _explain(self, *form: Any) -> Updates:
        return self._app.explain(self._values(form))

    def _explain_counted(self, *form: Any) -> Updates:
        return self._app.explain_counted(self._values(form))

    def _count_after(self, explained: Any) -> None:
        """Counts the layers in the background after the quick explanation is shown."""
        self._on(
            explained.then,
            self._explain_counted,
            self._form,
            ["meaning"],
            fair_queue=self._app.count_queue,
            **_BACKGROUND,
        )


_SLOW = {"queue": True, "concurrency_limit": None, "show_progress": "full", "trigger_mode": "once"}
"""Options of events that start a process."""
_BACKGROUND = {"queue": True, "concurrency_limit": None}
"""Options of an event that starts a process and that nobody waits for."""
_COMPARED = ("compare_table", "compare_chart", "plot_compare", "numbers_compare", "compare_runs")
_SHOWN = (
    "start",
    "run",
    "compare",
    "links",
    "title",
    "manage",
    "keep",
    "keeping",
    "delete",
    "notice",
    "runs",
    "viewport",
    "timer",
    "job",
    "key",
    "fingerprint",
    "head",
    "run_notice",
    "live",
    "log",
    "log_box",
    "settings",
    "cancel",
    "resume",
    "results",
    "verdict",
    "summary",
    "files",
    *(f"{part}_{key}" for key in CHARTS for part in ("chart", "plot", "numbers")),
)
"""Components that change when a run is opened or refreshed."""
