"""The rows of `make torture`, in the order of the table."""

from __future__ import annotations

from torture.honest import HONEST
from torture.hostile import HOSTILE
from torture.rows import Row

ROWS: tuple[Row, ...] = (HOSTILE, HONEST)
