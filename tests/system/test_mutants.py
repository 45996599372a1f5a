"""Every protection has a test that misses it: the table is in order, and one entry is tried every day."""

from __future__ import annotations

import datetime
import importlib.util
import subprocess
import sys

import pytest
from places import ROOT

pytestmark = pytest.mark.integration

SCRIPT = ROOT / "scripts" / "mutate.py"


@pytest.fixture(scope="module")
def mutate():
    spec = importlib.util.spec_from_file_location("mutate", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["mutate"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["mutate"]


def test_every_protection_of_the_table_is_still_there(mutate):
    found = mutate.table()
    assert len(found) >= 40
    assert [problem for mutant in found.values() if (problem := mutant.problem(ROOT))] == []
    assert all(mutant.code != mutant.instead for mutant in found.values())


def test_an_entry_whose_code_is_gone_is_told(mutate, tmp_path):
    (tmp_path / "a.py").write_text("x = 1\nx = 1\n")
    (tmp_path / "test_a.py").write_text("")
    assert "stands 2 times in a.py" in mutate.Mutant("m", "a.py", "x = 1", "", "test_a.py").problem(tmp_path)
    assert "stands 0 times in b.py" in mutate.Mutant("m", "b.py", "x = 1", "", "test_a.py").problem(tmp_path)
    assert "there is no test_b.py" in mutate.Mutant("m", "a.py", "x = 1\nx", "", "test_b.py -k c").problem(tmp_path)
    assert mutate.Mutant("m", "a.py", "x = 1\nx", "", "test_a.py").problem(tmp_path) is None


@pytest.mark.parametrize(
    "instead, test, verdict",
    [
        ("return False", "def test_a():\n    assert a.guard()\n", "noticed"),
        ("return 1", "def test_a():\n    assert a.guard()\n", "SURVIVED"),
        ("return (", "def test_a():\n    assert a.guard()\n", "BROKEN"),
    ],
)
def test_a_mutant_is_tried_in_a_copy_that_is_as_before_afterwards(instead, test, verdict, mutate, tmp_path):
    (tmp_path / "a.py").write_text("def guard():\n    return True\n")
    (tmp_path / "test_a.py").write_text(f"import a\n\n\n{test}")
    assert mutate.tried(mutate.Mutant("m", "a.py", "return True", instead, "test_a.py"), tmp_path)[0] == verdict
    assert (tmp_path / "a.py").read_text() == "def guard():\n    return True\n"


def test_a_protection_is_taken_out_today_and_missed():
    """Another every day; `python scripts/mutate.py --all` tries them all."""
    today = str(datetime.date.today().toordinal())
    done = subprocess.run(
        [sys.executable, SCRIPT, "--sample", "1", "--quick", "--seed", today],
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("| noticed |") == 1
