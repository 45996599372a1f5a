"""The self-contained HTML pages of a search: figures in both colour schemes, and the same numbers as tables."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from compress.report.card import templates
from compress.report.charts import COLOURS, dress
from compress.report.tables import Table

NOT_KNOWN = "—"
_LOSS_COLOURS = ((0.0, "#10a37f"), (0.15, "#e8f0e9"), (1.0, "#c2410c"))
_GAIN_COLOURS = ((0.0, "#f3f4f6"), (1.0, "#10a37f"))


def page(title: str, text: str, sections: Sequence[tuple[str, str, Callable[[bool], go.Figure], Table]]) -> str:
    """One HTML file that needs no network.

    Args:
        text: what was found, in a sentence or two.
        sections: (title, explanation, figure for a dark page or a light one, the same as numbers).
    """
    drawn = [
        {
            "title": name,
            "note": note,
            "light": _html(figure(False)),
            "dark": _html(figure(True)),
            "table": table,
        }
        for name, note, figure, table in sections
    ]
    return templates.get_template("search.html").render(title=title, text=text, sections=drawn, plotly=get_plotlyjs())


def _html(figure: go.Figure) -> str:
    html: str = figure.to_html(full_html=False, include_plotlyjs=False, config={"displaylogo": False, "responsive": True})
    return html


def sensitivity_page(table: dict[str, Any]) -> str:
    """The heat maps of `sensitivity.measure`."""
    whole, cells = table["whole"], table["cells"]
    columns = sorted({(cell["kind"], cell["value"]) for cell in cells}, key=lambda c: (c[0] != "ratio", c[1]))
    named = [f"−{100 * value:g} %" if kind == "ratio" else f"{value:g} bits" for kind, value in columns]
    groups = list(dict.fromkeys(cell["layers"][0] for cell in cells))
    found = {(cell["layers"][0], cell["kind"], cell["value"]): cell for cell in cells}

    def values(figure: str) -> list[list[float | None]]:
        return [[found[group, *column][figure] for column in columns] for group in groups]

    def section(title: str, note: str, figure: str, colours: tuple[tuple[float, str], ...], unit: str) -> Any:
        numbers = values(figure)
        words = [[NOT_KNOWN if number is None else f"{number:.1f}" for number in row] for row in numbers]
        table = ("Group", *named), [(group, *row) for group, row in zip(groups, words, strict=True)]
        return title, note, lambda dark: _heat_map(groups, named, numbers, words, colours, unit, dark), table

    text = (
        f"Unpruned, in the precision asked for: {100 * whole['accuracy']:.1f} % of {whole['n_images']:,} images held out "
        f"from the training images, {whole['latency_ms']:.2f} ms on {table['runtime']}, batch 1, {table['threads']} "
        f"thread{'s' if table['threads'] != 1 else ''}. Each cell changes one group of layers and nothing else, without "
        "training."
    )
    lost = "Points of accuracy against the unpruned model; training brings most of it back, but not the order."
    faster = "Percent of the unpruned model's time on the runtime itself; 0 where the runtime gains nothing."
    return page(
        f"{table['request']['model']}: what each group of layers bears",
        text,
        [
            section("Accuracy lost, points", lost, "points_lost", _LOSS_COLOURS, "points"),
            section("Time saved, %", faster, "percent_faster", _GAIN_COLOURS, "%"),
        ],
    )


def search_page(found: dict[str, Any]) -> str:
    """The front of a target search: a point for each measured candidate, each trained run and the original."""
    scored = [t for t in found["trials"] if t["outcome"] and not t["outcome"]["stopped"] and t["repeats"] is None]
    note = (
        "Small points are candidates as they were measured without training, on images held out from the training images; the "
        "line is their front. Large ones are trained runs, by the test images and through the deployed file. Each is compared "
        "with the original on its own images."
    )
    rows = [
        (
            f"trial {t['number']}",
            f"{t['outcome']['latency_ms']:.3f}",
            f"{100 * t['outcome']['accuracy']:.1f}",
            f"{_points_lost(t['outcome'], found['dense']):.1f}",
            f"{t['outcome']['file_bytes'] / 1e6:.2f}",
            "not trained",
        )
        for t in scored
    ]
    rows += [
        (
            row["folder"],
            NOT_KNOWN if row["latency_ms"] is None else f"{row['latency_ms']:.3f}",
            NOT_KNOWN if row["accuracy"] is None else f"{100 * row['accuracy']:.1f}",
            NOT_KNOWN if row["accuracy_drop_points"] is None else f"{row['accuracy_drop_points']:.1f}",
            NOT_KNOWN if row["size_mb"] is None else f"{row['size_mb']:.2f}",
            "; ".join(row["missed"]) or "reaches the target",
        )
        for row in found["runs"]
    ]
    table = ("Point", "ms, batch 1", "Accuracy, %", "Points lost", "MB", "Result"), rows
    draw = partial(_front, scored, found["runs"], found["dense"])
    section = ("Accuracy lost against latency", note, draw, table)
    return page(f"{found['request']['model']}: target search", found["text"], [section])


def pareto(outcomes: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those that no other is both as fast and as accurate as, the fastest first."""
    front: list[dict[str, Any]] = []
    for outcome in sorted(outcomes, key=lambda one: (one["latency_ms"], -one["accuracy"])):
        if not front or outcome["accuracy"] > front[-1]["accuracy"]:
            front.append(outcome)
    return front


