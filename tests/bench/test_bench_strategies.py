"""The table of strategies, and that an interrupted one goes on."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import search_formulas
import search_network
import torch
from search_formulas import measured, outcome

from bench import strategies
from compress.errors import PruningError
from compress.request import Request
from compress.search import latency
from compress.search.trials import Trial, Trials
from compress.workload import open_workload


@pytest.fixture
def problem():
    return replace(search_formulas.problem(), trials=6)


def test_finished_trials_are_not_measured_again(problem, tmp_path):
    asked = []

    def evaluate(candidate):
        if len(asked) == 3:
            raise KeyboardInterrupt
        asked.append(candidate)
        return measured(candidate)

    with pytest.raises(KeyboardInterrupt):
        strategies.run("simulated-annealing", problem, evaluate, tmp_path)
    assert len(Trials(tmp_path).all) == 3
    resumed = strategies.run("simulated-annealing", problem, measured, tmp_path)
    whole = search_formulas.search("simulated-annealing", problem)
    assert [(trial.candidate, trial.outcome) for trial in resumed] == whole
    assert strategies.run("simulated-annealing", problem, evaluate, tmp_path) == resumed


def test_a_refused_candidate_is_a_trial_and_the_others_go_on(problem, tmp_path):
    asked = []

    def evaluate(candidate):
        asked.append(candidate)
        if len(asked) == 1:
            raise PruningError("Too much of a.")
        return measured(candidate)

    trials = strategies.run("random", problem, evaluate, tmp_path)
    assert [trial.refused for trial in trials] == ["Too much of a.", *[None] * 5]


def test_the_best_is_the_most_accurate_one_that_keeps_to_the_limits(problem):
    space = problem.space
    fast, slow, poor = outcome(0.8, 0.5), outcome(0.9, 0.51), outcome(0.7, 0.1)
    found = ((0.75, poor), (0.25, slow), (0.9, None), (0.5, fast))
    trials = [Trial(number, space.uniform(ratio), o) for number, (ratio, o) in enumerate(found, start=1)]
    assert strategies.row("uniform", trials, problem) == strategies.Row("uniform", fast, 4, 0.0)
    assert strategies.row("uniform", trials[1:2], problem) == strategies.Row("uniform", None, 0, 0.0)


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


@pytest.mark.integration
def test_the_command_writes_the_page_and_goes_on(tmp_path, monkeypatch, capsys):
    folder = search_network.images(tmp_path / "images")
    source = open_workload(search_network.request(folder), search_network.trained(folder))
    requests, race = [], latency.benchmark.race
    monkeypatch.setattr(latency.benchmark, "race", partial(race, rounds=1, burst_ms=1.0))
    monkeypatch.setattr(strategies, "open_workload", lambda request: requests.append(request) or source)
    command = ["--strategies", "uniform", "random", "--trials", "2", "--min-speedup", "0.01", "--threads", "2"]
    command += ["--runtime", "onnxruntime", "--work", str(tmp_path / "work"), "--out", str(tmp_path / "page.md")]
    threads = torch.get_num_threads()
    try:
        strategies.main(command)
        page = (tmp_path / "page.md").read_text()
        assert [line.split("|")[1] for line in page.splitlines()[-2:]] == [" `uniform` ", " `random` "]
        assert "no trial was fast enough" not in page and requests[0].threads == 2
        strategies.main(command)
        assert (tmp_path / "page.md").read_text() == page
        with pytest.raises(SystemExit, match="1"):
            strategies.main([*command, "--pruning-epochs", "1"])
        assert "holds measurements of another request" in capsys.readouterr().err
    finally:
        torch.set_num_threads(threads)
