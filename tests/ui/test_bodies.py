"""JSON bodies: what names a file is refused, what parsers could read differently is refused, settings pass unchanged."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from compress.ui.web.bodies import NOT_UPLOADED, BodyError, sanitized

MARK = {"_type": "gradio.FileData"}
OWN = "0123456789abcdef" * 2


def is_own(upload_id: str) -> bool:
    return upload_id == OWN


FORMS: tuple[Callable[[str], Any], ...] = (
    lambda path: {"path": path, "meta": MARK},
    lambda path: {"path": path},
    lambda path: {"url": path},
    lambda path: {"path": None, "url": path, "meta": MARK},
    lambda path: {"path": OWN, "url": path, "meta": MARK},
    lambda path: {"path": path, "orig_name": "x.pth", "size": 1, "mime_type": "", "is_stream": False, "meta": MARK},
    lambda path: {"path": OWN, "is_stream": True, "meta": MARK},
    lambda path: {"path": OWN, "meta": {"_type": "gradio.FileData", "more": path}},
    lambda path: {"path": OWN, "meta": MARK, "image": {"path": path}},
    lambda path: {"path": {"path": path, "meta": MARK}, "meta": MARK},
    lambda path: {"meta": MARK, "orig_name": path},
    lambda path: [[{"a": [{"path": path, "meta": MARK}]}]],
    lambda path: json.dumps({"path": path, "meta": MARK}),
    lambda path: json.dumps([json.dumps({"path": path})]),
    lambda path: 'x {"meta": {"_type": "gradio.FileData"}, "path": "' + path + '"}',
)
PATHS = (
    "/etc/passwd", "/proc/self/environ", "/dev/zero", "../queue.sqlite", "%2fetc%2fpasswd", "file:///etc/passwd",
    "http://127.0.0.1:9/x.pth", "https://192.0.2.1/x.pth", "//192.0.2.1/x", "data:text/plain;base64,eA==", "\\\\host\\x", "",
    OWN.upper(), OWN + "\n", OWN[:-1], f"./{OWN}", f"{OWN}/../x", "\x00",
)  # fmt: skip


@pytest.mark.parametrize("form", range(len(FORMS)))
def test_a_body_that_names_a_file_is_refused_wherever_it_does(form: int) -> None:
    for path in PATHS:
        if (form, path) == (4, ""):
            continue  # an empty url is none
        named = FORMS[form](path)
        for body in (
            {"data": ["a", named], "fn_index": 1},
            {"checkpoint_file": named},
            {"data": [], "event_data": named},
            {"data": [{"layer": {"deep": [named]}}]},
            {"jsonrpc": "2.0", "method": "tools/call", "params": {"name": "check", "arguments": {"data_file": named}}},
            [named],
        ):
            with pytest.raises(BodyError) as refused:
                sanitized(json.dumps(body).encode(), is_own)
            assert str(refused.value) == NOT_UPLOADED


def test_an_own_upload_is_passed_on_as_its_id() -> None:
    page = f"http://127.0.0.1:7860/gradio_api/file={OWN}"
    sent = {"path": OWN, "orig_name": "../../x.pth", "url": page, "size": 7, "mime_type": "", "meta": MARK}
    for named in (sent, {"path": OWN}, {"path": OWN, "meta": MARK, "url": None}, {"path": OWN, "is_stream": False}):
        assert json.loads(sanitized(json.dumps({"data": [named, 1]}).encode(), is_own)) == {"data": [OWN, 1]}


@pytest.mark.parametrize(
    ("raw", "told"),
    [
        (b'{"data": [1], "data": [2]}', "has the same key twice"),
        (b'{"data": [{"path": "x", "path": "y"}]}', "has the same key twice"),
        (b'{"data": [NaN]}', "contains NaN, which is not a finite number"),
        (b'{"data": [-Infinity]}', "contains -Infinity, which is not a finite number"),
        (b'{"data": [1e400]}', "contains 1e400, which is not a finite number"),
        (b'{"data": [' + b"1" * 5000 + b"]}", "is not valid JSON"),
        (b'{"data": ["\xff"]}', "is not encoded in UTF-8"),
        (b'{"data": ["\\ud800"]}', "invalid Unicode"),
        (b"[" * 30 + b"]" * 30, "nests lists and objects more than 24 levels deep"),
        (b"[" * 50_000 + b"]" * 50_000, "nests lists and objects more than 24 levels deep"),
        (json.dumps({"data": ["[" * 30 + "]" * 30]}).encode(), "more than 24 levels deep"),
        (b"[" + b"1," * 60_000 + b"1]", "more than 50000 values"),
        (b'{"data": [}', r"is not valid JSON \(line 1, column 11\)"),
        (b'{"data": [], "session_hash": "a/../b"}', "session_hash: expected a string of up to 64 letters"),
        (b'{"data": [], "session_hash": [1]}', "session_hash: expected a string"),
    ],
)  # fmt: skip
def test_what_two_readers_could_understand_differently_is_refused(raw: bytes, told: str) -> None:
    with pytest.raises(BodyError, match=told):
        sanitized(raw, is_own)


def test_settings_pass_as_they_are() -> None:
    honest = {
        "data": [
            {"path": 0.5, "url": 0.25}, {"path": "4/8", "meta": "8"}, [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}],
            '[{"op_types": ["Conv2d"], "sparse_ratio": 0.5}]', '{"job": "", "mine": ["a"], "ticked": []}', "[not JSON", "ü 漢",
            None, True, 10**20, "", "path",
        ],
        "session_hash": "abc", "fn_index": 3, "event_data": None,
    }  # fmt: skip
    assert json.loads(sanitized(json.dumps(honest).encode(), is_own)) == honest
    assert sanitized(b"", is_own) == b""
