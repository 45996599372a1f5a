"""Optional login in front of everything that the server answers: the page, the API, MCP and the files of runs.

HTTP Basic authentication (RFC 7617), because browsers, `gradio_client`, curl and MCP clients all speak it and no route can
be forgotten: what is not let in here reaches no other code. The password goes along with every request, so TLS belongs
in front of a server that others reach through a network.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
from collections.abc import Sequence

from fastapi.responses import PlainTextResponse
from starlette.requests import Request

from compress.ui.web.limits import MOST_VISITORS, TOO_MANY, Rate, Receive, Scope, Send

HEALTH = "/healthz"
"""Tells only whether the server is well, and is asked by what starts it again."""
WRONG_PER_MIN = 10
"""Wrong passwords of one address; when there are more, it has to wait, with the right one as well."""
NAME = "login_name"
"""Where a request's scope holds who sent it."""
SENTENCE = "This server asks for a name and a password: those that its ESPALIER_LOGIN holds."


class Login:
    """Middleware that lets in whoever has one of `accounts`, pairs of name and password."""

    def __init__(self, app: object, accounts: Sequence[tuple[str, str]], wrong_per_min: int = WRONG_PER_MIN) -> None:
        self.app = app
        self._accounts = [(name, _digest(f"{name}:{password}")) for name, password in accounts]
        self._wrong = Rate(wrong_per_min, 60)
        self._known: set[tuple[str, bytes]] = set()
        """Address and digest of those let in: they are not shut out by wrong passwords of others at their address."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or _asks_for_health(scope):
            await self.app(scope, receive, send)  # type: ignore[operator]
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})  # the app has none
            return
        refusal = self._refusal(scope)
        await (self.app if refusal is None else refusal)(scope, receive, send)  # type: ignore[operator]

    def _refusal(self, scope: Scope) -> PlainTextResponse | None:
        given = _credentials(scope)
        if given is None:
            return _ask()
        visitor = (scope["client"][0] if scope.get("client") else "", _digest(given))
        if visitor not in self._known and (wait := self._wrong.full_for_s(visitor[0])) > 0:
            text = f"Too many wrong passwords from your address. Try again in {int(wait) + 1} s."
            return PlainTextResponse(text, status_code=TOO_MANY, headers={"retry-after": str(int(wait) + 1)})
        names = [name for name, digest in self._accounts if hmac.compare_digest(digest, visitor[1])]
        if not names:
            self._wrong.wait_s(visitor[0])
            return _ask()
        if len(self._known) < MOST_VISITORS:
            self._known.add(visitor)
        scope[NAME] = names[0]
        return None


def login_name(request: Request) -> str | None:
    """Whose request it is that was let in; None where no login is asked for."""
    return request.scope.get(NAME)


def _asks_for_health(scope: Scope) -> bool:
    return scope["type"] == "http" and scope["path"] == HEALTH and scope["method"] in ("GET", "HEAD")


def _ask() -> PlainTextResponse:
    challenge = {"www-authenticate": 'Basic realm="Espalier", charset="UTF-8"'}
    return PlainTextResponse(SENTENCE, status_code=401, headers=challenge)


def _credentials(scope: Scope) -> str | None:
    """`name:password` as the request gives them; None when it gives none that can be read."""
    for header, value in scope["headers"]:
        kind, _, encoded = value.partition(b" ")
        if header.lower() == b"authorization" and kind.lower() == b"basic":
            try:
                return base64.b64decode(encoded.strip(), validate=True).decode("utf-8")
            except ValueError:
                return None
    return None


def _digest(text: str) -> bytes:
    """Of one length whatever is given, so that comparing takes one time."""
    return hashlib.sha256(text.encode()).digest()
