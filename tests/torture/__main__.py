"""`python -m torture [--part] [row ...]`: carries the rows out and prints what they reached; 1 when one does not hold."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

from torture.rows import Row
from torture.table import ROWS

SHOWN = 10
"""Failures printed per row."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="torture", description=__doc__)
    parser.add_argument("--part", action="store_true", help="only what continuous integration carries out")
    parser.add_argument(
        "rows", nargs="*", metavar="row", help=f"of {', '.join(row.name for row in ROWS)}; default: all"
    )
    arguments = parser.parse_args()
    unknown = set(arguments.rows) - {row.name for row in ROWS}
    if unknown:
        parser.error(f"there is no row {min(unknown)}")
    with tempfile.TemporaryDirectory(prefix="espalier-torture-") as folder:
        os.environ["ESPALIER_SIGNING_KEY"] = str(Path(folder) / "signing.key")  # of its own, as in the tests
        return _carry_out_all(arguments.rows, full=not arguments.part)


def _carry_out_all(names: list[str], *, full: bool) -> int:
    chosen = [row for row in ROWS if not names or row.name in names]
    print("| test | must reach | reached | holds | seconds |\n|---|---|---|---|---:|")
    return 1 if [row for row in chosen if not carry_out(row, full=full)] else 0


def carry_out(row: Row, *, full: bool) -> bool:
    """Prints the row's line and, below it, what went wrong; whether it holds."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="espalier-torture-") as folder:
        outcome = row.run(Path(folder), full)
    holds = "no" if outcome.failures else "yes"
    seconds = time.monotonic() - started
    print(f"| {row.tried} | {row.wanted} | {outcome.figure} | {holds} | {seconds:.0f} |", flush=True)
    for line in outcome.failures[:SHOWN]:
        print(f"    {row.name}: {line}", file=sys.stderr)
    if len(outcome.failures) > SHOWN:
        print(f"    {row.name}: and {len(outcome.failures) - SHOWN} more", file=sys.stderr)
    return not outcome.failures


if __name__ == "__main__":
    sys.exit(main())
