"""A model whose accuracy and time are formulas, so that every candidate is measured at once."""

from __future__ import annotations

import math

from compress.pruning import Group
from compress.search.candidate import Candidate
from compress.search.outcome import Outcome
from compress.search.problem import Problem
from compress.search.space import Space
from compress.search.strategies import STRATEGIES
from compress.search.target import Target

HARM = {"a": 0.02, "b": 0.3, "c": 0.01, "d": 0.2, "e": 0.05, "f": 0.1}
"""What halving the channels of each group costs in accuracy; all take the same time."""
TRIALS = 30


def outcome(accuracy: float, latency_ms: float, **values) -> Outcome:
    return Outcome(accuracy, latency_ms, 0, 0, values.pop("file_bytes", 1), 0.0, latency_ms, latency_ms, 100, **values)


def problem() -> Problem:
    space = Space(tuple(Group((name,), 64, 32, "alone") for name in HARM), 8)
    return Problem(space, Target(min_speedup=2.0), outcome(0.9, 1.0), TRIALS)


def measured(candidate: Candidate) -> Outcome:
    """Time falls with each group's channels, squared and shared equally; accuracy with the square of its halvings."""
    halvings = {name: -math.log2(1 - ratio) for name, ratio in candidate.ratios}
    time = sum((1 - ratio) ** 2 for _, ratio in candidate.ratios) / len(HARM)
    accuracy = 0.9 - sum(HARM[name] * halvings[name] ** 2 for name in HARM)
    return outcome(max(0.0, accuracy), time)


def search(name: str, problem: Problem) -> list[tuple[Candidate, Outcome]]:
    strategy, history = STRATEGIES[name](problem), []
    for left in range(problem.trials, 0, -1):
        candidate = strategy.propose(history, left)
        history.append((candidate, measured(candidate)))
    return history


def best(problem: Problem, history: list) -> float:
    """Accuracy of the best candidate that keeps to the limits."""
    kept = [found for _, found in history if problem.excess(found) <= 1]
    return max(found.accuracy for found in kept)
