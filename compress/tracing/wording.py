"""The line of the user's code that is at fault, and the errors that name it."""

from __future__ import annotations

import linecache
import os
import sys
import sysconfig
import traceback
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import torch
from torch import nn

from compress.files import PACKAGE

_TORCH = f"{Path(torch.__file__).parent}{os.sep}"
_OURS = f"{PACKAGE}{os.sep}"
_STANDARD = f"{sysconfig.get_path('stdlib')}{os.sep}"
_PACKAGES = tuple(f"{os.sep}{name}{os.sep}" for name in ("site-packages", "dist-packages"))


class Untraceable(Exception):
    """A forward pass that a graph cannot represent: `reason` is the end of a sentence about the model."""

    def __init__(self, reason: str, place: Place | None = None) -> None:
        super().__init__(reason)
        self.reason, self.place = reason, place


class Unhashable(Untraceable, TypeError):
    """A lookup by a size: libraries catch `TypeError` where a symbol cannot be hashed."""


@dataclass(frozen=True)
class Place:
    """A line of the model's code."""

    file: str
    line: int
    function: str

    @property
    def code(self) -> str:
        return linecache.getline(self.file, self.line).strip()

    @property
    def short(self) -> str:
        return f"{self.function} ({Path(self.file).name}, line {self.line})"

    def __str__(self) -> str:
        return f"{Path(self.file).name}, line {self.line}, in {self.function}: `{self.code}`"


@dataclass(frozen=True)
class Decision:
    """A value that the model's code read from sizes in Python; the graph has only the branch taken."""

    place: Place
    answer: object

    def __str__(self) -> str:
        return f"{self.place} was {self.answer}"


def current_place() -> Place | None:
    """The line of the model's code that runs now."""
    return _best(_outwards(sys._getframe(1)))


def place_of(error: BaseException) -> Place | None:
    """The line of the model's code in which `error` was raised."""
    return _best(reversed(list(traceback.walk_tb(error.__traceback__))))


def first_sentence(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__).rstrip(".")


def _outwards(frame: FrameType | None) -> Iterator[tuple[FrameType, int]]:
    """From `frame` to the one in which tracing began."""
    while frame is not None and frame.f_code.co_name != "trace_root":
        yield frame, frame.f_lineno
        frame = frame.f_back


def _best(frames: Iterable[tuple[FrameType, int]]) -> Place | None:
    """The innermost line of the innermost module's author: not of torch, and of no other library that it calls."""
    lines: list[tuple[FrameType, int]] = []
    for frame, line in frames:
        if frame.f_code.co_filename.startswith((_TORCH, _OURS, "<")):
            continue
        lines.append((frame, line))
        if isinstance(frame.f_locals.get("self"), nn.Module):
            break
    if not lines:
        return None
    author = _author(lines[-1][0])
    frame, line = next(one for one in lines if _author(one[0]) == author)
    return Place(frame.f_code.co_filename, line, frame.f_code.co_name)


def _author(frame: FrameType) -> str:
    """The installed package that a line belongs to; empty for the user's own files."""
    file = frame.f_code.co_filename
    for folder in _PACKAGES:
        if folder in file:
            return file.partition(folder)[2].partition(os.sep)[0]
    return "standard library" if file.startswith(_STANDARD) else ""
