"""The manifest of a finished run: every file with its hash, signed, and what no longer agrees with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from compress import signing
from compress.errors import RunError, StorageError
from compress.files import PARTIAL, sha256, write_text

MANIFEST = "manifest.json"


def record_kind(stage: str) -> str:
    """What the record of a stage is signed as."""
    return f"stage {stage}"


def write_manifest(folder: Path, parents: dict[str, str]) -> None:
    """Hashes every file of the run.

    Args:
        parents: for an artifact, the file or variant that it was made from.
    """
    files = {
        str(path.relative_to(folder)): {"sha256": sha256(path), "bytes": path.stat().st_size}
        for path in sorted(folder.rglob("*"))
        if path.is_file() and _belongs_to_manifest(path.relative_to(folder))
    }
    for name, parent in parents.items():
        if name in files:
            files[name]["parent"] = parent
    _seal(folder, {"format": 1, "files": files})


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
    if (folder := _folder_with(path, MANIFEST)) is None:
        return None
    sha: str | None = manifest(folder).get(str(path.resolve().relative_to(folder)), {}).get("sha256")
    return sha


def recorded_sha256(path: Path) -> str | None:
    """The same, and for a run under way the hash in the record of the stage that made the file."""
    if recorded := manifest_sha256(path):
        return recorded
    if (folder := _folder_with(path, "stages/build.json")) is None:
        return None
    record = signing.opened(record_kind("build"), folder / "stages" / "build.json")
    sha: str | None = record["sha256"].get(str(path.resolve().relative_to(folder)))
    return sha


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
