"""The named endpoints: submit, status, cancel, resume, list, artifact, check.

`gradio_client`, plain HTTP and the shell's `jobs` commands call the same functions of the queue. Parameters of
`submit` and `check` are the fields of `Request`, made from it, so the two cannot drift apart.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypedDict, get_type_hints

import gradio as gr
from gradio.events import api

from compress.errors import RequestError, RunError
from compress.hub import SCHEME as HUB_SCHEME
from compress.jobs import Queue
from compress.jobs.folders import UPLOAD_FIELDS
from compress.jobs.status import Status
from compress.request import CHECKPOINT_SOURCES, DATA_SOURCES, Request
from compress.ui.errors import public, without_traceback
from compress.ui.handlers import App
from compress.ui.views.results import file_url
from compress.ui.web.permissions import run_key
from compress.ui.web.visitors import Visitor

NAMED_SOURCES = {"checkpoint": CHECKPOINT_SOURCES, "data": DATA_SOURCES, "class_map": ()}
"""What a visitor may give as text where a shell takes a path: never a path of the server."""
MAX_TEXT = 500
"""Characters of an id, a key or a name."""


class File(TypedDict):
    """A file of a finished run."""

    name: str
    url: str
    sha256: str
    bytes: int


def add_endpoints(app: App) -> None:
    """Adds the endpoints to the page that is being built."""
    endpoints = Endpoints(app)
    plain: tuple[Callable[..., Any], ...] = (
        endpoints.status, endpoints.cancel, endpoints.resume, endpoints.list, endpoints.artifact
    )  # fmt: skip
    described: tuple[tuple[Callable[..., Any], str], ...] = ((endpoints.submit, _SUBMIT), (endpoints.check, _CHECK))
    for function in plain:
        api(_with_client_errors(function), api_name=function.__name__, queue=False)
    for function, description in described:
        api(_with_request_parameters(function, description), api_name=function.__name__, queue=False)


class Endpoints:
    """The functions behind the endpoints; they raise `CompressError`."""

    def __init__(self, app: App) -> None:
        self._app = app
        self._queue: Queue = app.queue

    def submit(self, visitor: gr.Request | None, **values: Any) -> dict[str, Any]:
        owner = "" if visitor is None else Visitor.of(visitor).id
        request, files = self._request(values, owner)
        job_id = self._queue.submit(request, files=files, owner=owner)
        return public(self._queue.status(job_id)).as_dict() | {"key": run_key(job_id)}

    async def check(self, visitor: gr.Request | None, **values: Any) -> dict[str, Any]:
        who = "" if visitor is None else Visitor.of(visitor).id
        request, files = self._request(values, who)
        request = request.model_copy(update={field: str(path) for field, path in files.items()})
        return await self._app.check_queue.run(who, partial(self._app.check, request))

    def status(self, job_id: str) -> dict[str, Any]:
        """How a run is doing.

        Args:
            job_id: The id that submit returned.

        Returns:
            state (queued, running, cancelling, done, failed, cancelled), position in the queue, stage, fraction
            (0..1 of the run), seconds_left (of the stage), error (one sentence), and of a finished run its files.
        """
        status = self._queue.status(job_id)
        return public(status).as_dict() | {"files": self._files(status)}

    def cancel(self, job_id: str, key: str = "", visitor: gr.Request | None = None) -> dict[str, Any]:
        """Ends a run. When this returns, at most 5 s later, none of its processes lives.

        Args:
            job_id: The id that submit returned.
            key: The key that submit returned; not needed on a server that only its own machine reaches.

        Returns:
            The run's status.
        """
        self._refuse_unauthorized(job_id, key, visitor)
        return public(self._queue.cancel(job_id)).as_dict()

    def resume(self, job_id: str, key: str = "", visitor: gr.Request | None = None) -> dict[str, Any]:
        """Queues a failed or cancelled run again; finished stages are not repeated.

        Args:
            job_id: The id that submit returned.
            key: The key that submit returned; not needed on a server that only its own machine reaches.

        Returns:
            The run's status.
        """
        self._refuse_unauthorized(job_id, key, visitor)
        return public(self._queue.resume(job_id)).as_dict()

    def list(self, limit: int = 50) -> list[dict[str, Any]]:
        """The latest runs, newest first, where the server shows everybody's runs.

        Args:
            limit: How many, from 1 to 1000.

        Returns:
            The status of each run.
        """
        if not self._app.settings.lists_all_runs:
            raise RunError(
                "This server does not list runs, because a run's id is all that protects it. "
                "Ask for the status of an id."
            )
        if not 1 <= limit <= 1000:
            raise RequestError("limit", limit, "a whole number from 1 to 1000")
        return [public(status).as_dict() for status in self._queue.list(limit)]

    def artifact(self, job_id: str, name: str) -> File:
        """A file of a finished run, after its hash was compared with the run's manifest.

        Args:
            job_id: The id that submit returned.
            name: The file's name as status lists it, for example artifacts/quantized.onnxruntime.onnx.

        Returns:
            name, sha256, bytes, and url, from which it can be downloaded, relative to the server's address.
        """
        self._queue.artifact(job_id, name)
        status = self._queue.status(job_id)
        return next(file for file in self._files(status) if file["name"] == name)

    def _refuse_unauthorized(self, job_id: str, key: str, visitor: gr.Request | None) -> None:
        self._app.permissions.refuse(job_id, key, "" if visitor is None else Visitor.of(visitor).login)

    def _files(self, status: Status) -> Sequence[File]:
        if status.state != "done":
            return []
        return [
            {"name": name, "url": file_url(status.job_id, name), "sha256": facts["sha256"], "bytes": facts["bytes"]}
            for name, facts in sorted(self._queue.artifacts(status.job_id).items())
        ]

    def _request(self, values: dict[str, Any], who: str) -> tuple[Request, dict[str, Path]]:
        """The request and the uploads that stand for some of its fields. Raises `RequestError`."""
        values = dict(values)
        files = {}
        for field in UPLOAD_FIELDS:
            upload = values.pop(f"{field}_file", None)
            if upload is not None:
                files[field] = self._app.uploads.find(upload, who)
                values[field] = files[field].name
            elif values.get(field) is not None and not _is_named(field, values[field]):
                hub = [f"{HUB_SCHEME}owner/name"] if field == "checkpoint" else []
                allowed = [*NAMED_SOURCES[field], *hub, f"a file given as {field}_file"]
                raise RequestError(field, values[field], " or ".join(allowed))
        return Request(
            **{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
        ), files


def _is_named(field: str, value: Any) -> bool:
    return value in NAMED_SOURCES[field] or (field == "checkpoint" and str(value).startswith(HUB_SCHEME))


_SUBMIT = """Queues a run and returns at once.

