"""Calls of `python -m compress` in child processes.

The server itself never opens an untrusted checkpoint and never imports torch.
"""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from compress import processes
from compress.errors import CompressError, RunError
from compress.files import write_text
from compress.request import Request
from compress.ui.estimates import Structure

log = logging.getLogger("compress.ui")

CHECK_LIMIT_S = 180
MODELS_LIMIT_S = 120
CLASSIFY_LIMIT_S = 60
ESTIMATE_LIMIT_S = 120
MOST_LOGGED = 8000
"""Characters of a failed command's output that are logged."""


@dataclass(frozen=True)
class Offer:
    """A torchvision classifier in the form's list."""

    name: str
    parameters: int
    input_size: int = 224
    """Input size of its published weights, in pixels."""


def check(request: Request) -> dict[str, Any]:
    """The result of `compress.pipeline.check` for a request.

    Raises:
        CompressError: the check refused the request.
        RunError: the check timed out or crashed.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "request.json")
        file.write_text(request.to_json(), encoding="utf-8")
        result = call("check", "--request", str(file), limit_s=CHECK_LIMIT_S)
    assert isinstance(result, dict), "`compress check --json` prints an object"
    return result


def classify(run_folder: Path, image: Path) -> dict[str, Any]:
    """The result of `compress.classify.classify` for an image; raises as `check` does."""
    result = call("classify", str(run_folder), str(image), limit_s=CLASSIFY_LIMIT_S)
    assert isinstance(result, dict), "`compress classify --json` prints an object"
    return result


def estimate(structure: Structure) -> dict[str, Any]:
    """The result of `compress.pruning.profiles.profile`; raises as `check` does."""
    options = ("--classes", structure.classes, "--input-size", structure.input_size)
    multiple = ("--channel-multiple", structure.multiple)
    result = call("estimate", structure.model, *map(str, (*options, *multiple)), limit_s=ESTIMATE_LIMIT_S)
    assert isinstance(result, dict), "`compress estimate --json` prints an object"
    return result


def models(cache: Path) -> tuple[Offer, ...]:
    """The available classifiers, cached in the file `cache` because listing them takes seconds.

    Raises:
        CompressError: they cannot be listed.
    """
    installed = version("torchvision")
    try:
        kept = json.loads(cache.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        kept = {}
    if kept.get("torchvision") != installed:
        kept = {"torchvision": installed, "models": call("models", limit_s=MODELS_LIMIT_S)}
        write_text(cache, json.dumps(kept))
    return tuple(Offer(row["name"], int(row["parameters"]), int(row["input_size"])) for row in kept["models"])


def call(*arguments: str, limit_s: float) -> Any:
    """The JSON that `python -m compress ARGUMENTS --json` prints. Raises as `check` does.

    Args:
        limit_s: time limit, in seconds.
    """
    process = subprocess.Popen(  # noqa: S603
        [sys.executable, "-P", "-m", "compress", *arguments, "--json"],
        env=processes.child_environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    child = processes.identify(process.pid)
    assert child is not None, "a child that was not waited for is at least a zombie"
    try:
        output, printed = process.communicate(timeout=limit_s)
    except subprocess.TimeoutExpired:
        raise RunError(
            f"`compress {arguments[0]}` took longer than {limit_s:.0f} s and was stopped. Try again when no run is active."
        ) from None
    finally:
        processes.stop(child, grace_s=1.0)
        process.wait()
        processes.reap(child.pid)  # its descendants, if this process is the init process of a container
    return _answer(arguments[0], output, printed, process.returncode)


def _answer(command: str, output: str, printed: str, code: int) -> Any:
    """The JSON that the command printed. Raises `CompressError` for an error of the command."""
    try:
        answer = json.loads(output)  # also with a non-zero exit status: a check that finds problems lists them
    except ValueError:
        answer = {"error": None}
    if not isinstance(answer, dict) or "error" not in answer:
        return answer
    log.warning("`compress %s` ended with exit code %d:\n%s", command, code, printed[-MOST_LOGGED:])
    if answer["error"] is None:
        raise RunError(f"`compress {command}` ended without an answer (exit code {code}). Check the installation.")
    raise CompressError(answer["error"]["message"])
