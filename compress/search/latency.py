"""Times structures on a runtime, each in a race with the dense model, and remembers them by structure and machine."""

from __future__ import annotations

import hashlib
import json
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from compress import machine, onnx_export, quantization
from compress.engines import RUNTIMES, BuildSpec, Precision, Runtime, Session, benchmark
from compress.errors import EngineError, HandoffError, RequestError, RunError, RuntimeUnavailableError
from compress.files import write_text
from compress.models import counting
from compress.request import Request
from compress.search import onnx_surgery
from compress.search.outcome import Outcome, Timed
from compress.stages import steps
from compress.workload import Workload

MEASURED = "measured.json"


class Stopwatch:
    """The runtime that is timed, and the dense model's fastest fp32 session, which every candidate races against.

    Args:
        base: as of `OneShot`.
        workload: whose model is the dense one.
        folder: keeps `measured.json`; None keeps nothing.
        image: what is run, float32 [1, 3, size, size], normalised.
        quantize: a model as a request says.
        score: right answers of a model, and of how many.
        images_scored: how many `score` looks at.
        notify: called with each runtime that is left out, and why.

    Raises:
        RuntimeUnavailableError: the runtime does not run here.
        RunError: the folder holds measurements of another request, of another machine, or of a runtime that is gone.
    """

    def __init__(
        self,
        base: Request,
        workload: Workload,
        folder: Path | None,
        *,
        image: torch.Tensor,
        quantize: Callable[[Request, nn.Module], quantization.Quantized],
        score: Callable[[nn.Module], tuple[int, int]],
        images_scored: int,
        notify: Callable[[str], None],
    ) -> None:
        self.base, self.folder, self._workload, self._image = base, folder, workload, image
        self._quantize, self._score, self._notify = quantize, score, notify
        self._kept = self._restored(images_scored)
        self._open = ExitStack()
        try:
            self._measure_dense()
        except BaseException:
            self._open.close()
            raise

    dense: Outcome
    """The model as it came: its latency is the fastest real fp32 on any runtime here."""
    runtime: Runtime
    """The one that candidates are timed on."""

    def close(self) -> None:
        self._open.close()

    def _measure_dense(self) -> None:
        """Chooses the runtime, and keeps the dense model's fastest fp32 session to race every candidate against.

        What an earlier attempt measured stays the scale of everything.
        """
        start = time.perf_counter()
        here = {name: runtime for name, runtime in RUNTIMES.items() if runtime.runs_here and not runtime.ahead_of_time}
        if self.base.runtime != "auto" and self.base.runtime not in here:
            raise RuntimeUnavailableError(
                f"runtime: got {self.base.runtime!r}, which a search cannot time on this machine; take one of "
                f"{', '.join(here)}."
            )
        self._folder = Path(self._open.enter_context(tempfile.TemporaryDirectory()))
        self._dense_files: dict[str, Path] = {}
        model, dense = self._workload.model, self._folder / "dense.onnx"
        onnx_export.export(model, dense, input_size=self._workload.preprocessing.input_size)
        if self._kept is not None:
            if missing := [name for name in (self._kept["runtime"], self._kept["reference"]) if name not in here]:
                raise RunError(
                    f"{self.folder or ''}/{MEASURED} holds times of {missing[0]}, which does not run here any more. Install it, or "
                    "choose another folder."
                )
            self.dense, self.runtime = Outcome(**self._kept["dense"]), here[self._kept["runtime"]]
            self._reference = self._open.enter_context(here[self._kept["reference"]].load(dense, self._spec("fp32")))
            return
        sessions = self._sessions(self._open, here, lambda runtime: runtime.load(dense, self._spec("fp32")))
        timings = self._timings(sessions)
        fastest = min(timings, key=lambda name: timings[name].p50_ms)
        self._reference = sessions[fastest]
        self.runtime = here[self.base.runtime if self.base.runtime != "auto" else self._fastest(here)]
        right, total = self._score(model)
        self.dense = Outcome(
            accuracy=right / total,
            parameters=counting.count_parameters(model),
            macs=counting.count_macs(model, self._workload.preprocessing.input_size),
            seconds=time.perf_counter() - start,
            n_images=total,
            **asdict(_scaled(timings[fastest], 1.0, dense.stat().st_size)),
        )
        self._kept = {
            "request": self.base.model_dump(mode="json"),
            "dense": self.dense.as_dict(),
            "runtime": self.runtime.name,
            "reference": fastest,
            "cpu": machine.describe(self.base.threads).cpu,
            "structures": {},
        }
        self._save()

    def _fastest(self, here: Mapping[str, Runtime]) -> str:
        """On the unpruned model in the base request's precision."""
        quantized = self._quantize(self.base, self._workload.model) if self.base.quantizes else None

        def load(runtime: Runtime) -> Session:
            path = self._export(self._folder / runtime.name, self.base, self._workload.model, quantized, runtime)
            return runtime.load(path, self._spec(_precision(self.base)), trial=True)

        with ExitStack() as stack:
            sessions = self._sessions(stack, here, load)
            timings = self._timings(sessions)
        return min(timings, key=lambda name: timings[name].p50_ms)

    def _sessions(
        self, stack: ExitStack, here: Mapping[str, Runtime], load: Callable[[Runtime], Session]
    ) -> dict[str, Session]:
        """Of each runtime that takes the file; one that refuses it is named and left out, unless it was asked for.

        Raises:
            HandoffError, RequestError: the runtime that was asked for refuses the file, or all do.
        """
        sessions: dict[str, Session] = {}
        refused: HandoffError | RequestError | None = None
        for name, runtime in here.items():
            try:
                sessions[name] = stack.enter_context(load(runtime))
            except (HandoffError, RequestError) as error:
                if self.base.runtime == name:
                    raise
                refused = error
                self._notify(f"without {runtime.title}: {error}")
        if not sessions and refused:
            raise refused
        return sessions

    def _timings(self, sessions: Mapping[str, Session]) -> dict[str, benchmark.Timing]:
        """Of all in one race; a runtime that fails in it is named and left out, unless it was asked for or is the last.

        Raises:
            EngineError: of such a runtime.
        """
        try:
            return dict(zip(sessions, self._race(list(sessions.values())), strict=True))
        except EngineError as error:
            others = {name: session for name, session in sessions.items() if name != error.runtime}
            if self.base.runtime == error.runtime or not others:
                raise
            self._notify(f"without {RUNTIMES[error.runtime].title}: {error}")
        return self._timings(others)

    def time(self, request: Request, shrunk: nn.Module | None) -> Timed:
        """Of the structure: measured once."""
        model = self._workload.model if shrunk is None else shrunk
        key, known = self._structure(request, model), self._measured["structures"]
        if key not in known:
            with tempfile.TemporaryDirectory() as folder:
                path = self._file_to_time(Path(folder), request, shrunk)
                size = path.stat().st_size
                with self.runtime.load(path, self._spec(_precision(request)), trial=True) as session:
                    timing, dense = self._race([session, self._dense_session()])
            known[key] = asdict(_scaled(timing, self.dense.latency_ms / dense.p50_ms, size))
            self._save()
        return Timed(**known[key])

    @property
    def _measured(self) -> dict[str, Any]:
        """What `measured.json` holds, once the dense model has been measured."""
        assert self._kept is not None, "the dense model is measured first"
        return self._kept

    def _dense_session(self) -> Session:
        """The reference; loaded again when its process is gone."""
        if not self._reference.usable:
            runtime, path = RUNTIMES[self._measured["reference"]], self._folder / "dense.onnx"
            self._reference = self._open.enter_context(runtime.load(path, self._spec("fp32")))
        return self._reference

    def _file_to_time(self, folder: Path, request: Request, shrunk: nn.Module | None) -> Path:
        """Cut out of the dense model's file where that can be done, else exported."""
        dense = self._dense_file(request)
        if shrunk is None:
            return dense
        path = folder / "candidate.onnx"
        try:
            onnx_surgery.cut(dense, self._workload.model, shrunk, path)
            with self.runtime.load(path, self._spec(_precision(request)), trial=True):
                return path
        except (onnx_surgery.CannotCutError, HandoffError):
            quantized = self._quantize(request, shrunk) if request.quantizes else None
            return self._export(folder, request, shrunk, quantized, self.runtime)

    def _dense_file(self, request: Request) -> Path:
        """Of the model that loses nothing, with the bits of `request`: exported once for each choice of them."""
        bits = self._bits(request, self._workload.model)
        key = f"{_precision(request)} {sorted((name, str(layer)) for name, layer in bits.items())}"
        if key not in self._dense_files:
            quantized = self._quantize(request, self._workload.model) if request.quantizes else None
            folder = self._folder / str(len(self._dense_files))
            self._dense_files[key] = self._export(folder, request, self._workload.model, quantized, self.runtime)
        return self._dense_files[key]

    def _structure(self, request: Request, model: nn.Module) -> str:
        """Everything that the time of a file depends on here."""
        shapes = [f"{name} {tuple(p.shape)}" for name, p in model.named_parameters() if p.ndim > 1]
        bits = [f"{name} {layer}" for name, layer in self._bits(request, model).items()]
        text = "\n".join([_precision(request), *shapes, *bits])
        return hashlib.sha256(text.encode()).hexdigest()[:20]

    def _bits(self, request: Request, model: nn.Module) -> dict[str, quantization.LayerBits]:
        """Of each layer; empty where nothing is quantized."""
        return steps.prepared_with_bits(request, model, self._image)[1].layers if request.quantizes else {}

    def _restored(self, images_scored: int) -> dict[str, Any] | None:
        """What an earlier attempt left in the folder."""
        path = self.folder / MEASURED if self.folder else None
        if path is None or not path.exists():
            return None
        kept: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if Request(**kept["request"]) != self.base or kept["dense"]["n_images"] != images_scored:
            raise RunError(
                f"{path} holds measurements of another request or command. Choose another folder, or go on with the same options."
            )
        if (cpu := machine.describe(self.base.threads).cpu) != kept["cpu"]:
            raise RunError(
                f"{path} holds times of another machine ({kept['cpu']}; this one is {cpu}). Choose another folder, or go on "
                "where it was measured."
            )
        return kept

    def _save(self) -> None:
        if self.folder:
            write_text(self.folder / MEASURED, json.dumps(self._kept, indent=1) + "\n")

    def _export(
        self,
        folder: Path,
        request: Request,
        model: nn.Module,
        quantized: quantization.Quantized | None,
        runtime: Runtime,
    ) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        path, size = folder / "candidate.onnx", self._workload.preprocessing.input_size
        if quantized is not None:
            if runtime.flavour not in quantized.grids.flavours:
                raise RequestError("quantizer", request.quantizer, f"another one: {quantization.NO_TENSORRT_FILE}")
            onnx_export.export_flavours(quantized, {runtime.flavour: path}, input_size=size)
        else:
            onnx_export.export(model, path, input_size=size, precision="fp16" if request.half_precision else "fp32")
        return path

    def _spec(self, precision: Precision) -> BuildSpec:
        return steps.build_spec(self.base, self._workload, precision=precision)

    def _race(self, sessions: list[Session]) -> list[benchmark.Timing]:
        images = self._image.numpy()
        return benchmark.race([session.timed(np.ascontiguousarray(images)) for session in sessions])


def _scaled(timing: benchmark.Timing, scale: float, file_bytes: int) -> Timed:
    low, high = np.percentile(timing.samples_ms, (25, 75))
    return Timed(timing.p50_ms * scale, float(low) * scale, float(high) * scale, file_bytes)


def _precision(request: Request) -> Precision:
    return "int8" if request.quantizes else "fp16" if request.half_precision else "fp32"
