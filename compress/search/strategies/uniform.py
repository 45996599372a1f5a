"""Uniform pruning, to exactly as much as the limits need."""

from __future__ import annotations

from dataclasses import dataclass

from compress.search.candidate import Candidate
from compress.search.problem import History, Problem


@dataclass(frozen=True)
class Uniform:
    """Every group loses the same share: halves the interval between a share that keeps to the limits and one that does not.

    When it is narrower than the steps of the widest group, the next pruner and quantizer have their turn.
    """

    problem: Problem

    def propose(self, history: History, left: int) -> Candidate:
        space = self.problem.space
        widest = max(len(space.choices(group)) for group in space.groups)
        rounds = max(2, widest.bit_length())
        turn, halvings = divmod(len(history), rounds)
        pruner = space.pruners[turn % len(space.pruners)]
        quantizer = space.quantizers[turn // len(space.pruners) % len(space.quantizers)]
        low, high = 0.0, space.largest
        for one, outcome in history[turn * rounds : turn * rounds + halvings]:
            middle = (low + high) / 2
            # Where the middle could not be made, another one stands in for it; less is removed then.
            made = one == space.uniform(middle, pruner=pruner, quantizer=quantizer)
            low, high = (low, middle) if not made or self.problem.excess(outcome) <= 1 else (middle, high)
        return space.uniform((low + high) / 2, pruner=pruner, quantizer=quantizer)