def _points_lost(outcome: dict[str, Any], dense: dict[str, Any]) -> float:
    points: float = 100 * (dense["accuracy"] - outcome["accuracy"])
    return points


def _front(
    scored: Sequence[dict[str, Any]], runs: Sequence[dict[str, Any]], dense: dict[str, Any], dark: bool
) -> go.Figure:
    """`dense`: the outcome of the model as it came."""
    figure = go.Figure()
    front = pareto([t["outcome"] for t in scored])
    figure.add_scatter(
        x=[outcome["latency_ms"] for outcome in front],
        y=[_points_lost(outcome, dense) for outcome in front],
        name="front of the candidates",
        mode="lines",
        line={"color": COLOURS["pruned"], "width": 1.5, "shape": "hv"},
        hoverinfo="skip",
    )
    figure.add_scatter(
        x=[t["outcome"]["latency_ms"] for t in scored],
        y=[_points_lost(t["outcome"], dense) for t in scored],
        text=[f"trial {t['number']}" for t in scored],
        name="measured without training",
        mode="markers",
        marker={"color": COLOURS["pruned"], "size": 7, "opacity": 0.6},
        hovertemplate="%{text}<br>%{y:.1f} points lost, %{x:.3f} ms<extra></extra>",
    )
    figure.add_scatter(
        x=[dense["latency_ms"]],
        y=[0.0],
        name="the original, fastest fp32",
        mode="markers",
        marker={"color": COLOURS["baseline"], "size": 11, "symbol": "square"},
        hovertemplate="the original<br>%{x:.3f} ms<extra></extra>",
    )
    trained = [row for row in runs if row["latency_ms"] is not None and row["accuracy_drop_points"] is not None]
    figure.add_scatter(
        x=[row["latency_ms"] for row in trained],
        y=[row["accuracy_drop_points"] for row in trained],
        text=[f'<a href="{row["folder"]}/report.html">{row["trial"]}</a>' for row in trained],
        name="trained runs",
        mode="markers+text",
        textposition="top center",
        marker={"color": COLOURS["quantized"], "size": 13, "symbol": "diamond"},
        hovertemplate="trial %{text}<br>%{y:.1f} points lost, %{x:.3f} ms<extra></extra>",
    )
    figure.update_xaxes(title="milliseconds per image, batch 1")
    figure.update_yaxes(title="points of accuracy lost", autorange="reversed")
    return dress(figure, dark).update_layout(height=420, legend={"orientation": "h", "y": 1.12, "x": 0})


def _heat_map(
    groups: Sequence[str],
    columns: Sequence[str],
    values: Sequence[Sequence[float | None]],
    words: Sequence[Sequence[str]],
    colours: tuple[tuple[float, str], ...],
    unit: str,
    dark: bool,
) -> go.Figure:
    heat = go.Heatmap(
        x=columns,
        y=groups,
        z=values,
        text=words,
        texttemplate="%{text}",
        textfont={"color": "#111827"},
        colorscale=colours,
        zmin=0,
        xgap=2,
        ygap=2,
        colorbar={"title": unit},
        hovertemplate="%{y}, %{x}: %{text} " + unit + "<extra></extra>",
    )
    figure = dress(go.Figure(heat), dark)
    figure.update_yaxes(autorange="reversed", showgrid=False)
    figure.update_xaxes(showgrid=False, type="category")
    return figure.update_layout(height=140 + 30 * len(groups))
