"""Whose turn it is at work that takes a process of its own: visitors take turns, however much one of them asks for."""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from collections.abc import Callable
from typing import Any, TypeVar

import anyio.to_thread

from compress.errors import RunError

MOST_WAITING, MOST_WAITING_IN_ALL = 4, 60
T = TypeVar("T")


class Turns:
    """Work of many visitors, carried out in threads, one piece at a time."""

    def __init__(self, most_waiting: int = MOST_WAITING, most_in_all: int = MOST_WAITING_IN_ALL) -> None:
        self._most_waiting, self._most_in_all = most_waiting, most_in_all
        self._busy = False
        self._waiting: OrderedDict[str, deque[asyncio.Future[None]]] = OrderedDict()
        """Visitor -> what waits, the visitor whose turn is next first."""

    async def take(self, visitor: str, work: Callable[[], T]) -> T:
        """What `work` returns, once it is the visitor's turn.

        Raises:
            RunError: too much waits already, of this visitor or of all.
        """
        await self._wait(visitor)
        try:
            return await anyio.to_thread.run_sync(work)
        finally:
            self._next()

    async def _wait(self, visitor: str) -> None:
        if not self._busy:
            self._busy = True
            return
        own = self._waiting.get(visitor, ())
        if len(own) >= self._most_waiting:
            raise RunError(
                f"{len(own)} checks of yours wait for their turn already: try again when one of them is done."
            )
        if sum(map(len, self._waiting.values())) >= self._most_in_all:
            raise RunError("Too many checks wait for their turn on this server: try again in a few minutes.")
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(visitor, deque()).append(turn)
        try:
            await turn
        except asyncio.CancelledError:  # the visitor left
            if turn.done() and not turn.cancelled():
                self._next()
            else:
                self._forget(visitor, turn)
            raise

    def _next(self) -> None:
        """Hands the turn to the first visitor, who goes to the end of the row."""
        while self._waiting:
            visitor, own = next(iter(self._waiting.items()))
            turn = own.popleft()
            self._waiting.move_to_end(visitor)
            if not own:
                del self._waiting[visitor]
            if not turn.done():
                turn.set_result(None)
                return
        self._busy = False

    def _forget(self, visitor: str, turn: asyncio.Future[Any]) -> None:
        own = self._waiting.get(visitor)
        if own and turn in own:
            own.remove(turn)
            if not own:
                del self._waiting[visitor]
