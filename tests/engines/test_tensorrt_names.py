"""Every name of TensorRT's bindings that is used exists in the releases that are published."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path

import pytest
from gpu_double import NAMES, RELEASES
from tensorrt_files import SCRIPT

import compress.engines

SOURCES = sorted(Path(compress.engines.__file__).parent.glob("tensorrt*.py"))
CLASS_OF = {
    "builder": "Builder", "network": "INetworkDefinition", "parser": "OnnxParser", "config": "IBuilderConfig",
    "profile": "IOptimizationProfile", "runtime": "Runtime", "engine": "ICudaEngine", "execution": "IExecutionContext",
    "inspector": "EngineInspector", "BuilderFlag": "BuilderFlag", "ComputeCapability": "ComputeCapability",
    "ProfilingVerbosity": "ProfilingVerbosity", "LayerInformationFormat": "LayerInformationFormat", "Logger": "Logger",
    "NetworkDefinitionCreationFlag": "NetworkDefinitionCreationFlag",
}  # fmt: skip
"""What a variable of this name holds in the files that use the bindings."""
ONLY_RTX = {"ComputeCapability", "__members__", "num_compute_capabilities", "set_compute_capability"}


def used_names(path: Path) -> set[tuple[str, str]]:
    """(class, attribute) for each attribute of a variable that holds an object of the bindings."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name | ast.Attribute):
            owner = node.value.id if isinstance(node.value, ast.Name) else node.value.attr
            if owner in ("bindings", "trt"):
                found.add(("module", node.attr))
            elif (name := CLASS_OF.get(owner.lstrip("_"))) is not None:
                found.add((name, node.attr))
    return found


@pytest.mark.parametrize("release", RELEASES)
@pytest.mark.parametrize("path", [*SOURCES, SCRIPT], ids=lambda path: path.stem)
def test_only_names_of_the_published_bindings_are_used(path, release):
    names = NAMES[release]["names"]
    for owner, name in used_names(path):
        if name in ONLY_RTX and release != "tensorrt_rtx" or name.startswith("__"):
            continue
        assert name in (names if owner == "module" else names[owner]), f"{path.name}: {owner}.{name} in {release}"


def test_the_search_for_names_finds_them():
    used = set().union(*map(used_names, SOURCES))
    assert {("Builder", "build_serialized_network"), ("IExecutionContext", "execute_async_v3")} <= used
    assert {("ICudaEngine", "get_tensor_shape"), ("module", "OnnxParser"), ("BuilderFlag", "TF32")} <= used
    assert ("IBuilderConfig", "set_compute_capability") in used and len(used) > 25


def test_the_table_of_names_holds_for_the_bindings_installed_here():
    bindings = importlib.import_module("tensorrt_rtx")
    assert bindings.__version__ == NAMES["tensorrt_rtx"]["version"]
    for owner, names in NAMES["tensorrt_rtx"]["names"].items():
        assert names == [name for name in dir(getattr(bindings, owner)) if not name.startswith("_")]
