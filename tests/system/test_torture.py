"""The part of `make torture` that the suite carries out, and what its documents state."""

from __future__ import annotations

import pytest
from places import ROOT
from torture import hostile, mutants, zips

pytestmark = pytest.mark.integration


def test_hostile_checkpoints_run_nothing_and_would_have(tmp_path):
    outcome = hostile.run(tmp_path, False)
    assert outcome.failures == () and int(outcome.figure.split()[0]) >= 500


@pytest.mark.parametrize("name", zips.CASES)
def test_every_zip_gets_its_stated_verdict(name, tmp_path):
    assert zips.wrong(name, tmp_path) is None


def test_the_stated_verdicts_are_documented():
    assert zips.verdict_table() in (ROOT / "docs" / "uploads.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("count", [2_000, pytest.param(mutants.COUNT, marks=pytest.mark.slow)])
def test_random_mutants_are_read_or_refused(count, tmp_path):
    outcome = mutants.try_mutants(tmp_path, seed=0, first=0, count=count, timed=False)
    assert outcome.failures == ()
