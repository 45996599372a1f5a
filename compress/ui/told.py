"""What a visitor is told when the app itself makes a mistake: one sentence; the traceback goes to the server's log."""

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
from compress.jobs import Status

log = logging.getLogger("compress.ui")
MISTAKE = "The server made a mistake with this request; its log says more. Try again, or tell its administrator."
WRONG_VALUES = "The values of this request are not what this event takes: reload the page. gradio_api/info tells programs what is taken."
FOLDERS = re.compile(r"(?<![\w.:/<])/(?:[\w.@+-]+/)+")


def without_folders(text: str) -> str:
    """The text with files in place of paths: which folders a server has is nobody's business."""
    return FOLDERS.sub("", text)


def public(status: Status) -> Status:
    """What is known of a run, as everybody may read it who has its link."""
    error = None if status.error is None else without_folders(status.error)
    return replace(status, error=error, message=without_folders(status.message))


def without_traceback(function: Callable[..., Any], sentence: str = MISTAKE) -> Callable[..., Any]:
    """`function` (a coroutine, too) with refusals told word for word and anything unexpected as one sentence."""

    def told(error: Exception) -> gr.Error:
        if isinstance(error, CompressError):
            return gr.Error(without_folders(str(error)), print_exception=False)
        log.error("a request failed", exc_info=error)
        return gr.Error(sentence, print_exception=False)

    @wraps(function)
    def call(*given: Any, **named: Any) -> Any:
        try:
            return function(*given, **named)
        except gr.Error:
            raise
        except Exception as error:  # noqa: BLE001 - whatever it is, the visitor gets a sentence
            raise told(error) from error

    @wraps(function)
    async def wait(*given: Any, **named: Any) -> Any:
        try:
            return await function(*given, **named)
        except gr.Error:
            raise
        except Exception as error:  # noqa: BLE001 - as above
            raise told(error) from error

    return wait if inspect.iscoroutinefunction(function) else call
