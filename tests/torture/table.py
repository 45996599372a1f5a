"""The rows of `make torture`, in the order of the table."""

from __future__ import annotations

from torture.honest import HONEST
from torture.hostile import HOSTILE
from torture.mutants import MUTANTS
from torture.rows import Row
from torture.zips import ZIPS

ROWS: tuple[Row, ...] = (HOSTILE, HONEST, ZIPS, MUTANTS)
