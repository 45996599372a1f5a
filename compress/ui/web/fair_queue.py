"""A fair queue for work that needs a process of its own: round robin over visitors, however much one of them submits."""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from collections.abc import Callable
from typing import Any, TypeVar

import anyio.to_thread

from compress.errors import RunError

MOST_WAITING, MOST_WAITING_IN_ALL = 4, 60
T = TypeVar("T")


class FairQueue:
    """Runs the work of many visitors in threads, one piece at a time."""

    def __init__(self, most_waiting: int = MOST_WAITING, most_in_all: int = MOST_WAITING_IN_ALL) -> None:
        self._most_waiting, self._most_in_all = most_waiting, most_in_all
        self._busy = False
        self._waiting: OrderedDict[str, deque[asyncio.Future[None]]] = OrderedDict()
        """Visitor -> waiting work, in the order in which visitors are served."""

    async def run(self, visitor: str, work: Callable[[], T]) -> T:
        """Waits for the visitor's turn, then returns the result of `work`.

        Raises:
            RunError: too much work is waiting, of this visitor or of all.
        """
        await self._acquire(visitor)
        try:
            return await anyio.to_thread.run_sync(work)
        finally:
            self._release()

    async def _acquire(self, visitor: str) -> None:
        if not self._busy:
            self._busy = True
            return
        own = self._waiting.get(visitor, ())
        if len(own) >= self._most_waiting:
            raise RunError(f"{len(own)} checks of yours are waiting already: try again when one of them is done.")
        if sum(map(len, self._waiting.values())) >= self._most_in_all:
            raise RunError("Too many checks are waiting on this server: try again in a few minutes.")
        ticket: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(visitor, deque()).append(ticket)
        try:
            await ticket
        except asyncio.CancelledError:  # the visitor left
            if ticket.done() and not ticket.cancelled():
                self._release()
            else:
                self._remove(visitor, ticket)
            raise

    def _release(self) -> None:
        """Starts the next work of the first visitor and moves that visitor to the end."""
        while self._waiting:
            visitor, own = next(iter(self._waiting.items()))
            ticket = own.popleft()
            self._waiting.move_to_end(visitor)
            if not own:
                del self._waiting[visitor]
            if not ticket.done():
                ticket.set_result(None)
                return
        self._busy = False

    def _remove(self, visitor: str, ticket: asyncio.Future[Any]) -> None:
        own = self._waiting.get(visitor)
        if own and ticket in own:
            own.remove(ticket)
            if not own:
                del self._waiting[visitor]
