"""The layout of the page; `compress.ui.connections` connects its components to the handlers."""

from __future__ import annotations

import gradio as gr
from gradio.components import Component

from compress.ui import sharing, views
from compress.ui.api import add_endpoints
from compress.ui.connections import Parts, connect_all
from compress.ui.form import UploadField, main_fields, more_fields
from compress.ui.handlers import CHARTS, App
from compress.ui.texts import text
from compress.ui.web.uploads import IMAGE_TYPES

POLL_S = 1.0
TITLE = "Espalier: smaller, faster image classifiers"


def build_page(app: App) -> gr.Blocks:
    """The page with its events and the API's endpoints."""
    with gr.Blocks(title=TITLE, analytics_enabled=False, fill_width=True) as page:
        parts = _memory()
        with gr.Row(elem_classes="top"):
            gr.HTML(views.brand(text("brand_name")))
            parts["theme"] = gr.Button(
                text("theme_button"), size="sm", variant="secondary", elem_classes="theme", min_width=60, scale=0
            )
        parts["banner"] = gr.HTML(elem_id="banner")
        fields, start = _start_view(app)
        parts |= start | _run_view() | _compare_view() | fields
        connect_all(page, app, parts, list(fields))
        add_endpoints(app)
    blocks: gr.Blocks = page
    return blocks


def _memory() -> Parts:
    """State kept by the browser, so that the page survives a restart of the server."""
    parts: Parts = {
        name: gr.Textbox(visible=False, elem_id=f"memory-{name}")
        for name in ("context", "job", "key", "fingerprint", "viewport", "again")
    }
    parts["timer"] = gr.Timer(POLL_S, active=False)
    return parts


def _start_view(app: App) -> tuple[dict[str, Component], Parts]:
    parts: Parts = {}
    with gr.Column(elem_classes="view", elem_id="start") as parts["start"]:
        gr.HTML(text("hero"))
        parts["again_note"] = gr.HTML()
        with gr.Row(elem_classes="columns", equal_height=False):
            with gr.Column(scale=3, min_width=320):
                fields = main_fields(tuple(offer.name for offer in app.models))
                with gr.Accordion(text("more_title"), open=False, elem_classes="card more"):
                    fields |= more_fields()
            with gr.Column(scale=2, min_width=300, elem_classes="side"), gr.Column(elem_classes="card"):
                gr.HTML(text("meaning_head"))
                parts["meaning"] = gr.HTML()
                parts["notice"] = gr.HTML()
                parts["submit"] = gr.Button(text("submit_button"), variant="primary", size="lg", elem_id="submit")
                parts["preflight"] = gr.Button(text("plan_button"), variant="secondary", elem_id="preflight")
                parts["checked"] = gr.HTML()
        with gr.Row(elem_classes="earlier", equal_height=False):
            gr.HTML(text("runs_head"))
            parts["search"] = gr.Textbox(
                label=text("search_label"),
                placeholder=text("search_placeholder"),
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
                    text("cancel_button"), variant="stop", elem_id="cancel", size="md", min_width=120, visible=False
                )
                parts["resume"] = gr.Button(
                    text("resume_button"), variant="primary", elem_id="resume", size="md", min_width=120, visible=False
                )
                parts["links"] = gr.HTML(elem_classes="links")
        parts["run_notice"] = gr.HTML()
        parts["live"] = gr.HTML(elem_id="live")
        with gr.Column(elem_id="results", visible=False) as parts["results"]:
            _results(parts)
        with gr.Accordion(text("log_title"), open=True, elem_classes="card") as parts["log_box"]:
            parts["log"] = gr.HTML(elem_id="log")
        parts["settings"] = gr.HTML(elem_classes="card", elem_id="settings")
        with gr.Accordion(text("manage_title"), open=False, elem_classes="card") as parts["manage"]:
            with gr.Row(elem_classes="manage"):
                parts["title"] = gr.Textbox(label=text("name_label"), max_lines=1, elem_id="title")
                parts["rename"] = gr.Button(text("rename_button"), size="md", elem_id="rename", min_width=110, scale=0)
                parts["keep"] = gr.Button(text("keep_button"), size="md", elem_id="keep", min_width=130, scale=0)
                parts["delete"] = gr.Button(
                    text("delete_button"), variant="stop", size="md", elem_id="delete", min_width=140, scale=0
                )
            parts["keeping"] = gr.HTML()
    return parts


def _results(parts: Parts) -> None:
    parts["verdict"] = gr.HTML(elem_classes="card", elem_id="verdict")
    with gr.Column(elem_classes="card"):
        gr.HTML(text("summary_head"))
        parts["summary"] = gr.HTML(elem_id="summary")
    with gr.Column(elem_classes="card"):
        gr.HTML(text("try_head"))
        with gr.Row(elem_classes="manage"):
            parts["image"] = UploadField(label=text("image_label"), file_types=list(IMAGE_TYPES), height=136)
            parts["try"] = gr.Button(text("try_button"), size="md", elem_id="try", min_width=120, scale=0)
        parts["tried"] = gr.HTML(elem_id="tried")
    with gr.Column(elem_classes="card"):
        gr.HTML(text("files_head"))
        parts["files"] = gr.HTML(elem_id="files")
    for key in CHARTS:
        with gr.Column(elem_classes="card", elem_id=f"chart-{key}", visible=False) as parts[f"chart_{key}"]:
            gr.HTML(text(f"chart_{key}_head"))
            parts[f"plot_{key}"] = gr.Plot(show_label=False, container=False, elem_id=f"plot-{key}")
            parts[f"numbers_{key}"] = gr.HTML()
    parts |= sharing.card()


def _compare_view() -> Parts:
    parts: Parts = {}
    with gr.Column(elem_classes="view", elem_id="compare", visible=False) as parts["compare"]:
        gr.HTML(text("compare_head"))
        parts["compare_table"] = gr.HTML(elem_classes="card", elem_id="side-by-side")
        with gr.Column(elem_classes="card", elem_id="chart-compare", visible=False) as parts["compare_chart"]:
            gr.HTML(text("pareto_head"))
            parts["plot_compare"] = gr.Plot(show_label=False, container=False, elem_id="plot-compare")
            parts["numbers_compare"] = gr.HTML()
        with gr.Column(elem_classes="card"):
            gr.HTML(text("finished_head"))
            parts["compare_runs"] = gr.HTML(elem_id="compare-runs")
    return parts
