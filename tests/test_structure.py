"""The limits of the source tree: files in a folder, lines of a file and of a function, tests that check something."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from places import ROOT

from scripts import structure
from scripts.structure import Module, Structure


@pytest.fixture(scope="module")
def tree() -> Structure:
    return Structure.of(ROOT)


def test_every_limit_holds_and_every_exception_is_still_needed(tree: Structure) -> None:
    assert structure.problems(tree) == []


def test_every_test_checks_something(tree: Structure) -> None:
    assert tree.unchecked_tests[0] == []


def test_the_table_of_the_documentation_has_these_points_and_goals(tree: Structure) -> None:
    """Its figures are those of the day that it names: lines change with every commit."""
    page = (ROOT / structure.PAGE).read_text(encoding="utf-8").partition(structure.START)[2].partition(structure.END)[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in page.split("\n") if line.startswith("| ")]
    points = [(what, structure.BEFORE[what], goal) for what, _, goal in structure.table(tree)]
    assert [(row[0], row[1], row[3]) for row in rows[1:]] == points, "run `python -m scripts.structure --write`"


# ---- the measurement itself ----


def of(*texts: str, tests: str = "") -> Structure:
    source = [Module(f"compress/part{number}/module.py", text) for number, text in enumerate(texts)]
    return Structure(source, [Module("tests/test_module.py", tests)])


def test_a_folder_a_file_or_a_function_over_its_limit_is_named() -> None:
    long = "def work():\n" + "    x = 1\n" * structure.MOST_FUNCTION_LINES
    files = [Module(f"compress/wide/m{number}.py", "") for number in range(structure.MOST_MODULES + 1)]
    broken = Structure([*files, Module("compress/long.py", long + "\n" * structure.MOST_FILE_LINES)], [])
    none: dict[str, frozenset[str]] = {"folders": frozenset(), "files": frozenset(), "functions": frozenset()}
    assert structure.problems(broken, none) == [
        "compress/wide has 18 modules; the limit is 17. Split it.",
        "compress/long.py has 461 lines; the limit is 400. Split it.",
        "compress/long.py::work has 61 lines; the limit is 60. Split it.",
    ]
    exceptions = none | {"functions": frozenset({"compress/long.py::work", "compress/old.py::gone"})}
    assert structure.problems(broken, exceptions)[2:] == [
        "compress/old.py::gone keeps to the limit of 60 lines now. Take it out of EXCEPTIONS in scripts/structure.py."
    ]


def test_a_median_over_its_limit_is_named() -> None:
    text = "\n" * (structure.MOST_MEDIAN_LINES + 1)
    assert structure.problems(of(text), {"folders": frozenset(), "files": frozenset(), "functions": frozenset()}) == [
        "The median file has 201 lines; the limit is 200. Split the longer ones."
    ]


def test_self_is_no_argument_and_a_star_is_one() -> None:
    text = (
        "class A:\n    def f(self, a: int, *rest, b=1): ...\n    @staticmethod\n    def g(c): ...\ndef h(d: int): ...\n"
    )
    assert of(text).typed_arguments == (2, 5)


def test_only_public_functions_with_tensors_owe_a_shape() -> None:
    text = """
def with_shape(x: Tensor) -> None:
    "x: [N, 3, H, W], float32 in 0..1."
def without(x: "torch.Tensor | None") -> int:
    "Says nothing."
def _private(x: Tensor): ...
def other(x: int): ...
class A:
    def forward(self) -> Tensor:
        "A scalar."
        def inner(y: Tensor): ...
class _B:
    def forward(self) -> Tensor: ...
"""
    found = {name.partition("::")[2]: has for name, has in of(text).tensor_functions.items()}
    assert found == {"with_shape": True, "without": False, "A.forward": True}


def test_untyped_dictionaries_and_repeated_names_are_counted() -> None:
    tree = of(
        "def f(x: dict[str, Any]): ...\ndef run(): ...\nclass _P: ...",
        "def f() -> Facts: ...\ndef run(): ...\nclass _P: ...",
    )
    assert len(tree.untyped_functions) == 2
    assert tree.repeated_names == {"f": ["compress/part0/module.py", "compress/part1/module.py"]}


@pytest.mark.parametrize(
    ("body", "checks"),
    [
        ("assert x", True),
        ("with pytest.raises(ValueError): f()", True),
        ("torch.testing.assert_close(a, b)", True),
        ("subprocess.run(command, check=True)", True),
        ("helper(x)", True),
        ("other(x)", False),
        ("print(x)", False),
    ],
)
def test_a_test_checks_itself_or_through_a_helper(body: str, checks: bool) -> None:
    tests = f"def test_it():\n    {body}\ndef helper(x):\n    assert x\ndef other(x): ...\n"
    ast.parse(tests)
    assert of("", tests=tests).unchecked_tests == ([] if checks else ["tests/test_module.py::test_it"], 1)


def test_writing_replaces_what_is_between_the_markers_alone(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{structure.START}\nold\n{structure.END}\nafter\n")
    structure.write(page, "new")
    structure.write(page, "new")
    assert page.read_text() == f"before\n{structure.START}\n\nnew\n\n{structure.END}\nafter\n"
    page.write_text("no markers")
    with pytest.raises(SystemExit, match="has no line"):
        structure.write(page, "new")
