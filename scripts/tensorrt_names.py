"""Writes tests/helpers/tensorrt_names.json: the names that published TensorRT bindings have, class by class.

    python scripts/tensorrt_names.py

A bindings wheel alone (a megabyte) cannot be imported, because it links three libraries of gigabytes. But it needs only nine
functions of them, all called later than at import: empty stand-ins, compiled here, are enough to list every class.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

TARGET = Path(__file__).resolve().parents[1] / "tests" / "helpers" / "tensorrt_names.json"
RELEASES = ("10.3.0", "10.16.1.11", "11.4.0.106")
"""JetPack 6's, the last of 10, and the one that requirements-gpu.txt asks for."""
PACKAGE = "tensorrt_cu12_bindings"
CLASSES = (
    "Builder", "BuilderFlag", "ComputeCapability", "EngineInspector", "IBuilderConfig", "ICudaEngine",
    "IExecutionContext", "ILogger", "INetworkDefinition", "IOptimizationProfile", "LayerInformationFormat", "Logger",
    "NetworkDefinitionCreationFlag", "OnnxParser", "ParserError", "ProfilingVerbosity", "Runtime",
)  # fmt: skip
FUNCTIONS = (
    "createInferBuilder_INTERNAL", "createInferRefitter_INTERNAL", "createInferRuntime_INTERNAL",
    "createNvOnnxParserRefitter_INTERNAL", "createNvOnnxParser_INTERNAL", "getBuilderPluginRegistry",
    "getNvOnnxParserVersion", "getPluginRegistry", "initLibNvInferPlugins",
)  # fmt: skip
LISTING = """
import importlib, json, sys
module, classes = importlib.import_module(sys.argv[1]), sys.argv[2].split(",")
print(json.dumps({"version": module.__version__, "names": {
    name: [word for word in dir(getattr(module, name)) if not word.startswith("_")]
    for name in classes if hasattr(module, name)}}))
"""


def names_of(module: str, environment: dict[str, str]) -> dict[str, object]:
    command = [sys.executable, "-c", LISTING, module, ",".join(CLASSES)]
    done = subprocess.run(command, env=os.environ | environment, check=True, capture_output=True, text=True)
    return json.loads(done.stdout)


def published(release: str, folder: Path) -> dict[str, object]:
    """The names of one release of the data-centre edition."""
    pip = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--only-binary",
        ":all:",
        "--dest",
        str(folder),
    ]
    subprocess.run([*pip, f"{PACKAGE}=={release}"], check=True)
    (wheel,) = folder.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(folder)
    source = folder / "stubs.c"
    source.write_text("".join(f"void *{name}(void) {{ return 0; }}\n" for name in FUNCTIONS))
    major = release.split(".")[0]
    for library in ("libnvinfer", "libnvinfer_plugin", "libnvonnxparser"):
        code = source if library == "libnvinfer" else "/dev/null"
        target = folder / f"{library}.so.{major}"
        subprocess.run(["cc", "-shared", "-fPIC", "-o", str(target), "-x", "c", str(code)], check=True)
    return names_of("tensorrt_bindings", {"LD_LIBRARY_PATH": str(folder), "PYTHONPATH": str(folder)})


def main() -> None:
    table = {"tensorrt_rtx": names_of("tensorrt_rtx", {})}
    for release in RELEASES:
        with tempfile.TemporaryDirectory() as folder:
            table[f"tensorrt {release}"] = published(release, Path(folder))
    lines = json.dumps(table, indent=1).replace("\n    ", " ").replace("\n   ]", " ]")
    TARGET.write_text(lines + "\n", encoding="utf-8")
    print(f"{TARGET}: {', '.join(table)}")


if __name__ == "__main__":
    main()
