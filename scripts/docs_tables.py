"""Writes the tables and pictures of the documentation that the code itself can tell.

    python -m scripts.docs_tables            bring every page up to date
    python -m scripts.docs_tables --check    exit status 1 when one is not

A page says where a table belongs: between `<!-- made by scripts.docs_tables: NAME -->` and `<!-- end -->`.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from scripts import import_graph, pictures

ROOT = Path(__file__).resolve().parents[1]
_BLOCK = re.compile(r"<!-- made by scripts\.docs_tables: ([a-z-]+) -->\n.*?<!-- end -->", re.DOTALL)


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(_cell(value) for value in line) + " |" for line in lines)


def _cell(value: Any) -> str:
    return " ".join(str(value).split()).replace("|", "\\|")


def code(value: Any) -> str:
    return f"`{value}`"


# ---- the request and the command line ----


def request_fields() -> str:
    """Every option of `run` and `check`, which are the fields of a request."""
    from compress.request import Request

    rows = []
    for name, field in Request.model_fields.items():
        extra: Any = field.json_schema_extra
        rows.append((code(_flag(name, field.default)), _default(field.default), field.description, extra["allowed"]))
    return table(("option", "default", "what it sets", "values"), rows)


def _flag(name: str, default: object) -> str:
    flag = "--" + name.replace("_", "-")
    return f"{flag}, --no-{flag[2:]}" if isinstance(default, bool) else flag


def _default(value: object) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return "" if value is None or value == () or value == {} else code(value)


def commands() -> str:
    """Every command of the shell, with the first line of its help."""
    return table(("command", "what it does"), [(code(name), _first_line(c.help)) for name, c in _commands()])


def command_options() -> str:
    """The options of each command besides the fields of a request."""
    from compress.request import Request

    rows = []
    fields = set(Request.model_fields)
    for name, command in _commands():
        options = {p.name: p for p in command.params if p.param_type_name == "option" and p.name != "as_json"}
        shared = fields if fields <= set(options) else set()
        for option in (option for key, option in options.items() if key not in shared):
            rows.append((code(name), code(option.opts[0]), _option_default(option), option.help))
    return table(("command", "option", "default", "what it sets"), rows)


def _option_default(option: Any) -> str:
    if isinstance(option.show_default, str):
        return code(option.show_default)
    return "" if option.default is None or option.default is False or option.default == "" else code(option.default)


def _commands() -> Iterator[tuple[str, Any]]:
    """(name, command) of each command, those of groups included."""
    import typer

    from compress.cli.main import cli

    for name, command in typer.main.get_command(cli).commands.items():  # type: ignore[attr-defined]
        for inner, below in getattr(command, "commands", {}).items():
            yield f"{name} {inner}", below
        if not hasattr(command, "commands"):
            yield name, command


def _first_line(text: str | None) -> str:
    return (text or "").strip().partition("\n\n")[0]


# ---- registries ----


def pruners() -> str:
    from compress.methods.pruners import PRUNERS

    rows = [(code(p.name), p.summary, p.needs_data, p.cost, p.paper) for p in PRUNERS.values()]
    return table(("pruner", "what it does", "needs", "takes", "from"), rows)


def searches() -> str:
    from compress.methods.pruners import SEARCHES

    return table(("strategy", "what it does", "from"), [(code(s.name), s.summary, s.paper) for s in SEARCHES.values()])


def quantizers() -> str:
    from compress.methods.quantizers import QUANTIZERS

    rows = [
        (code(q.name), q.summary, _bits(q.weight_bits), _bits(q.activation_bits), ", ".join(q.integer_runtimes), q.note, q.paper)
        for q in QUANTIZERS.values()
    ]  # fmt: skip
    head = ("quantizer", "what it does", "weight bits", "activation bits", "integer kernels on", "note", "from")
    return table(head, rows)


def _bits(bits: Sequence[int]) -> str:
    return f"{bits[0]} to {bits[-1]}" if len(bits) > 1 else str(bits[0])


def runtimes() -> str:
    from compress.methods.runtimes import RUNTIMES

    rows = [(code(r.name), r.title, r.summary, code(f"{r.flavour}.onnx")) for r in RUNTIMES.values()]
    return table(("runtime", "", "what it does", "quantized file"), rows)


# ---- the web app ----


def settings() -> str:
    """Every environment variable of the app, from the docstrings of its settings."""
    from compress.ui.web import settings as module

    rows = []
    body = next(n for n in ast.parse(inspect.getsource(module)).body if isinstance(n, ast.ClassDef)).body
    for field, text in zip(body, body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
            variable, _, meaning = str(text.value.value).partition(":")
            default = getattr(module.Settings, ast.unparse(field.target), None)
            rows.append((code(variable), _default(default), meaning))
    return table(("variable", "default", "what it sets"), rows)


def endpoints() -> str:
    """The named endpoints, their parameters but for those of a request, and what they do."""
    import gradio as gr

    from compress.request import Request
    from compress.ui import api

    app: Any = SimpleNamespace(queue=None)
    with gr.Blocks() as page:
        api.add_endpoints(app)
    rows = []
    for name, facts in page.get_api_info()["named_endpoints"].items():  # type: ignore[index]
        names = [p["parameter_name"] for p in facts["parameters"]]
        own = [n for n in names if n not in Request.model_fields]
        shown = (["the fields of a request"] if len(own) < len(names) else []) + [code(n) for n in own]
        rows.append((code(name), ", ".join(shown), _first_line(facts["description"])))
    return table(("endpoint", "parameters", "what it does"), rows)


# ---- the tree ----


def file_map() -> str:
    """Every module of the package, by folder, with the first line of its docstring."""
    folders: dict[str, list[tuple[str, str]]] = {}
    for path in import_graph.module_names().values():
        text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        folder = path.relative_to(ROOT).parent.as_posix()
        folders.setdefault(folder, []).append((code(path.name), " ".join(_first_line(text).split("\n\n")[0].split())))
    return "\n\n".join(f"### {folder}\n\n{table(('file', 'what it is'), rows)}" for folder, rows in folders.items())


BLOCKS: dict[str, Callable[[], str]] = {
    "request-fields": request_fields,
    "commands": commands,
    "command-options": command_options,
    "pruners": pruners,
    "searches": searches,
    "quantizers": quantizers,
    "runtimes": runtimes,
    "settings": settings,
    "endpoints": endpoints,
    "file-map": file_map,
    "packages": pictures.packages,
    "data-flow": pictures.data_flow,
}


def pages(root: Path = ROOT) -> list[Path]:
    """Every page of the documentation."""
    return [root / "README.md", *sorted((root / "docs").glob("*.md"))]


def renewed(text: str, blocks: dict[str, Callable[[], str]] = BLOCKS) -> str:
    """A page with its tables as the code has them now. Raises `KeyError` for a table that is not known."""

    def block(match: re.Match[str]) -> str:
        return f"<!-- made by scripts.docs_tables: {match[1]} -->\n\n{blocks[match[1]]()}\n\n<!-- end -->"

    return _BLOCK.sub(block, text)


def used(text: str) -> list[str]:
    """The names of a page's tables."""
    return _BLOCK.findall(text)


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; fail when a page is stale")
    given = parser.parse_args(words)
    stale = []
    for page in pages():
        before = page.read_text(encoding="utf-8")
        after = renewed(before)
        if after != before:
            stale.append(page.relative_to(ROOT).as_posix())
            if not given.check:
                page.write_text(after, encoding="utf-8")
    if stale:
        print(f"{', '.join(stale)}: {'stale; run `python -m scripts.docs_tables`' if given.check else 'renewed'}")
    return 1 if stale and given.check else 0


if __name__ == "__main__":
    sys.exit(main())
