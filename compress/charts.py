"""Plotly figures and the tables behind them, drawn from a report and from nothing else.

Backgrounds are transparent and the ink follows `dark`, so that a figure sits on either page. Every figure has a table
of the same numbers for those who cannot see it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from compress.report import Measurement, Report, Variant

Table = tuple[tuple[str, ...], list[tuple[str, ...]]]
"""Headers and rows, all formatted."""

COLOURS = {"baseline": "#8a94a6", "pruned": "#3b82f6", "quantized": "#10a37f", "half": "#10a37f"}
LOSS_COLOURS = {"finetune": "#3b82f6", "quantize": "#10a37f"}
INK = {False: "#1f2937", True: "#e5e7eb"}
GRID = "rgba(128,128,128,.22)"
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif"
TICKS = [mantissa * 10**power for power in range(-3, 5) for mantissa in (1, 2, 5)]
MAX_POINTS = 400
"""Samples drawn per box; the report keeps all."""


def figures(report: Report, *, dark: bool = False) -> dict[str, go.Figure]:
    """The charts of a run, by key: size, latency, accuracy, channels, training. One without data is left out."""
    drawers: dict[str, Callable[[Report], go.Figure | None]] = {
        "size": _size,
        "latency": _latency,
        "accuracy": _accuracy,
        "channels": _channels,
        "training": _training,
    }
    drawn = {key: draw(report) for key, draw in drawers.items()}
    return {key: _dress(figure, dark) for key, figure in drawn.items() if figure is not None}


def tables(report: Report) -> dict[str, Table]:
    """The numbers of each chart under the chart's key, and `summary`: the baseline beside each variant."""
    return {
        "summary": _summary_table(report),
        "size": _size_table(report),
        "latency": _latency_table(report),
        "accuracy": _accuracy_table(report),
        "channels": _channels_table(report),
        "training": _training_table(report),
    }


def smallest_file(variant: Variant) -> int | None:
    """Bytes of the variant's smallest deployable file."""
    return min(variant.file_bytes.values(), default=None)


def fastest(
    report: Report, variant: str, *, batch_size: int = 1, precision: str | None = None, runtime: str | None = None
) -> Measurement | None:
    """The quickest measurement of a variant, of one precision or through one runtime where given."""
    rows = [
        m
        for m in report.measurements
        if m.variant == variant
        and m.batch_size == batch_size
        and precision in (None, m.precision)
        and runtime in (None, m.runtime)
    ]
    return min(rows, key=lambda m: m.p50_ms, default=None)


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
    names = [f"{hop.name}<br><sub>{hop.through}</sub>" for hop in report.ledger]
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
            error_y={"type": "data", "array": high, "arrayminus": low, "thickness": 1.2, "width": 4},
        )
    )
    kind = "agreement with the original" if report.data.kind != "labelled" else "top-1 accuracy"
    figure.update_traces(cliponaxis=False)
    figure.update_yaxes(title=f"{kind}, %  (95 % interval)")
    return figure.update_layout(height=340)


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
    figure.update_yaxes(title="accuracy on held-out training images, %", secondary_y=True, showgrid=False)
    return figure.update_layout(height=340, legend={"orientation": "h", "y": 1.25, "x": 0})


def _dress(figure: go.Figure, dark: bool) -> go.Figure:
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


# ---- tables -------------------------------------------------------------------------------------------------------


def _summary_table(report: Report) -> Table:
    dense = report.variants[0]
    reference = fastest(report, dense.name, precision="fp32")
    rows = []
    for variant in report.variants:
        through = report.verdict.runtime if variant is report.variants[-1] else None
        quickest, file = fastest(report, variant.name, runtime=through), smallest_file(variant)
        rows.append(
            (
                variant.name,
                _count(variant.parameters),
                _count(variant.macs),
                _megabytes(file),
                _times(smallest_file(dense), file),
                _percent(variant.accuracy, variant.accuracy_ci95),
                "—" if quickest is None else f"{quickest.p50_ms:.2f} ms",
                "—" if quickest is None else f"{quickest.runtime}, {quickest.precision}",
                _times(reference and reference.p50_ms, quickest and quickest.p50_ms),
            )
        )
    answer = "Accuracy" if report.data.kind == "labelled" else "Agreement"
    return ("Variant", "Parameters", "MACs", "File", "Smaller", answer, "Batch 1, p50", "Through", "Faster"), rows


