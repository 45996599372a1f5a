"""Plotly figures, drawn from a report and from nothing else.

Backgrounds are transparent and the ink follows `dark`, so that a figure sits on either page. `compress.report.tables` has a
table of the same numbers for those who cannot see a figure.
"""

from __future__ import annotations

from collections.abc import Callable

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from compress.report import Hop, Measurement, Report
from compress.report.tables import smallest_file

COLOURS = {"baseline": "#8a94a6", "pruned": "#3b82f6", "quantized": "#10a37f", "half": "#10a37f"}
LOSS_COLOURS = {"finetune": "#3b82f6", "quantize": "#10a37f"}
SQNR_COLOURS, SQNR_DASHES = ("#8a94a6", "#10a37f", "#3b82f6", "#a855f7"), ("dot", "solid", "solid", "solid")
INK = {False: "#1f2937", True: "#e5e7eb"}
GRID = "rgba(128,128,128,.22)"
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif"
TICKS = [mantissa * 10**power for power in range(-3, 5) for mantissa in (1, 2, 5)]
MAX_POINTS = 400
"""Samples drawn per box; the report keeps all."""


def figures(report: Report, *, dark: bool = False) -> dict[str, go.Figure]:
    """The charts of a run, by key: size, latency, accuracy, sqnr, mixed, channels, training. One without data is left out."""
    drawers: dict[str, Callable[[Report], go.Figure | None]] = {
        "size": _size,
        "latency": _latency,
        "accuracy": _accuracy,
        "sqnr": _sqnr,
        "mixed": _mixed,
        "channels": _channels,
        "training": _training,
    }
    drawn = {key: draw(report) for key, draw in drawers.items()}
    return {key: dress(figure, dark) for key, figure in drawn.items() if figure is not None}


# ---- figures ------------------------------------------------------------------------------------------------------


def _size(report: Report) -> go.Figure:
    measures = [
        ("Parameters, millions", [v.parameters / 1e6 for v in report.variants]),
        ("MACs per image, millions", [v.macs / 1e6 for v in report.variants]),
        ("Smallest file, MB", [(smallest_file(v) or 0) / 1e6 for v in report.variants]),
    ]
    figure = make_subplots(rows=1, cols=3, subplot_titles=[title for title, _ in measures], horizontal_spacing=0.08)
    names = [v.name for v in report.variants]
    for column, (_, values) in enumerate(measures, start=1):
        figure.add_bar(
            x=names,
            y=values,
            marker_color=[_colour(n) for n in names],
            text=[_short(v) for v in values],
            textposition="outside",
            cliponaxis=False,
            row=1,
            col=column,
        )
        figure.update_yaxes(range=[0, max(values) * 1.18 or 1], showticklabels=False, row=1, col=column)
    return figure.update_layout(showlegend=False, height=300, bargap=0.35)


