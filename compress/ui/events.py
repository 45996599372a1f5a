"""Events of the page: how a control calls a handler, which answers with updates by component name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import gradio as gr

from compress.errors import CompressError
from compress.ui import views
from compress.ui.told import without_traceback
from compress.ui.web.turns import Turns
from compress.ui.web.visitors import Visit


def connect(
    event: Any,
    handler: Callable[..., Mapping[str, Any]],
    inputs: list[Any],
    outputs: Sequence[str],
    parts: Mapping[str, Any],
    *,
    visited: bool = False,
    turns: Turns | None = None,
    refused: str = "",
    **options: Any,
) -> Any:
    """Connects a handler with an event of the page, which is no part of the API and waits in no queue of Gradio's.

    Args:
        outputs: names of the components that the handler may update.
        parts: all components by name.
        visited: the handler is told first whose request it answers.
        turns: visitors take turns at it.
        refused: where the sentence goes when the visitor gets no turn; nowhere is told.
    """

    def found(updates: Mapping[str, Any]) -> Any:
        listed = [updates.get(name, gr.skip()) for name in outputs]
        return listed if len(listed) > 1 else listed[0]

    @without_traceback
    def call(visitor: gr.Request, *given: Any) -> Any:
        return found(handler(Visit.of(visitor), *given) if visited else handler(*given))

    @without_traceback
    async def call_in_turn(visitor: gr.Request, *given: Any) -> Any:
        assert turns is not None, "it is connected for turns"
        visit = Visit.of(visitor)
        try:
            return found(await turns.take(visit.who, partial(handler, *([visit] if visited else []), *given)))
        except CompressError as error:
            return found({refused: views.alert(str(error))} if refused else {})

    for function in (call, call_in_turn):  # Gradio reads the type itself, not its name
        function.__annotations__["visitor"] = gr.Request
    return event(
        call if turns is None else call_in_turn,
        inputs,
        [parts[name] for name in outputs],
        api_visibility="private",
        **({"queue": False, "show_progress": "hidden"} | options),
    )
