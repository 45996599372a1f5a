"""The rows of `make torture`, in the order of the table."""

from __future__ import annotations

from torture.full_disk import DISK
from torture.kills import KILLS
from torture.rows import Row

ROWS: tuple[Row, ...] = (KILLS, DISK)
