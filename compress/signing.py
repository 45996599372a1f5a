"""Documents that this installation wrote itself: JSON with an HMAC-SHA256 (RFC 2104) under a key kept elsewhere.

A hash beside a file proves nothing against somebody who can write both. The key lies outside every folder of results:
in the file that ESPALIER_SIGNING_KEY names, else in the user's configuration folder.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import re
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compress.errors import StorageError
from compress.files import PARTIAL, storage_error

KEY_VARIABLE = "ESPALIER_SIGNING_KEY"
KEY_BYTES = 32
SIGNATURE, RUN = "signature", "run"
RUN_ID, RUN_DEPTH = r"[0-9a-f]{32}", 3
"""How the folder of a run of a queue is called, and how far above a document in it that folder is at most."""
ALGORITHM = "HMAC-SHA256"


class ForeignError(StorageError):
    """The document is not signed, or with the key of another installation."""


def key_path(environ: Mapping[str, str] = os.environ) -> Path:
    """Where the key of this installation lies, or will lie."""
    if given := environ.get(KEY_VARIABLE):
        return Path(given).expanduser()
    return Path(environ.get("XDG_CONFIG_HOME") or "~/.config").expanduser() / "espalier" / "signing.key"


def prepare() -> None:
    """Makes the key when there is none, so that a run does not fail at its end. Raises `StorageError`."""
    _key()


def fingerprint() -> str | None:
    """Tells this installation's key from others without telling it; None when there is none yet.

    Raises:
        StorageError: the key cannot be read.
    """
    return _name(_key()) if key_path().exists() else None


def run_of(path: Path) -> str:
    """The id of the run of a queue to whose folder a file belongs; nothing in any other folder, which may be renamed."""
    for way in (path.absolute(), path.resolve()):
        found = [folder.name for folder in way.parents[:RUN_DEPTH] if re.fullmatch(RUN_ID, folder.name)]
        if found:
            return found[0]
    return ""


def sealed(kind: str, document: Mapping[str, Any], path: Path | None = None) -> str:
    """`document` with its signature, as JSON text.

    Args:
        kind: what the document is; one kind does not pass for another.
        path: where it will lie: in the folder of a run of a queue it is signed for this run, and for no other.

    Raises:
        StorageError: the key cannot be read, or made when there is none.
    """
    key = _key()
    document = {**document, RUN: run_of(path) if path is not None else ""}
    signature = {"algorithm": ALGORITHM, "key": _name(key), "value": _value(key, kind, document)}
    return json.dumps({**document, SIGNATURE: signature}, indent=1) + "\n"


def opened(kind: str, path: Path) -> dict[str, Any]:
    """The document in a file that `sealed` wrote on this installation, without its signature.

    Raises:
        StorageError: it cannot be read, was changed, or belongs to another run.
        ForeignError: it was not signed with the key of this installation.
    """
    document = unchecked(path)
    signature = document.pop(SIGNATURE, None)
    key = _key()
    if not isinstance(signature, dict) or signature.get("key") != _name(key):
        raise ForeignError(
            f"{path} was not signed by this installation, so it does not tell who made the files that it lists. If you "
            f"trust where they came from, run `python -m compress adopt` on the folder of the run."
        )
    if not hmac.compare_digest(str(signature.get("value")).encode(), _value(key, kind, document).encode()):
        raise StorageError(f"{path} is damaged (its signature does not fit). The run has to be repeated.")
    run = document.pop(RUN, None)  # documents of earlier versions name none
    if run is not None and run_of(path) not in ("", run):
        raise StorageError(
            f"{path} was written for another run, so the files around it are not of this one. Repeat the run."
        )
    return document


def token(kind: str, name: str) -> str:
    """Proof of having been told by this installation what `kind` says about `name`: 32 hexadecimal digits.

    Raises:
        StorageError: the key cannot be read, or made when there is none.
    """
    return _value(_key(), f"token: {kind}", {"name": name})[:32]


def unchecked(path: Path) -> dict[str, Any]:
    """The document, whoever signed it. Raises `StorageError` when it cannot be read."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(document, dict):
            raise ValueError("it holds no JSON object")
    except (OSError, ValueError) as error:
        raise StorageError(f"{path} is damaged ({error}). The run has to be repeated.") from error
    return document


def _value(key: bytes, kind: str, document: Mapping[str, Any]) -> str:
    text = json.dumps([kind, document], sort_keys=True, separators=(",", ":"))
    return hmac.new(key, text.encode(), hashlib.sha256).hexdigest()


def _name(key: bytes) -> str:
    """Tells keys apart without telling them."""
    return hashlib.sha256(b"espalier key " + key).hexdigest()[:16]


def _key() -> bytes:
    path = key_path()
    try:
        if not path.exists():
            _make(path)
        key = path.read_bytes()
    except OSError as error:
        raise storage_error(path, error) from error
    if len(key) != KEY_BYTES:
        raise StorageError(
            f"The signing key {path} is damaged: it has {len(key)} bytes, not {KEY_BYTES}. Put back a copy of it, or move it "
            "away to begin with a new one, which does not fit what was signed before."
        )
    return key


def _make(path: Path) -> None:
    """A new key; when two processes make one at once, the first one counts for both."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    partial = path.with_name(f"{PARTIAL}{secrets.token_hex(4)}-{path.name}")
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(secrets.token_bytes(KEY_BYTES))
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(partial, path)
        except FileExistsError:
            return
    finally:
        partial.unlink()
