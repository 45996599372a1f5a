"""Engines of a finished run: whether one can run on this machine, and a new one where it cannot.

An engine belongs to the version of TensorRT, the system and the GPU that it was built for; its ONNX file does not.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx

from compress import runs
from compress.engines import RUNTIMES, BuildSpec, Built, Runtime
from compress.engines import passport as passports
from compress.errors import HandoffError, RequestError, RunError
from compress.files import sha256

TOLERANCE = 0.02
"""Root mean square of the logits' difference to ONNX Runtime on the CPU, as a share of the largest logit."""
COMPARED_IMAGES = 16


def check(engine_path: Path) -> list[str]:
    """Why the engine cannot run on this machine, a sentence each; empty when it can. Nothing of the engine is loaded.

    Raises:
        RunError: there is no such file.
    """
    _require_file(engine_path)
    try:
        passport = passports.read(engine_path)
    except HandoffError as error:
        return [str(error)]
    problems = []
    if sha256(engine_path) != passport["sha256"]:
        problems.append("It is not the file that its passport describes: the sha256 differs.")
    elif reason := passports.unrecorded(engine_path):
        problems.append(reason)
    if (runtime := RUNTIMES.get(passport["runtime"])) is None:
        problems.append(f"It is for {passport['runtime']!r}, and this version knows {', '.join(RUNTIMES)}.")
    else:
        problems += runtime.unfit(passport)
    if problems:
        problems.append(f"To build it for a machine, run there in its folder: {passport['rebuild']}")
    return problems


def build(onnx_path: Path, runtime_name: str, *, batch_size: int, max_batch: int, targets: tuple[str, ...]) -> Built:
    """Builds an engine beside an ONNX file of a finished run, and lists it and its passport in the run's manifest.

    Raises:
        RunError: the file is missing, belongs to no finished run, or is not the one in its manifest.
        RequestError: the runtime has no engines, or does not compile for a target.
        RuntimeUnavailableError: it cannot build here.
        HandoffError: it refuses the file, or the engine answers differently; no engine is left.
    """
    _require_file(onnx_path)
    if (recorded := runs.manifest_sha256(onnx_path)) is None:
        raise RunError(f"{onnx_path} belongs to no finished run; give an ONNX file from the artifacts of one.")
    if recorded != sha256(onnx_path):
        raise RunError(f"{onnx_path} was changed after the run: its sha256 differs from the manifest. Repeat the run.")
    runtime = RUNTIMES.get(runtime_name)
    if runtime is None or not runtime.ahead_of_time:
        allowed = ", ".join(name for name, runtime in RUNTIMES.items() if runtime.ahead_of_time)
        raise RequestError("runtime", runtime_name, f"one that has engines: {allowed}")
    if targets and not runtime.builds_for_targets:
        raise RequestError("target", targets[0], f"nothing, because {runtime_name} builds for the GPU that is present")
    spec = BuildSpec(_input_size(onnx_path), batch_size, max(batch_size, max_batch), targets=targets)
    engine_path = onnx_path.with_name(f"{onnx_path.stem}.{runtime.name}.engine")
    built = runtime.build(onnx_path, engine_path, spec)
    if runtime.runs_here:
        try:
            _compare(runtime, engine_path, onnx_path, spec)
        except HandoffError:
            engine_path.unlink()
            passports.path_of(engine_path).unlink()
            raise
    runs.add_to_manifest([engine_path, passports.path_of(engine_path)], parent=onnx_path)
    return built


def _compare(runtime: Runtime, engine_path: Path, onnx_path: Path, spec: BuildSpec) -> None:
    """Raises `HandoffError` when the engine answers differently from its ONNX file on normal noise."""
    shape = (min(COMPARED_IMAGES, spec.max_batch), 3, spec.input_size, spec.input_size)
    images = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
    with RUNTIMES["onnxruntime"].load(onnx_path, spec) as session:
        expected = session.run(images)
    with runtime.load(engine_path, spec) as session:
        got = session.run(images)
    difference = float(np.sqrt(np.mean(np.square(expected - got))))
    scale = float(np.abs(expected).max())
    if not difference <= TOLERANCE * scale:
        raise HandoffError(
            f"{engine_path.name} and {onnx_path.name} answer differently: root mean square {difference:.3g} of {scale:.3g}, "
            f"where {TOLERANCE:.0%} is allowed. The engine was not kept."
        )


def _input_size(onnx_path: Path) -> int:
    model = onnx.load(onnx_path, load_external_data=False)
    return int(model.graph.input[0].type.tensor_type.shape.dim[-1].dim_value)


def _require_file(path: Path) -> None:
    if not path.is_file():
        raise RunError(f"There is no file {path}; give one from the artifacts of a run.")
