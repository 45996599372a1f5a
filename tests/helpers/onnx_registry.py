"""torch.onnx reads the source of 500 operators before every export, which takes longer than the export of a small model."""

from __future__ import annotations

import copy
import functools

import pytest
from torch.onnx._internal.exporter._registration import ONNXRegistry


def read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep what was read; each export gets a registry of its own, as before."""
    read = functools.cache(ONNXRegistry.from_torchlib)

    def from_torchlib(cls: type[ONNXRegistry], opset_version: int) -> ONNXRegistry:
        registry = copy.copy(read(opset_version=opset_version))
        registry.functions = {target: list(found) for target, found in registry.functions.items()}
        return registry

    monkeypatch.setattr(ONNXRegistry, "from_torchlib", classmethod(from_torchlib))
