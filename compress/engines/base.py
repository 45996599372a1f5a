"""What every runtime offers: build a file, load it, run it, and say with which kernels."""

from __future__ import annotations

import importlib.util
import re
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import onnx

from compress.engines import benchmark
from compress.errors import HandoffError, RuntimeUnavailableError
from compress.methods.runtimes import RUNTIMES, Flavour, Hint, Precision

LARGEST_SAFE_WEIGHT = 64
"""Kernels without an int8 dot product add two products of unsigned and signed bytes in 16 bits: 2 * 255 * 64 = 32640
fits, 2 * 255 * 65 does not."""


@dataclass(frozen=True)
class BuildSpec:
    """The conditions under which a file is built or loaded."""

    input_size: int
    """Height and width of the images, pixels."""
    batch_size: int = 1
    """Images per call; the batch that an ahead-of-time engine is tuned for."""
    max_batch: int = 1
    """Largest batch that an ahead-of-time engine accepts."""
    threads: int = 1
    """CPU threads."""
    precision: Precision = "fp32"
    """Of the arithmetic that is not on integers. `fp32` is really fp32; `int8` leaves the choice to the runtime."""
    static: bool = True
    """Compile for exactly `batch_size` where that makes the runtime faster."""
    hint: Hint = "latency"
    """For OpenVINO; the other runtimes have no such choice."""
    targets: tuple[str, ...] = ()
    """GPU architectures that TensorRT for RTX compiles for, such as `SM89`; none is any that it supports."""

    @classmethod
    def any_batch(cls, input_size: int, threads: int) -> BuildSpec:
        """For comparing: batches of every size, not made faster for one."""
        return cls(input_size, static=False, threads=threads)

    @classmethod
    def one_image(cls, input_size: int, threads: int, precision: Precision) -> BuildSpec:
        """For answering one image at a time."""
        return cls(input_size, threads=threads, precision=precision)


@dataclass(frozen=True)
class Kernel:
    """A convolution or fully connected layer as the runtime executes it."""

    name: str
    """Its node in the ONNX file, as far as the runtime keeps it."""
    type: str
    """The runtime's own word for the kernel."""
    precision: str
    """Of its inputs: int8 (signed or unsigned), fp32, bf16 or fp16."""


@dataclass(frozen=True)
class Built:
    """What `Runtime.build` made."""

    path: Path | None
    """The engine; None for runtimes that load the ONNX file itself."""
    ran: bool
    """Whether this machine can execute it."""
    text: str
    """One sentence for a user."""
    passport: dict[str, Any] = field(default_factory=dict)
    """What is written beside the engine as `<engine>.json`; empty when there is no engine."""


class Session(ABC):
    """A loaded file. Use it as a context manager, or call `close`."""

    precision: str
    """Read back from the runtime: `int8` when any layer runs on integers, else the precision of the layers."""
    conversions: int | None = None
    """Operations on activations that only turn floats into integers or back; None where it cannot be read back."""
    usable: bool = True
    """False when its process is gone."""
    notes: tuple[str, ...] = ()
    """What was changed to get right answers on this machine, and anything else that a reader of timings must know."""

    @abstractmethod
    def run(self, images: np.ndarray) -> np.ndarray:
        """Images float32 [N, 3, H, W], normalised -> logits float32 [N, classes]; raises `HandoffError`."""

    def burst(self, images: np.ndarray, pace: benchmark.Pace) -> list[float]:
        """Milliseconds of single calls of `run`, timed in the process that the file is loaded in."""
        return benchmark.burst(partial(self.run, images), pace)

    def timed(self, images: np.ndarray) -> Timed:
        """This session with `images`, for `benchmark.race`."""
        return Timed(self, images)

    @abstractmethod
    def kernels(self) -> tuple[Kernel, ...]:
        """The convolutions and fully connected layers, read back from the runtime's own optimized graph."""

    @abstractmethod
    def close(self) -> None:
        """Free the runtime's memory; the session cannot run afterwards."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@dataclass(frozen=True)
class Timed:
    """A session and the batch that it is timed with."""

    session: Session
    images: np.ndarray

    def burst(self, pace: benchmark.Pace) -> list[float]:
        return self.session.burst(self.images, pace)


class Runtime(ABC):
    """Something that executes models. Methods raise `RuntimeUnavailableError` with `missing()` when it is not there.

    `build` and `load` let the runtime compile and execute in a process of its own (see `engines.remote`), which makes the
    class anew: it takes no arguments, and its module can be imported.
    """

    name: str
    title: str
    flavour: Flavour
    ahead_of_time: bool = False
    builds_for_targets: bool = False

    def __init_subclass__(cls, *, name: str | None = None) -> None:
        """`class OpenVino(OnnxLoader, name="openvino")` takes these attributes from `compress.methods.runtimes`."""
        super().__init_subclass__()
        if name is not None:
            entry = RUNTIMES[name]
            cls.name, cls.title, cls.flavour = entry.name, entry.title, entry.flavour
            cls.ahead_of_time, cls.builds_for_targets = entry.ahead_of_time, entry.builds_for_targets

    @abstractmethod
    def missing(self) -> str | None:
        """None when files can be built here; else one sentence: what is missing and what to do."""

    @property
    @abstractmethod
    def runs_here(self) -> bool:
        """Whether files can be executed on this machine."""

    @property
    def half_precision(self) -> Precision | None:
        """16-bit floats that it computes an fp32 file in when asked to, in this machine's hardware; None without any."""
        return None

    @abstractmethod
    def build(self, onnx_path: Path, engine_path: Path, spec: BuildSpec) -> Built:
        """Make what the runtime loads. Raises `EngineError` when it refuses the file, crashes or hangs."""

    @abstractmethod
    def load(self, path: Path, spec: BuildSpec, *, trial: bool = False) -> Session:
        """Load an ONNX file, or the engine that `build` made of it, in the runtime's process.

        Args:
            trial: in its second process, so that a file on which the runtime crashes takes no session along but others of
                its kind.

        Raises:
            EngineError: it refuses the file, crashes or hangs; so do the session's methods.
        """

    @abstractmethod
    def open(self, path: Path, spec: BuildSpec) -> Session:
        """The same in this process, which ends where the runtime crashes. Raises `HandoffError`."""

    def check_targets(self, targets: tuple[str, ...]) -> None:  # noqa: B027 - most runtimes have nothing to check
        """Raises `RequestError` for a GPU architecture that it cannot compile for ahead of time, listing what it offers."""

    def unfit(self, passport: dict[str, Any]) -> list[str]:
        """Why this machine cannot run the engine of this passport; empty when it can. Loads nothing of the engine."""
        return [f"{self.title} loads ONNX files, not engines."]


