"""Image classifiers: torchvision's by name, the user's own, their size and cost, and how a shrunk one is saved."""

from __future__ import annotations

from compress.models.architectures import (
    Architecture,
    build,
    build_empty,
    fresh,
    load,
    load_weights,
    recognise,
    without_auxiliary,
)
from compress.models.counting import LayerShape, count_macs, count_parameters, layer_shapes
from compress.models.storage import SPEC_FILE, WEIGHTS_FILE, RebuildSpec, read_spec, rebuild, require_class, save
from compress.preprocessing import Preprocessing

__all__ = [
    "Architecture",
    "LayerShape",
    "Preprocessing",
    "RebuildSpec",
    "SPEC_FILE",
    "WEIGHTS_FILE",
    "build",
    "build_empty",
    "count_macs",
    "count_parameters",
    "fresh",
    "layer_shapes",
    "load",
    "load_weights",
    "read_spec",
    "rebuild",
    "recognise",
    "require_class",
    "save",
    "without_auxiliary",
]
