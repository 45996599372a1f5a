"""The passport of an engine: what it was built for, by what, and the command that builds it again.

Loading an engine runs code from it. So an engine is handed to a runtime only as the bytes whose hash stands in its
passport, and only when this process built it or a run's manifest (see `compress.runs`) lists the same hash.
"""

from __future__ import annotations

import hashlib
import json
import platform
import shlex
from pathlib import Path
from typing import Any

from compress import runs
from compress.engines.base import BuildSpec
from compress.errors import HandoffError, StorageError
from compress.files import sha256, write_text

_built_by_this_process: set[str] = set()


def trust(digest: str) -> None:
    """In the process of a runtime: the engine with this sha256 was checked by the process that started it."""
    _built_by_this_process.add(digest)


def path_of(engine_path: Path) -> Path:
    return engine_path.with_name(f"{engine_path.name}.json")


def write(engine_path: Path, facts: dict[str, Any]) -> dict[str, Any]:
    """Completes `facts` with the engine's size, hash and platform, and writes them beside it."""
    digest = sha256(engine_path)
    passport = {
        "engine": engine_path.name,
        "sha256": digest,
        "size_bytes": engine_path.stat().st_size,
        "platform": this_platform(),
        **facts,
    }
    write_text(path_of(engine_path), json.dumps(passport, indent=1) + "\n")
    _built_by_this_process.add(digest)
    return passport


def read(engine_path: Path) -> dict[str, Any]:
    """Raises `HandoffError` when there is no passport of ours beside the engine."""
    try:
        passport: dict[str, Any] = json.loads(path_of(engine_path).read_text(encoding="utf-8"))
        needed = {"sha256", "runtime", "runtime_version", "targets", "platform", "layers", "rebuild"} - set(passport)
    except (OSError, ValueError, TypeError) as error:
        raise HandoffError(f"{engine_path.name} has no readable passport ({error}); build the engine again.") from error
    if needed:
        raise HandoffError(
            f"{engine_path.name} has no readable passport ({min(needed)} is missing); build the engine again."
        )
    return passport


def checked_engine(engine_path: Path, runtime: str) -> tuple[bytes, dict[str, Any]]:
    """The engine's bytes and its passport; nothing else may be deserialized.

    Raises:
        HandoffError: no passport, another file than the passport's, or one that no manifest of ours lists.
    """
    passport = read(engine_path)
    plan = engine_path.read_bytes()
    digest = hashlib.sha256(plan).hexdigest()
    if (digest, runtime) != (passport["sha256"], passport["runtime"]):
        raise HandoffError(f"{engine_path.name} is not the file that its passport describes; build the engine again.")
    if digest not in _built_by_this_process and (reason := unrecorded(engine_path)):
        raise HandoffError(reason)
    return plan, passport


def unrecorded(engine_path: Path) -> str | None:
    """None when a run's manifest, signed here, lists the engine and its passport as they are; else one sentence."""
    for path in (engine_path, path_of(engine_path)):
        try:
            recorded = runs.recorded_sha256(path)
        except StorageError as error:
            return str(error)
        if recorded is None or not path.is_file() or recorded != sha256(path):
            return (
                f"No manifest of a run lists {path.name} with this hash, and loading an engine runs code from it: "
                "build it again from the ONNX file."
            )
    return None


def rebuild_command(onnx_name: str, runtime: str, spec: BuildSpec) -> str:
    """To be run in the folder of the ONNX file."""
    words = ["python", "-m", "compress", "engine", "build", onnx_name, "--runtime", runtime]
    words += ["--batch-size", str(spec.batch_size), "--max-batch", str(max(spec.max_batch, spec.batch_size))]
    for target in spec.targets:
        words += ["--target", target]
    return shlex.join(words)


def this_platform() -> str:
    """Operating system and processor family, such as `Linux x86_64`: an engine of one does not load on another."""
    return f"{platform.system()} {platform.machine()}"
