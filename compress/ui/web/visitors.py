"""Who asks, and what their browser tells of itself."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import gradio as gr
from starlette.requests import Request

from compress.ui.web.limits import Scope
from compress.ui.web.login import NAME, login_name


def visitor_of(scope: Scope) -> str:
    """Whose request it is: a login name, else a network address. Uploads, checks and limits are counted by it."""
    client = scope.get("client")
    return scope.get(NAME) or (client[0] if client else "")


@dataclass(frozen=True)
class Visit:
    """Whose request it is that a handler answers, and under which address the visitor reached the server."""

    who: str
    """Login name, else network address."""
    address: str
    login: str = ""
    """Login name; empty where nobody logs in."""

    @classmethod
    def of(cls, request: gr.Request | Request) -> Visit:
        inner = getattr(request, "request", request)  # a tool's call comes as Starlette's own request
        name = login_name(inner) or getattr(request, "username", None) or ""
        return cls(name or visitor_of(inner.scope), str(inner.base_url), name)


@dataclass(frozen=True)
class Context:
    """What the browser tells of itself; anything of another form is taken for nothing."""

    job: str
    """Run in the address."""
    key: str
    """Of that run, where this browser has it."""
    again: str
    """Run in the address whose settings the form shall hold."""
    compare: tuple[str, ...] | None
    """Runs in the address that are set side by side; None on another page."""
    mine: tuple[str, ...]
    """Runs begun in this browser."""
    ticked: tuple[str, ...]
    """Runs ticked in the list."""
    look: str
    """Words of light, dark, wide and narrow."""

    @classmethod
    def read(cls, text: str) -> Context:
        try:
            given = json.loads(text or "{}")
        except ValueError:
            given = {}
        given = given if isinstance(given, dict) else {}
        lists = {name: _strings(given.get(name)) for name in ("compare", "mine", "ticked")}
        return cls(
            job=str(given.get("job") or ""),
            key=str(given.get("key") or ""),
            again=str(given.get("again") or ""),
            compare=lists["compare"] or None,
            mine=lists["mine"],
            ticked=lists["ticked"],
            look=str(given.get("look") or ""),
        )


MOST_IDS = 200
"""Runs of one list that are looked up; a page keeps 100."""


def _strings(value: Any) -> tuple[str, ...]:
    return tuple(item for item in value[:MOST_IDS] if isinstance(item, str)) if isinstance(value, list) else ()
