"""What a request would leave of its model, looked up while the sliders move; counted once for each architecture.

`compress.pruning.profiles` counts in a process of its own; the result is kept in a file for each architecture and torchvision.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from compress.files import write_text
from compress.request import Request

DEMO_MODEL, DEMO_DATA, DEMO_CLASSES, DEMO_SIZE = "resnet18", "fashion-mnist", 10, 32
"""What the bundled checkpoint is."""
IMAGENET_CLASSES = 1000


@dataclass(frozen=True)
class Structure:
    """What an estimate depends on beside the sparsity; see `compress.pruning.profiles.profile`."""

    model: str
    classes: int
    input_size: int
    multiple: int

    @classmethod
    def of(cls, request: Request, input_size: int) -> Structure:
        """As far as a form tells: of an upload the number of classes is not known yet.

        Args:
            input_size: of the published weights.
        """
        is_demo = (request.model, request.checkpoint, request.data) == (DEMO_MODEL, "auto", DEMO_DATA)
        classes, size = (DEMO_CLASSES, DEMO_SIZE) if is_demo else (IMAGENET_CLASSES, input_size)
        return cls(request.model, classes, request.input_size or size, request.channel_multiple)


@dataclass(frozen=True)
class Estimate:
    """A model before and after pruning, counted from its plan."""

    structure: Structure
    parameters: tuple[int, int]
    macs: tuple[int, int]
    groups: tuple[tuple[str, int, int, str], ...]
    """Layers, channels, kept, why together."""
    left_out: tuple[tuple[str, str], ...]
    """Layer, why it is not pruned."""
    uncounted: tuple[str, ...]
    """Fields of the request that change the plan and are not counted."""
    shortfall: str | None = None
    """What to tell where the plan removes far less than asked for."""


Count = Callable[[Structure], dict[str, Any]]


class Estimates:
    """Profiles in memory, on disk, or counted by `count`, which may take a while."""

    def __init__(self, folder: Path, count: Count) -> None:
        self._folder, self._count = folder, count
        self._profiles: dict[Structure, Mapping[str, Any]] = {}

    def known(self, structure: Structure) -> bool:
        return self._profile(structure) is not None

    def count(self, structure: Structure) -> None:
        """Raises `CompressError` when the model cannot be planned."""
        if not self.known(structure):
            counted = self._count(structure)
            write_text(self._file(structure), json.dumps(counted))
            self._profiles[structure] = counted

    def estimate(self, request: Request, structure: Structure) -> Estimate | None:
        """None until `count` was called for this structure, and where nothing shrinks."""
        profile = self._profile(structure)
        if profile is None or not request.shrinks:
            return None
        row, strings = profile["rows"][str(min(99, max(1, round(100 * request.sparsity))))], profile["words"]
        others = ("exclude", "layer_sparsity", "ranking", "config_list")
        return Estimate(
            structure,
            (profile["parameters"], row["parameters"]),
            (profile["macs"], row["macs"]),
            tuple((strings[layers], before, after, strings[why]) for layers, before, after, why in row["groups"]),
            tuple((strings[layer], strings[why]) for layer, why in row["left_out"]),
            tuple(name for name in others if getattr(request, name) != Request.model_fields[name].default),
            None if row.get("short") is None else strings[row["short"]],
        )

    def _profile(self, structure: Structure) -> Mapping[str, Any] | None:
        if structure not in self._profiles:
            try:
                self._profiles[structure] = json.loads(self._file(structure).read_text(encoding="utf-8"))
            except (FileNotFoundError, ValueError):
                return None
        return self._profiles[structure]

    def _file(self, structure: Structure) -> Path:
        sizes = f"{structure.classes}-{structure.input_size}-{structure.multiple}"
        return self._folder / f"torchvision-{version('torchvision')}" / f"{structure.model}-{sizes}.json"
