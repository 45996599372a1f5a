"""The figure over all finished runs: accuracy against latency, and the front of those that none other beats."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

import plotly.graph_objects as go

from compress.report import comparison
from compress.report.charts import TICKS, dress
from compress.report.comparison import Entry

KIND_COLOURS = ("#10a37f", "#3b82f6", "#a855f7", "#f59e0b", "#8a94a6")
KIND_SYMBOLS = ("circle", "square", "diamond", "triangle-up", "x")
LINK_COLOUR = {False: "#1d5738", True: "#86c09b"}


def accuracy_against_latency(
    entries: Sequence[Entry], links: Mapping[str, str], *, dark: bool = False
) -> go.Figure | None:
    """One point for each run, with its number (from 1, in the order of `entries`) as a link; None without a point.

    Runs on other images or another machine are of another kind: they have a colour, a symbol and a front of their own.

    Args:
        links: run id -> address that its number leads to.
    """
    numbered = [
        (number, entry)
        for number, entry in enumerate(entries, start=1)
        if entry.accuracy is not None and entry.p50_ms is not None
    ]
    if not numbered:
        return None
    kinds = list(dict.fromkeys(entry.kind for _, entry in numbered))
    front = comparison.front(entries)
    figure = go.Figure()
    for index, kind in enumerate(kinds):
        colour = KIND_COLOURS[index % len(KIND_COLOURS)]
        best = [entry for entry in front if entry.kind == kind]
        if len(best) > 1:
            figure.add_scatter(**_line(best), mode="lines", line={"color": colour, "width": 1.6, "dash": "dot"})
        own = [(number, entry) for number, entry in numbered if entry.kind == kind]
        figure.add_scatter(
            x=[entry.p50_ms for _, entry in own],
            y=[100 * (entry.accuracy or 0) for _, entry in own],
            error_y=_intervals([entry for _, entry in own]),
            name=escape(", ".join(kind)),
            mode="markers",
            marker={"color": colour, "symbol": KIND_SYMBOLS[index % len(KIND_SYMBOLS)], "size": 11},
            text=[f"{number}: {escape(entry.title)}" for number, entry in own],
            hovertemplate="%{text}<br>%{y:.1f} %, %{x:.2f} ms<extra></extra>",
            cliponaxis=False,
        )
    style = f"color:{LINK_COLOUR[dark]}"
    for number, entry in numbered:
        figure.add_annotation(
            x=math.log10(entry.p50_ms or 1),  # where an axis is logarithmic, annotations take exponents
            y=100 * (entry.accuracy or 0),
            text=f'<a href="{escape(links[entry.job_id])}" target="_self" style="{style}">{number}</a>',
            font_size=14,
            showarrow=False,
            captureevents=True,  # or the drag layer above would take the click
            xshift=14,
            yshift=12,
        )
    figure.update_xaxes(
        title="milliseconds per image, batch 1 (log scale)",
        type="log",
        tickvals=TICKS,
        ticktext=[f"{tick:g}" for tick in TICKS],
    )
    figure.update_yaxes(title="accuracy of the deployed file, %  (95 % interval)")
    figure = dress(figure, dark)
    return figure.update_layout(
        height=420, showlegend=len(kinds) > 1, legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0}
    )


def _line(best: Sequence[Entry]) -> dict[str, object]:
    return {
        "x": [entry.p50_ms for entry in best],
        "y": [100 * (entry.accuracy or 0) for entry in best],
        "name": "unbeaten",
        "showlegend": False,
        "hoverinfo": "skip",
    }


def _intervals(entries: Sequence[Entry]) -> dict[str, object]:
    pairs = [(entry.accuracy or 0.0, entry.accuracy_ci95 or (entry.accuracy or 0.0,) * 2) for entry in entries]
    return {
        "type": "data",
        "array": [100 * (high - value) for value, (_, high) in pairs],
        "arrayminus": [100 * (value - low) for value, (low, _) in pairs],
        "thickness": 1,
        "width": 3,
    }