def _size_table(report: Report) -> Table:
    files = sorted({name for variant in report.variants for name in variant.file_bytes})
    rows = [
        (v.name, f"{v.parameters:,}", f"{v.macs:,}", *(_megabytes(v.file_bytes.get(name)) for name in files))
        for v in report.variants
    ]
    return ("Variant", "Parameters", "MACs", *files), rows


def _latency_table(report: Report) -> Table:
    headers = (
        "Variant",
        "Runtime",
        "Asked",
        "Really",
        "Integer layers",
        "Batch",
        "p50 ms",
        "p90 ms",
        "p99 ms",
        "Images/s",
        "Samples",
        "Remarks",
    )
    return headers, [
        (
            m.variant,
            m.runtime,
            m.precision_requested,
            m.precision,
            "—" if m.integer_layers is None else f"{m.integer_layers} of {m.candidate_layers}",
            str(m.batch_size),
            f"{m.p50_ms:.3f}",
            f"{m.p90_ms:.3f}",
            f"{m.p99_ms:.3f}",
            f"{m.throughput_per_s:.0f}",
            str(len(m.samples_ms)),
            "; ".join((*(("noisy",) if m.noisy else ()), *m.notes)),
        )
        for m in sorted(report.measurements, key=lambda m: (m.batch_size, m.p50_ms))
    ]


def _accuracy_table(report: Report) -> Table:
    headers = ("Hop", "Through", "Accuracy", "95 % interval", "Agrees with the hop before", "Images")
    return headers, [
        (
            hop.name,
            hop.through,
            f"{100 * hop.accuracy:.2f} %",
            f"{100 * hop.accuracy_ci95[0]:.2f} to {100 * hop.accuracy_ci95[1]:.2f} %",
            "—" if hop.agreement_with_previous is None else f"{100 * hop.agreement_with_previous:.2f} %",
            f"{hop.n:,}",
        )
        for hop in report.ledger
    ]


def _channels_table(report: Report) -> Table:
    sizes = ("Layer", "Type", "Channels", "Kept", "MACs before", "MACs after")
    return (*sizes, "Pruned, off by", "Refitted", "Weight bits", "SQNR dB", "Why"), [
        (
            layer.name,
            layer.type,
            str(layer.channels_before),
            str(layer.channels_after),
            f"{layer.macs_before:,}",
            f"{layer.macs_after:,}",
            _share(layer.pruned_error),
            _share(layer.refitted_error),
            str(layer.weight_bits),
            "—" if layer.sqnr_db is None else f"{layer.sqnr_db:.1f}",
            layer.reason,
        )
        for layer in report.layers
    ]


def _share(share: float | None) -> str:
    return "—" if share is None else f"{100 * share:.2g} %"


def _training_table(report: Report) -> Table:
    return ("Stage", "Epoch", "Loss", "Held-out accuracy", "Seconds"), [
        (
            e.stage,
            str(e.epoch),
            f"{e.train_loss:.4f}",
            "—" if e.accuracy is None else f"{100 * e.accuracy:.2f} %",
            f"{e.seconds:.1f}",
        )
        for e in report.curves
    ]


# ---- words --------------------------------------------------------------------------------------------------------


def _colour(variant: str) -> str:
    return COLOURS.get(variant, "#a855f7")


def _contender(m: Measurement) -> str:
    return f"{m.variant} · {m.runtime} · {m.precision}"


def _short(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _count(value: int) -> str:
    return f"{value / 1e6:.2f} M" if value < 1e9 else f"{value / 1e9:.2f} G"


def _megabytes(size: int | None) -> str:
    return "—" if size is None else f"{size / 1e6:.2f} MB"


def _times(before: float | None, after: float | None) -> str:
    return "—" if not before or not after else f"{before / after:.1f}x"


def _percent(value: float | None, interval: Sequence[float] | None) -> str:
    if value is None:
        return "—"
    return f"{100 * value:.2f} %" + (f" (±{50 * (interval[1] - interval[0]):.1f})" if interval else "")
