"""HTML beside the form: what the settings mean, the plan, and what the check before a run found."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from fractions import Fraction
from html import escape
from typing import Any

from compress.request import Request
from compress.ui import views
from compress.ui.estimates import Estimate


def explain(request: Request, parameters: int | None, estimate: Estimate | None = None) -> str:
    """Explains what the settings will do, as text and bars.

    Args:
        parameters: number of parameters of the original model, if known.
        estimate: counted from the plan; without it the bars show a rule of thumb, labelled as one.
    """
    kept = (1 - request.sparsity) ** 2 if request.shrinks else 1.0
    before, after = parameters, None if parameters is None else round(parameters * kept)
    if estimate is not None:
        before, after = estimate.parameters
        kept = after / before
    bits = 8 if request.quantizes else request.weight_bits if request.half_precision else 32
    size = kept * bits / 32
    bars = [_bar("Parameters", kept, *_pair(before, after, _millions))]
    if estimate is not None:
        bars.append(
            _bar("Multiplications per image", estimate.macs[1] / estimate.macs[0], *_pair(*estimate.macs, _millions))
        )
    bytes_before = None if before is None else 4 * before
    bytes_after = None if before is None else 4 * before * size
    bars.append(_bar("File size", size, *_pair(bytes_before, bytes_after, views.file_size)))
    summary = f"{_explain_pruning(request, kept)} {_explain_bits(request)}"
    basis = _plan(estimate) if estimate is not None else _rough(request)
    return f'<div class="meaning" role="status"><p>{summary}</p>{"".join(bars)}</div>{basis}'


def _pair(
    before: float | None, after: float | None, shown: Callable[[float], str]
) -> tuple[str, str] | tuple[None, None]:
    return (None, None) if before is None or after is None else (shown(before), shown(after))


def _rough(request: Request) -> str:
    text = "A rule of thumb: layers that are not pruned are not counted yet." if request.shrinks else ""
    return f'<p class="soft">{text}</p>' if text else ""


def _plan(estimate: Estimate) -> str:
    """What the figures are counted from."""
    made = estimate.structure
    what = f"{made.model} with {made.classes:,} classes at {made.input_size} × {made.input_size} pixels"
    without = ", ".join(name.replace("_", " ") for name in estimate.uncounted)
    left = f" {without.capitalize()} not counted." if without else ""
    layers = sum(len(names.split()) for names, *_ in estimate.groups)
    groups = [(names.replace(" ", ", "), str(before), str(after), why) for names, before, after, why in estimate.groups]
    parts = []
    for title, headers, rows, count in (
        ("Layers that shrink", ("Layers", "Channels", "Kept", "Why together"), groups, layers),
        ("Layers that are not pruned", ("Layer", "Why"), estimate.left_out, len(estimate.left_out)),
    ):
        if rows:
            parts.append(views.folded(f"{title} ({count})", views.table(headers, rows, title)))
    shortfall = f'<p class="soft">{escape(estimate.shortfall)}</p>' if estimate.shortfall and not without else ""
    return f'<div class="plan">{shortfall}<p class="soft">Counted from the plan for {escape(what)}.{escape(left)}</p>{"".join(parts)}</div>'


def _explain_pruning(request: Request, kept: float) -> str:
    if not request.prunes:
        return "No channels are removed."
    if not request.shrinks:
        return f"{100 * request.sparsity:.0f} % of the weights become zero; no layer gets smaller or faster."
    return f"{100 * request.sparsity:.0f} % of the channels go: about {_share(kept)} of the parameters stay."


def _explain_bits(request: Request) -> str:
    if request.half_precision:
        return "16-bit numbers take half the space of 32-bit ones."
    if not request.quantizes:
        return "Numbers keep their 32 bits."
    if request.weight_bits == 8:
        return "8-bit integers take a quarter of the space of 32-bit numbers."
    return (
        f"{request.weight_bits}-bit weights are trained on their grid and kept in 8-bit integers, "
        "so the file is as large as at 8 bits."
    )


def _share(value: float) -> str:
    nearest = Fraction(1, max(1, round(1 / value)))
    if abs(float(nearest) - value) < 0.03 * value:
        return f"{nearest.numerator}/{nearest.denominator}"
    return f"{100 * value:.0f} %"


def _bar(name: str, share: float, before: str | None, after: str | None) -> str:
    text = f"about <b>{_share(share)}</b>"
    if before and after:
        text = f"{before} → about <b>{after}</b>" if share < 1 else f"<b>{before}</b>"
    return (
        f'<div class="bar"><span>{name}</span><span class="value">{text}</span>'
        f'<i class="track" aria-hidden="true"><i style="width:{max(1.0, 100 * share):.1f}%"></i></i></div>'
    )


def _millions(count: float) -> str:
    return f"{count / 1e6:.1f} million"


def check_result(found: Mapping[str, Any]) -> str:
    """What the pre-flight check found: the plan, what is not pruned and why, the runtimes."""
    groups = [
        (
            ", ".join(g["layers"][:3]) + (f" and {len(g['layers']) - 3} more" if len(g["layers"]) > 3 else ""),
            str(g["channels_before"]),
            str(g["channels_after"]),
            str(g["reason"]),
        )
        for g in found["groups"]
    ]
    kept = [(str(item["layer"]), str(item["reason"])) for item in found["left_out"]]
    modules = [(line["level"], line["module"], line["text"]) for line in found.get("modules", ())]
    runtimes = [(str(item["runtime"]), str(item["text"])) for item in found["runtimes"]]
    parts = [f'<p class="{"good" if found["possible"] else "bad"}">{escape(str(found["text"]))}</p>']
    for title, headers, rows in (
        ("Layers that shrink", ("Layers", "Channels", "Kept", "Why together"), groups),
        ("Layers that are not pruned", ("Layer", "Why"), kept),
        ("Each layer", ("", "Layer", "What happens to it"), modules),
        ("Runtimes", ("Runtime", "State"), runtimes),
    ):
        if rows:
            parts.append(views.folded(f"{title} ({len(rows)})", views.table(headers, rows, title)))
    return f'<div class="checked" role="status">{"".join(parts)}</div>'
