"""Tree-structured Parzen estimator (Bergstra et al. 2011) by Optuna, over the ratios of all groups together.

The study lives in memory and is made from the record of the search before each proposal: the record is the only truth, and
a search that was killed goes on with the proposals that it would have made.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from compress.search.candidate import Candidate
from compress.search.problem import History, Problem
from compress.search.space import Space
from compress.search.strategies.uniform import Uniform

STARTS = 8
"""Proposals of uniform pruning first: they find out how much has to go, from where single groups are moved."""


@dataclass(frozen=True)
class Tpe:
    """Uniform pruning first, then where the estimator expects the best score."""

    problem: Problem

    def propose(self, history: History, left: int) -> Candidate:
        if len(history) < min(STARTS, self.problem.trials // 2):
            return Uniform(self.problem).propose(history, left)
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        sampler = optuna.samplers.TPESampler(
            n_startup_trials=1,
            multivariate=True,
            seed=self.problem.seed + len(history),
            warn_independent_sampling=False,
        )
        study = optuna.create_study(direction="maximize", sampler=sampler)
        distributions = _distributions(self.problem.space, optuna)
        for candidate, outcome in history:
            params = _params(self.problem.space, candidate)
            score = self.problem.score(outcome)
            study.add_trial(optuna.trial.create_trial(params=params, distributions=distributions, value=score))
        return _candidate(self.problem.space, study.ask(distributions).params)


def _distributions(space: Space, optuna: Any) -> dict[str, Any]:
    """Choices of a group by number, which keeps their order; what has only one choice is no parameter."""
    found: dict[str, Any] = {
        group.layers[0]: optuna.distributions.IntDistribution(0, len(space.choices(group)) - 1)
        for group in space.groups
    }
    if space.sensitive:
        found["widened"] = optuna.distributions.IntDistribution(0, len(space.sensitive))
    for name, choices in (("pruner", space.pruners), ("quantizer", space.quantizers)):
        if len(choices) > 1:
            found[name] = optuna.distributions.CategoricalDistribution(choices)
    return found


def _params(space: Space, candidate: Candidate) -> dict[str, Any]:
    ratios = dict(candidate.ratios)
    params: dict[str, Any] = {
        group.layers[0]: space.choices(group).index(ratios[group.layers[0]]) for group in space.groups
    }
    if space.sensitive:
        params["widened"] = len(candidate.layer_bits)
    if len(space.pruners) > 1:
        params["pruner"] = candidate.pruner
    if len(space.quantizers) > 1:
        params["quantizer"] = candidate.quantizer
    return params


def _candidate(space: Space, params: dict[str, Any]) -> Candidate:
    return space.candidate(
        {group.layers[0]: space.choices(group)[params[group.layers[0]]] for group in space.groups},
        widened=params.get("widened", 0),
        pruner=params.get("pruner"),
        quantizer=params.get("quantizer"),
    )
