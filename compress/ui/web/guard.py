"""Security headers on every answer, and checks of Host, Origin and proxy headers before anything else reads a request."""

from __future__ import annotations

import ipaddress
import json
import re
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

from fastapi.responses import PlainTextResponse

from compress.ui.web.limits import Message, Receive, Scope, Send
from compress.ui.web.settings import LOOPBACK

CONTENT_SECURITY_POLICY = "; ".join(
    (
        "default-src 'self'",
        # Gradio's page starts from inline scripts and evaluates the `js=` of its events
        "script-src 'self' 'unsafe-inline' 'unsafe-eval'",
        "style-src 'self' 'unsafe-inline'",
        "img-src 'self' data: blob:",
        "font-src 'self' data:",
        "connect-src 'self'",
        "worker-src 'self' blob:",
        "object-src 'none'",
        "base-uri 'self'",
        "form-action 'self'",
        "frame-ancestors 'self' https://huggingface.co https://*.hf.space",  # a Space shows the app in a frame
    )
)
HEADERS = {
    "content-security-policy": CONTENT_SECURITY_POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",  # the address of a run is the key to it
    "permissions-policy": "camera=(), microphone=(), geolocation=()",
    "cross-origin-resource-policy": "same-origin",
}
ELSEWHERE = re.compile(r"/(proxy=|file[=/][a-z][a-z0-9+.-]*:)", re.IGNORECASE)
"""Paths for which Gradio would fetch a URL for anyone."""
SAFE_METHODS = ("GET", "HEAD", "OPTIONS")
PROXIED = re.compile(r"(x-)?forwarded(-.*)?|via|x-real-ip|(true-)?client-ip|x-client-ip|cf-.*|x-original-.*|x-envoy-.*")
"""Names of headers that a proxy adds."""
CROSS_ORIGIN = b"access-control-"
"""Prefix of the CORS headers, all of which are removed."""


class Guard:
    """Middleware: adds security headers; refuses unknown Host names, cross-site requests, and paths that fetch URLs.

    Args:
        hosts: accepted Host names.
        local: every visitor may change every run, so requests through a proxy are refused.
        addresses: accept numeric addresses, too.
    """

    def __init__(self, app: Any, hosts: Sequence[str], local: bool, addresses: bool = False) -> None:
        self.app, self._hosts, self._local, self._addresses = app, frozenset(hosts), local, addresses
        self._behind_proxies = self._hosts.difference(LOOPBACK)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                kept = [item for item in message["headers"] if not item[0].lower().startswith(CROSS_ORIGIN)]
                present = {name.lower() for name, _ in kept}
                extra = [
                    (name.encode(), value.encode()) for name, value in HEADERS.items() if name.encode() not in present
                ]
                message = {**message, "headers": [*kept, *extra]}
            await send(message)

        refusal = self._refusal(scope)
        scope = {**scope, "headers": [item for item in scope["headers"] if not self._misleads(item)]}
        answer = self.app if refusal is None else PlainTextResponse(refusal, status_code=403)
        await answer(scope, receive, send_with_headers)

    def _refusal(self, scope: Scope) -> str | None:
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        host = headers.get("host", "")
        if sum(name.lower() == b"host" for name, _ in scope["headers"]) > 1 or not self._answers_to(_name(host)):
            name = json.dumps(_name(host)[:100])
            return f"This server does not accept the host name {name}: add it to ESPALIER_ALLOWED_HOSTS."
        proxied = any(PROXIED.fullmatch(name) for name in headers) or scope.get("http_version") == "1.0"
        if self._local and (proxied or self._is_served_elsewhere(headers)):
            return (
                "This request came through a proxy, and this server lets every visitor change every run: add the host name "
                "that the proxy serves to ESPALIER_ALLOWED_HOSTS."
            )
        if scope["method"] not in SAFE_METHODS and self._is_of_another_site(headers, host):
            return "Pages of other sites may not send requests to this server."
        if ELSEWHERE.search(scope["path"]):
            return "This server does not fetch files from other addresses: upload the file."
        return None

    def _answers_to(self, name: str) -> bool:
        return name in self._hosts or (self._addresses and _is_address(name))

    def _is_served_elsewhere(self, headers: dict[str, str]) -> bool:
        """Whether the browser shows another address, which even a proxy that hides itself cannot change."""
        origin = headers.get("origin", "null")
        return (
            headers.get("sec-fetch-site") == "same-origin"
            and origin != "null"
            and not self._answers_to(_origin(origin))
        )

    def _misleads(self, header: tuple[bytes, bytes]) -> bool:
        """Whether Gradio would use the unverified name in this header for its own URLs."""
        name, value = header
        return name.lower() == b"x-forwarded-host" and not self._answers_to(_name(value.decode("latin-1")))

    def _is_of_another_site(self, headers: dict[str, str], host: str) -> bool:
        """Whether a cross-site page sent the request: by Sec-Fetch-Site (newer browsers, HTTPS), else by Origin."""
        if (site := headers.get("sec-fetch-site")) is not None:
            return site not in ("same-origin", "none")
        if (origin := headers.get("origin")) is None:
            return False  # a program, not a page
        came_from = _netloc(origin)
        return came_from != host.lower() and _name(came_from) not in self._behind_proxies


def _netloc(origin: str) -> str:
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:
        return ""


def _origin(origin: str) -> str:
    return _name(_netloc(origin))


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _name(host: str) -> str:
    """The host of `name:port`, `name` or `[address]:port`."""
    return re.sub(r":\d*$", "", host).strip("[]").lower()
