"""Layout of the page and which control calls which handler; nothing is decided here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gradio as gr
from gradio.components import Component

from compress.ui import sharing, views
from compress.ui.api import add_endpoints
from compress.ui.events import connect
from compress.ui.form import UploadField, main_fields, more_fields
from compress.ui.handlers import CHARTS, App, Updates
from compress.ui.web.uploads import IMAGE_TYPES
from compress.ui.words import word

POLL_S = 1.0
TITLE = "Espalier: smaller, faster image classifiers"
Parts = dict[str, Any]


def build_page(app: App) -> gr.Blocks:
    """The page with its events and the API's endpoints."""
    with gr.Blocks(title=TITLE, analytics_enabled=False, fill_width=True) as page:
        parts = _memory()
        with gr.Row(elem_classes="top"):
            gr.HTML(views.brand(word("brand_name")))
            parts["theme"] = gr.Button(
                word("theme_button"), size="sm", variant="secondary", elem_classes="theme", min_width=60, scale=0
            )
        parts["banner"] = gr.HTML(elem_id="banner")
        fields, start = _start_view(app)
        parts |= start | _run_view() | _compare_view() | fields
        _connect(page, app, parts, list(fields))
        add_endpoints(app)
    return page


def _memory() -> Parts:
    """What the browser keeps, so that the page goes on after the server was restarted."""
    parts: Parts = {
        name: gr.Textbox(visible=False, elem_id=f"memory-{name}")
        for name in ("context", "job", "key", "seen", "look", "again")
    }
    parts["timer"] = gr.Timer(POLL_S, active=False)
    return parts


def _start_view(app: App) -> tuple[dict[str, Component], Parts]:
    parts: Parts = {}
    with gr.Column(elem_classes="view", elem_id="start") as parts["start"]:
        gr.HTML(word("hero"))
        parts["again_note"] = gr.HTML()
        with gr.Row(elem_classes="columns", equal_height=False):
            with gr.Column(scale=3, min_width=320):
                fields = main_fields(tuple(offer.name for offer in app.models))
                with gr.Accordion(word("more_title"), open=False, elem_classes="card more"):
                    fields |= more_fields()
            with gr.Column(scale=2, min_width=300, elem_classes="side"), gr.Column(elem_classes="card"):
                gr.HTML(word("meaning_head"))
                parts["meaning"] = gr.HTML()
                parts["notice"] = gr.HTML()
                parts["submit"] = gr.Button(word("submit_button"), variant="primary", size="lg", elem_id="submit")
                parts["preflight"] = gr.Button(word("plan_button"), variant="secondary", elem_id="preflight")
                parts["checked"] = gr.HTML()
        with gr.Row(elem_classes="earlier", equal_height=False):
            gr.HTML(word("runs_head"))
            parts["search"] = gr.Textbox(
                label=word("search_label"),
                placeholder=word("search_placeholder"),
                elem_id="search",
                scale=0,
                min_width=260,
            )
        parts["runs"] = gr.HTML(elem_id="runs")
    return fields, parts


def _run_view() -> Parts:
    parts: Parts = {}
    with gr.Column(elem_classes="view", elem_id="run", visible=False) as parts["run"]:
        with gr.Row(elem_classes="run-top", equal_height=False):
            parts["head"] = gr.HTML()
            with gr.Row(elem_classes="actions"):
                parts["cancel"] = gr.Button(
                    word("cancel_button"), variant="stop", elem_id="cancel", size="md", min_width=120, visible=False
                )
                parts["resume"] = gr.Button(
                    word("resume_button"), variant="primary", elem_id="resume", size="md", min_width=120, visible=False
                )
                parts["links"] = gr.HTML(elem_classes="links")
        parts["run_notice"] = gr.HTML()
        parts["live"] = gr.HTML(elem_id="live")
        with gr.Column(elem_id="results", visible=False) as parts["results"]:
            _results(parts)
        with gr.Accordion(word("log_title"), open=True, elem_classes="card") as parts["log_box"]:
            parts["log"] = gr.HTML(elem_id="log")
        parts["settings"] = gr.HTML(elem_classes="card", elem_id="settings")
        with gr.Accordion(word("manage_title"), open=False, elem_classes="card") as parts["manage"]:
            with gr.Row(elem_classes="manage"):
                parts["title"] = gr.Textbox(label=word("name_label"), max_lines=1, elem_id="title")
                parts["rename"] = gr.Button(word("rename_button"), size="md", elem_id="rename", min_width=110, scale=0)
                parts["keep"] = gr.Button(word("keep_button"), size="md", elem_id="keep", min_width=130, scale=0)
                parts["delete"] = gr.Button(
                    word("delete_button"), variant="stop", size="md", elem_id="delete", min_width=140, scale=0
                )
            parts["keeping"] = gr.HTML()
    return parts


def _results(parts: Parts) -> None:
    parts["verdict"] = gr.HTML(elem_classes="card", elem_id="verdict")
    with gr.Column(elem_classes="card"):
        gr.HTML(word("summary_head"))
        parts["summary"] = gr.HTML(elem_id="summary")
    with gr.Column(elem_classes="card"):
        gr.HTML(word("try_head"))
        with gr.Row(elem_classes="manage"):
            parts["image"] = UploadField(label=word("image_label"), file_types=list(IMAGE_TYPES), height=136)
            parts["try"] = gr.Button(word("try_button"), size="md", elem_id="try", min_width=120, scale=0)
        parts["tried"] = gr.HTML(elem_id="tried")
    with gr.Column(elem_classes="card"):
        gr.HTML(word("files_head"))
        parts["files"] = gr.HTML(elem_id="files")
    for key in CHARTS:
        with gr.Column(elem_classes="card", elem_id=f"chart-{key}", visible=False) as parts[f"chart_{key}"]:
            gr.HTML(word(f"chart_{key}_head"))
            parts[f"plot_{key}"] = gr.Plot(show_label=False, container=False, elem_id=f"plot-{key}")
            parts[f"numbers_{key}"] = gr.HTML()
    parts |= sharing.card()


