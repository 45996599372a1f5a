"""A runtime that fails in the way that the environment variable FAULT names, where the name of the order comes first."""

from __future__ import annotations

import ctypes
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from compress.engines import BuildSpec, Kernel, Session
from compress.engines.benchmark import Pace
from compress.engines.onnxruntime import OnnxRuntime
from compress.errors import EngineError

HOLDING_THE_LOCK = ctypes.PyDLL(None)
"""Its calls keep Python's lock, as those of a library that never gives it back."""


def _spin() -> None:
    end = time.monotonic() + 600
    while time.monotonic() < end:
        pass


def _hang() -> None:
    Path(os.environ.get("HANGING", os.devnull)).touch()
    HOLDING_THE_LOCK.sleep(600)


def _raise() -> None:
    raise ValueError("At conv1: primitive descriptor was not found in its own words")


def _want_too_much() -> None:
    raise EngineError("openvino", "OpenVINO cannot compile it.") from RuntimeError(
        "Exception from x.cpp: std::bad_alloc"
    )


def _say(words: bytes) -> None:
    os.write(2, words)
    os.abort()


FAULTS: dict[str, Callable[[], object]] = {
    "abort": os.abort,
    "segfault": lambda: os.kill(os.getpid(), signal.SIGSEGV),
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "exit": lambda: os._exit(0),
    "hang": _hang,
    "spin": _spin,
    "raise": _raise,
    "garbage": lambda: _say(b"garbage " * 400_000 + b"\nlast words\n"),
    "no memory": _want_too_much,
    "allocate": lambda: _say(
        b"terminate called after throwing an instance of 'std::bad_alloc'\n  what():  std::bad_alloc\n"
    ),
}


def fail(moment: str) -> None:
    """What the fault does at this moment: `compile`, `run` or `batch of 2`."""
    when, _, how = os.environ.get("FAULT", "").partition(": ")
    if when == moment:
        FAULTS[how]()


class Faulty(OnnxRuntime):
    """Stands in for OpenVINO."""

    name, title = "openvino", "OpenVINO"

    def open(self, path: Path, spec: BuildSpec) -> Session:
        fail("compile")
        return _Faulty(super().open(path, spec))


class _Faulty(Session):
    def __init__(self, session: Session) -> None:
        self._session = session
        self.precision, self.conversions, self.notes = session.precision, session.conversions, session.notes

    def run(self, images: np.ndarray) -> np.ndarray:
        fail("run")
        answers = self._session.run(images)
        wrong = {"shape": answers[0], "classes": answers[:, 1:], "nan": answers * np.float32("nan")}
        return wrong.get(os.environ.get("FAULT", ""), answers)

    def burst(self, images: np.ndarray, pace: Pace) -> list[float]:
        fail(f"batch of {len(images)}")
        return super().burst(images, pace)

    def kernels(self) -> tuple[Kernel, ...]:
        return self._session.kernels()

    def close(self) -> None:
        self._session.close()
