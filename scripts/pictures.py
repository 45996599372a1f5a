"""The pictures of docs/architecture.md as Mermaid, which GitHub draws, read from the code."""

from __future__ import annotations

import ast
from pathlib import Path

from scripts import import_graph

FACADE = {import_graph.PACKAGE, "__main__"}
"""Entry points of two lines each."""


def mermaid(lines: list[str], kind: str = "flowchart TD") -> str:
    return "\n".join(["```mermaid", kind, *(f"    {line}" for line in lines), "```"])


def packages() -> str:
    """The packages by layer. An arrow leads from who imports to what is imported; arrows that follow from others are left out."""
    (_, lowest), *layers = import_graph.LAYERS
    hidden = lowest | FACADE
    edges = {name: targets - hidden for name, targets in import_graph.graph().items() if name not in hidden}
    lines = []
    for number, (title, names) in reversed(list(enumerate(layers))):
        lines += [f'subgraph layer{number}["{title}"]', *(f"    {name}" for name in sorted(names - hidden)), "end"]
    for name, targets in import_graph.reduced(edges).items():
        lines += [f"{name} --> {target}" for target in sorted(targets)]
    lines += [f'base["everything may import:<br>{", ".join(sorted(lowest))}"]', "layer0 --> base"]
    return mermaid(lines)


def data_flow(root: Path = import_graph.ROOT) -> str:
    """What the pipeline hands from stage to stage, read from the body of `pipeline.run`, where every result has a name.

    Two kinds of arrows are left out, as the page says: every stage is given the workload, and the last one every result.
    """
    every = stages(root)
    lines = ["request & checkpoint & images --> workload", f"workload --> {every[0][1]}"]
    producer: dict[str, str] = {}
    for name, stage, given in every:
        result = _returns(root / "compress" / "stages" / f"{stage}.py", stage)
        lines.append(f'{stage}["<b>{stage}</b><br>{result.replace(" | ", " or ")}"]')
        known = [value for value in given if value in producer]
        lines += [f"{producer[value]} -->|{value}| {stage}" for value in (known if stage != every[-1][1] else known[-1:])]
        producer[name] = stage
    return mermaid(lines)


def stages(root: Path = import_graph.ROOT) -> list[tuple[str, str, list[str]]]:
    """(name of the result, stage, names of what it is given) of each `name = run.stage(stage, ...)` in the pipeline."""
    tree = ast.parse((root / "compress" / "pipeline.py").read_text(encoding="utf-8"))
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call) and ast.unparse(node.value.func) == "run.stage":
            (target,), (stage, *given) = node.targets, node.value.args
            found.append((ast.unparse(target), ast.unparse(stage), [ast.unparse(value) for value in given]))
    return found


def _returns(path: Path, function: str) -> str:
    """The return annotation of a function, as it is written."""
    body = ast.parse(path.read_text(encoding="utf-8")).body
    return next(ast.unparse(n.returns) for n in body if isinstance(n, ast.FunctionDef) and n.name == function and n.returns)
