"""Sanitizes the JSON body of a request before Gradio reads it.

Gradio treats every object with `path` and `meta`, at any depth, as a file of its own, and opens, copies or fetches what `path`
names. So no such object reaches it: one that names an upload of the visitor is replaced with the upload's id (a string), and a
body with any other is refused. The body is serialized again from the parsed values, so that no second parser can read it
differently.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from typing import Any

from compress.errors import CompressError

MAX_DEPTH = 24
"""Nesting depth of lists and objects; a config list needs 4."""
MAX_ITEMS = 50_000
FILE_KEYS = ("path", "url", "orig_name", "mime_type", "is_stream", "meta", "_type")
FILE_MARK = "gradio.filedata"
BITS = re.compile(r"\d{1,2}(/\d{1,2})?")
SESSION = re.compile(r"[A-Za-z0-9_-]{1,64}")
NOT_UPLOADED = (
    "This request names a file that you did not upload here: upload it to gradio_api/upload first, and use the id that it "
    "returns."
)


class BodyError(CompressError):
    """The body of a request is refused."""


def sanitized(
    raw: bytes, is_upload: Callable[[str], bool], refuses_session: Callable[[str], bool] = lambda session: False
) -> bytes:
    """The body that Gradio receives.

    Args:
        is_upload: upload id -> whether the visitor uploaded that file.
        refuses_session: session -> whether it has too many pending answers.

    Raises:
        BodyError: the body is not strict JSON, is too deep or too large, or names a file that is not an upload of the visitor.
    """
    if not raw.strip():
        return b""
    body = _read(raw)
    if isinstance(body, dict):
        _refuse_session(body.get("session_hash"), refuses_session)
    try:
        return json.dumps(_Walk(is_upload).of(body), ensure_ascii=False, allow_nan=False).encode()
    except UnicodeEncodeError:
        raise BodyError("The body of this request contains invalid Unicode (half of a surrogate pair).") from None


def _refuse_session(session: Any, refuses: Callable[[str], bool]) -> None:
    if session in (None, ""):
        return
    if not isinstance(session, str) or not SESSION.fullmatch(session):
        raise BodyError("session_hash: expected a string of up to 64 letters, digits, - and _.")
    if refuses(session):
        raise BodyError("This session has too many pending answers: fetch them before you send more requests.")


def _read(raw: bytes) -> Any:
    try:
        return json.loads(
            raw.decode("utf-8"), object_pairs_hook=_object, parse_constant=_no_number, parse_float=_number
        )
    except RecursionError:
        raise BodyError(_too_deep()) from None
    except UnicodeDecodeError:
        raise BodyError("The body of this request is not encoded in UTF-8.") from None
    except ValueError as error:
        where = f" (line {error.lineno}, column {error.colno})" if isinstance(error, json.JSONDecodeError) else ""
        raise BodyError(f"The body of this request is not valid JSON{where}.") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        raise BodyError("An object in the body of this request has the same key twice: use each key once.")
    return values


def _no_number(text: str) -> float:
    raise BodyError(f"The body of this request contains {text}, which is not a finite number.")


def _number(text: str) -> float:
    return number if math.isfinite(number := float(text)) else _no_number(text[:20])


def _too_deep() -> str:
    return f"The body of this request nests lists and objects more than {MAX_DEPTH} levels deep."


class _Walk:
    """Traverses one body and counts its values."""

    def __init__(self, is_upload: Callable[[str], bool]) -> None:
        self._is_upload, self._items = is_upload, 0

    def of(self, value: Any, depth: int = 0) -> Any:
        self._items += 1
        if depth > MAX_DEPTH:
            raise BodyError(_too_deep())
        if self._items > MAX_ITEMS:
            raise BodyError(f"The body of this request contains more than {MAX_ITEMS} values.")
        if isinstance(value, str):
            self._refuse_hidden_file(value, depth)
        elif isinstance(value, dict):
            if _names_file(value):
                return self._upload(value)
            return {key: self.of(item, depth + 1) for key, item in value.items()}
        elif isinstance(value, list):
            return [self.of(item, depth + 1) for item in value]
        return value

    def _upload(self, values: dict[str, Any]) -> str:
        """The id of the upload that the object names, in the form that Gradio's page and `gradio_client` send."""
        path, meta, url = values.get("path"), values.get("meta"), values.get("url")
        known = (
            isinstance(path, str)
            and values.keys() <= {"size", *FILE_KEYS}
            and meta in (None, {"_type": "gradio.FileData"})
            and values.get("_type") is None
            and not values.get("is_stream")
            and (url in (None, "") or (isinstance(url, str) and url.endswith(f"/gradio_api/file={path}")))
            and self._is_upload(path)
        )
        if not known:
            raise BodyError(NOT_UPLOADED)
        return str(path)

    def _refuse_hidden_file(self, text: str, depth: int) -> None:
        """Checks a string that is JSON itself, in case anything parses it."""
        if FILE_MARK in text.lower():
            raise BodyError(NOT_UPLOADED)
        if text.lstrip()[:1] not in ("{", "["):
            return
        try:
            inner = json.loads(text)
        except ValueError:
            return  # not JSON
        except RecursionError:
            raise BodyError(_too_deep()) from None
        _Walk(lambda upload_id: False).of(inner, depth + 1)


def _names_file(value: dict[str, Any]) -> bool:
    """Whether Gradio could treat the object as a file. Sparsities or bits of layers with such names are not files."""
    marks = [value[key] for key in FILE_KEYS if key in value]
    return any(not _is_setting(mark) for mark in marks)


def _is_setting(mark: Any) -> bool:
    return isinstance(mark, int | float) or (isinstance(mark, str) and BITS.fullmatch(mark) is not None)
