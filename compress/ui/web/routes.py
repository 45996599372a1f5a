"""The allowlist of routes; every other request is refused before it reaches Gradio.

Gradio has far more routes than this app needs, and some of them serve files or fetch URLs. A route is open only because it is
listed here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qsl

from fastapi.responses import JSONResponse, PlainTextResponse

from compress.ui.web.bodies import BodyError, sanitized
from compress.ui.web.limits import TOO_MANY, UPLOAD, Message, Receive, Scope, Send
from compress.ui.web.login import HEALTH
from compress.ui.web.streams import Streams, StreamsError
from compress.ui.web.upload_routes import PROGRESS
from compress.ui.web.visitors import visitor_of

READ = ("GET", "HEAD")
NAME, EVENT, FILES = r"[A-Za-z0-9_]{1,64}", r"[A-Za-z0-9_-]{1,64}", r"(?!.*\.\.)[A-Za-z0-9_.@+/-]{1,200}"
API = "/gradio_api"


@dataclass(frozen=True)
class Route:
    """An open route: its methods, its path as a regular expression, and whether its body is JSON."""

    methods: tuple[str, ...]
    path: str
    json: bool = False
    stream: bool = False
    """The answer is an event stream that lasts while the visitor listens."""


OWN = (
    Route(READ, HEALTH),
    Route(READ, r"/runs/[^/]{1,100}/files/.{1,500}"),
    Route(READ, r"/runs/[^/]{1,100}/files\.zip"),
    Route(("POST",), UPLOAD),
    Route(("GET",), PROGRESS, stream=True),
)
PAGE = (
    Route(READ, "/"),
    Route(("GET",), rf"/(assets|static|svelte)/{FILES}"),
    Route(("GET",), rf"({API})?/theme\.css"),
    Route(("GET",), r"/(favicon\.ico|robots\.txt|manifest\.json)"),
    Route(
        ("GET",), rf"{API}/(startup-events|app_id/?)"
    ),  # starts Gradio's queue; tells a page that the server began anew
    Route(("GET",), rf"{API}/heartbeat/{EVENT}", stream=True),
)
EVENTS = (
    Route(("POST",), rf"{API}/queue/join", json=True),
    Route(("GET",), rf"{API}/queue/data", stream=True),
    Route(("POST",), rf"{API}/(run|api)/{NAME}/?", json=True),
    Route(("POST",), rf"{API}/(cancel|reset)/?", json=True),
)
PROGRAMS = (  # gradio_client and plain HTTP
    Route(("GET",), r"/config/?"),
    Route(("GET",), rf"{API}/(info/?|openapi\.json)"),
    Route(("POST",), rf"{API}/call/(v2/)?{NAME}/?", json=True),
    Route(("GET",), rf"{API}/call/(v2/)?{NAME}/{EVENT}", stream=True),
)
TOOLS = (  # the Model Context Protocol
    Route(("POST", "DELETE"), rf"{API}/mcp/?", json=True),
    Route(("GET",), rf"{API}/mcp/?", stream=True),
    Route(("GET",), rf"{API}/mcp/schema"),
)
LOGGING_IN = (Route(("GET",), r"/login/(huggingface|callback)"), Route(("GET",), "/logout"))  # on a Space
CLOSED_QUERIES = ("deep_link",)
"""Query parameters of Gradio that would open a copy of another visitor's page."""


def open_routes(*, mcp: bool = False, space: bool = False) -> tuple[Route, ...]:
    """The routes that a server with these settings answers."""
    return (*OWN, *PAGE, *EVENTS, *PROGRAMS, *(TOOLS if mcp else ()), *(LOGGING_IN if space else ()))


class RouteFilter:
    """Middleware that passes on requests to open routes only, with sanitized JSON bodies.

    Args:
        routes: the open routes.
        is_upload: (upload id, visitor) -> whether this visitor uploaded that file.
        refuses_session: session -> whether it has too many pending answers.
        streams: counts the open event streams.
    """

    def __init__(
        self,
        app: Any,
        routes: Sequence[Route],
        is_upload: Callable[[str, str], bool],
        refuses_session: Callable[[str], bool] = lambda session: False,
        streams: Streams | None = None,
    ) -> None:
        self.app, self._is_upload, self._refuses_session = app, is_upload, refuses_session
        self._streams = streams or Streams()
        self._routes = [(re.compile(route.path), route) for route in routes]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})  # the app has no WebSockets
            return
        matches = [route for path, route in self._routes if path.fullmatch(scope["path"])]
        route = next((route for route in matches if scope["method"] in route.methods), None)
        if route is None or _has_closed_query(scope):
            text = "There is nothing at this address."
            await PlainTextResponse(text, status_code=405 if matches and route is None else 404)(scope, receive, send)
            return
        visitor = visitor_of(scope)
        if route.stream:
            await self._stream(visitor, scope, receive, send)
        elif route.json:
            await self._body(visitor, scope, receive, send)
        else:
            await self.app(scope, receive, send)

    async def _stream(self, visitor: str, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            with self._streams.listening(visitor):
                await self.app(scope, receive, send)
        except StreamsError as error:
            await PlainTextResponse(str(error), status_code=TOO_MANY)(scope, receive, send)

    async def _body(self, visitor: str, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            body = sanitized(
                await _whole(receive), lambda upload_id: self._is_upload(upload_id, visitor), self._refuses_session
            )
        except BodyError as error:
            answer = {"error": str(error), "detail": str(error)}  # as Gradio's page and gradio_client look for it
            await JSONResponse(answer, status_code=400)(scope, receive, send)
            return
        headers = [item for item in scope["headers"] if item[0].lower() not in _REWRITTEN]
        headers += [(b"content-length", str(len(body)).encode()), (b"content-type", b"application/json")]
        await self.app({**scope, "headers": headers}, _once(body, receive), send)


_REWRITTEN = (b"content-length", b"content-type", b"transfer-encoding", b"content-encoding")


def _has_closed_query(scope: Scope) -> bool:
    query = scope.get("query_string", b"").decode("latin-1")
    return any(key.strip().lower() in CLOSED_QUERIES for key, _ in parse_qsl(query, keep_blank_values=True))


async def _whole(receive: Receive) -> bytes:
    """The body, which `Limits` keeps small."""
    body, more = bytearray(), True
    while more:
        message = await receive()
        if message["type"] != "http.request":
            raise BodyError("The request was interrupted.")
        body += message.get("body", b"")
        more = message.get("more_body", False)
    return bytes(body)


def _once(body: bytes, receive: Receive) -> Receive:
    delivered = False

    async def first() -> Message:
        nonlocal delivered
        if delivered:
            return await receive()
        delivered = True
        return {"type": "http.request", "body": body, "more_body": False}

    return first
