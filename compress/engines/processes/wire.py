"""Messages between this program and the process of a runtime: JSON through a connection, arrays through shared memory.

A batch of images would pass through the buffer of a socket in a hundred pieces, and wait for the other process at each.
"""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Mapping
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

Arrays = dict[str, np.ndarray]
ALIGNED = 64


class Channel:
    """One end. Both take turns, so what one wrote into the memory is read before anything else is written.

    Args:
        connection: to the other end.
        memory: an open file in memory (`os.memfd_create`), which grows with what is sent.
    """

    def __init__(self, connection: Connection, memory: int) -> None:
        self._connection, self._memory = connection, memory
        self._map: mmap.mmap | None = None

    def poll(self, seconds: float | None) -> bool:
        """Whether there is something to receive, or nobody who could send; waits so long for it, or for ever."""
        return self._connection.poll(seconds)

    def send(self, header: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
        """Raises `OSError` when nobody reads any more."""
        listed: list[tuple[str, str, list[int], int]] = []
        end = 0
        for name, array in arrays.items():
            listed.append((name, str(array.dtype), list(array.shape), end))
            end += -(-array.nbytes // ALIGNED) * ALIGNED
        if end > os.fstat(self._memory).st_size:
            os.ftruncate(self._memory, end)
        for array, (_, dtype, shape, offset) in zip(arrays.values(), listed, strict=True):
            self._at(dtype, shape, offset)[...] = array
        self._connection.send_bytes(json.dumps({**header, "arrays": listed}).encode())

    def receive(self) -> tuple[dict[str, Any], Arrays]:
        """Raises `EOFError` or `OSError` when nobody writes any more, `ValueError` for what is no message."""
        header = json.loads(self._connection.recv_bytes())
        listed = header.pop("arrays")
        return header, {name: self._at(dtype, shape, offset).copy() for name, dtype, shape, offset in listed}

    def close(self) -> None:
        self._connection.close()
        os.close(self._memory)
        self._map = None

    def _at(self, dtype: str, shape: list[int], offset: int) -> np.ndarray:
        """An array in the memory itself."""
        count = int(np.prod(shape))
        if not count:
            return np.empty(shape, dtype)
        size = os.fstat(self._memory).st_size
        if self._map is None or len(self._map) < size:
            self._map = mmap.mmap(self._memory, size)
        return np.frombuffer(self._map, dtype, count, offset).reshape(shape)
