"""The visitor behind a request, and the state that the browser sends along."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import gradio as gr
from starlette.requests import Request

from compress.ui.web.limits import Scope
from compress.ui.web.login import NAME, login_name


def visitor_of(scope: Scope) -> str:
    """The id of the visitor: the login name, or else the network address. Uploads, checks and limits count by it."""
    client = scope.get("client")
    return scope.get(NAME) or (client[0] if client else "")


@dataclass(frozen=True)
class Visitor:
    """Who sent a request, and the address under which they reached the server."""

    id: str
    """Login name, or else network address."""
    address: str
    """Base URL of the server as the visitor sees it."""
    login: str = ""
    """Login name; empty on a server without login."""

    @classmethod
    def of(cls, request: gr.Request | Request) -> Visitor:
        starlette_request: Any = getattr(request, "request", request)  # MCP tools pass Starlette's request directly
        name = login_name(starlette_request) or getattr(request, "username", None) or ""
        return cls(name or visitor_of(starlette_request.scope), str(starlette_request.base_url), name)


@dataclass(frozen=True)
class PageState:
    """State sent by the browser; a value of an unexpected type counts as missing."""

    job: str
    """Run in the page's address."""
    key: str
    """Key of that run, if this browser has it."""
    again: str
    """Run in the address whose settings prefill the form."""
    compare: tuple[str, ...] | None
    """Runs in the address to compare; None on another page."""
    mine: tuple[str, ...]
    """Runs started in this browser."""
    ticked: tuple[str, ...]
    """Runs ticked in the list."""
    viewport: str
    """Two words: light or dark, wide or narrow."""

    @classmethod
    def read(cls, text: str) -> PageState:
        try:
            values = json.loads(text or "{}")
        except ValueError:
            values = {}
        values = values if isinstance(values, dict) else {}
        lists = {name: _strings(values.get(name)) for name in ("compare", "mine", "ticked")}
        return cls(
            job=str(values.get("job") or ""),
            key=str(values.get("key") or ""),
            again=str(values.get("again") or ""),
            compare=lists["compare"] or None,
            mine=lists["mine"],
            ticked=lists["ticked"],
            viewport=str(values.get("viewport") or ""),
        )


MAX_IDS = 200
"""Runs read from one list; a page keeps 100."""


def _strings(value: Any) -> tuple[str, ...]:
    return tuple(item for item in value[:MAX_IDS] if isinstance(item, str)) if isinstance(value, list) else ()
