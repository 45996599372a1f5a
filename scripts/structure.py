"""Measures the structure of the source tree, and fails when a limit is broken.

    python -m scripts.structure                  the table, as Markdown
    python -m scripts.structure --check          exit status 1 when a limit is broken, or an exception is no longer needed
    python -m scripts.structure --write          the table into docs/architecture.md
    python -m scripts.structure --tree FOLDER    the same of another checkout

All figures are read from the syntax trees; nothing is imported.
"""

from __future__ import annotations

import argparse
import ast
import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass
from datetime import date
from functools import cached_property
from pathlib import Path
from statistics import median, quantiles

ROOT = Path(__file__).resolve().parents[1]
PAGE = Path("docs/architecture.md")
START, END = "<!-- structure: made by `python -m scripts.structure --write` -->", "<!-- end of structure -->"

MOST_MODULES = 17
"""Python files in one folder, tests and tools included."""
MOST_FILE_LINES = 400
"""Tests and tools included."""
MOST_MEDIAN_LINES = 200
"""Of the files of the package."""
MOST_FUNCTION_LINES = 60
"""Not of tests, where a stand-in for a library is one long function."""

EXCEPTIONS: dict[str, frozenset[str]] = {
    "folders": frozenset(),
    "files": frozenset(),
    "functions": frozenset(),
}
"""What breaks a limit today. An entry that is no longer needed is an error too, so these lists only get shorter."""

BEFORE_COMMIT = "2b83e0b"
"""The last commit before the modules moved into packages; its column below is this script's own measurement of it."""
BEFORE: dict[str, str] = {
    "files / lines": "169 / 27,527",
    "modules in the largest folder": "80 (`compress`)",
    "lines of a file, median / max": "147 / 411",
    "lines of a function, p50 / p90 / max": "7 / 21 / 123",
    "typed arguments": "99.1 %",
    "public functions with tensors whose docstring gives a shape": "35 % of 83",
    "tests without a check": "0 of 886",
    "functions typed `dict[str, Any]` or `Facts`": "153",
    "public names that several modules define": "42",
}

Function = ast.FunctionDef | ast.AsyncFunctionDef
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
_UNTYPED = re.compile(r"\b(Facts|[dD]ict\[str, Any\])")
_SHAPE = re.compile(
    r"\bshape|\[(?:[A-Za-z0-9_ *+/.-]+, ?)+[A-Za-z0-9_ *+/.-]*\]|\bscalar\b|\b[0-9]-D\b|\b0-d", re.IGNORECASE
)
_CHECKING_CALL = re.compile(r"assert_\w+|expect\w*|raises|warns|fail|wait_for_\w+")
"""Of pytest, torch.testing, numpy.testing and Playwright."""
_SHARED_NAMES = frozenset({"main", "run"})
"""Entry points: each program has a `main`, each stage a `run`."""


@dataclass(frozen=True)
class Module:
    """A Python file of the tree."""

    name: str
    """Path from the root of the tree."""
    text: str

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text)

    @property
    def lines(self) -> int:
        return len(self.text.splitlines())

    @cached_property
    def functions(self) -> list[tuple[str, Function, bool]]:
        """(qualified name, definition, whether it is a method) of each function, nested ones included."""
        return list(_functions(self.tree, "", in_class=False))


def _functions(node: ast.AST, prefix: str, *, in_class: bool) -> Iterator[tuple[str, Function, bool]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, _FUNCTIONS):
            yield prefix + child.name, child, in_class
            yield from _functions(child, f"{prefix}{child.name}.", in_class=False)
        elif isinstance(child, ast.ClassDef):
            yield from _functions(child, f"{prefix}{child.name}.", in_class=True)
        else:
            yield from _functions(child, prefix, in_class=in_class)


def modules(root: Path, folder: str) -> list[Module]:
    """Every Python file below `folder`, by path."""
    paths = sorted((root / folder).rglob("*.py"))
    return [Module(path.relative_to(root).as_posix(), path.read_text(encoding="utf-8")) for path in paths]


def length(function: Function) -> int:
    """Lines from `def` to the end, without decorators."""
    return (function.end_lineno or function.lineno) - function.lineno + 1


def arguments(function: Function, is_method: bool) -> list[ast.arg]:
    """All arguments but `self` and `cls`."""
    given = function.args
    positional = [*given.posonlyargs, *given.args]
    static = any(isinstance(d, ast.Name) and d.id == "staticmethod" for d in function.decorator_list)
    if is_method and not static:
        positional = positional[1:]
    return [*positional, *given.kwonlyargs, *(a for a in (given.vararg, given.kwarg) if a is not None)]


def signature(function: Function, is_method: bool) -> list[str]:
    """The annotations of a function, as they are written."""
    nodes = [*(argument.annotation for argument in arguments(function, is_method)), function.returns]
    return [ast.unparse(node) for node in nodes if node is not None]


