"""What a browser is told about every answer, and requests that are refused before anything looks at them."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

from fastapi.responses import PlainTextResponse

from compress.ui.limits import Message, Receive, Scope, Send
from compress.ui.settings import LOOPBACK

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
"""Paths for which Gradio would fetch what lies at another address, whoever asks."""
SAFE_METHODS = ("GET", "HEAD", "OPTIONS")
PROXIED = ("forwarded", "x-forwarded-for", "x-forwarded-host")
"""Headers that a proxy adds."""


class Guard:
    """Security headers on every answer; refuses foreign Host names, other sites' pages, and what reaches beyond the app.

    Args:
        hosts: names that are answered; none for any.
        local: everybody who reaches this server may change every run, so nobody may come through a proxy.
    """

    def __init__(self, app: Any, hosts: Sequence[str], local: bool) -> None:
        self.app, self._hosts, self._local = app, frozenset(hosts), local
        self._behind_proxies = self._hosts.difference(LOOPBACK)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                present = {name.lower() for name, _ in message["headers"]}
                extra = [
                    (name.encode(), value.encode()) for name, value in HEADERS.items() if name.encode() not in present
                ]
                message = {**message, "headers": [*message["headers"], *extra]}
            await send(message)

        refusal = self._refusal(scope)
        answer = self.app if refusal is None else PlainTextResponse(refusal, status_code=403)
        await answer(scope, receive, send_with_headers)

    def _refusal(self, scope: Scope) -> str | None:
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        host = headers.get("host", "")
        if self._hosts and _name(host) not in self._hosts:
            name = json.dumps(_name(host)[:100])
            return f"This server does not answer to the name {name}; ESPALIER_ALLOWED_HOSTS lists those it answers to."
        if self._local and any(name in headers for name in PROXIED):
            return (
                "This request came through a proxy, and this server lets everybody who reaches it change every run: put the "
                "name under which the proxy serves it into ESPALIER_ALLOWED_HOSTS."
            )
        if scope["method"] not in SAFE_METHODS and self._is_of_another_site(headers, host):
            return "Another site's page may not act on this server."
        if ELSEWHERE.search(scope["path"]):
            return "This server fetches nothing from other addresses: upload the file."
        return None

    def _is_of_another_site(self, headers: dict[str, str], host: str) -> bool:
        """A browser tells where a page comes from: newer ones and by HTTPS as Sec-Fetch-Site, all of them as Origin."""
        if (site := headers.get("sec-fetch-site")) is not None:
            return site not in ("same-origin", "none")
        if (origin := headers.get("origin")) is None:
            return False  # no page, but a program
        came_from = urlsplit(origin).netloc.lower()
        return came_from != host.lower() and _name(came_from) not in self._behind_proxies


def _name(host: str) -> str:
    """Of `name:port`, `name` or `[address]:port`."""
    return re.sub(r":\d*$", "", host).strip("[]").lower()