class OnnxLoader(Runtime):
    """A runtime that loads ONNX files as they are; building is a trial of loading."""

    module: str
    """Name of its package, for the import and for pip."""
    how_loaded: str
    """End of the sentence for a user: `<title> loads <file> <how_loaded>.`"""

    def missing(self) -> str | None:
        return None if installed(self.module) else _not_installed(self.title, self.module)

    @property
    def runs_here(self) -> bool:
        return self.missing() is None

    def build(self, onnx_path: Path, engine_path: Path, spec: BuildSpec) -> Built:
        with self.load(onnx_path, spec):
            return Built(path=None, ran=True, text=f"{self.title} loads {onnx_path.name} {self.how_loaded}.")

    def load(self, path: Path, spec: BuildSpec, *, trial: bool = False) -> Session:
        from compress.engines.processes import remote  # which needs this module

        if reason := self.missing():
            raise RuntimeUnavailableError(reason)
        return remote.load(self, path, spec, trial=trial)


def installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _not_installed(title: str, package: str) -> str:
    return f"{title} is not installed; install it with `pip install {package}`."


def failing_part(path: Path, text: str) -> str:
    """What a runtime complains of in `text`, in the words of the user's file: one of its layers, or the file."""
    layer = failing_layer(path, text)
    return f"{layer} of {path.name}" if layer else path.name


def failing_layer(path: Path, text: str) -> str | None:
    """The layer of an ONNX file whose name stands in `text`."""
    try:
        nodes = onnx.load(path, load_external_data=False).graph.node
    except Exception:  # noqa: BLE001 - protobuf's decoding error differs from version to version
        return None
    named = [node for node in nodes if re.search(rf"(?<![\w./]){re.escape(node.name or '?')}(?![\w./])", text)]
    if not named:
        return None
    layer = max(named, key=lambda node: len(node.name))
    return f"the layer {layer.name} ({layer.op_type})"


def check_images(images: np.ndarray, spec: BuildSpec, fixed_batch: int | None) -> np.ndarray:
    """Contiguous float32 images of the shape the session was made for; raises `HandoffError`."""
    expected = (fixed_batch, 3, spec.input_size, spec.input_size)
    fits = images.ndim == 4 and images.shape[1:] == expected[1:] and fixed_batch in (None, len(images))
    if not fits or images.dtype != np.float32:
        shape = " x ".join(str(side or "any number") for side in expected)
        actual = " x ".join(map(str, images.shape))
        raise HandoffError(
            f"Images of shape {actual} ({images.dtype}) were given; the session takes {shape} (float32)."
        )
    return np.ascontiguousarray(images)


def precision_of(kernels: tuple[Kernel, ...], otherwise: str) -> str:
    """`int8` when any layer runs on integers; else what most layers run in."""
    precisions = [kernel.precision for kernel in kernels]
    if "int8" in precisions:
        return "int8"
    return max(set(precisions), key=precisions.count) if precisions else otherwise
