"""The rows of `make torture`, in the order of the table."""

from __future__ import annotations

from torture.cancels import CANCEL
from torture.full_disk import DISK
from torture.honest import HONEST
from torture.hostile import HOSTILE
from torture.kills import KILLS
from torture.mutants import MUTANTS
from torture.rows import Row
from torture.runs_in_a_row import RUNS
from torture.zips import ZIPS

ROWS: tuple[Row, ...] = (HOSTILE, HONEST, ZIPS, MUTANTS, KILLS, DISK, CANCEL, RUNS)
