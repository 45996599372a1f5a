"""The front that can be expected before any training: every group loses the same share, at several shares.

Each point is made and measured as `OneShot` does: pruned, refitted, calibrated, timed on the runtime. Fine-tuning starts from
there, so the points lost are more than what a run loses as far as training does no harm.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import plotly.graph_objects as go
from torch import nn

from compress import tasks
from compress.errors import RequestError, RunError
from compress.files import write_text
from compress.report.charts import COLOURS, dress
from compress.report.forecast import FILE, Front, Point, difference
from compress.request import Request
from compress.search.evaluate import OneShot
from compress.search.latency import MEASURED
from compress.search.outcome import Outcome
from compress.search.pages import page
from compress.search.space import Space
from compress.workload import open_workload

RATIOS = (0.25, 0.375, 0.5, 0.625, 0.75)
PAGE = "forecast.html"


def measure(
    request: Request,
    folder: Path,
    *,
    model: nn.Module | None = None,
    ratios: Sequence[float] = RATIOS,
    notify: Callable[[str], None] = lambda text: None,
) -> Front:
    """Measures every ratio that `folder` does not hold yet; the folder then has the front as JSON and HTML.

    Args:
        folder: new, empty, or of an interrupted attempt with the same request, which then goes on.
        ratios: shares of each group's channels to remove, 0 < r < 1.

    Raises:
        RequestError: no ratio, or one out of range.
        RunError: the folder holds something else.
        CompressError: the model cannot be made at a ratio.
    """
    wanted = sorted(set(ratios))
    if not wanted or not all(0 < ratio < 1 for ratio in wanted):
        raise RequestError("ratios", tuple(ratios), "fractions strictly between 0 and 1, at least one")
    _require_own(folder)
    with OneShot(request, open_workload(request, model), folder, notify=notify) as oneshot:
        space = Space(oneshot.groups, request.channel_multiple, largest=1.0)
        points = {point.sparsity: point for point in _finished(folder)}
        for number, ratio in enumerate(wanted, start=1):
            if ratio not in points:
                notify(f"{number} of {len(wanted)}: {100 * ratio:g} % of the channels of each layer")
                points[ratio] = _point(ratio, oneshot.evaluate(space.uniform(ratio)), oneshot.dense)
            found = Front(
                request=request.model_dump(mode="json"),
                runtime=oneshot.runtime.name,
                n_images=oneshot.dense.n_images,
                dense_accuracy=oneshot.dense.accuracy,
                dense_latency_ms=oneshot.dense.latency_ms,
                points=tuple(points[ratio] for ratio in sorted(points)),
            )
            write_text(folder / FILE, found.model_dump_json(indent=1) + "\n")
    write_text(folder / PAGE, forecast_page(found))
    return found


def _require_own(folder: Path) -> None:
    own = {MEASURED, FILE, PAGE}
    found = sorted(entry.name for entry in folder.iterdir()) if folder.exists() else []
    if strangers := [name for name in found if name not in own and not name.startswith(".partial-")]:
        raise RunError(
            f"The output folder {folder} is not empty (it holds {strangers[0]}). Choose a new or empty folder, or that of "
            "an interrupted forecast."
        )


def _finished(folder: Path) -> tuple[Point, ...]:
    path = folder / FILE
    return Front.from_file(path).points if path.exists() else ()


def _point(ratio: float, outcome: Outcome, dense: Outcome) -> Point:
    lost, low, high = difference(_share(dense), _share(outcome))
    return Point(
        sparsity=ratio,
        accuracy=outcome.accuracy,
        points_lost=100 * lost,
        points_lost_low=100 * low,
        points_lost_high=100 * high,
        latency_ms=outcome.latency_ms,
        speedup=dense.latency_ms / outcome.latency_ms,
        speedup_low=dense.latency_ms / outcome.latency_high_ms,
        speedup_high=dense.latency_ms / outcome.latency_low_ms,
        file_bytes=outcome.file_bytes,
        parameters=outcome.parameters,
        macs=outcome.macs,
    )


def _share(outcome: Outcome) -> tuple[float, float, float]:
    found = tasks.share(round(outcome.accuracy * outcome.n_images), outcome.n_images)
    return found.value, found.low, found.high


# ---- the page --------------------------------------------------------------------------------------------------------


def forecast_page(front: Front) -> str:
    """One HTML file: the front with its uncertainty, and the same as numbers."""
    best = max(front.points, key=lambda point: point.speedup)
    text = (
        f"Without any training, {100 * best.sparsity:g} % sparsity is {best.speedup:.1f}x faster on {front.runtime} and "
        f"loses {best.points_lost:.1f} points; fine-tuning starts from there."
    )
    note = (
        f"Points of accuracy below the original on {front.n_images:,} images held out from the training images, and how much "
        "faster than its fastest real fp32. Bars: 95 % of the accuracy, and half of all single calls."
    )
    header = ("Sparsity", "Points lost", "95 %", "Faster", "Half of all calls", "ms", "MB", "Parameters", "MACs")
    rows = [
        (
            f"{100 * p.sparsity:g} %",
            f"{p.points_lost:.1f}",
            f"{p.points_lost_low:.1f} to {p.points_lost_high:.1f}",
            f"{p.speedup:.2f}x",
            f"{p.speedup_low:.2f} to {p.speedup_high:.2f}x",
            f"{p.latency_ms:.3f}",
            f"{p.file_bytes / 1e6:.2f}",
            f"{p.parameters / 1e6:.2f} M",
            f"{p.macs / 1e6:.1f} M",
        )
        for p in front.points
    ]
    section = ("What can be expected", note, lambda dark: _figure(front, dark), (header, rows))
    return page(f"{front.request['model']}: forecast", text, [section])


def _figure(front: Front, dark: bool) -> go.Figure:
    points = front.points
    figure = go.Figure(
        go.Scatter(
            x=[p.speedup for p in points],
            y=[p.points_lost for p in points],
            text=[f"{100 * p.sparsity:g} %" for p in points],
            error_x=_bars([p.speedup for p in points], [(p.speedup_low, p.speedup_high) for p in points]),
            error_y=_bars([p.points_lost for p in points], [(p.points_lost_low, p.points_lost_high) for p in points]),
            mode="lines+markers+text",
            textposition="bottom right",
            marker={"color": COLOURS["quantized"], "size": 9},
            hovertemplate="%{text}: %{y:.1f} points lost, %{x:.2f}x faster<extra></extra>",
        )
    )
    figure.update_xaxes(title="times faster than the original's fastest fp32, batch 1")
    figure.update_yaxes(title="points of accuracy lost, untrained", autorange="reversed")
    return dress(figure, dark).update_layout(height=420, showlegend=False)


def _bars(values: Sequence[float], ranges: Sequence[tuple[float, float]]) -> dict[str, object]:
    return {
        "type": "data",
        "symmetric": False,
        "array": [high - value for value, (_, high) in zip(values, ranges, strict=True)],
        "arrayminus": [value - low for value, (low, _) in zip(values, ranges, strict=True)],
        "thickness": 1,
    }
