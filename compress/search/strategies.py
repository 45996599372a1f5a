"""How the next candidate is chosen, by name.

A strategy is a function of the problem and of what was measured so far, and of nothing else: with the same seed and the
same history it proposes the same candidate. So a search that was interrupted goes on as if it had not been.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from compress.errors import RequestError
from compress.search.annealing import AutoCompress, SimulatedAnnealing
from compress.search.candidate import Candidate
from compress.search.oneshot import Outcome
from compress.search.space import Space
from compress.search.target import Target
from compress.search.tpe import Tpe
from compress.search.trials import Trials

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


class Strategy(Protocol):
    """Chooses what to measure next."""

    def propose(self, history: History) -> Candidate:
        """The next candidate; one that was measured already is not measured again, and its outcome is repeated."""


@dataclass(frozen=True)
class Uniform:
    """Every group loses the same share: halves the interval between a share that keeps to the limits and one that does not.

    When it is narrower than the steps of the widest group, the next pruner and quantizer have their turn.
    """

    problem: Problem

    def propose(self, history: History) -> Candidate:
        space = self.problem.space
        widest = max(len(space.choices(group)) for group in space.groups)
        rounds = max(2, widest.bit_length())
        turn, halvings = divmod(len(history), rounds)
        pruner = space.pruners[turn % len(space.pruners)]
        quantizer = space.quantizers[turn // len(space.pruners) % len(space.quantizers)]
        low, high = 0.0, space.largest
        for one, outcome in history[turn * rounds : turn * rounds + halvings]:
            middle = (low + high) / 2
            excess = self.problem.target.excess(outcome.latency_ms, outcome.file_bytes, self.problem.dense)
            # Where the middle could not be made, another one stands in for it; less is removed then.
            made = one == space.uniform(middle, pruner=pruner, quantizer=quantizer)
            low, high = (low, middle) if not made or excess <= 1 else (middle, high)
        return space.uniform((low + high) / 2, pruner=pruner, quantizer=quantizer)


@dataclass(frozen=True)
class Random:
    """Every choice of every group is as likely as any other: what a strategy has to beat."""

    problem: Problem

    def propose(self, history: History) -> Candidate:
        return random_candidate(self.problem.space, f"{self.problem.seed} {len(history)}")


def random_candidate(space: Space, seed: str) -> Candidate:
    """Every choice of every group is as likely as any other."""
    generator = random.Random(seed)
    return space.candidate(
        {group.layers[0]: generator.choice(space.choices(group)) for group in space.groups},
        widened=generator.randint(0, len(space.sensitive)),
        pruner=generator.choice(space.pruners),
        quantizer=generator.choice(space.quantizers),
    )


def proposal(strategy: Strategy, problem: Problem, trials: Trials) -> Candidate:
    """Of the strategy; it does not see what could not be made, so a random one stands in when it proposes that again."""
    candidate = strategy.propose(trials.history)
    known = trials.of(candidate)
    if known is not None and known.refused:
        return random_candidate(problem.space, f"{problem.seed} stands in {len(trials.all)}")
    return candidate


def _amc(problem: Problem) -> Strategy:
    """Raises `RequestError` where the agent's library is not installed."""
    try:
        from compress.search.amc import Amc
    except ModuleNotFoundError as error:
        if error.name not in ("stable_baselines3", "gymnasium"):
            raise
        raise RequestError(
            "strategy", "amc", "another one, or stable-baselines3: pip install -r requirements-search.txt"
        ) from None
    return Amc(problem)


STRATEGIES: dict[str, Callable[[Problem], Strategy]] = {
    "tpe": Tpe,
    "uniform": Uniform,
    "random": Random,
    "simulated-annealing": SimulatedAnnealing,
    "auto-compress": AutoCompress,
    "amc": _amc,
}
"""Name -> what makes the strategy for a problem."""

RATIOS_ALONE = frozenset({"simulated-annealing", "auto-compress", "amc"})
"""Strategies that choose the ratio of each group and nothing else: neither pruner nor quantizer, and no wider layers."""

LEARN_BEYOND_LIMITS = frozenset({"auto-compress", "amc"})
"""Strategies that need the accuracy of candidates far beyond the limits too: annealing in rounds starts there on purpose, and an
agent takes a score without accuracy for the worst there is."""
