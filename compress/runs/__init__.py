"""A run's folder: its stages, its progress, its manifest.

    request.json  events.jsonl  log.txt  stages/<name>.json  artifacts/...
    report.json  report.html  README.md  manifest.json

A stage is done when its record exists and every file it names still has the recorded hash; otherwise the stage and
all later ones are carried out again. manifest.json is written last, so its presence means that the run is complete.
Records and manifest are signed (see `compress.signing`): what was changed outside of a run does not count.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import resource
import shutil
import time
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from compress import memory, signing
from compress.errors import CompressError, RunError, StorageError
from compress.files import PARTIAL, sha256, storage_error, write_text
from compress.report import Handoff
from compress.request import Request
from compress.runs.manifest import (
    MANIFEST,
    add_to_manifest,
    adopt,
    manifest,
    manifest_sha256,
    record_kind,
    recorded_sha256,
    require_unchanged,
    verify,
    write_manifest,
)

__all__ = [
    "MANIFEST",
    "STAGES",
    "Run",
    "Skipped",
    "StageResult",
    "add_to_manifest",
    "adopt",
    "claim",
    "manifest",
    "manifest_sha256",
    "open_run",
    "recorded_sha256",
    "require_unchanged",
    "verify",
    "within_memory",
]

STAGES = ("baseline", "prune", "finetune", "quantize", "export", "build", "measure", "report")
MAY_PREEXIST = {"request.json", "uploads", "events.jsonl", "log.txt"}
"""What a queue leaves in the folder before the run starts."""

Notify = Callable[[dict[str, Any]], None]
P = ParamSpec("P")
log = logging.getLogger("compress")


class StageResult(BaseModel):
    """What a stage hands on to later stages; JSON in the stage's record.

    Unknown keys of a record are left out and missing ones take their defaults, so that records of other versions can be read.
    """

    model_config = ConfigDict(frozen=True, extra="ignore", ser_json_inf_nan="constants")

    files: tuple[str, ...] = ()
    """What the stage wrote, relative to the run's folder; the record keeps their hashes."""
    handoffs: tuple[Handoff, ...] = ()
    skipped: str | None = None
    """Why the stage changed nothing."""
    seconds: float = 0.0
    """Wall time, set by `Run.stage`."""
    peak_rss_bytes: int = 0
    """Of this process while the stage ran, set by `Run.stage`."""


class Skipped(StageResult):
    """A stage that leaves nothing: `skipped` says why. What it would have changed is as the stage before left it."""


R = TypeVar("R", bound=StageResult)


