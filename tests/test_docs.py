"""The README and the pages of docs/: tables as the code has them now, and nothing named that is not there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer
from places import ROOT

from compress.cli.main import cli
from compress.runs import STAGES
from compress.search.strategies import STRATEGIES
from scripts import docs_tables, import_graph, pictures

PAGES = [*docs_tables.pages(), ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md"]
COMMANDS = typer.main.get_command(cli).commands
MOST_README_LINES = 150


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.fixture(params=PAGES, ids=name_of)
def page(request: pytest.FixtureRequest) -> Path:
    return request.param


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives to the headings of a page."""
    heads = re.findall(r"^#+ (.*)$", text_of(page), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads}


def test_the_tables_of_a_page_are_those_of_the_code(page: Path) -> None:
    assert docs_tables.renewed(text_of(page)) == text_of(page), "run `python -m scripts.docs_tables`"


def test_every_table_is_on_one_page() -> None:
    assert sorted(name for page in PAGES for name in docs_tables.used(text_of(page))) == sorted(docs_tables.BLOCKS)


def test_a_stale_table_is_seen_and_an_unknown_one_refused() -> None:
    blocks = {"runtimes": lambda: "| new |"}
    stale = "before\n<!-- made by scripts.docs_tables: runtimes -->\n| old |\n<!-- end -->\nafter"
    fresh = docs_tables.renewed(stale, blocks)
    assert fresh == "before\n<!-- made by scripts.docs_tables: runtimes -->\n\n| new |\n\n<!-- end -->\nafter"
    assert docs_tables.renewed(fresh, blocks) == fresh
    with pytest.raises(KeyError, match="nothing"):
        docs_tables.renewed(stale.replace("runtimes", "nothing"), blocks)


def test_the_readme_is_short_and_names_every_page_and_every_stage_in_order() -> None:
    readme = text_of(ROOT / "README.md")
    assert len(readme.splitlines()) <= MOST_README_LINES
    linked = set(
        re.findall(r"\]\(((?:docs/)?[\w.-]+\.md)\)", "".join(map(text_of, (ROOT / "docs").glob("*.md"))) + readme)
    )
    assert {page.name for page in (ROOT / "docs").glob("*.md")} <= {Path(link).name for link in linked}
    assert tuple(re.findall(r"^\| `(\w+)` \|", readme, re.MULTILINE)) == STAGES


def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", text_of(page)):
        if not target.startswith(("http://", "https://", "mailto:")):
            path, _, anchor = target.partition("#")
            goal = (page.parent / path).resolve() if path else page
            assert goal.exists(), target
            assert not anchor or anchor in anchors(goal), target


def test_files_that_are_named_exist(page: Path) -> None:
    named = re.findall(r"`((?:compress|tests|scripts|bench|assets|examples|docs)/[\w./-]+)(?:::\w+)?`", text_of(page))
    assert [path for path in named if not (ROOT / path).exists()] == []


def test_make_targets_and_modules_that_are_named_exist(page: Path) -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"(?:`|^)make ([a-z-]+)", text_of(page), re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    for module in re.findall(r"python -m ((?:bench|scripts)\.\w+)", text_of(page)):
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file(), module


def test_commands_and_options_that_are_shown_exist(page: Path) -> None:
    for line in shown_commands(text_of(page)):
        words = shlex.split(line, comments=True)
        command, rest = COMMANDS.get(words[0]), words[1:]
        assert command is not None, line
        if hasattr(command, "commands") and rest and re.fullmatch(r"[a-z|]+", rest[0]):
            assert all(word in command.commands for word in rest[0].split("|")), line
            command, rest = command.commands[rest[0].split("|")[0]], rest[1:]
        known = {flag for option in command.params for flag in (*option.opts, *option.secondary_opts)} | {"--help"}
        assert {word.partition("=")[0] for word in rest if word.startswith("--")} <= known, line


def shown_commands(text: str) -> list[str]:
    """What follows `python -m compress` in code blocks, and between backticks."""
    blocks = re.findall(r"^```.*?\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    outside = re.sub(r"^```.*?\n.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    spans = re.findall(r"`([^`\n]+)`", outside)
    found = [re.search(r"python -m compress +([a-z].*)", line) for line in [*spans, *"\n".join(blocks).splitlines()]]
    return [match[1].rstrip("&\\ ").replace("...", "") for match in found if match]


def test_every_setting_of_the_environment_is_documented() -> None:
    named = {
        name
        for path in (ROOT / "compress").rglob("*.py")
        for name in re.findall(r"ESPALIER_[A-Z_]+[A-Z]", path.read_text(encoding="utf-8"))
    }
    assert {name for name in named if f"`{name}`" not in text_of(ROOT / "docs/web-app.md")} == set()


def test_every_search_strategy_is_described() -> None:
    described = set(re.findall(r"^\| `([a-z][\w-]*)` \|", text_of(ROOT / "docs/search.md"), re.MULTILINE))
    assert described == set(STRATEGIES)


def test_the_data_flow_is_drawn_from_the_pipeline(tmp_path: Path) -> None:
    """And has every stage in order."""
    assert tuple(stage for _, stage, _ in pictures.stages()) == STAGES
    (tmp_path / "compress/stages").mkdir(parents=True)
    calls = "    dense = run.stage(first, workload)\n    last = run.stage(second, workload, dense)\n"
    (tmp_path / "compress/pipeline.py").write_text(f"def run():\n{calls}")
    (tmp_path / "compress/stages/first.py").write_text("def first(run) -> First | Skipped: ...")
    (tmp_path / "compress/stages/second.py").write_text("def second(run) -> Second: ...")
    lines = [line.strip() for line in pictures.data_flow(tmp_path).splitlines()]
    assert lines[3:] == [
        "workload --> first",
        'first["<b>first</b><br>First or Skipped"]',
        'second["<b>second</b><br>Second"]',
        "first -->|dense| second",
        "```",
    ]


def test_imports_that_follow_from_others_are_not_drawn() -> None:
    assert import_graph.reduced({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == {"a": {"b"}, "b": {"c"}, "c": set()}
