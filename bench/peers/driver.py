"""Runs a peer's script in its environment, within its budget, and keeps what came of it."""

from __future__ import annotations

import ast
import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import time
import tokenize
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.peers.environments import PeerError, reason, required, variables
from bench.peers.rows import OURS, Row
from compress.files import write_text

SCRIPTS = Path(__file__).parent / "scripts"
ROOT = Path(__file__).resolve().parents[2]
NOT_THE_USERS = "handover"
"""The script's way to its job; its lines are nobody's recipe."""
RESULT = "result.json"
MEASURING = ("measure", "report")
"""Stages of Espalier's runs that compress nothing; no other script measures."""

Facts = dict[str, Any]


@dataclass(frozen=True)
class Conditions:
    """What is the same for all rows of a model; see `Job` of scripts/handover.py."""

    model: str
    weights: Path
    images: Path
    data: str
    mean: float
    std: float
    input_size: int
    budget: int
    int8_dot_product: bool
    seed: int = 0

    def job(self, row: Row) -> Facts:
        values = {key: str(value) if isinstance(value, Path) else value for key, value in vars(self).items()}
        return values | {"options": row.options}


def finished(row: Row, conditions: Conditions, folder: Path) -> Facts | None:
    """The result in `folder`, if it is of this row under these conditions with scripts and packages as they are."""
    path = folder / RESULT
    if not path.is_file():
        return None
    result = json.loads(path.read_text(encoding="utf-8"))
    same = result["job"] == conditions.job(row) and result["digest"] == _digest(row)
    return result if same else None


def compress_row(row: Row, conditions: Conditions, folder: Path, python: Path, *, limit_s: float = 4 * 3600) -> Facts:
    """Runs the row's script in an empty `folder`, whatever was there before, and writes result.json last.

    A script that fails is a result too, with its reason under `error`.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    job = conditions.job(row)
    write_text(folder / "job.json", json.dumps(job, indent=1) + "\n")
    result = {"row": row.name, "job": job, "digest": _digest(row), "lines": user_lines(row.script)}
    started = time.perf_counter()
    try:
        _run(row, folder, python, limit_s)
        result |= {"seconds": time.perf_counter() - started - _measured(folder), "files": _files(folder)}
        result["images"] = json.loads((folder / "used.json").read_text(encoding="utf-8"))
    except PeerError as error:
        result["error"] = str(error)
    write_text(folder / RESULT, json.dumps(result, indent=1) + "\n")
    return result


def user_lines(script: str) -> int:
    """Lines of code of a script and of the files beside it that it imports, without comments and docstrings."""
    return sum(_code_lines(path.read_text(encoding="utf-8")) for path in _parts(script) if path.stem != NOT_THE_USERS)


def _parts(script: str) -> list[Path]:
    """The script and every file beside it that it imports, directly or not."""
    found, waiting = [], [SCRIPTS / f"{script}.py"]
    while waiting:
        path = waiting.pop()
        if path in found:
            continue
        found.append(path)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [node.module] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            waiting += [part for name in names if name and (part := SCRIPTS / f"{name}.py").is_file()]
    return sorted(found)


def _code_lines(text: str) -> int:
    silent = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    lines = {line for token in tokens if token.type not in silent for line in range(token.start[0], token.end[0] + 1)}
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            lines -= set(range(node.lineno, node.end_lineno + 1))
    return len(lines)


def _digest(row: Row) -> str:
    """Of all that decides what a row leaves, beside its job: its scripts and its packages, or Espalier's own code."""
    found = hashlib.sha256()
    for path in _parts(row.script) + (_own_code() if row.environment == OURS else []):
        found.update(path.name.encode() + path.read_bytes())
    if row.environment != OURS:
        found.update(required(row.environment).encode())
    return found.hexdigest()


def _own_code() -> list[Path]:
    return [ROOT / "requirements.txt", *sorted((ROOT / "compress").rglob("*.py"))]


def _run(row: Row, folder: Path, python: Path, limit_s: float) -> None:
    command = [str(python), str(SCRIPTS / f"{row.script}.py"), str(folder / "job.json")]
    if row.environment == OURS:
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
    else:
        environment = variables(python)
    log = folder / "log.txt"
    with log.open("w", encoding="utf-8") as out:
        child = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = child.wait(timeout=limit_s)
        except subprocess.TimeoutExpired:
            raise PeerError(f"it was ended after {limit_s / 60:.0f} minutes") from None
        finally:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()
    if code:
        raise PeerError(reason(log.read_text(encoding="utf-8", errors="replace")))


def _measured(folder: Path) -> float:
    """Seconds that Espalier's run spent measuring rather than compressing."""
    report = folder / "run" / "report.json"
    if not report.is_file():
        return 0.0
    stages = json.loads(report.read_text(encoding="utf-8"))["stages"]
    return sum(stage["seconds"] for stage in stages if stage["name"] in MEASURING)


def _files(folder: Path) -> dict[str, str]:
    """Runtime -> the file that it gets."""
    if not (folder / "model.onnx").is_file():
        raise PeerError("it left no model.onnx")
    own = (folder / "model.xml").is_file()
    return {"onnxruntime": "model.onnx", "openvino": "model.xml" if own else "model.onnx"}
