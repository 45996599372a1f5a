"""What the shell command prints: tables of plain text, and what `check` found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def listing(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows of the same keys as a table."""
    return table(tuple(rows[0]), [tuple(str(value) for value in row.values()) for row in rows])


def table(headers: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    """Rows as plain text, in columns under the headers."""
    widths = [max(len(row[column]) for row in (headers, *rows)) for column in range(len(headers))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in (headers, *rows)
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def check(found: dict[str, Any]) -> str:
    lines = [found["text"], *(f"Note: {note}" for note in found.get("notes", ())), ""]
    if found["groups"]:
        lines.append(
            table(
                ("Pruned together", "Channels", "Kept", "Why"),
                [
                    (
                        ", ".join(g["layers"][:3])
                        + (f" and {len(g['layers']) - 3} more" if len(g["layers"]) > 3 else ""),
                        str(g["channels_before"]),
                        str(g["channels_after"]),
                        g["reason"],
                    )
                    for g in found["groups"]
                ],
            )
        )
    lines += ["", *(f"{line['level']:<5}  {line['module']}: {line['text']}" for line in found["modules"]), ""]
    lines += [f"{row['runtime']}: {row['text']}" for row in found["runtimes"]]
    return "\n".join(lines)
