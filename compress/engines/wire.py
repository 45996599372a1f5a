"""Messages between this program and the process of a runtime: a line of JSON, then the bytes of the arrays that it lists."""

from __future__ import annotations

import json
from collections.abc import Mapping
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

Arrays = dict[str, np.ndarray]


def send(connection: Connection, header: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
    """Raises `OSError` when nobody reads any more."""
    listed = [[name, str(array.dtype), list(array.shape)] for name, array in arrays.items()]
    connection.send_bytes(json.dumps({**header, "arrays": listed}).encode())
    for array in arrays.values():
        connection.send_bytes(_bytes(np.ascontiguousarray(array)))


def receive(connection: Connection) -> tuple[dict[str, Any], Arrays]:
    """Raises `EOFError` or `OSError` when nobody writes any more, `ValueError` for what is no message."""
    header = json.loads(connection.recv_bytes())
    arrays: Arrays = {}
    for name, dtype, shape in header.pop("arrays"):
        arrays[name] = np.empty(shape, dtype)
        if connection.recv_bytes_into(_bytes(arrays[name])) != arrays[name].nbytes:
            raise ValueError(f"{name} is shorter than announced")
    return header, arrays


def _bytes(array: np.ndarray) -> np.ndarray:
    return array.reshape(-1).view(np.uint8)
