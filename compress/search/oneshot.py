"""Candidates made without training and measured: prune, shrink, refit, calibrate, export, time on the runtime.

Accuracy comes from images held out from the training images, which neither the refit nor the calibration has seen. What
a run reaches starts from there and trains on, so it is a lower bound as far as training does no harm. Latency comes from
the runtime itself, in a race with the dense model, because channel counts have steps that no count of operations shows.
"""

from __future__ import annotations

import hashlib
import json
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from compress import benchmark, counting, data, evaluation, machine, onnx_export, pruning, quantization, recipes
from compress.engines import RUNTIMES, BuildSpec, Precision, Runtime, Session
from compress.errors import DataError, HandoffError, PruningError, RequestError, RunError, RuntimeUnavailableError
from compress.files import write_text
from compress.pruning import Group
from compress.pruning.registry import TRAINS
from compress.request import Request
from compress.search import cutting
from compress.search.candidate import Candidate
from compress.sources import Source

SCORED_IMAGES = 1000
"""At most this many training images are held out to score candidates, and at most a fifth of all."""
REFIT_IMAGES = 256
"""At most this many images refit a candidate and calibrate it; fewer when they are large, see `recipes.MOST_PIXELS`."""
MEASURED = "measured.json"

Hopeless = Callable[[float, int], str | None]
"""(latency in ms, bytes of the file) -> why the candidate is not worth scoring, or None."""


@dataclass(frozen=True)
class Outcome:
    """What one candidate is like without training."""

    accuracy: float
    """Share of right answers, 0..1, on images held out from the training images; of agreement with the original where
    images have no labels. 0 where `stopped` says that it was not scored."""
    latency_ms: float
    """p50 of the chosen runtime, batch 1, the request's threads; scaled by how the dense model, raced beside it, has
    drifted since it was first measured."""
    parameters: int
    macs: int
    file_bytes: int
    """Of the ONNX file that the chosen runtime loads."""
    seconds: float
    """To make and measure it."""
    latency_low_ms: float
    """Lower and upper quartile of the single calls, scaled as the median."""
    latency_high_ms: float
    n_images: int
    """Images behind `accuracy`."""
    stopped: str | None = None
    """Why it was not scored; None for a complete measurement."""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class _Timed:
    """A structure on the runtime; its weights do not matter."""

    latency_ms: float
    latency_low_ms: float
    latency_high_ms: float
    file_bytes: int