def is_public(qualified: str) -> bool:
    """Whether no part of a qualified name starts with an underscore; a function within a function is not public."""
    return not any(part.startswith("_") for part in qualified.split("."))


@dataclass(frozen=True)
class Structure:
    """What is measured of a tree."""

    source: list[Module]
    """The package."""
    tests: list[Module]
    tools: tuple[Module, ...] = ()
    """Benchmarks and scripts."""

    @classmethod
    def of(cls, root: Path) -> Structure:
        tools = (*modules(root, "bench"), *modules(root, "scripts"))
        return cls(modules(root, "compress"), modules(root, "tests"), tools)

    @property
    def every(self) -> list[Module]:
        return [*self.source, *self.tests, *self.tools]

    @cached_property
    def folders(self) -> Counter[str]:
        """Python files in each folder."""
        return Counter(module.name.rpartition("/")[0] for module in self.every)

    @cached_property
    def functions(self) -> list[tuple[str, Function, bool]]:
        return [(f"{m.name}::{name}", function, method) for m in self.source for name, function, method in m.functions]

    @property
    def typed_arguments(self) -> tuple[int, int]:
        """(annotated, all) arguments."""
        every = [a for _, function, method in self.functions for a in arguments(function, method)]
        return sum(a.annotation is not None for a in every), len(every)

    @property
    def tensor_functions(self) -> dict[str, bool]:
        """Public functions that take or return a tensor -> whether the docstring gives a shape."""
        return {
            name: bool(_SHAPE.search(ast.get_docstring(function) or ""))
            for name, function, method in self._outer_functions()
            if is_public(name.partition("::")[2]) and any("Tensor" in a for a in signature(function, method))
        }

    @property
    def untyped_functions(self) -> list[str]:
        """Functions with `dict[str, Any]` or `Facts` in their signature."""
        return [n for n, f, method in self.functions if any(_UNTYPED.search(a) for a in signature(f, method))]

    @property
    def repeated_names(self) -> dict[str, list[str]]:
        """Public functions and classes that several modules define -> those modules.

        Left out are entry points, and the templates: a script that goes along with the results imports nothing of us.
        """
        places: dict[str, list[str]] = {}
        for module in self.source:
            if "/templates/" not in module.name:
                names = {n.name for n in module.tree.body if isinstance(n, (*_FUNCTIONS, ast.ClassDef))}
                for name in names - _SHARED_NAMES:
                    if not name.startswith("_"):
                        places.setdefault(name, []).append(module.name)
        return {name: where for name, where in sorted(places.items()) if len(where) > 1}

    @property
    def unchecked_tests(self) -> tuple[list[str], int]:
        """(tests that check nothing, number of tests)."""
        tests = [
            (f"{module.name}::{name}", function)
            for module in self.tests
            if Path(module.name).name.startswith("test_")
            for name, function, _ in module.functions
            if name.rpartition(".")[2].startswith("test_")
        ]
        helpers = {n.rpartition(".")[2] for m in self.tests for n, f, _ in m.functions if _checks(f, frozenset())}
        return [name for name, function in tests if not _checks(function, helpers)], len(tests)

    def _outer_functions(self) -> Iterator[tuple[str, Function, bool]]:
        """Functions that are not within another one."""
        for module in self.source:
            inner = {id(g) for _, f, _ in module.functions for g in ast.walk(f) if g is not f}
            yield from ((f"{module.name}::{n}", f, method) for n, f, method in module.functions if id(f) not in inner)


def _checks(test: Function, helpers: Set[str]) -> bool:
    """Whether a function asserts, expects an error, or calls a helper of the tests that does."""
    for node in ast.walk(test):
        if isinstance(node, ast.Assert):
            return True
        if isinstance(node, ast.Call):
            called = node.func
            name = (
                called.attr if isinstance(called, ast.Attribute) else called.id if isinstance(called, ast.Name) else ""
            )
            if _CHECKING_CALL.fullmatch(name) or name in helpers:
                return True
            if name == "run" and any(word.arg == "check" for word in node.keywords):  # of a child process
                return True
    return False


