"""Errors as visitors see them: one sentence without server paths; tracebacks go to the server's log."""

from __future__ import annotations

import inspect
import logging
import re
from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from typing import Any

import gradio as gr

from compress.errors import CompressError
from compress.jobs.status import Status

log = logging.getLogger("compress.ui")
MISTAKE = "The server failed to process this request because of a bug; its log has the details. Try again, or tell the administrator."
WRONG_VALUES = (
    "The values of this request have the wrong number or types: reload the page, or see gradio_api/info for the API."
)
FOLDERS = re.compile(r"(?<![\w.:/<])/(?:[\w.@+-]+/)+")


def without_folders(text: str) -> str:
    """The text with file names in place of paths, because the server's folders are not public."""
    return FOLDERS.sub("", text)


def public(status: Status) -> Status:
    """The status of a run without server paths, for everyone who has its link."""
    error = None if status.error is None else without_folders(status.error)
    return replace(status, error=error, message=without_folders(status.message))


def without_traceback(function: Callable[..., Any], sentence: str = MISTAKE) -> Callable[..., Any]:
    """Wraps a function or coroutine: a `CompressError` reaches the visitor verbatim, any other exception as `sentence`."""

    def shown(error: Exception) -> gr.Error:
        if isinstance(error, CompressError):
            return gr.Error(without_folders(str(error)), print_exception=False)
        log.error("a request failed", exc_info=error)
        return gr.Error(sentence, print_exception=False)

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except gr.Error:
            raise
        except Exception as error:  # noqa: BLE001 - whatever it is, the visitor gets a sentence
            raise shown(error) from error

    @wraps(function)
    async def wait(*args: Any, **kwargs: Any) -> Any:
        try:
            return await function(*args, **kwargs)
        except gr.Error:
            raise
        except Exception as error:  # noqa: BLE001 - as above
            raise shown(error) from error

    return wait if inspect.iscoroutinefunction(function) else call