class OneShot:
    """Makes candidates without training and measures them; latency is cached by structure (channel counts and bits).

    Use it as a context manager, or call `close`.

    Args:
        base: what candidates differ from. Its runtime is the one that is timed; `auto` takes the one that runs the
            unpruned model fastest, quantized as the base says.
        source: of `open_source(base)`; only training images are looked at.
        folder: keeps `measured.json`, with which a later OneShot of the same request goes on; None keeps nothing.
        progress: called with a text at each step of an evaluation.

    Raises:
        RequestError: the base's pruner shrinks nothing or trains, there are no images, or the plan is an NNI config list.
        RuntimeUnavailableError: the runtime does not run here.
        RunError: the folder holds measurements of another request, of another machine, or of a runtime that is gone.
    """

    def __init__(
        self,
        base: Request,
        source: Source,
        folder: Path | None = None,
        *,
        scored_images: int = SCORED_IMAGES,
        progress: Callable[[str], None] = lambda text: None,
    ) -> None:
        require_searchable(base)
        if source.dataset.kind == "none":
            raise RequestError("data", base.data, "images: candidates are compared on images held out from training")
        self.base, self.folder, self._progress = base, folder, progress
        count = min(scored_images, len(source.dataset.train) // 5)
        if count == 0:
            raise DataError(
                f"{source.dataset.source} has fewer than 5 training images, too few to hold one out: add some."
            )
        held_out, rest = data.split_held_out(source.dataset.train, count, base.seed)
        self._source = replace(source, dataset=replace(source.dataset, train=rest))
        self._held_out = held_out
        self._labels: list[torch.Tensor] | None = None
        if source.dataset.kind != "labelled":
            answer = evaluation.torch_answer(source.model)
            self._labels = [torch.from_numpy(answer(x.numpy()).argmax(1)) for x, _ in self._scored()]
        most = max(1, recipes.MOST_PIXELS // source.preprocessing.input_size**2)
        self._calibration = data.calibration_images(
            self._source.dataset, min(base.calibration_images, REFIT_IMAGES, most), source.preprocessing, base.seed
        )
        self.groups = variable_groups(base, source)
        self._kept = self._restored()
        self._open = ExitStack()
        try:
            self._measure_dense()
        except BaseException:
            self._open.close()
            raise

    groups: tuple[Group, ...]
    """Of the plan, what can be varied: groups that the base request does not fix by name."""
    dense: Outcome
    """The model as it came: its latency is the fastest real fp32 on any runtime here."""
    runtime: Runtime
    """The one that candidates are timed on."""

    def __enter__(self) -> OneShot:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._open.close()

    def evaluate(self, candidate: Candidate, hopeless: Hopeless = lambda latency_ms, file_bytes: None) -> Outcome:
        """Makes the candidate and measures it; `hopeless` is asked before it is scored, the longer part.

        Raises:
            CompressError: it cannot be made: the plan, the quantizer or the runtime refuses it.
        """
        start = time.perf_counter()
        request = self._request(candidate)
        shrunk = self._shrunk(request)
        model = self._source.model if shrunk is None else shrunk.model
        timed = self._timed(request, shrunk and shrunk.model)
        why = hopeless(timed.latency_ms, timed.file_bytes)
        right = total = 0
        if why is None:
            if shrunk is not None:
                self._progress("refitting")
                recipes.recover(request, self._source, self._source.model, model, shrunk.kept)
            deployed = quantization.fake_quantized(self._quantized(request, model)) if request.quantizes else model
            right, total = self._score(deployed)
        return Outcome(
            accuracy=right / total if total else 0.0,
            parameters=counting.count_parameters(model),
            macs=counting.count_macs(model, self._source.preprocessing.input_size),
            seconds=time.perf_counter() - start,
            n_images=total,
            stopped=why,
            **asdict(timed),
        )

    def sensitive_layers(self, wide_bits: str) -> tuple[str, ...]:
        """Quantized layers, the one that puts most noise on the logits by itself first (see `quantization.mixed`).

        Those that have `wide_bits` (such as `8/8`) already are left out.
        """
        quantized = self._quantized(self.base, self._source.model)
        decibels = quantization.layer_sensitivity(quantized, self._calibration[: recipes.SENSITIVITY_IMAGES])
        bits = recipes.prepared_with_bits(self.base, self._source.model)[1].layers
        return tuple(layer for layer in decibels if str(bits[layer]) != wide_bits)

    # ---- the steps -------------------------------------------------------------------------------------------------

    def _request(self, candidate: Candidate) -> Request:
        request = candidate.request(self.base)
        count = min(request.reconstruction_images, REFIT_IMAGES)
        return request.model_copy(update={"reconstruction_images": count, "max_quantization_loss": None})

    def _shrunk(self, request: Request) -> pruning.Shrunk | None:
        """None where nothing goes: no ratio is large enough for one multiple of channels."""
        if not request.prunes:
            return None
        try:
            plan = recipes.usable_plan(request, self._source)
        except PruningError:
            if any(_removes(request, group) for group in self.groups):
                raise
            return None
        self._progress("pruning")
        how = recipes.pruning_training(request, self._source, self._source.model, lambda done, text: None)
        shrunk = pruning.prune(self._source.model, self._source.example, plan, request.pruner, how)
        shrunk.model.eval()
        return shrunk

    def _quantized(self, request: Request, model: nn.Module) -> quantization.Quantized:
        prepared, plan = recipes.prepared_with_bits(request, model)
        return quantization.quantize(
            prepared,
            plan,
            quantizer=request.quantizer,
            estimator=request.calibration,
            calibration=self._calibration.split(recipes.TEST_BATCH),
            train=None,
        )

    def _score(self, model: nn.Module) -> tuple[int, int]:
        answer, right = evaluation.torch_answer(model), 0
        for number, (x, labels) in enumerate(self._scored()):
            truth = labels if self._labels is None else self._labels[number]
            right += int((answer(x.numpy()).argmax(1) == truth.numpy()).sum())
        return right, len(self._held_out)

    def _scored(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Batches of images and labels, read anew each time: 1,000 images of 1024 pixels are 12 GB."""
        preprocessing = self._source.preprocessing
        return data.batches(self._held_out, recipes.TEST_BATCH, shuffle=False, seed=0, preprocessing=preprocessing)

    # ---- latency ---------------------------------------------------------------------------------------------------

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
        model, dense = self._source.model, self._folder / "dense.onnx"
        self._progress("the dense model")
        onnx_export.export(model, dense, input_size=self._source.preprocessing.input_size)
        if self._kept is not None:
            if missing := [name for name in (self._kept["runtime"], self._kept["reference"]) if name not in here]:
                raise RunError(
                    f"{self.folder / MEASURED} holds times of {missing[0]}, which does not run here any more. Install it, or "
                    "choose another folder."
                )
            self.dense, self.runtime = Outcome(**self._kept["dense"]), here[self._kept["runtime"]]
            self._reference = self._open.enter_context(here[self._kept["reference"]].load(dense, self._spec("fp32")))
            return
        sessions = self._sessions(self._open, here, lambda runtime: runtime.load(dense, self._spec("fp32")))
        timings = dict(zip(sessions, self._race(list(sessions.values())), strict=True))
        fastest = min(timings, key=lambda name: timings[name].p50_ms)
        self._reference = sessions[fastest]
        self.runtime = here[self.base.runtime if self.base.runtime != "auto" else self._fastest(here)]
        right, total = self._score(model)
        self.dense = Outcome(
            accuracy=right / total,
            parameters=counting.count_parameters(model),
            macs=counting.count_macs(model, self._source.preprocessing.input_size),
            seconds=time.perf_counter() - start,
            n_images=total,
            **asdict(_timed(timings[fastest], 1.0, dense.stat().st_size)),
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
        quantized = self._quantized(self.base, self._source.model) if self.base.quantizes else None

        def load(runtime: Runtime) -> Session:
            path = self._export(self._folder / runtime.name, self.base, self._source.model, quantized, runtime)
            return runtime.load(path, self._spec(_precision(self.base)))

        with ExitStack() as stack:
            sessions = self._sessions(stack, here, load)
            timings = self._race(list(sessions.values()))
        return min(zip(timings, sessions, strict=True), key=lambda pair: pair[0].p50_ms)[1]

    def _sessions(
        self, stack: ExitStack, here: Mapping[str, Runtime], load: Callable[[Runtime], Session]
    ) -> dict[str, Session]:
        """Of each runtime that takes the file; one that refuses it is named and left out, unless it was asked for.

        Raises:
            HandoffError, RequestError: the runtime that was asked for refuses the file, or all do.
        """
        sessions, refused = {}, None
        for name, runtime in here.items():
            try:
                sessions[name] = stack.enter_context(load(runtime))
            except (HandoffError, RequestError) as error:
                if self.base.runtime == name:
                    raise
                refused = error
                self._progress(f"without {runtime.title}: {error}")
        if not sessions:
            raise refused
        return sessions

    def _timed(self, request: Request, shrunk: nn.Module | None) -> _Timed:
        """Of the structure: measured once."""
        model = self._source.model if shrunk is None else shrunk
        key, known = self._structure(request, model), self._kept["structures"]
        if key not in known:
            self._progress(f"timing on {self.runtime.title}")
            with tempfile.TemporaryDirectory() as folder:
                path = self._file_to_time(Path(folder), request, shrunk)
                size = path.stat().st_size
                with self.runtime.load(path, self._spec(_precision(request))) as session:
                    timing, dense = self._race([session, self._reference])
            known[key] = asdict(_timed(timing, self.dense.latency_ms / dense.p50_ms, size))
            self._save()
        return _Timed(**known[key])

    def _file_to_time(self, folder: Path, request: Request, shrunk: nn.Module | None) -> Path:
        """Cut out of the dense model's file where that can be done, else exported."""
        dense = self._dense_file(request)
        if shrunk is None:
            return dense
        path = folder / "candidate.onnx"
        try:
            cutting.cut(dense, self._source.model, shrunk, path)
            with self.runtime.load(path, self._spec(_precision(request))):
                return path
        except (cutting.CannotCutError, HandoffError):
            quantized = self._quantized(request, shrunk) if request.quantizes else None
            return self._export(folder, request, shrunk, quantized, self.runtime)

    def _dense_file(self, request: Request) -> Path:
        """Of the model that loses nothing, with the bits of `request`: exported once for each choice of them."""
        bits = recipes.prepared_with_bits(request, self._source.model)[1].layers if request.quantizes else {}
        key = f"{_precision(request)} {sorted((name, str(layer)) for name, layer in bits.items())}"
        if key not in self._dense_files:
            quantized = self._quantized(request, self._source.model) if request.quantizes else None
            folder = self._folder / str(len(self._dense_files))
            self._dense_files[key] = self._export(folder, request, self._source.model, quantized, self.runtime)
        return self._dense_files[key]

    def _structure(self, request: Request, model: nn.Module) -> str:
        """Everything that the time of a file depends on here."""
        shapes = [f"{name} {tuple(p.shape)}" for name, p in model.named_parameters() if p.ndim > 1]
        plan = recipes.prepared_with_bits(request, model)[1] if request.quantizes else None
        bits = [f"{name} {layer}" for name, layer in plan.layers.items()] if plan else []
        text = "\n".join([_precision(request), *shapes, *bits])
        return hashlib.sha256(text.encode()).hexdigest()[:20]

    def _restored(self) -> dict[str, Any] | None:
        """What an earlier attempt left in the folder."""
        path = self.folder / MEASURED if self.folder else None
        if path is None or not path.exists():
            return None
        kept = json.loads(path.read_text(encoding="utf-8"))
        if Request(**kept["request"]) != self.base:
            raise RunError(
                f"{path} holds measurements of another request. Choose another folder, or go on with the same options."
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
        path, size = folder / "candidate.onnx", self._source.preprocessing.input_size
        if quantized is not None:
            if runtime.flavour not in quantized.ranges.flavours:
                raise RequestError("quantizer", request.quantizer, f"another one: {quantization.NO_TENSORRT_FILE}")
            onnx_export.export_flavours(quantized, {runtime.flavour: path}, input_size=size)
        else:
            precision = "fp16" if request.half_precision else "fp32"
            onnx_export.export(model, path, input_size=size, precision=precision)
        return path

    def _spec(self, precision: Precision) -> BuildSpec:
        size = self._source.preprocessing.input_size
        return BuildSpec(size, threads=self.base.threads, precision=precision, hint=self.base.runtime_hint)

    def _race(self, sessions: list[Session]) -> list[benchmark.Timing]:
        images = self._calibration[:1].numpy()
        return benchmark.race([partial(session.run, np.ascontiguousarray(images)) for session in sessions])


def require_searchable(base: Request) -> None:
    """Raises `RequestError` where per-group ratios cannot be set, or making a candidate would need training."""
    if base.config_list is not None:
        raise RequestError("config_list", "a list", "nothing, because a search sets the ratio of each group itself")
    if not base.shrinks or pruning.PRUNERS[base.pruner].needs_data == TRAINS:
        known = ", ".join(
            name for name, one in pruning.PRUNERS.items() if one.needs_data != TRAINS and not one.fine_grained
        )
        raise RequestError("pruner", base.pruner, f"one that shrinks layers and needs no training of its own: {known}")


def variable_groups(base: Request, source: Source) -> tuple[Group, ...]:
    """Groups whose ratio may be chosen: those that can lose a multiple of channels and that `base` does not fix by name."""
    plan = recipes.usable_plan(
        base.model_copy(update={"sparsity": 0.5, "ranking": "per-group", "max_layer_sparsity": None}), source
    )
    fixed = tuple(base.layer_sparsity)
    named = [
        g for g in plan.groups if any(layer == n or layer.startswith(f"{n}.") for layer in g.layers for n in fixed)
    ]
    free = tuple(group for group in plan.groups if group not in named)
    if not free:
        raise RequestError(
            "layer_sparsity", base.layer_sparsity, "at least one group of layers left to choose a ratio for"
        )
    return free


def _removes(request: Request, group: Group) -> bool:
    """Whether the ratio asked of a group is worth at least one step of its channels."""
    step = math.lcm(request.channel_multiple, group.unit * group.blocks)
    return request.layer_sparsity.get(group.layers[0], request.sparsity) * group.channels_before >= step


def _timed(timing: benchmark.Timing, scale: float, file_bytes: int) -> _Timed:
    low, high = np.percentile(timing.samples_ms, (25, 75))
    return _Timed(timing.p50_ms * scale, float(low) * scale, float(high) * scale, file_bytes)


def _precision(request: Request) -> Precision:
    return "int8" if request.quantizes else "fp16" if request.half_precision else "fp32"
