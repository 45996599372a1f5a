"""Executes one runtime for the process that started it.

`python -m compress.engines.processes.worker MODULE CLASS CONNECTION MEMORY LIFELINE IDLE_S`

CONNECTION, MEMORY and LIFELINE are open files. Orders come through the first two (`engines.wire`), see `_Worker`. Nothing is
ever written into the third: it closes when the process that started this one ends, however that happens, and then this one ends, too.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import importlib
import os
import resource
import signal
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from compress import memory
from compress.engines import benchmark, passport
from compress.engines.base import BuildSpec, Runtime, failing_layer
from compress.engines.processes import wire
from compress.errors import CompressError, EngineError

KILLED_FIRST = "500"
"""Added to the badness by which Linux chooses whom to kill when memory runs out: this process, not the run that started it."""

_NO_MEMORY = ("bad_alloc", "out of memory", "failed to allocate memory")

Answer = tuple[dict[str, Any], dict[str, np.ndarray]]


@dataclass(frozen=True)
class _Loaded:
    run: Callable[[np.ndarray], np.ndarray | dict[str, np.ndarray]]
    burst: Callable[[np.ndarray, benchmark.Pace], list[float]] | None
    close: Callable[[], None]


class _Worker:
    """Each public method is an order; its arguments come as JSON, and `images` as an array."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self.loaded: dict[int, _Loaded] = {}

    def load(self, path: str, spec: dict[str, Any], trusted: str | None) -> Answer:
        if trusted:
            passport.trust(trusted)
        session = self._runtime.open(Path(path), _spec(spec))
        facts = {
            "precision": session.precision,
            "conversions": session.conversions,
            "notes": list(session.notes),
            "kernels": [asdict(kernel) for kernel in session.kernels()],
        }
        return {"session": self._keep(_Loaded(session.run, session.burst, session.close)), **facts}, {}

    def record(self, path: str, nodes: dict[str, str], threads: int) -> Answer:
        values = self._runtime.recorder(Path(path), nodes, threads)  # type: ignore[attr-defined]  # of ONNX Runtime
        return {"session": self._keep(_Loaded(values, None, lambda: None))}, {}

    def run(self, session: int, images: np.ndarray) -> Answer:
        answers = self.loaded[session].run(images)
        return {}, answers if isinstance(answers, dict) else {"answers": answers}

    def burst(self, session: int, pace: dict[str, Any], images: np.ndarray) -> Answer:
        timed = self.loaded[session].burst
        assert timed is not None, "a recorder is not timed"
        return {"samples_ms": timed(images, benchmark.Pace(**pace))}, {}

    def close(self, session: int) -> Answer:
        self.loaded.pop(session).close()
        return {}, {}

    def compile(self, path: str, plan: str, spec: dict[str, Any]) -> Answer:
        layers = self._runtime.compile(Path(path), Path(plan), _spec(spec))  # type: ignore[attr-defined]  # of TensorRT
        return {"layers": [asdict(layer) for layer in layers]}, {}

    def half_precision(self) -> Answer:
        return {"precision": self._runtime.half_precision_here()}, {}  # type: ignore[attr-defined]  # of OpenVINO

    def _keep(self, loaded: _Loaded) -> int:
        number = max(self.loaded, default=0) + 1
        self.loaded[number] = loaded
        return number


def serve(runtime: Runtime, channel: wire.Channel, idle_s: float) -> None:
    """Carries out orders until nobody can send any more, or nothing is loaded and none comes for `idle_s` seconds."""
    worker = _Worker(runtime)
    with contextlib.suppress(EOFError, OSError):
        while channel.poll(None if worker.loaded else idle_s):
            header, arrays = channel.receive()
            channel.send(*_answered(worker, header["order"], header["arguments"] | arrays))
        channel.send({"retired": True}, {})


def _answered(worker: _Worker, order: str, arguments: dict[str, Any]) -> Answer:
    try:
        answer: Answer = getattr(worker, order)(**arguments)
        return answer
    except CompressError as error:
        if error.__cause__ and _ran_out(error.__cause__):
            return {"failed": None, "memory": True, "detail": str(error.__cause__)}, {}
        what, advice = (error.what, error.advice) if isinstance(error, EngineError) else (str(error), "")
        return {"refused": what, "advice": advice, "detail": str(error.__cause__ or what)}, {}
    except Exception as error:  # noqa: BLE001 - whatever a runtime raises, its own words are for the log
        if order == "compile" and isinstance(error, OSError) and error.errno:  # the disk's refusal of the engine
            return {"os_error": [error.errno, error.strerror, error.filename]}, {}
        subject = failing_layer(Path(arguments["path"]), str(error)) if "path" in arguments else None
        detail = f"{type(error).__name__}: {error}"
        return {"failed": subject, "memory": _ran_out(error), "detail": detail}, {}


def _ran_out(error: BaseException) -> bool:
    """Whether it says that memory ran out, in the words of any runtime."""
    return memory.ran_out(error) or any(words in str(error).lower() for words in _NO_MEMORY)


def _spec(fields: dict[str, Any]) -> BuildSpec:
    return BuildSpec(**fields | {"targets": tuple(fields["targets"])})


def _prepare(lifeline: int) -> None:
    """The process that started this one ends it, and takes the same signals: interrupted, that one cleans up here."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGIO, signal.SIG_DFL)  # ends the process, also in the middle of a library that never returns
    fcntl.fcntl(lifeline, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(lifeline, fcntl.F_SETFL, fcntl.fcntl(lifeline, fcntl.F_GETFL) | os.O_ASYNC)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(KILLED_FIRST)


def main() -> None:
    module, name, connection, shared, lifeline, idle_s = sys.argv[1:]
    _prepare(int(lifeline))
    kind: Any = functools.reduce(getattr, name.split("."), importlib.import_module(module))
    serve(kind(), wire.Channel(Connection(int(connection)), int(shared)), float(idle_s))


if __name__ == "__main__":
    main()
