"""Disables Gradio's session state, because the page keeps no state on the server.

For each session that a request names, Gradio stores the last values of all components (of up to 10,000 sessions) and the answers
that nobody fetches. Both let requests fill the memory, and the former takes most of the time of an event.
"""

from __future__ import annotations

from copy import copy
from typing import Any

import gradio as gr
from gradio.state_holder import SessionState, StateHolder
from gradio.utils import LRUCache

MOST_SESSIONS = 500
"""Sessions with pending answers."""
MOST_UNFETCHED = 32
"""Pending answers of one session."""


class _NoState(SessionState):
    """The state of one event, discarded after it."""

    def __init__(self, blocks: gr.Blocks) -> None:
        self.blocks_config = copy(blocks.default_config)
        self.config_values: dict[int, Any] = {}  # for deep links, which are closed
        self.state_data: dict[int, Any] = {}
        self._state_ttl: dict[int, Any] = {}
        self.is_closed = False

    def __setitem__(self, key: int, value: Any) -> None:
        self.blocks_config.blocks[key] = value

    def _update_config(self, key: int) -> None:
        """Nothing is kept."""

    def _update_value_in_config(self, key: int, value: Any) -> None:
        """Nothing is kept."""


class _NoSessions(StateHolder):
    def __getitem__(self, session_id: str) -> SessionState:
        return _NoState(self.blocks)


def disable_session_state(page: gr.Blocks, mounted: Any) -> None:
    """Makes a page and its app discard all session state between events.

    Args:
        mounted: the app that `mount_gradio_app` made of the page.
    """
    holder = _NoSessions()  # type: ignore[no-untyped-call]  # Gradio's StateHolder is not typed
    holder.set_blocks(page)
    mounted.state_holder = page.state_holder = holder
    page._queue.pending_messages_per_session = LRUCache(MOST_SESSIONS)


def skip_unchanged_outputs(page: gr.Blocks) -> None:
    """Skips Gradio's postprocessing of unchanged outputs, for each of which it would build a new component.

    Most refreshes of a run change nothing, and postprocessing took 30 ms of processor time for each.
    """
    postprocess, skipped = page.postprocess_data, gr.skip()

    async def changed_only(block_fn: Any, predictions: Any, state: SessionState | None) -> list[Any]:
        outputs = block_fn.outputs
        if not isinstance(predictions, list) or len(predictions) != len(outputs) or len(outputs) < 2:
            return await postprocess(block_fn, predictions, state)
        changed = [number for number, value in enumerate(predictions) if value != skipped]
        outputs_data: list[Any] = [dict(skipped) for _ in outputs]
        if changed:
            part = copy(block_fn)
            part.outputs = [outputs[number] for number in changed]
            values = [predictions[number] for number in changed]
            results = await postprocess(part, values if len(values) > 1 else values[0], state)
            for number, value in zip(changed, results, strict=True):
                outputs_data[number] = value
        return outputs_data

    page.postprocess_data = changed_only  # type: ignore[method-assign]


class PendingAnswers:
    """Counts the answers that wait in Gradio's queue until a session fetches them."""

    def __init__(self, page: gr.Blocks) -> None:
        self._page = page

    def refuses(self, session: str) -> bool:
        """Whether a session has too many pending answers. Called before every event, so it also removes expired sessions."""
        queue = self._page._queue
        known = queue.pending_event_ids_session
        if len(known) > 2 * MOST_SESSIONS:
            for gone in [name for name in known if name not in queue.pending_messages_per_session]:
                for event_id in known.pop(gone):
                    queue.event_ids_to_events.pop(event_id, None)
        return len(known.get(session, ())) >= MOST_UNFETCHED