Args:
{arguments}

Returns:
    The run's status. job_id leads to it, and whoever has that may look at it; key lets its holder cancel and resume it.
"""
_CHECK = """What a run would do, without training: the plan, the layers that are not pruned and why, the runtimes.

Args:
{arguments}

Returns:
    possible, text, groups, left_out, runtimes.
"""
_UPLOADS = {
    "checkpoint": "Upload (handle_file, or the id of one): a .safetensors, .pth or .pt file with a state dict, in place of checkpoint.",
    "data": "Upload (handle_file, or the id of one): a .zip with one folder of images for each class, in place of data.",
    "class_map": "Upload (handle_file, or the id of one): a JSON file, in place of class_map.",
}


def _with_request_parameters(function: Callable[..., Any], description: str) -> Callable[..., Any]:
    """`function` with one typed and documented parameter for each field of `Request`, and one for each upload."""
    hints = get_type_hints(Request)
    parameters, lines = [], []
    for name, field in Request.model_fields.items():
        if name != "class_map":  # only ever an upload
            parameters.append((name, hints[name], field.default))
            lines.append(f"    {name}: {field.description}")
    for name, text in _UPLOADS.items():
        parameters.append((f"{name}_file", str | None, None))  # the id of an upload, see compress.ui.web.bodies
        lines.append(f"    {name}_file: {text}")

    guarded = _with_client_errors(function)
    takes_visitor = "visitor" in inspect.signature(function).parameters
    if takes_visitor:
        parameters.insert(0, ("visitor", gr.Request, None))  # filled in by Gradio, and no parameter of the endpoint

    def named(positional: tuple[Any, ...]) -> dict[str, Any]:
        return dict(zip((name for name, _, _ in parameters), positional, strict=False))

    def call(*positional: Any, **values: Any) -> Any:
        return guarded(**named(positional) | values)

    async def wait(*positional: Any, **values: Any) -> Any:
        return await guarded(**named(positional) | values)

    endpoint: Any = wait if inspect.iscoroutinefunction(function) else call
    endpoint.__name__ = function.__name__
    endpoint.__doc__ = description.format(arguments="\n".join(lines))
    endpoint.__annotations__ = {name: kind for name, kind, _ in parameters} | {"return": dict[str, Any]}
    endpoint.__signature__ = inspect.Signature(
        [
            inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=default, annotation=kind)
            for name, kind, default in parameters
        ],
        return_annotation=dict[str, Any],
    )
    guarded_endpoint: Callable[..., Any] = endpoint
    return guarded_endpoint


def _with_client_errors(function: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps an endpoint so that a `CompressError` reaches the client verbatim.

    Texts and numbers are held to their types here, for all endpoints alike; fields of a request are by `Request`.
    """
    signature = inspect.signature(function, eval_str=True)

    def refuse_wrong_types(positional: tuple[Any, ...], named: dict[str, Any]) -> None:
        for name, value in signature.bind_partial(*positional, **named).arguments.items():
            kind = signature.parameters[name].annotation
            if kind is str and not (isinstance(value, str) and len(value) <= MAX_TEXT):
                raise RequestError(name, _short(value), f"a text of up to {MAX_TEXT} characters")
            if kind is int and (not isinstance(value, int) or isinstance(value, bool)):
                raise RequestError(name, _short(value), "a whole number")

    @without_traceback
    def call(*positional: Any, **named: Any) -> Any:
        refuse_wrong_types(positional, named)
        return function(*positional, **named)

    @without_traceback
    async def wait(*positional: Any, **named: Any) -> Any:
        return await function(*positional, **named)

    endpoint: Any = wait if inspect.iscoroutinefunction(function) else call
    endpoint.__name__, endpoint.__doc__ = function.__name__, inspect.getdoc(function)
    endpoint.__annotations__ = get_type_hints(function)
    endpoint.__signature__ = signature
    wrapped: Callable[..., Any] = endpoint
    return wrapped


def _short(value: Any) -> Any:
    """As much of a wrong value as a sentence holds."""
    return value[:50] if isinstance(value, str) else value if isinstance(value, int | float) else type(value).__name__
