"""Files that are loaded in the processes of their runtimes, as if they were loaded here.

Each thread of this program has one process per runtime, and a second one for trials. Both start when they are needed and
end by themselves when they hold nothing for a while.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from compress.engines import benchmark
from compress.engines.base import BuildSpec, Kernel, Runtime, Session
from compress.engines.processes.process import Retired, RuntimeProcess
from compress.errors import EngineError
from compress.methods.runtimes import Precision

_processes: dict[tuple[int, type[Runtime], bool], RuntimeProcess] = {}
"""By thread, runtime, and whether it is for trials."""


def load(
    runtime: Runtime, path: Path, spec: BuildSpec, *, trial: bool = False, trusted: str | None = None
) -> RemoteSession:
    """What `Runtime.open` does, in the runtime's process.

    Args:
        trial: as of `Runtime.load`.
        trusted: sha256 of an engine that may be loaded, see `engines.passport`.

    Raises:
        EngineError: the runtime refuses the file, crashes or hangs.
    """
    arguments = {"path": str(path.absolute()), "spec": asdict(spec), "trusted": trusted}
    doing = f"{'loaded' if runtime.ahead_of_time else 'compiled'} {path.name}"
    process, facts = _ask(runtime, "load", doing, arguments, trial)
    return RemoteSession(runtime, process, path.name, facts)


@contextmanager
def recording(
    runtime: Runtime, path: Path, nodes: Mapping[str, str], threads: int
) -> Iterator[Callable[[np.ndarray], dict[str, np.ndarray]]]:
    """What `engines.onnxruntime.recorder` returns, in ONNX Runtime's process. Raises `EngineError`, as does the function."""
    arguments = {"path": str(path.absolute()), "nodes": dict(nodes), "threads": threads}
    process, facts = _ask(runtime, "record", f"compiled {path.name}", arguments)
    number = {"session": facts["session"]}
    try:
        yield lambda images: process.ask("run", _answered(images, path.name), number, images)[1]
    finally:
        with contextlib.suppress(EngineError):
            process.ask("close", f"closed {path.name}", number)


def compile_apart(runtime: Runtime, onnx_path: Path, plan_path: Path, spec: BuildSpec) -> tuple[Kernel, ...]:
    """Has `compile` of a TensorRT runtime write the engine to `plan_path`, and returns the engine's layers.

    In a process that compiles nothing else and takes with it whatever it taught the library: TensorRT for RTX 1.7 keeps
    layers in fp32 when the process built for chosen GPUs before, or was refused a build; and every edition keeps the first
    logger that it was given, so the logs of two builds would be told apart by nobody.

    Raises:
        EngineError: TensorRT refuses the file, crashes or hangs.
        OSError: `plan_path` cannot be written.
    """
    arguments = {"path": str(onnx_path.absolute()), "plan": str(plan_path.absolute()), "spec": asdict(spec)}
    with RuntimeProcess(runtime) as process:
        facts, _ = process.ask("compile", f"built an engine from {onnx_path.name}", arguments)
    return tuple(Kernel(**layer) for layer in facts["layers"])


def half_precision(runtime: Runtime) -> Precision | None:
    """What `half_precision_here` of the runtime says in its process. Raises `EngineError`."""
    precision: Precision | None = _ask(runtime, "half_precision", "was asked for its precisions", {})[1]["precision"]
    return precision


def release() -> None:
    """Ends this thread's processes, with whatever they hold."""
    for key in [key for key in _processes if key[0] == threading.get_ident()]:
        _processes.pop(key).end()


def _ask(
    runtime: Runtime, order: str, doing: str, arguments: Mapping[str, Any], trial: bool = False
) -> tuple[RuntimeProcess, dict[str, Any]]:
    """The process, and its answer to an order that needs nothing loaded."""
    key = threading.get_ident(), type(runtime), trial
    while True:
        process = _processes.get(key)
        if process is None or not process.usable:
            if process is not None:
                process.end()
            process = _processes[key] = RuntimeProcess(runtime)
        with contextlib.suppress(Retired):
            return process, process.ask(order, doing, arguments)[0]


class RemoteSession(Session):
    """A file that is loaded in the process of its runtime; every method raises `EngineError` when that fails or is gone."""

    def __init__(self, runtime: Runtime, process: RuntimeProcess, file: str, facts: Mapping[str, Any]) -> None:
        self._runtime, self._process, self._file = runtime, process, file
        self._number = {"session": facts["session"]}
        self._closed = False
        self._kernels = tuple(Kernel(**kernel) for kernel in facts["kernels"])
        self.precision, self.conversions = facts["precision"], facts["conversions"]
        self.notes = tuple(facts["notes"])

    def run(self, images: np.ndarray) -> np.ndarray:
        _, arrays = self._process.ask("run", _answered(images, self._file), self._number, images)
        answers = arrays["answers"]
        if answers.ndim != 2 or len(answers) != len(images):
            shape = " x ".join(map(str, answers.shape))
            raise EngineError(
                self._runtime.name,
                f"{self._runtime.title} answered {len(images)} image(s) with numbers of the shape {shape} from {self._file}, where "
                "one row for each image is due.",
            )
        return answers

    def burst(self, images: np.ndarray, pace: benchmark.Pace) -> list[float]:
        doing = f"was timed with {self._file}, {len(images)} image(s) at once"
        header, _ = self._process.ask("burst", doing, self._number | {"pace": asdict(pace)}, images)
        return [float(sample) for sample in header["samples_ms"]]

    @property
    def usable(self) -> bool:  # type: ignore[override]
        return self._process.usable

    def kernels(self) -> tuple[Kernel, ...]:
        return self._kernels

    def close(self) -> None:
        if not self._closed and self.usable:
            with contextlib.suppress(EngineError):  # nobody needs what it holds
                self._process.ask("close", f"closed {self._file}", self._number)
        self._closed = True


def _answered(images: np.ndarray, file: str) -> str:
    return f"answered {len(images)} image(s) with {file}"


def _abandon() -> None:
    for process in _processes.values():
        process.abandon()
    _processes.clear()


@atexit.register
def _end_all() -> None:
    for process in _processes.values():
        process.end()


os.register_at_fork(after_in_child=_abandon)
