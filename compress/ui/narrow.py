"""Charts of `compress.report.charts` made to fit a narrow page."""

from __future__ import annotations

import plotly.graph_objects as go

FONT_SIZE = 10
LINE = 18
"""Pixels that a line of the legend takes."""
SHORT_NAME = 12
"""Characters; names up to this length share a line of the legend."""


def fit_narrow(figure: go.Figure) -> go.Figure:
    """The figure with small type, names broken into lines and the legend above it, readable from 300 pixels on."""
    named = [trace.name for trace in figure.data if trace.name and trace.showlegend is not False]
    shows_legend = len(named) > 1 and figure.layout.showlegend is not False
    lines = 0 if not shows_legend else 1 if max(map(len, named)) <= SHORT_NAME else len(named)
    top = 44 if figure.layout.annotations else 24 + LINE * lines
    figure.update_layout(font_size=FONT_SIZE, margin={"l": 8, "r": 8, "b": 8, "t": top})
    figure.update_xaxes(title_font_size=FONT_SIZE, title_standoff=8)
    figure.update_yaxes(title_font_size=FONT_SIZE, title_standoff=6)
    figure.for_each_annotation(lambda note: note.update(text=note.text.replace(", ", "<br>"), font_size=FONT_SIZE))
    for trace in figure.data:
        if trace.type == "box":
            trace.name = trace.name.replace(" · ", "<br>", 1)
    if lines:
        height = (figure.layout.height or 340) + LINE * lines
        figure.update_layout(legend={"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"}, height=height)
    return figure
