"""Where the tests find the project and each other."""

import os
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
ROOT = TESTS.parent
PYTHONPATH = os.pathsep.join(map(str, (ROOT, TESTS, TESTS / "helpers", TESTS / "networks")))
"""Of a child process that imports what tests import."""
