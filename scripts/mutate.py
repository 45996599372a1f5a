"""Takes protections out one at a time, in a copy of the tree, and runs the tests that have to fail then.

    python scripts/mutate.py --all                   every protection of scripts/mutants.toml
    python scripts/mutate.py --sample 5 --seed 3     five of them
    python scripts/mutate.py storage-bounds names    these

A protection that no test misses is as good as none: somebody will take it out and see everything green. Exit status 1 when
one survives; 2 when an entry's code is not found exactly once, so that the table cannot rot.
"""

from __future__ import annotations

import argparse
import os
import random
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TABLE = Path(__file__).with_name("mutants.toml")
LIMIT_S = 900
_NOT_COPIED = (".git", ".venv", "__pycache__", "*.pyc", ".pytest_cache", ".ruff_cache")
_NOT_COPIED_AT_THE_ROOT = ("runs", "app-data", "build", "shared")
"""Data beside the package, which has a folder `runs` as well."""
_FAILED, _PASSED = 1, 0
"""Exit status of pytest."""


@dataclass(frozen=True)
class Mutant:
    name: str
    file: str
    """From the root of the tree."""
    code: str
    instead: str
    tests: str
    """Arguments of pytest."""
    quick: bool = False

    def problem(self, root: Path) -> str | None:
        """What is wrong with the entry; None when its code stands in its file exactly once and its tests are there."""
        path = root / self.file
        found = path.read_text(encoding="utf-8").count(self.code) if path.is_file() else 0
        if found != 1:
            return f"{self.name}: its code stands {found} times in {self.file}, not once: correct {TABLE.name}"
        missing = [word for word in shlex.split(self.tests) if word.endswith(".py") and not (root / word).is_file()]
        return f"{self.name}: there is no {missing[0]}: correct {TABLE.name}" if missing else None


def table() -> dict[str, Mutant]:
    entries = tomllib.loads(TABLE.read_text(encoding="utf-8"))
    return {name: Mutant(name, **entry) for name, entry in entries.items()}


def tried(mutant: Mutant, tree: Path) -> tuple[str, str]:
    """Verdict and detail; `tree` is a copy that may be changed, and is as before afterwards."""
    path = tree / mutant.file
    before = path.read_text(encoding="utf-8")
    path.write_text(before.replace(mutant.code, mutant.instead), encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "--durations=0", "--no-header"]
    try:
        done = subprocess.run(
            [*command, *shlex.split(mutant.tests)],
            cwd=tree,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": str(tree)},
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
        )
    except subprocess.TimeoutExpired:
        return "noticed", f"its tests did not end within {LIMIT_S} s"
    finally:
        path.write_text(before, encoding="utf-8")
    lines = done.stdout.strip().splitlines() or done.stderr.strip().splitlines() or [""]
    failed = next((line.removeprefix("FAILED ") for line in lines if line.startswith("FAILED ")), lines[-1])
    verdict = {_FAILED: "noticed", _PASSED: "SURVIVED"}.get(done.returncode, "BROKEN")
    return verdict, failed[:110]


def chosen(arguments: argparse.Namespace, mutants: dict[str, Mutant]) -> list[Mutant]:
    """Raises SystemExit for a name that is not in the table."""
    if unknown := set(arguments.names) - set(mutants):
        sys.exit(f"There is no mutant {min(unknown)}; {TABLE.name} has {', '.join(mutants)}.")
    if arguments.names:
        return [mutants[name] for name in arguments.names]
    offered = [mutant for mutant in mutants.values() if mutant.quick or not arguments.quick]
    if arguments.sample is None:
        return offered
    return random.Random(arguments.seed).sample(offered, min(arguments.sample, len(offered)))


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="mutate.py", description=__doc__.splitlines()[0])
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--all", action="store_true", help="every protection, which takes about an hour")
    which.add_argument("--sample", type=int, metavar="N", help="so many, at random")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument("--quick", action="store_true", help="only those whose tests need seconds")
    parser.add_argument("names", nargs="*", metavar="name", help=f"of {TABLE.name}")
    arguments = parser.parse_args(words)
    if not (arguments.all or arguments.sample is not None or arguments.names):
        parser.error("say which: --all, --sample N, or names")
    mutants = table()
    if problems := [problem for mutant in mutants.values() if (problem := mutant.problem(ROOT))]:
        print("\n".join(problems))
        return 2
    return _try_all(chosen(arguments, mutants))


def _not_copied(folder: str, names: list[str]) -> set[str]:
    """What `shutil.copytree` leaves out of a folder of the tree."""
    patterns = (*_NOT_COPIED, *_NOT_COPIED_AT_THE_ROOT) if Path(folder) == ROOT else _NOT_COPIED
    return shutil.ignore_patterns(*patterns)(folder, names)


def _try_all(mutants: Sequence[Mutant]) -> int:
    survivors = 0
    print("| protection taken out | verdict | seconds | by |\n|---|---|---:|---|", flush=True)
    with tempfile.TemporaryDirectory(prefix="espalier-mutants-") as folder:
        tree = Path(folder) / "tree"
        shutil.copytree(ROOT, tree, ignore=_not_copied)
        for mutant in mutants:
            started = time.monotonic()
            verdict, detail = tried(mutant, tree)
            survivors += verdict != "noticed"
            print(f"| {mutant.name} | {verdict} | {time.monotonic() - started:.0f} | {detail} |", flush=True)
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
