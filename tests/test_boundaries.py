"""Who may import what, held by reading the imports of every file."""

import ast
import functools
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from places import PYTHONPATH, ROOT

from scripts import import_graph

SOURCES = sorted([*ROOT.glob("compress/**/*.py"), ROOT / "app.py"])
ALLOWED = {
    "nni": {
        "compress/nni_bridge/__init__.py",
        "compress/pruning/nni/data_driven.py",  # pruners built on NNI's base classes
        "compress/pruning/nni/evaluator.py",  # our training as NNI's evaluator
        "compress/pruning/nni/backend.py",
        "compress/pruning/nni/config.py",  # a plan as NNI's config list
        "compress/pruning/speedup.py",
        "compress/pruning/nni/trained.py",  # NNI's pruners that train
        "compress/quantization/nni/backend.py",
    },
    "onnxruntime": {"compress/engines/onnxruntime.py", "compress/report/templates/infer.py"},
    "openvino": {"compress/engines/openvino.py", "compress/report/templates/infer.py"},
    "tensorrt": {"compress/engines/tensorrt"},
    "tensorrt_rtx": {"compress/engines/tensorrt"},
    "pycuda": {"compress/engines/tensorrt", "compress/report/templates/infer.py"},
    "gradio": {"app.py", "compress/ui/"},
    "huggingface_hub": {"compress/hub.py"},
    "ray": {"compress/jobs/ray.py"},
    "stable_baselines3": {"compress/search/strategies/amc.py"},
    "gymnasium": {"compress/search/strategies/amc.py"},
}


@functools.cache
def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("library", ALLOWED)
def test_fragile_libraries_live_behind_one_file_each(library):
    strangers = [
        str(path.relative_to(ROOT))
        for path in SOURCES
        if library in imported(path) and not str(path.relative_to(ROOT)).startswith(tuple(ALLOWED[library]))
    ]
    assert strangers == []


def test_only_the_runtimes_import_by_a_name_made_at_run_time():
    """TensorRT's editions are imported so, which the test above cannot see; the modules of runtimes are named in a table."""
    found = {str(p.relative_to(ROOT)) for p in SOURCES if "importlib.import_module(" in p.read_text(encoding="utf-8")}
    engines = {path for path in found if path.startswith("compress/engines/tensorrt")}
    assert len(engines) == 3 and found - engines <= {
        "compress/engines/__init__.py",
        "compress/nni_bridge/__init__.py", "compress/engines/processes/worker.py", "compress/report/templates/infer.py",
    }  # fmt: skip


LIGHT = ["request/__init__.py", "errors.py", "report/__init__.py", "files.py", "runs/__init__.py", "report/charts.py"]


@pytest.mark.parametrize("name", LIGHT)
def test_light_files_import_no_torch(name):
    assert "torch" not in imported(ROOT / "compress" / name)


def test_one_file_loads_checkpoints_and_nothing_else_of_the_program_may():
    """The lint rule (banned-api in pyproject.toml) is off in one file, which calls the loader once."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["ruff"]["lint"]
    assert {"torch.load", "torch.jit.load", "pickle"} <= set(settings["flake8-tidy-imports"]["banned-api"])
    assert "TID251" in settings["select"]
    ignored = {path for path, rules in settings["per-file-ignores"].items() if "TID251" in rules}
    assert {path for path in ignored if not path.startswith("tests/")} == {"compress/checkpoints/sandboxed.py"}
    assert (ROOT / "compress/checkpoints/sandboxed.py").read_text(encoding="utf-8").count("torch.load(") == 1


def test_checkpoints_are_only_ever_loaded_as_weights():
    for path in [*SOURCES, *ROOT.glob("scripts/*.py"), *ROOT.glob("bench/*.py")]:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if re.search(r"\btorch\.load\(", line):
                assert "weights_only=True" in line and "mmap=False" in line, f"{path.name}:{number}"
            assert not re.search(
                r"weights_only=False|add_safe_globals|pickle\.loads?\(|jit\.load|allow_pickle=True", line
            ), f"{path.name}:{number}"


@pytest.fixture(scope="module")
def edges():
    return import_graph.graph()


def test_packages_import_each_other_in_no_circle(edges):
    assert import_graph.circles(edges) == []


def test_every_package_and_module_has_its_layer(edges):
    nodes = [name for _, names in import_graph.LAYERS for name in names]
    assert sorted(nodes) == sorted(edges), "give it its place in scripts/import_graph.py"


def test_no_package_imports_one_of_a_higher_layer(edges):
    assert import_graph.upward(edges) == []


@pytest.mark.parametrize(
    "text",
    [
        "from compress.b import value",
        "from .. import b",
        "from ..b import value",
        "import compress.b.inner as other",
        "def late():\n    from compress.b import inner",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from compress.b.inner import value",
    ],
)
def test_the_graph_sees_every_way_to_import(tmp_path, text):
    for name, content in {
        "a/__init__": "",
        "a/low": text,
        "b/__init__": "",
        "b/inner": "from compress import a",
    }.items():
        path = tmp_path / "compress" / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    (tmp_path / "compress/__init__.py").write_text("__version__ = '1'")
    (tmp_path / "compress/c.py").write_text("from compress import __version__, a")
    edges = import_graph.graph(tmp_path)
    assert edges == {"compress": set(), "a": {"b"}, "b": {"a"}, "c": {"a"}}
    assert import_graph.circles(edges) == [["a", "b"]]
    assert import_graph.upward(edges, [("low", {"a"}), ("high", {"b", "c", "compress"})]) == ["a -> b"]


def test_the_lowest_layer_works_where_torch_is_not_installed():
    """Also what it imports by way of others; the server imports this layer, and nothing of torch."""
    known = import_graph.module_names()
    lowest = [
        name for name in known if import_graph.node(name) in import_graph.LAYERS[0][1] and ".templates." not in name
    ]
    script = f"import sys; sys.modules['torch'] = None\nimport {', '.join(lowest)}"
    done = subprocess.run(
        [sys.executable, "-c", script], env=os.environ | {"PYTHONPATH": PYTHONPATH}, capture_output=True
    )
    assert done.returncode == 0, done.stderr.decode()