def _compare_view() -> Parts:
    parts: Parts = {}
    with gr.Column(elem_classes="view", elem_id="compare", visible=False) as parts["compare"]:
        gr.HTML(word("compare_head"))
        parts["compare_table"] = gr.HTML(elem_classes="card", elem_id="side-by-side")
        with gr.Column(elem_classes="card", elem_id="chart-compare", visible=False) as parts["compare_chart"]:
            gr.HTML(word("pareto_head"))
            parts["plot_compare"] = gr.Plot(show_label=False, container=False, elem_id="plot-compare")
            parts["numbers_compare"] = gr.HTML()
        with gr.Column(elem_classes="card"):
            gr.HTML(word("finished_head"))
            parts["compare_runs"] = gr.HTML(elem_id="compare-runs")
    return parts


def _connect(page: gr.Blocks, app: App, parts: Parts, names: list[str]) -> None:
    """Every event of the page. None of them is part of the API; none waits in Gradio's queue."""
    form = [parts[name] for name in names if name != "hint"]

    def values(given: tuple[Any, ...]) -> dict[str, Any]:
        return dict(zip((name for name in names if name != "hint"), given, strict=True))

    def on(event: Any, handler: Callable[..., Updates], inputs: list[Any], outputs: list[str], **options: Any) -> Any:
        return connect(event, handler, inputs, outputs, parts, **options)

    run_outputs = list(_SHOWN)
    run = [parts["job"], parts["key"]]
    where = [*run, parts["look"]]
    context = {"js": "() => espalier.context()"}
    filled = [name for name in names if name not in ("hint", "checkpoint_file", "data_file", "class_map")]
    opened = [*run_outputs, *_COMPARED, "again", "again_note", *filled]
    on(page.load, app.open, [parts["context"]], opened, visited=True, **context)
    on(page.load, app.banner, [], ["banner"])
    counting = (lambda *given: app.counted(values(given)), form, ["meaning"])
    meant = on(page.load, lambda *given: app.meaning(values(given)), form, ["meaning"])
    on(meant.then, *counting, turns=app.counts, **_BEHIND)
    submitted = on(
        parts["submit"].click,
        lambda visit, again, look, *given: app.submit(visit, values(given), again, look),
        [parts["again"], parts["look"], *form],
        run_outputs,
        visited=True,
        trigger_mode="once",
    )
    submitted.then(None, run, None, js="(job, key) => espalier.opened(job, key)")
    on(
        parts["preflight"].click,
        lambda visit, again, *given: app.preflight(visit, values(given), again),
        [parts["again"], *form],
        ["checked", "notice"],
        visited=True,
        turns=app.turns,
        refused="checked",
        show_progress_on=parts["checked"],
        **_SLOW,
    )
    on(
        parts["try"].click,
        app.try_image,
        [parts["job"], parts["image"]],
        ["tried"],
        visited=True,
        turns=app.turns,
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
    searched = on(
        parts["search"].change,
        app.search,
        [parts["search"], parts["context"]],
        ["runs"],
        js="text => [text, espalier.context()]",
        trigger_mode="always_last",
    )
    searched.then(None, None, None, js="() => espalier.retick()", api_visibility="private")
    watching = {"visited": True, "trigger_mode": "once"}
    on(parts["timer"].tick, app.look, [*run, parts["seen"], parts["look"]], run_outputs, **watching)
    for name, act in (("cancel", app.cancel), ("resume", app.resume), ("keep", app.keep)):
        on(parts[name].click, act, where, run_outputs, **watching)
    on(parts["rename"].click, app.rename, [*where, parts["title"]], run_outputs, **watching)
    deleted = on(
        parts["delete"].click,
        app.delete,
        run,
        ["job", "timer", "run_notice"],
        js="(job, key) => [espalier.sure() ? job : '', key]",
        **watching,
    )
    deleted.then(None, [parts["job"]], None, js="job => espalier.left(job)", api_visibility="private")
    choices = [parts[name] for name in ("weights", "images", "model", "arithmetic")]
    for choice in choices:
        on(choice.change, app.sources, choices, ["checkpoint_file", "hub", "data_file", "bits", "hint"])
    for name in names:
        if name not in ("hint", "checkpoint_file", "data_file", "class_map"):
            meant = on(
                parts[name].change,
                lambda *given: app.meaning(values(given)),
                form,
                ["meaning"],
                trigger_mode="always_last",
            )
            if name in ("model", "weights", "images", "input_size", "channel_multiple"):
                on(meant.then, *counting, turns=app.counts, **_BEHIND)
    themed = parts["theme"].click(None, None, [parts["look"]], js="() => espalier.toggle()", api_visibility="private")
    on(
        themed.then,
        app.restyle,
        [parts["job"], parts["look"], parts["context"]],
        ["plot_compare", *(f"plot_{key}" for key in CHARTS)],
        js="(job, look) => [job, look, espalier.context()]",
    )


_SLOW = {"queue": True, "concurrency_limit": None, "show_progress": "full", "trigger_mode": "once"}
"""Of events that start a process."""
_BEHIND = {"queue": True, "concurrency_limit": None}
"""Of an event that starts a process and that nobody waits for."""
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
    "look",
    "timer",
    "job",
    "key",
    "seen",
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
"""Components that change while runs are opened and watched."""