def _latency(report: Report) -> go.Figure | None:
    rows = sorted((m for m in report.measurements if m.batch_size == 1), key=lambda m: -m.p50_ms)
    if not rows:
        return None
    figure = go.Figure()
    for m in rows:
        step = max(1, len(m.samples_ms) // MAX_POINTS)
        figure.add_box(
            x=m.samples_ms[::step],
            name=_contender(m),
            marker_color=_colour(m.variant),
            boxpoints=False,
            orientation="h",
            line_width=1.6,
            hoverinfo="x+name",
        )
    figure.update_xaxes(
        title="milliseconds per image, batch 1 (log scale)",
        type="log",
        tickvals=TICKS,
        ticktext=[f"{tick:g}" for tick in TICKS],
    )
    return figure.update_layout(showlegend=False, height=110 + 36 * len(rows), margin_l=10, yaxis_automargin=True)


def _accuracy(report: Report) -> go.Figure | None:
    if not report.ledger:
        return None
    names = [f"{_in_lines(hop.name)}<br><i>{hop.through}</i>" for hop in report.ledger]
    values = [100 * hop.accuracy for hop in report.ledger]
    high = [100 * hop.accuracy_ci95[1] - v for hop, v in zip(report.ledger, values, strict=True)]
    low = [v - 100 * hop.accuracy_ci95[0] for hop, v in zip(report.ledger, values, strict=True)]
    figure = go.Figure(
        go.Scatter(
            x=names,
            y=values,
            mode="lines+markers+text",
            text=[f"{v:.1f}" for v in values],
            textposition="top center",
            line_color=COLOURS["pruned"],
            marker_size=9,
            customdata=[_flips(hop) for hop in report.ledger],
            hovertemplate="%{x}: %{y:.2f} %<br>%{customdata}<extra></extra>",
            error_y={"type": "data", "array": high, "arrayminus": low, "thickness": 1.2, "width": 4},
        )
    )
    kind = "top-1 accuracy" if report.data.labelled else "agreement with the original"
    figure.update_traces(cliponaxis=False)
    figure.update_yaxes(title=f"{kind}, %  (95 % interval)")
    return figure.update_layout(height=400)


def _sqnr(report: Report) -> go.Figure | None:
    """Of each quantized layer in order; a layer without a value leaves a gap."""
    layers = [layer for layer in report.layers if layer.sqnr_db is not None or layer.output_sqnr_db is not None]
    if not layers:
        return None
    files = sorted({file for layer in layers for file in layer.file_sqnr_db})
    series = {
        "weights": [layer.sqnr_db for layer in layers],
        "output": [layer.output_sqnr_db for layer in layers],
        **{_file_name(file): [layer.file_sqnr_db.get(file) for layer in layers] for file in files},
    }
    figure = go.Figure()
    for (name, values), colour, dash in zip(series.items(), SQNR_COLOURS, SQNR_DASHES, strict=False):
        figure.add_scatter(
            x=[layer.name for layer in layers],
            y=values,
            name=name,
            mode="lines+markers",
            marker_size=5,
            line={"color": colour, "dash": dash, "width": 1.6},
            hovertemplate="%{x}: %{y:.1f} dB<extra>" + name + "</extra>",
        )
    figure.update_yaxes(title="signal to noise, dB", rangemode="tozero")
    figure.update_xaxes(tickangle=-60, tickfont_size=9)
    return figure.update_layout(height=400, legend={"orientation": "h", "y": 1.18, "x": 0})


def _mixed(report: Report) -> go.Figure | None:
    if not report.mixed_precision:
        return None
    figure = go.Figure(
        go.Scatter(
            x=[step.weight_bits for step in report.mixed_precision],
            y=[100 * step.accuracy for step in report.mixed_precision],
            mode="lines+markers+text",
            text=[str(len(step.widened)) for step in report.mixed_precision],
            textposition="top center",
            marker_size=9,
            line_color=COLOURS["quantized"],
            cliponaxis=False,
            hovertemplate="%{text} layers with more bits<br>%{x:.2f} bits per weight, %{y:.1f} %<extra></extra>",
        )
    )
    figure.update_xaxes(title="mean bits per weight; the number at a point: layers with more bits")
    figure.update_yaxes(title="held-out accuracy, %, by calibration alone")
    return figure.update_layout(height=320)


def _channels(report: Report) -> go.Figure | None:
    layers = [layer for layer in report.layers if layer.channels_before]
    if not layers:
        return None
    names = [layer.name for layer in layers]
    figure = go.Figure(
        [
            go.Bar(
                x=names,
                y=[layer.channels_before for layer in layers],
                name="before",
                marker_color=COLOURS["baseline"],
                opacity=0.45,
            ),
            go.Bar(
                x=names,
                y=[layer.channels_after for layer in layers],
                name="after",
                marker_color=COLOURS["pruned"],
                customdata=[layer.reason for layer in layers],
                hovertemplate="%{x}: %{y} kept<br>%{customdata}<extra></extra>",
            ),
        ]
    )
    figure.update_yaxes(title="output channels")
    figure.update_xaxes(tickangle=-60, tickfont_size=9)
    return figure.update_layout(barmode="overlay", height=380, legend={"orientation": "h", "y": 1.12, "x": 0})


def _training(report: Report) -> go.Figure | None:
    if not report.curves:
        return None
    figure = make_subplots(specs=[[{"secondary_y": True}]])
    step = 0
    for stage, title in (("finetune", "fine-tuning"), ("quantize", "quantization-aware training")):
        epochs = [epoch for epoch in report.curves if epoch.stage == stage]
        at = [step + number for number in range(1, len(epochs) + 1)]
        step += len(epochs)
        if not epochs:
            continue
        figure.add_scatter(
            x=at,
            y=[e.train_loss for e in epochs],
            name=f"loss, {title}",
            mode="lines+markers",
            line={"color": LOSS_COLOURS[stage], "dash": "dot"},
        )
        if all(e.accuracy is not None for e in epochs):
            figure.add_scatter(
                x=at,
                y=[100 * (e.accuracy or 0) for e in epochs],
                name=f"held-out accuracy, {title}",
                mode="lines+markers",
                line_color=LOSS_COLOURS[stage],
                secondary_y=True,
            )
    figure.update_xaxes(title="epoch", dtick=1)
    figure.update_yaxes(title="loss", secondary_y=False)
    figure.update_yaxes(title="held-out accuracy, %", tickformat=".1f", secondary_y=True, showgrid=False)
    return figure.update_layout(height=340, legend={"orientation": "h", "y": 1.25, "x": 0})


def dress(figure: go.Figure, dark: bool) -> go.Figure:
    """Type, ink, grid and margins that all figures share."""
    figure.update_layout(
        template="plotly_dark" if dark else "plotly_white",
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"family": FONT, "size": 13, "color": INK[dark]},
        margin={"l": 60, "r": 20, "t": 50, "b": 60},
        autosize=True,
    )
    figure.update_annotations(font_size=13)
    figure.update_xaxes(gridcolor=GRID, zerolinecolor=GRID, automargin=True)
    figure.update_yaxes(gridcolor=GRID, zerolinecolor=GRID, automargin=True)
    return figure


# ---- words -----------------------------------------------------------------------------------------------------------


def _colour(variant: str) -> str:
    return COLOURS.get(variant, "#a855f7")


def _contender(m: Measurement) -> str:
    return f"{m.variant} · {m.runtime} · {m.precision}"


def _short(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _flips(hop: Hop) -> str:
    if hop.previous is None:
        return "the first"
    return f"{hop.lost:,} answers lost, {hop.gained:,} gained<br>against {hop.previous}"


def _in_lines(name: str) -> str:
    """At most two."""
    return "<br>".join((_file_name(name) if name.endswith(".onnx") else name).rsplit(" ", 1))


def _file_name(file: str) -> str:
    return f"{file.removeprefix('quantized.').removesuffix('.onnx')} file"
