"""HTML of the list of runs, and of what can be done with one: settings, copies of them, links."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from html import escape
from pathlib import Path

from compress.jobs.retention import Limits
from compress.jobs.status import Status
from compress.request import Request, snippets
from compress.ui import views

NONE_YET = "No runs yet. The first one appears here, and stays when you close the page."


def run_list(
    runs: Sequence[Status], ticked: Collection[str] = (), *, searched: bool = False, button: str = "Compare the ticked"
) -> str:
    """The runs with a box at each finished one; the form opens the page of those that are ticked side by side."""
    if not runs:
        return f'<p class="soft" role="status">{"No run matches." if searched else NONE_YET}</p>'
    items = "".join(_item(run, run.job_id in ticked) for run in runs)
    comparable = sum(run.state == "done" for run in runs) > 1
    send = f'<p><button class="button" type="submit">{button}</button></p>' if comparable else ""
    return f'<form class="ticks" action="./" method="get"><ul class="runs">{items}</ul>{send}</form>'


def _item(run: Status, ticked: bool) -> str:
    title = escape(run.title)
    box = ""
    if run.state == "done":
        mark = " checked" if ticked else ""
        box = f'<input type="checkbox" name="compare" value="{run.job_id}" aria-label="Compare {title}"{mark}>'
    return (
        f'<li><span class="tick">{box}</span><a href="?job={run.job_id}"><span class="title">{title}</span>'
        f'{views.badge(run.state)}<span class="soft">{views.ago(run.created)}</span></a></li>'
    )


def links(job_id: str, *, finished: bool) -> str:
    """Where to go from a run; only a finished one can be compared."""
    compare = f'<a class="button" href="?compare={job_id}">Compare</a>' if finished else ""
    return (
        f'<a class="button" href="?again={job_id}">Change and run again</a>'
        f'{compare}<a class="button" href="./">New run</a>'
    )


def keeping(limits: Limits) -> str:
    """When this server removes runs; nothing where it never does."""
    rules = []
    if limits.keep_days is not None:
        rules.append(f"runs {limits.keep_days:g} day{'' if limits.keep_days == 1 else 's'} after they ended")
    if limits.max_bytes is not None:
        rules.append(f"the oldest runs as soon as all together take more than {limits.max_bytes / 1e9:g} GB")
    return f'<p class="soft">This server removes {", and ".join(rules)}; never one that is kept.</p>' if rules else ""


def settings_of(request: Request) -> str:
    """The request as `compress run --request` takes it, folded away."""
    changed = sum(getattr(request, name) != field.default for name, field in Request.model_fields.items())
    count = f"{changed} of {len(Request.model_fields)} differ from the defaults" if changed else "all at their defaults"
    text = f'<pre class="log" tabindex="0" aria-label="Settings of this run">{escape(request.to_json())}</pre>'
    return views.folded(f"Settings of this run ({count})", text)


def copy_as(request: Request, address: str, uploads: Collection[str]) -> str:
    """The request as a shell command, as Python and as `gradio_client` code.

    Args:
        address: of this server.
        uploads: fields that name a file which the visitor has uploaded.
    """
    values = request.model_dump(mode="json")
    files = [str(values[field]) for field in uploads]
    needs = f'<p class="soft">Expects {escape(" and ".join(files))} in the current folder.</p>' if files else ""
    parts = (
        ("Shell command", snippets.shell_command(values) + "\n"),
        ("Python", snippets.python_code(values)),
        ("gradio_client, through this server", snippets.client_code(values, address, uploads)),
    )
    return views.folded("Copy as", needs + "".join(views.copied(title, text) for title, text in parts))


def without_paths(request: Request, uploads: Mapping[str, Path]) -> Request:
    """The request with its uploads by name, as their owner knows them."""
    return request.model_copy(update={field: path.name for field, path in uploads.items()})


def filled_from(status: Status, uploads: Mapping[str, Path]) -> str:
    """Above a form that was filled with the settings of a run."""
    run = f'<a href="?job={status.job_id}">{escape(status.title)}</a>'
    names = escape(" and ".join(path.name for path in uploads.values()))
    files = f" Its {names} {'are' if len(uploads) > 1 else 'is'} used again unless you upload another." if names else ""
    return f'<div class="note" role="status">The form holds the settings of {run}.{files}</div>'