@dataclass
class Run:
    """The execution of one request, and its folder. `open_run` makes it."""

    folder: Path
    request: Request
    notify: Notify
    created: bool = False
    """The folder did not exist before."""
    _redo: bool = False
    _next: int = 0
    """Position in STAGES that the next stage must have or come after."""
    _last_message: str = ""
    _started: dict[str, float] = field(default_factory=dict)

    @property
    def artifacts(self) -> Path:
        return self.folder / "artifacts"

    @property
    def uploads(self) -> Path:
        """Files of the user's, and what was accepted of them."""
        return self.folder / "uploads"

    def stage(self, work: Callable[Concatenate[Run, P], R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Executes the function of a stage, unless an earlier attempt finished it, and returns its result.

        Args:
            work: a function with the name of a stage, one of STAGES, or a partial of it; takes this run and `args`, leaves its
                files in the folder, and returns its result. Its return annotation, a `StageResult` or a union of one with
                `Skipped`, is the type that its record is read as.

        Raises:
            ValueError: a stage that comes before it in STAGES was executed already.
            RunError: memory ran out.
        """
        function: Callable[..., R] = work.func if isinstance(work, functools.partial) else work
        return self._execute(function.__name__, _result_types(function), lambda: work(self, *args, **kwargs))

    def _execute(self, name: str, result_types: tuple[type[R], ...], work: Callable[[], R]) -> R:
        position = STAGES.index(name)
        if position < self._next:
            raise ValueError(f"The stage {name} comes before {STAGES[self._next - 1]}, which is done already.")
        self._next = position + 1
        if not self._redo and (found := _finished(name, self.folder, result_types)) is not None:
            self.progress(name, 1.0, "done in an earlier attempt")
            return found
        self._redo = True
        self.progress(name, 0.0, "started")
        _reset_peak_memory()
        start = time.perf_counter()
        result = within_memory(name, work)
        measured = {"seconds": time.perf_counter() - start, "peak_rss_bytes": _peak_memory_bytes()}
        result = result.model_copy(update=measured)
        record = self.folder / "stages" / f"{name}.json"
        hashes = {file: sha256(self.folder / file) for file in result.files}
        facts = result.model_dump(mode="json")
        write_text(record, signing.sealed(record_kind(name), {"facts": facts, "sha256": hashes}, record))
        self.progress(name, 1.0, result.skipped or f"done in {result.seconds:.1f} s")
        return result

    def progress(self, stage: str, fraction: float, message: str) -> None:
        """One line of events.jsonl: where the run is. `seconds_left` is of this stage, null until it can be told."""
        now = time.monotonic()
        began = self._started.setdefault(stage, now)
        left = (now - began) * (1 - fraction) / fraction if fraction > 0.02 else None
        event = {
            "time": time.time(),
            "stage": stage,
            "index": STAGES.index(stage) + 1,
            "of": len(STAGES),
            "fraction": round(fraction, 4),
            "message": message,
            "seconds_left": None if left is None else round(left, 1),
        }
        self.record(event)
        if message != self._last_message:  # the log is read by people; events.jsonl has every step
            self._last_message = message
            log.info("%s: %s", stage, message)

    def record(self, event: dict[str, Any]) -> None:
        try:
            with (self.folder / "events.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(event) + "\n")
        except OSError as error:
            raise storage_error(self.folder / "events.jsonl", error) from error
        self.notify(event)

    def finish(self, parents: dict[str, str]) -> None:
        """Writes the manifest, last of all, and the event that ends the run.

        Args:
            parents: for an artifact, the file or variant that it was made from.
        """
        write_manifest(self.folder, parents)
        self.record({"time": time.time(), "state": "done"})

    def end(self, error: BaseException) -> None:
        """Records why the run stopped; a folder in which nothing was achieved is removed again."""
        if self.created and not (self.folder / "stages").exists():
            shutil.rmtree(self.folder)
            return
        if isinstance(error, Exception):
            text = (
                str(error)
                if isinstance(error, CompressError)
                else f"A mistake of Espalier ended the run (an unexpected {type(error).__name__}); what the run printed says "
                "where. Please report it; until it is mended, other settings may work."
            )
            ended = {"state": "failed", "error": text}
        else:
            ended = {"state": "cancelled"}
        with contextlib.suppress(StorageError):  # a full disk must not hide the sentence that says so
            self.record({"time": time.time(), **ended})


def open_run(out: Path, request: Request, notify: Notify, *, resume: bool = False) -> Run:
    """Makes the run's folder, or opens it again with `resume`.

    Raises:
        RunError: the folder holds something else, or a run of another request.
        StorageError: it cannot be written.
    """
    created = not out.exists()
    claim(out, request, resume=resume)
    for leftover in out.rglob(f"{PARTIAL}*"):
        leftover.unlink()
    (out / MANIFEST).unlink(missing_ok=True)  # until this attempt is complete, nothing here may pass for a finished run
    write_text(out / "request.json", request.to_json())
    return Run(out, request, notify, created)


def claim(out: Path, request: Request, *, resume: bool) -> None:
    """Makes the folder when there is none, and refuses one that this run may not work in.

    Raises:
        RunError, StorageError: as `open_run`.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        found = {entry.name for entry in out.iterdir()}
    except OSError as error:
        raise storage_error(out, error) from error
    saved = out / "request.json"
    if resume:
        if not saved.exists():
            raise RunError(f"{out} holds no run to resume. Start a new run without --resume.")
        if Request.from_file(saved) != request:
            raise RunError(
                f"{out} holds a run of another request. Choose another folder, or resume it with its own request.json."
            )
    elif strangers := found - MAY_PREEXIST:
        raise RunError(
            f"The output folder {out} is not empty (it holds {sorted(strangers)[0]}). "
            "Choose a new or empty folder, or add --resume."
        )


def _result_types(work: Callable[..., R]) -> tuple[type[R], ...]:
    """The result types in the return annotation of a stage's function."""
    returned = typing.get_type_hints(work)["return"]
    return typing.get_args(returned) if isinstance(returned, types.UnionType) else (returned,)


def _finished(name: str, folder: Path, result_types: tuple[type[R], ...]) -> R | None:
    """What an earlier attempt left of a stage, when record and files are as it left them."""
    record = folder / "stages" / f"{name}.json"
    if not record.is_file():
        return None
    try:
        saved = signing.opened(record_kind(name), record)
        result = _read_result(saved["facts"], result_types)
    except (StorageError, ValidationError) as error:
        log.info("%s is done again: %s", name, error)
        return None
    intact = all(
        (folder / file).is_file() and sha256(folder / file) == digest for file, digest in saved["sha256"].items()
    )
    return result if intact else None


def _read_result(facts: dict[str, Any], result_types: tuple[type[R], ...]) -> R:
    is_skipped = bool(facts.get("skipped")) and any(issubclass(one, Skipped) for one in result_types)
    result_type = next(one for one in result_types if issubclass(one, Skipped) == is_skipped)
    return result_type.model_validate(facts)


def within_memory(stage: str, work: Callable[[], R]) -> R:
    """What the work of a stage returns; raises `RunError` when memory runs out in it."""
    try:
        return work()
    except (MemoryError, RuntimeError) as error:
        if not memory.ran_out(error):
            raise
        raise RunError(
            f"Memory ran out in the stage {stage}. End other programs on this machine and resume the run, or start one with "
            "a smaller model, --input-size or --train-batch-size."
        ) from error


def _reset_peak_memory() -> None:
    """Linux restarts the high-water mark of resident memory; elsewhere the peak is of the whole process so far."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        log.debug("peak memory cannot be reset here; it is reported for the process so far")


def _peak_memory_bytes() -> int:
    try:
        status = Path("/proc/self/status").read_text()
        return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))) * 1024
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
