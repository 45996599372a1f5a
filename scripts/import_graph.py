"""Who imports whom in the package, read from the syntax trees: lazy imports and those for type checkers count too.

A node is a package directly below `compress`, with everything in it, or a module that lies beside them.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "compress"
VERSION = "compress.__version__"
"""Stands in the package's own file, which imports the rest when it is called. Whoever reads it imports nothing else of that file."""

LAYERS: list[tuple[str, set[str]]] = [
    (
        "without torch",
        {"errors", "files", "naming", "processes", "signing", "memory", "machine", "preprocessing", "runs"}
        | {"tasks", "methods", "request", "report"},
    ),
    (
        "models, data and checkpoints",
        {"models", "data", "checkpoints", "equality", "tracing", "own_modules", "nni_bridge", "hub"}
        | {"workload"},
    ),
    ("training, pruning, quantization and engines", {"training", "pruning", "quantization", "onnx_export", "engines"}),
    ("stages", {"stages"}),
    ("runs", {"pipeline", "search", "classify"}),
    ("interfaces", {"compress", "__main__", "jobs", "cli", "ui"}),
]
"""Nodes from the lowest: what is in a layer imports that layer and lower ones only. Held by tests/test_boundaries.py."""


def module_names(root: Path = ROOT) -> dict[str, Path]:
    """Dotted name -> file of each module, `compress` itself included."""
    names = {}
    for path in sorted((root / PACKAGE).rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return names


def imports(name: str, path: Path, known: Mapping[str, Path]) -> Iterator[str]:
    """The modules of `known` that a module imports anywhere in its text."""
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            targets = [f"{source}.{alias.name}" for alias in node.names]
        else:
            continue
        for target in targets:
            if target.split(".")[0] == PACKAGE and target != VERSION:
                while target not in known:  # a class or a function: its module
                    target = target.rpartition(".")[0]
                yield target


def node(module: str) -> str:
    """The node that a module belongs to: `compress.pruning.plan` -> `pruning`, `compress.errors` -> `errors`."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else PACKAGE


def graph(root: Path = ROOT) -> dict[str, set[str]]:
    """Node -> the nodes that it imports."""
    known = module_names(root)
    edges: dict[str, set[str]] = {node(name): set() for name in known}
    for name, path in known.items():
        edges[node(name)] |= {node(target) for target in imports(name, path, known)} - {node(name)}
    return edges


def reachable(edges: Mapping[str, set[str]], start: str) -> set[str]:
    """Every node that `start` imports, directly or through others."""
    seen: set[str] = set()
    waiting = [start]
    while waiting:
        for target in edges[waiting.pop()] - seen:
            seen.add(target)
            waiting.append(target)
    return seen


def circles(edges: Mapping[str, set[str]]) -> list[list[str]]:
    """The sets of nodes that reach each other, each in alphabetical order."""
    reach = {name: reachable(edges, name) for name in edges}
    found = {
        tuple(sorted(other for other in edges if other in reach[name] and name in reach[other]))
        for name in edges
        if name in reach[name]
    }
    return [list(circle) for circle in sorted(found)]


def upward(edges: Mapping[str, set[str]], layers: Sequence[tuple[str, set[str]]] = LAYERS) -> list[str]:
    """The imports that lead from a layer into a higher one, as `low -> high`."""
    level = {name: number for number, (_, names) in enumerate(layers) for name in names}
    return [f"{a} -> {b}" for a in sorted(edges) for b in sorted(edges[a]) if level[b] > level[a]]


def reduced(edges: Mapping[str, set[str]]) -> dict[str, set[str]]:
    """The same graph without the imports that follow from others (transitive reduction); it has no circles."""
    reach = {name: reachable(edges, name) for name in edges}
    return {
        name: {b for b in targets if not any(b in reach[other] for other in targets - {b})}
        for name, targets in edges.items()
    }
