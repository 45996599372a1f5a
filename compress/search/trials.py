"""The record of a search: one file per measured candidate, whole or absent, in the search's folder.

A trial is recorded when it is finished. One that was under way when the search was killed leaves nothing, and is proposed
again, because a strategy sees nothing but the record.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from compress.errors import CompressError, RuntimeUnavailableError, StorageError
from compress.files import write_text
from compress.search.candidate import Candidate
from compress.search.outcome import Outcome

FOLDER = "trials"


@dataclass(frozen=True)
class Trial:
    """One proposal and what came of it."""

    number: int
    """From 1, in the order of proposals."""
    candidate: Candidate
    outcome: Outcome | None
    """None where it could not be made."""
    refused: str | None = None
    """Why it could not be made."""
    repeats: int | None = None
    """The number of the earlier trial of the same candidate, whose outcome this one has."""
    seconds: float = 0.0
    """To make and measure it, or to find that it cannot be made."""

    @property
    def complete(self) -> bool:
        """Whether it was scored."""
        return self.outcome is not None and self.outcome.stopped is None

    def as_dict(self) -> dict[str, Any]:
        return {
            "number": self.number,
            "candidate": self.candidate.as_dict(),
            "outcome": self.outcome and self.outcome.as_dict(),
            "refused": self.refused,
            "repeats": self.repeats,
            "seconds": self.seconds,
        }


class Trials:
    """The trials of one folder, oldest first."""

    def __init__(self, folder: Path) -> None:
        """Raises `StorageError` when a record is damaged or missing between others."""
        self._folder = folder / FOLDER
        paths = sorted(self._folder.glob("[0-9]*.json"))
        self.all = [_read(path) for path in paths]
        for number, trial in enumerate(self.all, start=1):
            if trial.number != number:
                raise StorageError(f"{self._folder} lacks trial {number}. Restore it, or search in a new folder.")

    @property
    def history(self) -> list[tuple[Candidate, Outcome]]:
        """What strategies see: without the candidates that could not be made."""
        return [(trial.candidate, trial.outcome) for trial in self.all if trial.outcome is not None]

    def of(self, candidate: Candidate) -> Trial | None:
        """The first trial of this candidate."""
        return next((trial for trial in self.all if trial.candidate == candidate), None)

    def measure(self, candidate: Candidate, evaluate: Callable[[Candidate], Outcome]) -> Trial:
        """Adds the next trial, on disk as well: measured, refused, or with the outcome of an earlier one.

        Raises:
            StorageError, RuntimeUnavailableError: what is wrong is not the candidate, and nothing is recorded.
        """
        number, known = len(self.all) + 1, self.of(candidate)
        if known is not None:
            trial = replace(known, number=number, repeats=known.repeats or known.number, seconds=0.0)
        else:
            start = time.perf_counter()
            try:
                outcome, refused = evaluate(candidate), None
            except (StorageError, RuntimeUnavailableError):
                raise
            except CompressError as error:
                outcome, refused = None, str(error)
            trial = Trial(number, candidate, outcome, refused, seconds=time.perf_counter() - start)
        write_text(self._folder / f"{number:05d}.json", json.dumps(trial.as_dict(), indent=1) + "\n")
        self.all.append(trial)
        return trial


def _read(path: Path) -> Trial:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        outcome = values["outcome"] and Outcome(**values["outcome"])
        return Trial(**(values | {"candidate": Candidate.from_dict(values["candidate"]), "outcome": outcome}))
    except (ValueError, KeyError, TypeError) as error:
        raise StorageError(f"{path} is damaged ({error!r}). Restore it, or search in a new folder.") from error
