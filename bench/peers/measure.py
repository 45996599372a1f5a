"""Accuracy of the deployed files, and latency of all of them in turn, with the code that measures Espalier's own runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from compress.data import dataset
from compress.data.batches import iter_batches
from compress.engines import RUNTIMES, BuildSpec, Precision, Session, benchmark
from compress.equality import outputs
from compress.errors import CompressError, EngineError
from compress.stages.workspace import padded
from compress.tasks import CLASSIFICATION

Facts = dict[str, Any]

ANSWERED = 32
"""Images a call while accuracy is measured."""
Key = tuple[str, str, str]
"""Row, runtime, precision asked for."""


@dataclass(frozen=True)
class Deployed:
    """A file on a runtime."""

    row: str
    runtime: str
    path: Path
    precision: Precision = "int8"
    """As `BuildSpec.precision`: `int8` lets the runtime choose, as it does for whoever sets nothing; `fp32` is real fp32."""

    @property
    def key(self) -> Key:
        return self.row, self.runtime, self.precision

    def load(self, input_size: int, batch_size: int, threads: int) -> Session:
        """Static shapes. Raises `CompressError` when the runtime refuses the file."""
        spec = BuildSpec(input_size, batch_size, batch_size, threads, self.precision)
        return RUNTIMES[self.runtime].load(self.path, spec)

    @property
    def file_bytes(self) -> int:
        """OpenVINO keeps the weights beside the graph."""
        weights = self.path.with_suffix(".bin")
        own = self.path.stat().st_size
        return own + weights.stat().st_size if self.path.suffix == ".xml" else own


def accuracy(deployed: Deployed, test: dataset.Split, threads: int) -> Facts:
    """Of the test images, through the file. Raises what the runtime raises: the file is not one of Espalier's."""
    batches = list(iter_batches(test, ANSWERED, shuffle=False, seed=0, preprocessing=test.preprocessing))
    with deployed.load(test.preprocessing.input_size, ANSWERED, threads) as session:
        answers = outputs.of_batches(partial(padded, session, ANSWERED), [images for images, _ in batches])
    found = CLASSIFICATION.score(answers, test.labels.numpy())
    return {"accuracy": found.value, "ci95": [found.low, found.high], "n": found.n}


def latencies(contenders: Sequence[Deployed], input_size: int, threads: int = 1) -> dict[Key, Facts]:
    """One image a call, all contenders in turn, in their runtimes' processes: key -> facts, with `error` where a file does not run."""
    found: dict[Key, Facts] = {}
    images = np.random.default_rng(0).standard_normal((1, 3, input_size, input_size)).astype(np.float32)
    with ExitStack() as stack:
        running: list[tuple[Deployed, Session]] = []
        for deployed in contenders:
            try:
                session = stack.enter_context(deployed.load(input_size, 1, threads))
                session.run(images)
                found[deployed.key] = {
                    "precision": session.precision,
                    "kernels": _counts(session),
                    "notes": list(session.notes),
                }
                running.append((deployed, session))
            except Exception as error:  # noqa: BLE001 - foreign files
                found[deployed.key] = {"error": refusal(error)}
        timings = benchmark.race([session.timed(images) for _, session in running])
        for (deployed, _), timing in zip(running, timings, strict=True):
            found[deployed.key] |= {"p50_ms": timing.p50_ms, "p90_ms": timing.p90_ms, "noisy": timing.noisy}
    return found


def refusal(error: Exception) -> str:
    """Why a file does not run; a runtime's own exception with its type, as its text alone may be a name or a number."""
    if isinstance(error, EngineError):
        return " ".join(part for part in (error.detail, error.what) if part)
    return str(error) if isinstance(error, CompressError) else f"{type(error).__name__}: {error}"


def deployed_files(row: str, folder: Path, files: Mapping[str, str], *, reference: bool) -> list[Deployed]:
    """A row's file on each runtime; the dense model in real fp32 as well."""
    wanted: tuple[Precision, ...] = ("int8", "fp32") if reference else ("int8",)
    return [Deployed(row, name, folder / file, precision) for precision in wanted for name, file in files.items()]


def _counts(session: Session) -> dict[str, int]:
    """Precision -> how many convolutions and fully connected layers run in it."""
    precisions = [kernel.precision for kernel in session.kernels()]
    return {precision: precisions.count(precision) for precision in sorted(set(precisions))}
