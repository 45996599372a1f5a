"""How far a candidate will be from the limits, told before it is made, so that trials are spent near them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from compress.search.candidate import Candidate
from compress.search.problem import History, Problem

WORK_PER_CHANNEL = 2.0
"""Before anything is measured: halving all channels quarters the operations, so it halves the excess twice."""
PRIOR_WEIGHT = 0.1
"""Of what is assumed of a group, in measurements; what is assumed of the whole model weighs a tenth of it."""
HALVINGS = 30


@dataclass(frozen=True)
class Forecast:
    """log2 of measured / allowed as a linear function of how often each group's channels were halved."""

    problem: Problem
    unpruned: float
    """log2 of the excess with nothing removed."""
    gains: tuple[float, ...]
    """By how much it falls for each halving of a group's channels, in the order of `space.groups`; never below 0."""

    @classmethod
    def of(cls, problem: Problem, history: History) -> Forecast:
        """Ridge regression on what was measured; what is assumed at first is Work ~ channels², shared equally."""
        groups = problem.space.groups
        assumed = np.full(1 + len(groups), -WORK_PER_CHANNEL / len(groups))
        assumed[0] = np.log2(problem.excess(problem.dense))
        x = np.array([[1.0, *_halvings(problem, one)] for one, _ in history]).reshape(-1, 1 + len(groups))
        y = np.log2([problem.excess(found) for _, found in history])
        weights = np.diag([PRIOR_WEIGHT / 10, *[PRIOR_WEIGHT] * len(groups)])
        change = np.linalg.solve(x.T @ x + weights, x.T @ (y - x @ assumed))
        first, *rest = (assumed + change).tolist()
        return cls(problem, first, tuple(max(0.0, -slope) for slope in rest))

    def log_excess(self, candidate: Candidate) -> float:
        """log2 of the largest of measured / allowed; at most 0 keeps to the limits."""
        return self.unpruned - float(np.dot(self.gains, _halvings(self.problem, candidate)))

    def fitted(
        self, ratios: Mapping[str, float], allowed: float = 0.0, least: Mapping[str, float] | None = None
    ) -> Candidate:
        """The candidate with these proportions of channels between the groups that just keeps to the limits.

        All kept shares are scaled by one factor. Where even the smallest model would not keep to the limits, that one.

        Args:
            ratios: lead layer -> share of its channels removed.
            allowed: log2 of the excess that is allowed.
            least: lead layer -> share that is removed at least.
        """
        space, least = self.problem.space, least or {}

        def at(factor: float) -> Candidate:
            wished = {name: 1 - (1 - ratio) * factor for name, ratio in ratios.items()}
            return space.candidate({name: max(ratio, least.get(name, 0.0)) for name, ratio in wished.items()})

        return _largest(at, lambda candidate: self.log_excess(candidate) <= allowed, ratios)


def _largest(
    at: Callable[[float], Candidate], keeps: Callable[[Candidate], bool], ratios: Mapping[str, float]
) -> Candidate:
    """`at` the largest factor on what is kept that keeps to the limits, found by bisection."""
    high = 1 / min(1 - ratio for ratio in ratios.values())
    if keeps(at(high)):
        return at(high)
    low = 0.0
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if keeps(at(middle)) else (low, middle)
    return at(low)


def _halvings(problem: Problem, candidate: Candidate) -> Sequence[float]:
    ratios = dict(candidate.ratios)
    return [-float(np.log2(1 - ratios.get(group.layers[0], 0.0))) for group in problem.space.groups]
