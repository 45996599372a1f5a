"""What each group of layers bears: accuracy and measured latency when it alone loses channels or bits, without training.

Everything is compared with the unpruned model in the base request's precision, made the same way and measured on the same
images, so that what a cell loses is its own doing.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress.errors import CompressError, RequestError, RunError, RuntimeUnavailableError, StorageError
from compress.files import write_text
from compress.request import Request
from compress.search.candidate import Candidate
from compress.search.evaluate import OneShot
from compress.workload import Workload, open_workload

RATIOS = (0.25, 0.5, 0.75)
BITS = (*range(2, 9), 32)
"""32 keeps a layer in floating point."""
SCORED_IMAGES = 500
FILE, PAGE = "sensitivity.json", "sensitivity.html"

Notify = Callable[[str], None]


@dataclass(frozen=True)
class _Cell:
    """One thing done to one group."""

    layers: tuple[str, ...]
    kind: str
    """`ratio` or `bits`."""
    value: float

    @property
    def key(self) -> str:
        return f"{self.layers[0]} {self.kind} {self.value:g}"

    def candidate(self, layers: Sequence[str]) -> Candidate:
        """The change to this group alone, where `layers` are those of all groups."""
        ratio = self.value if self.kind == "ratio" else 0.0
        bits = tuple((layer, f"{self.value:g}") for layer in self.layers) if self.kind == "bits" else ()
        return Candidate(tuple((layer, ratio if layer in self.layers else 0.0) for layer in layers), bits)


def measure(
    request: Request,
    folder: Path,
    *,
    workload: Workload | None = None,
    ratios: Sequence[float] = RATIOS,
    bits: Sequence[int] = (),
    notify: Notify = lambda text: None,
) -> dict[str, Any]:
    """Measures every cell that `folder` does not hold yet and returns the table; the folder then has it as JSON and HTML.

    Args:
        folder: new, empty, or of an interrupted attempt with the same request, which then goes on.
        ratios: shares of a group's channels to remove, 0 < r < 1.
        bits: bits of the weights of a group's layers; needs a quantizer.

    Returns: what sensitivity.json holds; a figure that is not known is None.

    Raises:
        RequestError: a ratio or a number of bits is out of range.
        StorageError, RuntimeUnavailableError: nothing more can be kept or timed.
        RunError: the folder holds something else.
    """
    for ratio in ratios:
        if not 0 < ratio < 1:
            raise RequestError("ratios", ratio, "fractions strictly between 0 and 1")
    if bits and not request.quantizes:
        raise RequestError("bits", tuple(bits), "nothing, because nothing is quantized")
    for number in bits:
        if number not in BITS:
            raise RequestError("bits", number, "whole numbers from 2 to 8, or 32")
    _require_own(folder)
    found = workload or open_workload(request)
    with OneShot(request, found, folder, scored_images=SCORED_IMAGES, notify=notify) as oneshot:
        names = [layer for group in oneshot.groups for layer in group.layers]
        cells = list(_cells([group.layers for group in oneshot.groups], ratios, bits))
        measured = _finished(folder)
        if "whole" not in measured:
            notify("the unpruned model")
            measured["whole"] = oneshot.evaluate(Candidate(tuple((name, 0.0) for name in names))).as_dict()
            _write(folder, measured)
        for number, cell in enumerate(cells, start=1):
            if cell.key in measured:
                continue
            notify(f"{number} of {len(cells)}: {cell.key}")
            measured[cell.key] = _outcome(oneshot, cell, names)
            _write(folder, measured)
        table = _table(request, oneshot, cells, measured)
    write_text(folder / FILE, json.dumps(table, indent=1) + "\n")
    from compress.search.pages import sensitivity_page

    write_text(folder / PAGE, sensitivity_page(table))
    return table


def _cells(groups: Sequence[tuple[str, ...]], ratios: Sequence[float], bits: Sequence[int]) -> Iterator[_Cell]:
    for layers in groups:
        yield from (_Cell(layers, "ratio", ratio) for ratio in ratios)
        yield from (_Cell(layers, "bits", number) for number in bits)


def _outcome(oneshot: OneShot, cell: _Cell, names: Sequence[str]) -> dict[str, Any]:
    """A cell that cannot be made says why, and the others go on; what is no cell's doing ends the measurement."""
    try:
        return oneshot.evaluate(cell.candidate(names)).as_dict()
    except (StorageError, RuntimeUnavailableError):
        raise
    except CompressError as error:
        return {"refused": str(error)}


def _require_own(folder: Path) -> None:
    strangers = {entry.name for entry in folder.iterdir()} - {"measured.json", FILE, PAGE} if folder.exists() else set()
    if strangers := {name for name in strangers if not name.startswith(".partial-")}:
        raise RunError(
            f"The output folder {folder} is not empty (it holds {sorted(strangers)[0]}). Choose a new or empty folder, or "
            "that of an interrupted measurement."
        )


def _finished(folder: Path) -> dict[str, dict[str, Any]]:
    path = folder / FILE
    return json.loads(path.read_text(encoding="utf-8"))["measured"] if path.exists() else {}


def _write(folder: Path, measured: dict[str, Any]) -> None:
    write_text(folder / FILE, json.dumps({"measured": measured}, indent=1) + "\n")


def _table(
    request: Request, oneshot: OneShot, cells: Sequence[_Cell], measured: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    whole, rows = measured["whole"], []
    for cell in cells:
        outcome = measured[cell.key]
        scored = "refused" not in outcome
        rows.append(
            {
                "layers": list(cell.layers),
                "kind": cell.kind,
                "value": cell.value,
                "accuracy": outcome["accuracy"] if scored else None,
                "points_lost": 100 * (whole["accuracy"] - outcome["accuracy"]) if scored else None,
                "latency_ms": outcome["latency_ms"] if scored else None,
                "percent_faster": 100 * (1 - outcome["latency_ms"] / whole["latency_ms"]) if scored else None,
                "refused": outcome.get("refused"),
            }
        )
    return {
        "request": request.model_dump(mode="json"),
        "runtime": oneshot.runtime.name,
        "threads": request.threads,
        "dense": oneshot.dense.as_dict(),
        "whole": whole,
        "cells": rows,
        "measured": measured,
    }
