"""The shell commands `search` and `sensitivity`: what they hand on, what they print, and their exit status."""

import json

import pytest
from typer.testing import CliRunner

from compress.cli.main import cli
from compress.search import sensitivity, target_search
from compress.search.target import Target
from compress.search.target_search import Settings

CELLS = [
    {"layers": ["a", "b"], "kind": "ratio", "value": 0.25, "points_lost": 20.04, "percent_faster": 12.5},
    {"layers": ["a", "b"], "kind": "bits", "value": 4, "points_lost": None, "percent_faster": None},
]


def answering(monkeypatch, module, name, found):
    """Puts a function in place that notes what it is given and answers `found`."""
    given = []

    def answer(*values, **options):
        given.append((values, options))
        return found

    monkeypatch.setattr(module, name, answer)
    return given


@pytest.mark.parametrize(("winner", "status"), [(3, 0), (None, 1)])
def test_search_exits_with_1_when_no_run_reached_the_target(winner, status, tmp_path, monkeypatch):
    given = answering(monkeypatch, target_search, "search", {"winner": winner, "text": "What was found."})
    command = ["search", "--out", str(tmp_path), "--min-speedup", "2", "--max-accuracy-drop", "0.5", "--trials", "7"]
    result = CliRunner().invoke(cli, [*command, "--pruners", "l2-norm,fpgm", "--quantizers", "lsq", "--seed", "5"])
    assert result.exit_code == status, result.output
    assert result.stdout == f"What was found.\n\nChart    {tmp_path / 'search.html'}\n"
    (((request, settings, folder), _),) = given
    assert request.seed == 5 and folder == tmp_path
    assert settings == Settings(
        Target(0.5, min_speedup=2.0), trials=7, pruners=("l2-norm", "fpgm"), quantizers=("lsq",)
    )


def test_search_prints_json_and_keeps_its_exit_status(tmp_path, monkeypatch):
    found = {"winner": None, "text": "What was found."}
    answering(monkeypatch, target_search, "search", found)
    result = CliRunner().invoke(cli, ["search", "--out", str(tmp_path), "--min-speedup", "2", "--json"])
    assert (result.exit_code, json.loads(result.stdout)) == (1, found)


def test_sensitivity_prints_a_row_for_each_cell(tmp_path, monkeypatch):
    given = answering(monkeypatch, sensitivity, "measure", {"cells": CELLS})
    result = CliRunner().invoke(cli, ["sensitivity", "--out", str(tmp_path), "--ratios", "0.25", "--bits", "4, 3"])
    assert result.exit_code == 0, result.output
    rows = [line.split() for line in result.stdout.splitlines()]
    assert ["a", "ratio", "0.25", "20.0", "12.5"] in rows and ["a", "bits", "4", "—", "—"] in rows
    (((_, folder), options),) = given
    assert (folder, options["ratios"], options["bits"]) == (tmp_path, (0.25,), (4, 3))


def test_numbers_that_are_none_are_refused(tmp_path):
    result = CliRunner().invoke(cli, ["sensitivity", "--out", str(tmp_path), "--bits", "four"])
    assert result.exit_code == 1
    assert "bits: got 'four', expected numbers separated by commas" in f"{result.exception}"
