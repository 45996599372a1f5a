"""A run's folder: its stages, its progress, its manifest.

    request.json  events.jsonl  log.txt  stages/<name>.json  artifacts/...
    report.json  report.html  README.md  manifest.json

A stage is done when its record exists and every file it names still has the recorded hash; otherwise the stage and
all later ones are carried out again. manifest.json is written last, so its presence means that the run is complete.
Records and manifest are signed (see `compress.signing`): what was changed outside of a run does not count.
"""

from __future__ import annotations

import contextlib
import json
import logging
import resource
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from compress import memory, signing
from compress.errors import CompressError, RunError, StorageError
from compress.files import PARTIAL, sha256, storage_error, write_text
from compress.request import Request

STAGES = ("baseline", "prune", "finetune", "quantize", "export", "build", "measure", "report")
MANIFEST = "manifest.json"
MAY_PREEXIST = {"request.json", "uploads", "events.jsonl", "log.txt"}
"""What a queue leaves in the folder before the run starts."""

Notify = Callable[[dict[str, Any]], None]
log = logging.getLogger("compress")


@dataclass
class Run:
    """One request being carried out, and its folder. `open_run` makes it."""

    folder: Path
    request: Request
    notify: Notify
    created: bool = False
    """The folder did not exist before."""
    _redo: bool = False
    _last_message: str = ""
    _started: dict[str, float] = field(default_factory=dict)

    @property
    def artifacts(self) -> Path:
        return self.folder / "artifacts"

    @property
    def uploads(self) -> Path:
        """Files of the user's, and what was accepted of them."""
        return self.folder / "uploads"

    def stage(self, name: str, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Carries out `work` unless an earlier attempt finished it; returns its facts (JSON-safe).

        `work` leaves its models and files in the folder and returns what the report needs. Facts may hold `files`,
        paths relative to the folder, which are hashed; a fact `skipped` gives the reason why nothing was done.
        """
        record = self.folder / "stages" / f"{name}.json"
        if not self._redo and (facts := _finished_facts(name, self.folder)) is not None:
            self.progress(name, 1.0, "done in an earlier attempt")
            return facts
        self._redo = True
        self.progress(name, 0.0, "started")
        _reset_peak_memory()
        start = time.perf_counter()
        facts = within_memory(name, work)
        facts |= {"seconds": time.perf_counter() - start, "peak_rss_bytes": _peak_memory_bytes()}
        hashes = {file: sha256(self.folder / file) for file in facts.get("files", ())}
        write_text(record, signing.sealed(_record_kind(name), {"facts": facts, "sha256": hashes}, record))
        self.progress(name, 1.0, facts.get("skipped") or f"done in {facts['seconds']:.1f} s")
        return facts

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

    def facts(self, name: str) -> dict[str, Any]:
        """What a finished stage left for the report."""
        return signing.opened(_record_kind(name), self.folder / "stages" / f"{name}.json")["facts"]

    def finish(self) -> None:
        """Writes the manifest, last of all, and the event that ends the run."""
        self._write_manifest(self.facts("report")["parents"])
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

    def _write_manifest(self, parents: dict[str, str]) -> None:
        """Hashes every file of the run; `parents` names, for an artifact, the file or variant that it was made from."""
        files = {
            str(path.relative_to(self.folder)): {"sha256": sha256(path), "bytes": path.stat().st_size}
            for path in sorted(self.folder.rglob("*"))
            if path.is_file() and _belongs_to_manifest(path.relative_to(self.folder))
        }
        for name, parent in parents.items():
            if name in files:
                files[name]["parent"] = parent
        _seal(self.folder, {"format": 1, "files": files})


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


def verify(folder: Path) -> list[str]:
    """Everything about a finished run that no longer holds; empty when it verifies.

    Raises:
        RunError: there is no finished run in the folder.
        StorageError: its manifest is damaged.
    """
    _require_finished(folder)
    try:
        listed, problems = manifest(folder), []
    except signing.ForeignError as error:
        listed, problems = _files(folder, signing.unchecked(folder / MANIFEST)), [str(error)]
    problems += _changed(folder, listed)
    found = {
        str(p.relative_to(folder))
        for p in folder.rglob("*")
        if p.is_file() and _belongs_to_manifest(p.relative_to(folder))
    }
    return problems + [f"{name} is not listed in the manifest" for name in sorted(found - set(listed))]


def adopt(folder: Path) -> None:
    """Signs the manifest of a run from another installation, because the user trusts where it came from.

    Raises:
        RunError: there is no finished run in the folder.
        StorageError: a file is not the one that the manifest lists, or the manifest is damaged.
    """
    _require_finished(folder)
    document = signing.unchecked(folder / MANIFEST)
    document.pop(signing.SIGNATURE, None)
    if problems := _changed(folder, _files(folder, document)):
        raise StorageError(f"{problems[0]}, so this run was not adopted. Copy its folder again.")
    _seal(folder, document)


def require_unchanged(folder: Path, names: list[str]) -> None:
    """Compares files of a finished run with its manifest, whoever signed it; for files that are data, not programs.

    Raises:
        StorageError: one is missing, changed or not listed.
    """
    try:
        listed = manifest(folder)
    except signing.ForeignError:
        listed = _files(folder, signing.unchecked(folder / MANIFEST))
    for name in names:
        if problems := _changed(folder, {name: listed.get(name, {"sha256": None})}):
            raise StorageError(f"{problems[0]}: restore it, or compress the model again.")


def _require_finished(folder: Path) -> None:
    if not (folder / MANIFEST).is_file():
        raise RunError(
            f"{folder} holds no finished run: {MANIFEST} is missing. Give the folder that `compress run` printed."
        )


def _changed(folder: Path, listed: dict[str, dict[str, Any]]) -> list[str]:
    problems = []
    for name, facts in listed.items():
        path = folder / name
        if not path.is_file():
            problems.append(f"{name} is missing")
        elif sha256(path) != facts["sha256"]:
            problems.append(f"{name} was changed after the run: its sha256 differs from the manifest")
    return problems


def manifest(folder: Path) -> dict[str, dict[str, Any]]:
    """The files that a finished run lists, by name: sha256, bytes, and parent where it has one.

    Raises:
        StorageError: the manifest is missing, damaged, or not signed by this installation.
    """
    return _files(folder, signing.opened(MANIFEST, folder / MANIFEST))


def _files(folder: Path, document: dict[str, Any]) -> dict[str, dict[str, Any]]:
    try:
        return {str(name): {"sha256": facts["sha256"], **facts} for name, facts in document["files"].items()}
    except (KeyError, TypeError, AttributeError) as error:
        raise StorageError(f"{folder / MANIFEST} is damaged ({error!r}). The run has to be repeated.") from error


def manifest_sha256(path: Path) -> str | None:
    """The hash that the manifest of the finished run around `path` lists for it; None when there is none.

    Raises:
        StorageError: the manifest is damaged, or not signed by this installation.
    """
    folder = _folder_with(path, MANIFEST)
    return folder and manifest(folder).get(str(path.resolve().relative_to(folder)), {}).get("sha256")


def recorded_sha256(path: Path) -> str | None:
    """The same, and for a run under way the hash in the record of the stage that made the file."""
    if recorded := manifest_sha256(path):
        return recorded
    if (folder := _folder_with(path, "stages/build.json")) is None:
        return None
    record = signing.opened(_record_kind("build"), folder / "stages" / "build.json")
    return record["sha256"].get(str(path.resolve().relative_to(folder)))


def add_to_manifest(paths: list[Path], parent: Path) -> None:
    """Lists new files, made from `parent`, in the manifest of the finished run that holds `parent`."""
    folder = _folder_with(parent, MANIFEST)
    if folder is None:
        raise RunError(f"{parent} belongs to no finished run: no {MANIFEST} lies above it.")
    name = str(parent.resolve().relative_to(folder))
    new = {
        str(path.resolve().relative_to(folder)): {
            "sha256": sha256(path),
            "bytes": path.stat().st_size,
            "parent": name,
        }
        for path in paths
    }
    files = dict(sorted((manifest(folder) | new).items()))
    _seal(folder, {"format": 1, "files": files})


def _seal(folder: Path, document: dict[str, Any]) -> None:
    write_text(folder / MANIFEST, signing.sealed(MANIFEST, document, folder / MANIFEST))


def _folder_with(path: Path, name: str) -> Path | None:
    """The nearest folder above `path` that holds `name`."""
    return next((folder for folder in path.resolve().parents if (folder / name).is_file()), None)


def _belongs_to_manifest(relative: Path) -> bool:
    """Uploads, progress and stage records are the run's workings, not its result."""
    return relative.parts[0] not in {
        "uploads",
        "stages",
        "events.jsonl",
        "log.txt",
        MANIFEST,
    } and not relative.name.startswith(PARTIAL)


def _finished_facts(name: str, folder: Path) -> dict[str, Any] | None:
    """What an earlier attempt left of a stage, when record and files are as it left them."""
    record = folder / "stages" / f"{name}.json"
    if not record.is_file():
        return None
    try:
        saved = signing.opened(_record_kind(name), record)
    except StorageError as error:
        log.info("%s is done again: %s", name, error)
        return None
    intact = all(
        (folder / file).is_file() and sha256(folder / file) == digest for file, digest in saved["sha256"].items()
    )
    return saved["facts"] if intact else None


def within_memory(stage: str, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
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


def _record_kind(stage: str) -> str:
    return f"stage {stage}"


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
