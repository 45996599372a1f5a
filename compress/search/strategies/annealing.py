"""Ratios by simulated annealing, and AutoCompress, which anneals in rounds: searches of NNI 2.x, on measured time.

Liu et al., AutoCompress: An Automatic DNN Structured Pruning Framework for Ultra-High Compression Rates, AAAI 2020,
arXiv:1907.03141.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from compress.search.candidate import Candidate
from compress.search.forecast import Forecast
from compress.search.outcome import Outcome
from compress.search.problem import History, Problem
from compress.search.target import POINTS_PER_DOUBLING

HOTTEST, COLDEST = 4.0, 0.1
"""Temperature of the first and the last trial, in points of accuracy: a trial that is worse by as much as the temperature
is accepted with a probability of 1/e."""
STRIDE = 0.35
"""Largest change of a ratio in the first trial, as in NNI; it shrinks with the square root of the temperature."""
DRAWS = 50
"""A perturbation that leads to a candidate measured before is drawn again, at most this often."""
ROUNDS = 3
"""Of AutoCompress. Each takes away the same factor of what the limits are exceeded by."""


@dataclass(frozen=True)
class SimulatedAnnealing:
    """Perturbs the ratios of all groups at once, brings them to the limits, and accepts by Metropolis' rule.

    It starts from the same share for every group. The temperature falls by one factor from trial to trial.
    """

    problem: Problem

    def propose(self, history: History, left: int) -> Candidate:
        start = self.problem.space.candidate({})
        return _Walk(self.problem, start, history, self.problem.trials).next(history)


@dataclass(frozen=True)
class AutoCompress:
    """Anneals in rounds whose limits come nearer, each from the best of the round before; the last trial is ADMM's.

    What a round has removed stays removed in those behind it. As published, each round ends in training with ADMM; here
    every candidate is made from the original weights, which keep nothing of such a training but the last one's. So the
    last trial alone prunes the best ratios with `admm`, which trains for the request's pruning_epochs, and so does the
    run that is made of it.
    """

    problem: Problem

    def propose(self, history: History, left: int) -> Candidate:
        problem = self.problem
        if not history:
            return problem.space.candidate({})
        if left == 1:
            return replace(_best(problem, history), pruner="admm")
        length = max(1, (problem.trials - 2) // ROUNDS)
        number = min(ROUNDS - 1, (len(history) - 1) // length)
        first = 1 + number * length
        start = _best(problem, history[max(0, first - length) : first], self._allowed(history, number - 1))
        walk = _Walk(problem, start, history[first:], length, self._allowed(history, number), dict(start.ratios))
        return walk.next(history)

    def _allowed(self, history: History, number: int) -> float:
        """log2 of what the limits may be exceeded by in a round: from the unpruned model's to 0 in equal steps."""
        return max(0.0, _log_excess(self.problem, history[0][1])) * (1 - (number + 1) / ROUNDS)


@dataclass(frozen=True)
class _Walk:
    """One annealing."""

    problem: Problem
    start: Candidate
    trials: History
    """What was measured on this walk."""
    length: int
    """Trials of the whole walk."""
    allowed: float = 0.0
    """log2 of what the limits may be exceeded by."""
    least: Mapping[str, float] = field(default_factory=dict)
    """Lead layer -> share that is removed at least."""

    def next(self, history: History) -> Candidate:
        """The start, brought to the limits; then neighbours of what was accepted, new where `DRAWS` draws find one."""
        forecast = Forecast.of(self.problem, history)
        if not self.trials:
            return forecast.fitted(dict(self.start.ratios), self.allowed, self.least)
        accepted, known = self._accepted(), {one for one, _ in history}
        generator = random.Random(f"{self.problem.seed} {len(history)}")
        leads = {group.layers[0] for group in self.problem.space.groups}
        ratios = {name: ratio for name, ratio in accepted.ratios if name in leads}
        stride = STRIDE * math.sqrt(self._temperature(len(self.trials)) / HOTTEST)
        for draw in range(DRAWS):
            # Ratios come in steps: a stride that is too short for one finds nothing new, and grows.
            reach = stride * (1 + draw / 10)
            moved = {name: ratio + generator.uniform(-reach, reach) for name, ratio in ratios.items()}
            within = {name: min(max(ratio, 0.0), self.problem.space.largest) for name, ratio in moved.items()}
            neighbour = forecast.fitted(within, self.allowed, self.least)
            if neighbour not in known:
                break
        return neighbour

    def _accepted(self) -> Candidate:
        """Where Metropolis' rule has led to."""
        accepted, score = self.start, -math.inf
        for step, (candidate, outcome) in enumerate(self.trials):
            found = _score(self.problem, outcome, self.allowed)
            luck = random.Random(f"{self.problem.seed} accepts {step}").random()
            if found >= score or luck < math.exp((found - score) / self._temperature(step)):
                accepted, score = candidate, found
        return accepted

    def _temperature(self, step: int) -> float:
        temperature: float = HOTTEST * (COLDEST / HOTTEST) ** min(1.0, step / max(1, self.length - 1))
        return temperature


def _score(problem: Problem, outcome: Outcome, allowed: float) -> float:
    """`Target.score`, where limits may be exceeded by `allowed` (log2)."""
    missed = max(0.0, _log_excess(problem, outcome) - allowed)
    return 100 * (outcome.accuracy - problem.dense.accuracy) - POINTS_PER_DOUBLING * missed


def _best(problem: Problem, history: History, allowed: float = 0.0) -> Candidate:
    return max(history, key=lambda pair: _score(problem, pair[1], allowed))[0]


def _log_excess(problem: Problem, outcome: Outcome) -> float:
    return math.log2(problem.excess(outcome))
