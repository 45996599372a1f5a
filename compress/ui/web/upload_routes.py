"""POST /gradio_api/upload in place of Gradio's own: the same answer, with ids where Gradio has server paths."""

from __future__ import annotations

import asyncio
import json
from collections import OrderedDict
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from typing import Any

import anyio.to_thread
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from compress.errors import CompressError, RequestError
from compress.ui.web.limits import UPLOAD
from compress.ui.web.uploads import NoRoomError, Upload, Uploads
from compress.ui.web.visitors import visitor_of

PROGRESS = "/gradio_api/upload_progress"
MOST_PARTS = 8
"""Files in one request."""
PIECE_BYTES = 1 << 20
"""Bytes per write."""
MOST_WATCHED = 500
PROGRESS_S = 0.2
"""Between two progress messages of an upload."""
LONGEST_WATCH_S = 3600.0
FORM = (
    f"Send uploads as multipart/form-data with at most {MOST_PARTS} parts, each named files and with a filename, as "
    "gradio_client's handle_file does."
)


class FormError(CompressError):
    """The body is not a multipart form of files."""


def add_upload_routes(app: FastAPI, uploads: Uploads) -> None:
    """Adds the routes for uploading and for the progress that Gradio's page shows meanwhile."""
    watched = _ProgressRegistry()

    @app.post(UPLOAD)
    async def upload(request: Request, upload_id: str = "") -> Response:
        reception = _Reception(request, uploads, watched.begin(upload_id))
        try:
            return JSONResponse([upload.id for upload in await reception.all()])
        except FormError as error:
            return PlainTextResponse(str(error), status_code=400)
        except RequestError as error:
            return PlainTextResponse(str(error), status_code=415)
        except NoRoomError as error:
            return PlainTextResponse(str(error), status_code=507, headers={"connection": "close"})
        finally:
            watched.end(upload_id)

    @app.get(PROGRESS)
    async def progress(upload_id: str) -> Response:
        return StreamingResponse(watched.messages(upload_id), media_type="text/event-stream")


class _Reception:
    """Receives the files of one request, all of them or none."""

    def __init__(self, request: Request, uploads: Uploads, progress: dict[str, int]) -> None:
        self._request, self._uploads, self._progress = request, uploads, progress
        self._visitor = visitor_of(request.scope)
        self._done: list[Upload] = []
        self._now: Upload | None = None
        self._name = ""
        self._piece = bytearray()

    async def all(self) -> list[Upload]:
        """Raises `FormError`, `RequestError` or `NoRoomError`; on any failure all files of the request are removed."""
        try:
            length = self._request.headers.get("content-length", "")
            self._uploads.refuse_announced(self._visitor, int(length) if length.isdigit() else 0)
            await self._read()
            return self._done
        except BaseException:
            for upload in (*self._done, *filter(None, [self._now])):
                self._uploads.remove(upload)
            raise

    async def _read(self) -> None:
        kind, options = parse_options_header(self._request.headers.get("content-type"))
        if kind != b"multipart/form-data" or not options.get(b"boundary"):
            raise FormError(FORM)
        parts = _Parts()
        parser = MultipartParser(options[b"boundary"], parts.callbacks())
        async for chunk in self._request.stream():
            try:
                parser.write(chunk)
            except FormParserError as error:
                raise FormError(FORM) from error
            for name, value in parts.taken():
                await self._take(name, value)
        if self._now is not None or not parts.whole:
            raise FormError(f"The form ended early. {FORM}")

    async def _take(self, name: str, value: Any) -> None:
        if name == "begin":
            if len(self._done) >= MOST_PARTS:
                raise FormError(FORM)
            self._now, self._name = self._uploads.begin(self._visitor, value), value
        elif name == "data":
            self._piece += value
            if len(self._piece) >= PIECE_BYTES:
                await self._write()
        else:
            await self._write()
            assert self._now is not None, "a part begins before it ends"
            await anyio.to_thread.run_sync(self._uploads.finish, self._now)
            self._done.append(self._now)
            self._now = None

    async def _write(self) -> None:
        assert self._now is not None, "a part begins before it has data"
        piece, self._piece = bytes(self._piece), bytearray()
        await anyio.to_thread.run_sync(self._uploads.write, self._now, piece)
        self._progress[self._name] = self._progress.get(self._name, 0) + len(piece)


class _Parts:
    """Collects the events of the multipart parser: begin (with the file name), data, and end of each part."""

    def __init__(self) -> None:
        self._events: list[tuple[str, Any]] = []
        self._header, self._value, self._disposition = bytearray(), bytearray(), b""
        self.whole = False

    def callbacks(self) -> Any:
        return {
            "on_header_field": lambda data, start, end: self._header.extend(data[start:end]),
            "on_header_value": lambda data, start, end: self._value.extend(data[start:end]),
            "on_header_end": self._header_ended,
            "on_headers_finished": self._headers_ended,
            "on_part_data": lambda data, start, end: self._events.append(("data", data[start:end])),
            "on_part_end": lambda: self._events.append(("end", None)),
            "on_end": self._ended,
        }

    def taken(self) -> Iterator[tuple[str, Any]]:
        events, self._events = self._events, []
        return iter(events)

    def _header_ended(self) -> None:
        if bytes(self._header).lower() == b"content-disposition":
            self._disposition = bytes(self._value)
        self._header.clear()
        self._value.clear()

    def _headers_ended(self) -> None:
        _, options = parse_options_header(self._disposition)
        if options.get(b"name") != b"files" or not options.get(b"filename"):
            raise FormError(FORM)
        self._disposition = b""
        self._events.append(("begin", options[b"filename"].decode("utf-8", errors="replace")))

    def _ended(self) -> None:
        self.whole = True


class _ProgressRegistry:
    """Progress of the uploads under way, by the page's id of the upload: file name -> bytes since the last message."""

    def __init__(self) -> None:
        self._arriving: OrderedDict[str, dict[str, int]] = OrderedDict()

    def begin(self, upload_id: str) -> dict[str, int]:
        if not upload_id or len(upload_id) > 100:
            return {}
        while len(self._arriving) >= MOST_WATCHED:
            self._arriving.popitem(last=False)
        return self._arriving.setdefault(upload_id, {})

    def end(self, upload_id: str) -> None:
        self._arriving.pop(upload_id, None)

    async def messages(self, upload_id: str) -> AsyncIterator[str]:
        """Server-sent events until the upload ends; gives up on an unknown upload after a few attempts."""
        with suppress(TimeoutError):
            async with asyncio.timeout(LONGEST_WATCH_S):
                for _ in range(10):
                    if upload_id in self._arriving:
                        break
                    await asyncio.sleep(PROGRESS_S)
                while (arrived := self._arriving.get(upload_id)) is not None:
                    for name in list(arrived):
                        yield _message(msg="update", orig_name=name, chunk_size=arrived.pop(name))
                    await asyncio.sleep(PROGRESS_S)
        yield _message(msg="done")


def _message(**values: Any) -> str:
    return f"data: {json.dumps(values)}\n\n"
