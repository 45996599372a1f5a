"""HTML of everything the page shows that is not a form field. All text from outside is escaped here."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from html import escape

from compress.jobs.status import Status
from compress.runs import STAGES

STAGE_NAMES = {
    "baseline": "Baseline",
    "prune": "Prune",
    "finetune": "Fine-tune",
    "quantize": "Quantize",
    "export": "Export",
    "build": "Build",
    "measure": "Measure",
    "report": "Report",
}
STAGE_SENTENCES = {
    "baseline": "Checking how good the original model is",
    "prune": "Removing channels and shrinking the layers",
    "finetune": "Training the smaller model to recover",
    "quantize": "Teaching it to compute with fewer bits",
    "export": "Writing ONNX files and comparing their answers",
    "build": "Building an engine for each runtime",
    "measure": "Timing original and compressed model in turns",
    "report": "Writing the report",
}
STATE_NAMES = {
    "queued": "Waiting",
    "running": "Running",
    "cancelling": "Stopping",
    "done": "Done",
    "failed": "Failed",
    "cancelled": "Cancelled",
}
LOGO = """<svg viewBox="0 0 40 40" width="34" height="34" aria-hidden="true"><g fill="none" stroke="currentColor" stroke-width="2.6" stroke-linecap="round"><path d="M20 37V6"/><path d="M20 31C13 31 6 30 5 23"/><path d="M20 31c7 0 14-1 15-8"/><path d="M20 21c-5 0-9-1-10-7"/><path d="M20 21c5 0 9-1 10-7"/></g><g fill="var(--leaf)"><circle cx="5" cy="20.500" r="3.200"/><circle cx="35" cy="20.500" r="3.200"/><circle cx="10" cy="11.500" r="3.200"/><circle cx="30" cy="11.500" r="3.200"/><circle cx="20" cy="5" r="3.200"/></g></svg>"""  # noqa: E501


def brand(name: str) -> str:
    return f'<a class="brand" href="./" aria-label="{name}">{LOGO}<span>Espalier</span></a>'


def alert(text: str) -> str:
    return f'<div class="alert" role="alert">{escape(text)}</div>' if text else ""


# ---- a run --------------------------------------------------------------------------------------------------------


def run_head(status: Status, *, kept: bool = False, mine: bool = True) -> str:
    """The name, the state and the facts of a run.

    Args:
        kept: it is never removed to make room.
        mine: the visitor may change it.
    """
    begun = f"submitted {ago(status.created)} · run <code>{status.job_id[:8]}</code>"
    facts = f"{begun} · the address of this page is the link to it"
    facts += " · kept" if kept else ""
    facts += "" if mine else " · begun by somebody else, so you can look, download and repeat it"
    title = escape(status.title).replace(" %", "&nbsp;%").replace(" bits", "&nbsp;bits")
    return f'<div class="run-head"><h1>{title}</h1><p>{badge(status.state)}<span class="soft">{facts}</span></p></div>'


def progress(status: Status) -> str:
    """The stages, how far they are, and one sentence; empty once the run is over and well."""
    if status.state == "done":
        return ""
    steps = "".join(_step(status, number, stage) for number, stage in enumerate(STAGES, start=1))
    values = f'aria-valuemin="0" aria-valuemax="100" aria-valuenow="{100 * status.fraction:.0f}"'
    return (
        f'<div class="progress {status.state}"><p class="now" role="status">{_sentence(status)}</p>'
        f'<div class="unseen" role="progressbar" aria-label="Progress of the run" {values}></div>'
        f'<ol class="steps" aria-label="Stages of the run">{steps}</ol></div>'
    )


def _sentence(status: Status) -> str:
    if status.state == "queued":
        ahead = status.position or 0
        return "Starting" if ahead == 0 else f"Waiting for {ahead} run{'s' if ahead > 1 else ''} before this one"
    if status.state == "cancelling":
        return "Stopping"
    if status.state == "cancelled":
        return "This run was cancelled"
    name = STAGE_NAMES.get(status.stage or "", "")
    if status.state == "failed":
        return f"Stopped at {name}" if name else "Stopped before the first stage"
    remaining = "" if status.seconds_left is None else f" · about {duration(status.seconds_left)} left in this stage"
    doing = STAGE_SENTENCES.get(status.stage or "", "Starting")
    detail = "" if status.message in ("", "started") else f" · {escape(status.message)}"
    return f'{doing}<span class="soft">{detail}{remaining}</span>'


def _step(status: Status, number: int, stage: str) -> str:
    fraction = status.stage_fraction
    if number < status.stage_index or (number == status.stage_index and fraction == 1.0):
        kind, share, label = "past", 1.0, "done"
    elif number > status.stage_index:
        kind, share, label = "ahead", 0.0, "to come"
    elif status.state in ("failed", "cancelled"):
        kind, share, label = "broken", fraction, "stopped here"
    elif fraction == 0:
        kind, share, label = "current begun", 0.0, "now"
    else:
        kind, share, label = "current", fraction, f"{100 * fraction:.0f} %"
    mark = ' aria-current="step"' if kind.startswith("current") else ""
    return (
        f'<li class="{kind}"{mark}><i class="track" aria-hidden="true"><i style="width:{100 * share:.0f}%"></i></i>'
        f"<span>{STAGE_NAMES[stage]}</span><small>{label}</small></li>"
    )


def log_text(text: str) -> str:
    lines = "\n".join(text.splitlines()[-200:])
    return f'<pre class="log" tabindex="0" aria-label="Log of the run">{escape(lines) or "Nothing written yet."}</pre>'


def ending(status: Status) -> str:
    """Why a run has no result; empty for one that has or may yet have."""
    if status.state == "failed":
        return f'<div class="alert" role="alert"><b>This run failed.</b> {escape(status.error or "")}</div>'
    if status.state == "cancelled":
        return '<div class="note">Finished stages are kept: resume the run to go on from there.</div>'
    return ""


# ---- tables and text ------------------------------------------------------------------------------------------------


def table(headers: Sequence[str], rows: Iterable[Sequence[str]], name: str) -> str:
    body = ("".join(_cell(cell, first=number == 0) for number, cell in enumerate(row)) for row in rows)
    return html_table(headers, body, name)


def numbers(headers: Sequence[str], rows: Sequence[Sequence[str]], name: str) -> str:
    """The table of a chart, folded away."""
    return folded("The numbers of this chart", table(headers, rows, name)) if rows else ""


def copied(title: str, text: str) -> str:
    """Text to be copied, with a button that does it; see page.js."""
    name = escape(title)
    return (
        f'<div class="copied"><p><b>{name}</b><button type="button" class="copy" aria-label="Copy: {name}">Copy</button>'
        f'</p><pre class="log" tabindex="0" aria-label="{name}">{escape(text)}</pre></div>'
    )


# ---- words --------------------------------------------------------------------------------------------------------


def duration(seconds: float) -> str:
    if not math.isfinite(seconds):
        return "unknown time"
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    if seconds < 5400:
        return f"{round(seconds / 60)} min"
    return f"{seconds / 3600:.1f} h"


def html_table(headers: Iterable[str], rows: Iterable[str], name: str, kind: str = "", *, escaped: bool = False) -> str:
    """A table that scrolls sideways by itself; `rows` are the cells of each row as HTML, and `headers` if `escaped`."""
    head = "".join(f'<th scope="col">{header if escaped else escape(header)}</th>' for header in headers)
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(name)}"><table class="{kind}">'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def folded(title: str, inner: str) -> str:
    return f'<details class="numbers"><summary>{title}</summary>{inner}</details>'


def ago(moment: float) -> str:
    passed = time.time() - moment
    if passed < 60:
        return "just now"
    if passed < 48 * 3600:
        return f"{duration(passed)} ago"
    return f"on {time.strftime('%Y-%m-%d', time.gmtime(moment))}"


def badge(state: str) -> str:
    return f'<span class="badge {state}">{STATE_NAMES[state]}</span>'


def factor(value: float | None) -> str:
    return "—" if value is None else f"{value:.1f}×"


def file_size(count: float) -> str:
    if count < 1000:
        return f"{count:.0f} B"
    return f"{count / 1e3:.1f} kB" if count < 1e6 else f"{count / 1e6:.1f} MB"


def _cell(text: str, *, first: bool) -> str:
    return f'<th scope="row">{escape(text)}</th>' if first else f"<td>{escape(text)}</td>"
