"""AMC on a model of formulas; what it needs is in requirements-dev.txt."""

from __future__ import annotations

import sys
from dataclasses import replace

import numpy as np
import pytest
import search_formulas
import torch
from search_formulas import HARM, best, measured, outcome, search

from compress.errors import RequestError
from compress.search.strategies import STRATEGIES


@pytest.fixture
def amc():
    pytest.importorskip("stable_baselines3", reason="pip install -r requirements-search.txt")
    from compress.search.strategies import amc

    return amc


@pytest.fixture
def problem():
    return search_formulas.problem()


def test_without_the_library_the_refusal_says_what_to_install(problem, monkeypatch):
    monkeypatch.delitem(sys.modules, "compress.search.strategies.amc", raising=False)
    monkeypatch.setitem(sys.modules, "stable_baselines3", None)
    monkeypatch.setitem(sys.modules, "gymnasium", None)
    with pytest.raises(RequestError) as refusal:
        STRATEGIES["amc"](problem)
    assert str(refusal.value) == (
        "strategy: got 'amc', expected another one, or stable-baselines3: pip install -r requirements-search.txt."
    )


def test_it_beats_uniform_and_random_with_as_many_trials(amc, problem):
    found = best(problem, search("amc", problem))
    assert found > best(problem, search("uniform", problem)) + 0.03
    assert found > best(problem, search("random", problem))


def test_the_agent_learns_which_group_to_spare(amc, problem):
    """One group does all the harm: what the agent would choose without noise, before and after its trials."""
    strategy, rewards = amc.Amc(problem), []
    before = strategy._episode(amc.random.Random(0), 0.0)
    history = []
    for left in range(problem.trials, 0, -1):
        candidate = strategy.propose(history, left)
        history.append((candidate, outcome(0.9 - 0.5 * dict(candidate.ratios)["b"], measured(candidate).latency_ms)))
        rewards.append(problem.target.score(history[-1][1], problem.dense))
    after = strategy._episode(amc.random.Random(0), 0.0)
    assert max(before.values()) - min(before.values()) < 0.1
    assert after["b"] < np.mean([after[name] for name in HARM if name != "b"]) - 0.2
    assert np.mean(rewards[-8:]) > np.mean(rewards[:8]) + 10


def test_a_state_tells_the_place_the_channels_and_what_was_chosen(amc, problem):
    strategy = amc.Amc(problem)
    assert strategy._state(0, {}).tolist() == pytest.approx([0, 1, 1, 0, 5 / 6, 0])
    assert strategy._state(2, {"a": 0.5, "b": 0.25}).tolist() == pytest.approx([2 / 6, 1, 1, 0.125, 3 / 6, 0.25])
    assert strategy._state(6, dict.fromkeys(HARM, 0.5)).tolist() == pytest.approx([1, 0, 0, 0.5, 0, 0.5])


def test_noise_stays_and_then_falls_by_one_factor(amc, problem):
    strategy = amc.Amc(replace(problem, trials=100))
    assert [strategy._noise(n) for n in (0, 25, 100)] == pytest.approx([0.5, 0.5, 0.05])
    assert strategy._noise(50) / strategy._noise(40) == pytest.approx(strategy._noise(90) / strategy._noise(80))


def test_an_interrupted_search_goes_on_as_if_it_had_not_been(amc, problem):
    history = search("amc", replace(problem, trials=5))
    again = amc.Amc(replace(problem, trials=5))
    assert [again.propose(history[:n], 5 - n) for n in (4, 2, 3)] == [history[n][0] for n in (4, 2, 3)]


def test_nobody_elses_random_numbers_are_touched(amc, problem):
    torch.manual_seed(5), np.random.seed(5)
    expected = torch.rand(1), np.random.rand()
    torch.manual_seed(5), np.random.seed(5)
    search("amc", replace(problem, trials=3))
    assert (torch.rand(1), np.random.rand()) == expected
