"""Rate limits per visitor (requests per minute, uploads per hour), and limits on the size and duration of a request's body."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from fastapi.responses import PlainTextResponse

from compress.errors import CompressError

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

UPLOAD = "/gradio_api/upload"
MAX_BODY_BYTES = 1 << 17
"""Limit for a request that is not an upload."""
SLACK_BYTES = 1 << 16
"""Allowance for the multipart headers of an upload."""
SILENCE_S = 30.0
"""Longest pause within a body."""
SLOWEST_BYTES_S = 16 * 1024
"""Minimum average rate of a body after the first SILENCE_S."""
MOST_VISITORS = 10_000
TOO_LARGE, TOO_SLOW, TOO_MANY = 413, 408, 429


class Rate:
    """A leaky bucket for each visitor: at most `events` per `seconds`."""

    def __init__(self, events: int, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._events, self._per_second, self._clock = events, events / seconds, clock
        self._fill: dict[str, tuple[float, float]] = {}
        """Visitor -> fill level of the bucket, and time of it."""

    def wait_s(self, visitor: str) -> float:
        """Counts an event and returns 0; returns the seconds to wait, without counting, if the bucket is full."""
        now = self._clock()
        if len(self._fill) >= MOST_VISITORS:
            self._fill = {name: fill for name, fill in self._fill.items() if self._level(fill, now) > 0}
        level = self._level(self._fill.get(visitor, (0.0, now)), now)
        if level + 1 > self._events:
            return (level + 1 - self._events) / self._per_second
        self._fill[visitor] = (level + 1, now)
        return 0.0

    def full_for_s(self, visitor: str) -> float:
        """What `wait_s` would return, without counting."""
        now = self._clock()
        level = self._level(self._fill.get(visitor, (0.0, now)), now)
        return max(0.0, level + 1 - self._events) / self._per_second

    def _level(self, fill: tuple[float, float], now: float) -> float:
        level, moment = fill
        return max(0.0, level - (now - moment) * self._per_second)


class Refused(CompressError):
    """Aborts the reading of a body; `status` is the HTTP status of the answer."""

    def __init__(self, status: int, sentence: str) -> None:
        super().__init__(sentence)
        self.status = status


class Limits:
    """Middleware; identifies visitors by address, which requires FORWARDED_ALLOW_IPS behind a proxy."""

    def __init__(
        self,
        app: Any,
        *,
        requests_per_min: int,
        uploads_per_hour: int,
        max_upload_bytes: int,
        silence_s: float = SILENCE_S,
    ) -> None:
        self.app = app
        self._requests, self._uploads = Rate(requests_per_min, 60), Rate(uploads_per_hour, 3600)
        self._max_upload_bytes, self._silence_s = max_upload_bytes, silence_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        upload = scope["path"].rstrip("/") == UPLOAD and scope["method"] == "POST"
        most = self._max_upload_bytes + SLACK_BYTES if upload else MAX_BODY_BYTES
        if (refusal := self._refusal(scope, upload, most)) is not None:
            await refusal(scope, receive, send)
            return
        body = _Body(receive, send, most, self._silence_s)
        try:
            await self.app(scope, body.receive, body.send)
        except Exception:  # the exception ended the app's reading; the visitor gets an answer
            if body.refused is None:
                raise
            await body.answer()

    def _refusal(self, scope: Scope, upload: bool, most: int) -> PlainTextResponse | None:
        visitor = scope["client"][0] if scope.get("client") else ""
        waits = [self._requests.wait_s(visitor)]
        if upload and not waits[0]:
            waits.append(self._uploads.wait_s(visitor))
        if max(waits) > 0:
            seconds = int(max(waits)) + 1
            text = f"Too many requests from your address. Try again in {seconds} s."
            return PlainTextResponse(text, status_code=TOO_MANY, headers={"retry-after": str(seconds)})
        lengths = [value for name, value in scope["headers"] if name.lower() == b"content-length"]
        if lengths and (not lengths[0].isdigit() or int(lengths[0]) > most):
            return PlainTextResponse(_too_large(most), status_code=TOO_LARGE, headers={"connection": "close"})
        return None


class _Body:
    """Limits the body of one request, and replaces the answer if the body was refused."""

    def __init__(self, receive: Receive, send: Send, most: int, silence_s: float) -> None:
        self._receive, self._send, self._most, self._silence_s = receive, send, most, silence_s
        self._begun, self._bytes, self._whole, self._answered = time.monotonic(), 0, False, False
        self.refused: Refused | None = None

    async def receive(self) -> Message:
        if self._whole:  # from here on only a disconnect can arrive
            return await self._receive()
        try:
            message = await asyncio.wait_for(self._receive(), self._silence_s)
        except TimeoutError:
            raise self._refuse(
                TOO_SLOW, "The request did not arrive: send it again over a faster connection."
            ) from None
        if message["type"] == "http.disconnect":
            raise self._refuse(TOO_SLOW, "The request was interrupted.")
        self._bytes += len(message.get("body", b""))
        self._whole = not message.get("more_body", False)
        passed = time.monotonic() - self._begun
        if self._bytes > self._most:
            raise self._refuse(TOO_LARGE, _too_large(self._most))
        if not self._whole and passed > self._silence_s and self._bytes < passed * SLOWEST_BYTES_S:
            raise self._refuse(TOO_SLOW, "The request arrived too slowly: send it again over a faster connection.")
        return message

    async def send(self, message: Message) -> None:
        if self.refused is not None:
            await self.answer()
        else:
            self._answered = True
            await self._send(message)

    async def answer(self) -> None:
        """Sends the refusal, unless an answer has started."""
        if self.refused is not None and not self._answered:
            self._answered = True
            text = str(self.refused).encode()
            headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"connection", b"close")]
            await self._send({"type": "http.response.start", "status": self.refused.status, "headers": headers})
            await self._send({"type": "http.response.body", "body": text})

    def _refuse(self, status: int, sentence: str) -> Refused:
        self.refused = Refused(status, sentence)
        return self.refused


def _too_large(most: int) -> str:
    return f"The request is larger than the maximum allowed size of {_size(most)}."


def _size(count: int) -> str:
    return f"{count // 2**20} MiB" if count >= 2**20 else f"{count // 2**10} KiB"
