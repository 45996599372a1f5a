"""The model card (README.md) and the self-contained HTML report of a run; both read only the report."""

from __future__ import annotations

from typing import Any

import jinja2
from plotly.offline import get_plotlyjs

from compress.methods.pruners import PRUNERS
from compress.report import Report, charts
from compress.report.tables import tables
from compress.request.snippets import shell_command, without_folders

CHART_TITLES = {
    "size": "Size",
    "latency": "Latency",
    "accuracy": "Accuracy at each step",
    "sqnr": "Noise that each layer adds",
    "mixed": "Mixed precision",
    "channels": "Channels kept, layer by layer",
    "training": "Training",
}

templates = jinja2.Environment(
    loader=jinja2.PackageLoader("compress.report", "templates"),
    autoescape=jinja2.select_autoescape(["html"]),
    trim_blocks=True,
    lstrip_blocks=True,
    undefined=jinja2.StrictUndefined,
)
_IN_MARKDOWN = str.maketrans({"<": "&lt;", "[": "&#91;", "`": "&#96;"})
"""HTML, links and code, none of which a name of the user's may become. Inside a block of code nothing is either."""
_markdown = templates.overlay(
    finalize=lambda value: (
        value.translate(_IN_MARKDOWN) if isinstance(value, str) and not isinstance(value, _Code) else value
    )
)


class _Code(str):
    """Text inside a block of code."""


def model_card(report: Report) -> str:
    """Markdown with the Hub's front matter; every number comes from `report`."""
    facts = _facts(report)
    command = _Code(facts["command"].replace("```", "` ` `"))
    return _markdown.get_template("card.md").render(**facts | {"command": command})


def html_report(report: Report) -> str:
    """One HTML file with its charts and their script inside; it needs no network."""
    drawn = {
        theme: {
            key: figure.to_html(
                full_html=False, include_plotlyjs=False, config={"displaylogo": False, "responsive": True}
            )
            for key, figure in charts.figures(report, dark=theme == "dark").items()
        }
        for theme in ("light", "dark")
    }
    return templates.get_template("report.html").render(
        **_facts(report), drawn=drawn, titles=CHART_TITLES, plotly=get_plotlyjs()
    )


def _facts(report: Report) -> dict[str, Any]:
    return {
        "report": report,
        "tables": tables(report),
        "title": f"{report.architecture}, {_what_was_done(report)}",
        "command": shell_command(without_folders(report.request)),
        "seconds": sum(stage.seconds for stage in report.stages),
    }


def _what_was_done(report: Report) -> str:
    request, done = report.request, []
    if request["pruner"] != "none":
        pruner = PRUNERS.get(request["pruner"])
        what = "weights set to zero" if pruner is not None and pruner.fine_grained else "channels pruned"
        share = f"{100 * request['sparsity']:.0f} % of the {what} ({request['pruner']})"
        done.append(f"Channels pruned ({request['pruner']}, NNI config list)" if request.get("config_list") else share)
    if any(layer.weight_bits < 16 for layer in report.layers):
        bits = f"{request['weight_bits']}-bit weights, {request['activation_bits']}-bit activations"
        done.append("quantized by an NNI config list" if request.get("quantization_config_list") else bits)
    elif any(layer.weight_bits == 16 for layer in report.layers):
        done.append("half precision")
    return " and ".join(done) or "measured"
