"""What a strategy is given, and what it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from compress.search.candidate import Candidate
from compress.search.outcome import Outcome
from compress.search.space import Space
from compress.search.target import Target

History = Sequence[tuple[Candidate, Outcome]]
"""Everything measured so far, oldest first."""


@dataclass(frozen=True)
class Problem:
    """What a strategy is given to start with."""

    space: Space
    target: Target
    dense: Outcome
    trials: int
    """How many candidates will be measured in all, for strategies with a schedule."""
    seed: int = 0

    def excess(self, outcome: Outcome) -> float:
        """The largest of measured / allowed over all limits on speed and size: at most 1 keeps to them."""
        return self.target.excess(outcome.latency_ms, outcome.file_bytes, self.dense)

    def score(self, outcome: Outcome) -> float:
        """`Target.score`."""
        return self.target.score(outcome, self.dense)


class Strategy(Protocol):
    """Chooses what to measure next."""

    def propose(self, history: History, left: int) -> Candidate:
        """The next candidate; one that was measured already is not measured again, and its outcome is repeated.

        Args:
            left: trials that are left, with this one. Those that could not be made are spent, too, and not in `history`.
        """
