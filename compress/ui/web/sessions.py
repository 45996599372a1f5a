"""What Gradio would remember of each visitor's page, and here does not: the page has no state on the server.

Gradio keeps the last values of all controls for each session that a request names, for up to 10,000 of them, and the answers to
events that nobody fetches. Both let requests fill the memory, and the first one costs most of the time of an event.
"""

from __future__ import annotations

from copy import copy
from typing import Any

import gradio as gr
from gradio.state_holder import SessionState, StateHolder
from gradio.utils import LRUCache

MOST_SESSIONS = 500
"""With answers that wait to be fetched."""
MOST_UNFETCHED = 32
"""Answers of one session."""


class _Nothing(SessionState):
    """Of one event, and gone with it."""

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


class _Forgetful(StateHolder):
    def __getitem__(self, session_id: str) -> SessionState:
        return _Nothing(self.blocks)


def forget_sessions(page: gr.Blocks, mounted: Any) -> None:
    """Makes a page and its app keep nothing between events.

    Args:
        mounted: the app that `mount_gradio_app` made of the page.
    """
    holder = _Forgetful()
    holder.set_blocks(page)
    mounted.state_holder = page.state_holder = holder
    page._queue.pending_messages_per_session = LRUCache(MOST_SESSIONS)


def skip_what_stays(page: gr.Blocks) -> None:
    """Spares Gradio the outputs of an event that stay as they are: it builds each of their components anew for it.

    Most looks at a run change nothing, and that cost thirty milliseconds of processor time for each of them.
    """
    whole, stays = page.postprocess_data, gr.skip()

    async def changed_only(block_fn: Any, predictions: Any, state: SessionState | None) -> list[Any]:
        outputs = block_fn.outputs
        if not isinstance(predictions, list) or len(predictions) != len(outputs) or len(outputs) < 2:
            return await whole(block_fn, predictions, state)
        changed = [number for number, value in enumerate(predictions) if value != stays]
        told: list[Any] = [dict(stays) for _ in outputs]
        if changed:
            part = copy(block_fn)
            part.outputs = [outputs[number] for number in changed]
            values = [predictions[number] for number in changed]
            found = await whole(part, values if len(values) > 1 else values[0], state)
            for number, value in zip(changed, found, strict=True):
                told[number] = value
        return told

    page.postprocess_data = changed_only  # type: ignore[method-assign]


class Unfetched:
    """Whether a session may ask for more, by the answers that wait for it in Gradio's queue."""

    def __init__(self, page: gr.Blocks) -> None:
        self._page = page

    def refuses(self, session: str) -> bool:
        """Called before every event, so it also forgets sessions whose answers are gone."""
        queue = self._page._queue
        known = queue.pending_event_ids_session
        if len(known) > 2 * MOST_SESSIONS:
            for gone in [name for name in known if name not in queue.pending_messages_per_session]:
                for event_id in known.pop(gone):
                    queue.event_ids_to_events.pop(event_id, None)
        return len(known.get(session, ())) >= MOST_UNFETCHED
