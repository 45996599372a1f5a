"""How the next candidate is chosen, by name.

A strategy is a function of the problem, of what was measured so far and of how much is left: with the same seed and the
same history and as many trials left it proposes the same candidate. So a search that was interrupted goes on as if it had not been.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from compress.errors import RequestError
from compress.search.candidate import Candidate
from compress.search.problem import History, Problem, Strategy
from compress.search.space import Space
from compress.search.strategies.annealing import AutoCompress, SimulatedAnnealing
from compress.search.strategies.tpe import Tpe
from compress.search.strategies.uniform import Uniform
from compress.search.trials import Trials


@dataclass(frozen=True)
class Random:
    """Every choice of every group is as likely as any other: what a strategy has to beat."""

    problem: Problem

    def propose(self, history: History, left: int) -> Candidate:
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
    candidate = strategy.propose(trials.history, problem.trials - len(trials.all))
    known = trials.of(candidate)
    if known is not None and known.refused:
        return random_candidate(problem.space, f"{problem.seed} stands in {len(trials.all)}")
    return candidate


def _amc(problem: Problem) -> Strategy:
    """Raises `RequestError` where the agent's library is not installed."""
    try:
        from compress.search.strategies.amc import Amc
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