def table(structure: Structure) -> list[tuple[str, str, str]]:
    """(what, value, goal) of each point."""
    lines = [module.lines for module in structure.source]
    lengths = [length(function) for _, function, _ in structure.functions]
    typed, every = structure.typed_arguments
    shapes = structure.tensor_functions
    unchecked, tests = structure.unchecked_tests
    largest, most = Counter(module.name.rpartition("/")[0] for module in structure.source).most_common(1)[0]
    p90 = quantiles(lengths, n=10)[-1]
    return [
        ("files / lines", f"{len(lines)} / {sum(lines):,}", "as many as it needs"),
        ("modules in the largest folder", f"{most} (`{largest}`)", f"<= {MOST_MODULES}"),
        ("lines of a file, median / max", f"{median(lines):.0f} / {max(lines)}", f"<= {MOST_MEDIAN_LINES} / {MOST_FILE_LINES}"),
        ("lines of a function, p50 / p90 / max", f"{median(lengths):.0f} / {p90:.0f} / {max(lengths)}", f"max <= {MOST_FUNCTION_LINES}"),
        ("typed arguments", f"{100 * typed / every:.1f} %", "100 %"),
        ("public functions with tensors whose docstring gives a shape", _share(shapes), "100 %"),
        ("tests without a check", f"{len(unchecked)} of {tests:,}", "0"),
        ("functions typed `dict[str, Any]` or `Facts`", f"{len(structure.untyped_functions)}", "only at the JSON border"),
        ("public names that several modules define", f"{len(structure.repeated_names)}", "0"),
    ]  # fmt: skip


def _share(facts: dict[str, bool]) -> str:
    return f"{100 * sum(facts.values()) / max(len(facts), 1):.0f} % of {len(facts)}"


def markdown(structure: Structure) -> str:
    rows = [f"| point | before ({BEFORE_COMMIT}) | {date.today()} | goal |", "|---|---|---|---|"]
    rows += [f"| {what} | {BEFORE.get(what, '')} | {value} | {goal} |" for what, value, goal in table(structure)]
    return "\n".join(rows)


def breaches(structure: Structure) -> dict[str, dict[str, int]]:
    """What is over a limit, by kind -> name -> value."""
    modules_with_limits = [*structure.source, *structure.tools]
    functions = {f"{m.name}::{name}": length(f) for m in modules_with_limits for name, f, _ in m.functions}
    return {
        "folders": {folder: count for folder, count in structure.folders.items() if count > MOST_MODULES},
        "files": {module.name: module.lines for module in structure.every if module.lines > MOST_FILE_LINES},
        "functions": {name: lines for name, lines in functions.items() if lines > MOST_FUNCTION_LINES},
    }


def problems(structure: Structure, exceptions: dict[str, frozenset[str]] = EXCEPTIONS) -> list[str]:
    """One sentence for each broken limit that is no exception, and for each exception that is no longer needed."""
    limits = {
        "folders": (MOST_MODULES, "modules"),
        "files": (MOST_FILE_LINES, "lines"),
        "functions": (MOST_FUNCTION_LINES, "lines"),
    }
    sentences = []
    for kind, over in breaches(structure).items():
        most, unit = limits[kind]
        sentences += [
            f"{name} has {value} {unit}; the limit is {most}. Split it."
            for name, value in sorted(over.items())
            if name not in exceptions[kind]
        ]
        sentences += [
            f"{name} keeps to the limit of {most} {unit} now. Take it out of EXCEPTIONS in scripts/structure.py."
            for name in sorted(exceptions[kind] - set(over))
        ]
    middle = median(module.lines for module in structure.source)
    if middle > MOST_MEDIAN_LINES:
        sentences.append(
            f"The median file has {middle:.0f} lines; the limit is {MOST_MEDIAN_LINES}. Split the longer ones."
        )
    return sentences


def write(page: Path, text: str, start: str = START, end: str = END) -> None:
    """Puts `text` between the markers of `page`."""
    before, _, rest = page.read_text(encoding="utf-8").partition(start)
    _, found, after = rest.partition(end)
    if not found:
        raise SystemExit(f"{page} has no line {start!r} with {end!r} after it. Put both in.")
    page.write_text(f"{before}{start}\n\n{text}\n\n{end}{after}", encoding="utf-8")


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tree", type=Path, default=ROOT, help="root of the tree")
    parser.add_argument("--check", action="store_true", help="fail when a limit is broken")
    parser.add_argument("--write", action="store_true", help=f"put the table into {PAGE}")
    parser.add_argument("--list", action="store_true", help="name what is counted")
    given = parser.parse_args(words)
    structure = Structure.of(given.tree)
    if given.write:
        write(given.tree / PAGE, markdown(structure))
    elif given.check:
        found = problems(structure)
        print("\n".join(found) or "Every limit holds.")
        return 1 if found else 0
    elif given.list:
        print(*_named(structure), sep="\n")
    else:
        print(markdown(structure))
    return 0


def _named(structure: Structure) -> Iterator[str]:
    yield from (f"no shape: {name}" for name, has in structure.tensor_functions.items() if not has)
    yield from (f"no check: {name}" for name in structure.unchecked_tests[0])
    yield from (f"untyped: {name}" for name in structure.untyped_functions)
    yield from (f"repeated: {name} in {', '.join(where)}" for name, where in structure.repeated_names.items())


if __name__ == "__main__":
    sys.exit(main())
