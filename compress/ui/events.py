"""Connects an event of the page with a handler, which returns updates by component name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import gradio as gr

from compress.errors import CompressError
from compress.ui import views
from compress.ui.errors import without_traceback
from compress.ui.web.fair_queue import FairQueue
from compress.ui.web.visitors import Visitor


def connect(
    event: Any,
    handler: Callable[..., Mapping[str, Any]],
    inputs: list[Any],
    outputs: Sequence[str],
    parts: Mapping[str, Any],
    *,
    visited: bool = False,
    fair_queue: FairQueue | None = None,
    refused: str = "",
    **options: Any,
) -> Any:
    """Connects a handler with an event of the page. The event is private to the page and bypasses Gradio's queue.

    Args:
        outputs: names of the components that the handler may update.
        parts: all components by name.
        visited: pass the `Visitor` to the handler as its first argument.
        fair_queue: run the handler in this queue.
        refused: name of the component that shows why the queue refused the visitor; empty shows nothing.
        options: of Gradio's event listener.
    """

    def values_of(updates: Mapping[str, Any]) -> Any:
        values = [updates.get(name, gr.skip()) for name in outputs]
        return values if len(values) > 1 else values[0]

    @without_traceback
    def call(request: gr.Request, *inputs: Any) -> Any:
        return values_of(handler(Visitor.of(request), *inputs) if visited else handler(*inputs))

    @without_traceback
    async def call_in_turn(request: gr.Request, *inputs: Any) -> Any:
        assert fair_queue is not None, "only connected with a queue"
        visitor = Visitor.of(request)
        try:
            return values_of(
                await fair_queue.run(visitor.id, partial(handler, *([visitor] if visited else []), *inputs))
            )
        except CompressError as error:
            return values_of({refused: views.alert(str(error))} if refused else {})

    for function in (call, call_in_turn):  # Gradio compares the annotation with the class, not with its name
        function.__annotations__["request"] = gr.Request
    return event(
        call if fair_queue is None else call_in_turn,
        inputs,
        [parts[name] for name in outputs],
        api_visibility="private",
        **({"queue": False, "show_progress": "hidden"} | options),
    )
