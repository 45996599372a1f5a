"""The table of strategies, and that an interrupted one goes on."""

from __future__ import annotations

from dataclasses import replace

import pytest
import search_formulas
from search_formulas import measured, outcome

from bench import strategies
from compress.request import Request


@pytest.fixture
def problem():
    return replace(search_formulas.problem(), trials=6)


def test_finished_trials_are_not_measured_again(problem, tmp_path):
    path, asked = tmp_path / "uniform.jsonl", []

    def evaluate(candidate):
        if len(asked) == 3:
            raise KeyboardInterrupt
        asked.append(candidate)
        return measured(candidate)

    with pytest.raises(KeyboardInterrupt):
        strategies.trials("simulated-annealing", problem, evaluate, path)
    assert len(path.read_text().splitlines()) == 3
    resumed = strategies.trials("simulated-annealing", problem, measured, path)
    assert resumed == search_formulas.search("simulated-annealing", problem)
    assert strategies.trials("simulated-annealing", problem, evaluate, path) == resumed


def test_the_best_is_the_most_accurate_one_that_keeps_to_the_limits(problem):
    space = problem.space
    fast, slow, poor = outcome(0.8, 0.5), outcome(0.9, 0.51), outcome(0.7, 0.1)
    history = [(space.uniform(ratio), o) for ratio, o in ((0.75, poor), (0.25, slow), (0.5, fast))]
    assert strategies.row("uniform", history, problem) == strategies.Row("uniform", fast, 3, 0.0)
    assert strategies.row("uniform", history[1:2], problem).best is None


def test_the_page_has_a_line_for_each_strategy(problem):
    rows = [strategies.Row("uniform", outcome(0.8, 0.4), 3, 12.4), strategies.Row("amc", None, 0, 7.0)]
    lines = strategies.table(rows, problem, Request(), "OpenVINO").splitlines()
    assert lines[-2:] == [
        "| `uniform` | 80.0 % | 2.50 x | 0.00 M | 3 | 12 |",
        "| `amc` | no trial was fast enough | | | | 7 |",
    ]
    assert (
        "at least 2 x as fast on OpenVINO" in lines[2] and "of 6 trials each" in lines[2] and "90.0 % right" in lines[2]
    )
