"""The worked examples of docs/extending.md: each diff is applied to a copy of the tree, and the code after it runs there."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from places import ROOT

PAGE = ROOT / "docs" / "extending.md"
PRINTS = {"A pruner": "random\n8\n", "A runtime": "onnx-reference\nTrue 2\n"}
"""Heading of an example -> what its code prints."""


def examples() -> dict[str, tuple[str, str]]:
    """Heading -> (diff, code) of each section with a diff."""
    sections = re.split(r"^## ", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    found = {}
    for section in sections:
        blocks = dict(re.findall(r"^```(diff|python)\n(.*?)^```", section, re.MULTILINE | re.DOTALL))
        if "diff" in blocks:
            found[section.splitlines()[0]] = (blocks["diff"], blocks["python"])
    return found


def test_every_example_has_its_test() -> None:
    assert list(examples()) == list(PRINTS)


@pytest.mark.parametrize("heading", PRINTS)
def test_an_example_works_in_a_copy_of_the_tree(heading: str, tmp_path: Path) -> None:
    diff, code = examples()[heading]
    shutil.copytree(ROOT / "compress", tmp_path / "compress", ignore=shutil.ignore_patterns("__pycache__"))
    done = subprocess.run(["git", "apply", "--verbose", "-"], cwd=tmp_path, input=diff, text=True, capture_output=True)
    assert done.returncode == 0, f"{done.stderr}\nBring the diff in docs/extending.md up to date."
    # a module is imported by its path in the child that a runtime starts, so the copy has to come first there too
    environ = {"PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, cwd=tmp_path, env=environ, text=True, capture_output=True, timeout=300)
    assert (done.returncode, done.stdout) == (0, PRINTS[heading]), done.stderr
