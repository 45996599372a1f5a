"""One TensorRT build in a process of its own, which takes with it whatever it taught the library.

TensorRT for RTX 1.7 keeps layers in fp32 when the process built for chosen GPUs before, or was refused a build; every
edition keeps the first logger that it was given, so the logs of two builds would be told apart by nobody; and a builder
that crashes takes its process along.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

from compress.engines.base import BuildSpec, Kernel
from compress.errors import HandoffError

INSTALLATION = Path(__file__).resolve().parents[2]


def compile_apart(runtime: str, onnx_path: Path, plan_path: Path, spec: BuildSpec) -> tuple[Kernel, ...]:
    """Has `compile` of the runtime of this name write the engine to `plan_path`, and returns the engine's layers.

    Raises:
        HandoffError: with TensorRT's reason, or how its process ended.
        OSError: `plan_path` cannot be written.
    """
    order = {"runtime": runtime, "onnx": str(onnx_path), "plan": str(plan_path), "spec": asdict(spec)}
    ended = subprocess.run(  # noqa: S603  (our own words, no shell)
        [sys.executable, "-P", "-c", f"from {__name__} import main; main()"],  # -m warns: the package has imported it
        input=json.dumps(order),
        stdout=subprocess.PIPE,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(INSTALLATION)},
    )
    if ended.returncode:
        raise HandoffError(_crash(runtime, onnx_path.name, ended.returncode))
    answer = json.loads(ended.stdout)
    if "refused" in answer:
        raise HandoffError(answer["refused"])
    if "os_error" in answer:
        raise OSError(*answer["os_error"])
    return tuple(Kernel(**layer) for layer in answer["layers"])


def _crash(runtime: str, name: str, code: int) -> str:
    how = f"signal {-code}" if code < 0 else f"exit code {code}"
    why = ", often because the machine ran out of memory" if code == -9 else ""
    return (
        f"The process in which {runtime} built an engine from {name} ended without a result ({how}{why}). Its last words are "
        "in the log; build again, or leave this runtime out."
    )


def main() -> None:
    from compress.engines import RUNTIMES
    from compress.engines.tensorrt import TensorRTRuntime

    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the library prints is no part of the answer
    order = json.load(sys.stdin)
    spec = BuildSpec(**order["spec"] | {"targets": tuple(order["spec"]["targets"])})
    edition = RUNTIMES[order["runtime"]]
    assert isinstance(edition, TensorRTRuntime), "no other runtime compiles"
    with answer:
        try:
            layers = edition.compile(Path(order["onnx"]), Path(order["plan"]), spec)
            json.dump({"layers": [asdict(layer) for layer in layers]}, answer)
        except HandoffError as error:
            json.dump({"refused": str(error)}, answer)
        except OSError as error:
            json.dump({"os_error": [error.errno, error.strerror or str(error)]}, answer)
