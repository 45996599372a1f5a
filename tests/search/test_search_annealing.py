"""Annealing, and the forecast that it spends its trials by, on a model of formulas."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import search_formulas
from search_formulas import HARM, TRIALS, best, measured, outcome, search

from compress.errors import PruningError
from compress.search.forecast import Forecast
from compress.search.strategies import annealing, proposal
from compress.search.target import Target
from compress.search.trials import Trials


@pytest.fixture
def problem():
    return search_formulas.problem()


# ---- the forecast ----------------------------------------------------------------------------------------------------


def test_before_anything_is_measured_halving_all_channels_quarters_the_time(problem):
    forecast = Forecast.of(problem, [])
    assert forecast.log_excess(problem.space.uniform(0.0)) == pytest.approx(1.0)
    assert forecast.log_excess(problem.space.uniform(0.5)) == pytest.approx(-1.0)
    assert set(dict(forecast.fitted(dict.fromkeys(HARM, 0.0)).ratios).values()) == {0.375}


def test_what_was_measured_replaces_what_was_assumed(problem):
    def real(candidate):
        return outcome(0.5, 0.8 * 2 ** (1.5 * math.log2(1 - dict(candidate.ratios)["b"])))

    tried = [problem.space.candidate({name: ratio}) for name in HARM for ratio in (0.25, 0.5, 0.75)] * 5
    forecast = Forecast.of(problem, [(one, real(one)) for one in tried])
    assert forecast.unpruned == pytest.approx(math.log2(1.6), abs=0.01)
    assert forecast.gains == pytest.approx((0, 1.5, 0, 0, 0, 0), abs=0.02)


def test_a_group_that_seems_to_cost_time_when_it_shrinks_is_taken_for_free(problem):
    slower = [(problem.space.candidate({"a": 0.75}), outcome(0.5, 4.0))] * 9
    assert Forecast.of(problem, slower).gains[0] == 0.0


def test_fitting_keeps_proportions_limits_and_what_is_removed_already(problem):
    forecast = Forecast.of(problem, [])
    fitted = forecast.fitted({**dict.fromkeys(HARM, 0.0), "a": 0.75}, least={"b": 0.5})
    ratios = dict(fitted.ratios)
    assert forecast.log_excess(fitted) <= 0 and ratios["b"] == 0.5
    assert ratios["a"] > ratios["c"] == ratios["d"] == ratios["e"] == ratios["f"] < 0.375
    assert forecast.fitted(dict.fromkeys(HARM, 0.5), allowed=1.0) == problem.space.candidate({})
    hard = Forecast.of(replace(problem, target=Target(min_speedup=1e6)), [])
    assert hard.fitted(dict.fromkeys(HARM, 0.5)) == problem.space.uniform(0.9)


# ---- annealing -------------------------------------------------------------------------------------------------------


def test_the_temperature_falls_by_one_factor(problem):
    walk = annealing._Walk(problem, problem.space.candidate({}), [], 3)
    assert [walk._temperature(step) for step in (0, 1, 2, 9)] == pytest.approx([4.0, math.sqrt(0.4), 0.1, 0.1])


def test_metropolis_takes_what_is_better_always_and_what_is_worse_while_it_is_hot(problem):
    one, two, three = (problem.space.uniform(ratio) for ratio in (0.25, 0.5, 0.75))
    better = [(one, outcome(0.5, 0.1)), (two, outcome(0.6, 0.1)), (three, outcome(0.61, 0.1))]
    assert annealing._Walk(problem, one, better, TRIALS)._accepted() == three
    assert annealing._Walk(problem, one, better[::-1], 3)._accepted() == three
    taken = 0
    for seed in range(400):
        slightly_worse = [(one, outcome(0.54, 0.1)), (two, outcome(0.5, 0.1))]
        walk = annealing._Walk(replace(problem, seed=seed), one, slightly_worse, 10_000)
        taken += walk._accepted() == two
    assert taken / 400 == pytest.approx(math.exp(-1), abs=0.08)


def test_a_missed_limit_counts_beyond_what_is_allowed_alone(problem):
    found = outcome(0.8, 1.0)
    assert annealing._score(problem, found, 0.0) == pytest.approx(-110.0)
    assert annealing._score(problem, found, 0.0) == problem.target.score(found, problem.dense)
    assert annealing._score(problem, found, 1.0) == pytest.approx(-10.0)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("name", ["simulated-annealing", "auto-compress"])
def test_it_beats_uniform_and_random_with_as_many_trials(name, seed, problem):
    problem = replace(problem, seed=seed)
    found = best(problem, search(name, problem))
    assert found > best(problem, search("uniform", problem)) + 0.03
    assert found > best(problem, search("random", problem))


def test_annealing_measures_nothing_twice(problem):
    tried = [one for one, _ in search("simulated-annealing", problem)]
    assert len(set(tried)) == TRIALS


def test_auto_compress_comes_nearer_in_rounds_and_ends_with_admm(problem):
    history = search("auto-compress", problem)
    assert history[0][0] == problem.space.candidate({})
    length = (TRIALS - 2) // annealing.ROUNDS
    times = [history[1 + number * length][1].latency_ms for number in range(3)]
    assert times == sorted(times, reverse=True) and times[0] > 0.6
    for number in (1, 2):
        first = 1 + number * length
        allowed = 1 - number / annealing.ROUNDS
        before = dict(annealing._best(problem, history[first - length : first], allowed).ratios)
        for one, _ in history[first : first + length]:
            assert all(ratio >= before[name] for name, ratio in one.ratios)
    assert history[-1][0] == replace(annealing._best(problem, history[:-1]), pruner="admm")
    assert all(one.pruner == "l1-norm" for one, _ in history[:-1])


def test_auto_compress_ends_with_admm_although_some_candidates_cannot_be_made(problem, tmp_path):
    strategy, trials = annealing.AutoCompress(problem), Trials(tmp_path)

    def made(candidate):
        if len(trials.all) in (2, 7):
            raise PruningError("Too much of a.")
        return measured(candidate)

    for _ in range(TRIALS):
        trials.measure(proposal(strategy, problem, trials), made)
    assert [trial.number for trial in trials.all if trial.refused] == [3, 8]
    assert [trial.number for trial in trials.all if trial.candidate.pruner == "admm"] == [TRIALS]


@pytest.mark.parametrize("trials", [1, 2, 3, 5])
def test_a_few_trials_are_enough_to_run(trials, problem):
    assert len(search("auto-compress", replace(problem, trials=trials))) == trials
