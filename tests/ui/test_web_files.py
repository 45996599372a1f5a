"""A visitor names no file of the server: every route, endpoint and event of the page is tried with one that was not uploaded."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gradio as gr
import httpx
import pytest
from app_server import AppServer
from fastapi import FastAPI
from fastapi.testclient import TestClient
from gradio_client import Client, handle_file

from compress.errors import RequestError
from compress.jobs import Queue
from compress.ui.backend import Offer
from compress.ui.web.bodies import NOT_UPLOADED, BodyError, sanitized
from compress.ui.web.routes import RouteFilter, open_routes
from compress.ui.web.server import build_app
from compress.ui.web.settings import Settings
from compress.ui.web.uploads import MOST_AT_ONCE, NoRoomError, Uploads

pytestmark = pytest.mark.integration

CANARY = "canary-7f3a-of-the-server"
MARK = {"_type": "gradio.FileData"}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AppServer]:
    server = AppServer(
        tmp_path_factory.mktemp("files"), ESPALIER_REQUESTS_PER_MIN="100000", ESPALIER_UPLOADS_PER_HOUR="1000"
    )
    yield server
    server.close()


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    path = tmp_path / "secret.pth"
    path.write_text(CANARY)
    return path


@pytest.fixture
def app(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FastAPI:
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "data" / "gradio"))
    settings = Settings(data=tmp_path / "data", requests_per_min=10**6, mcp=True)
    found = {"possible": True, "text": "", "groups": [], "left_out": [], "runtimes": []}
    return build_app(
        settings,
        Queue(settings.data_dir),
        check=lambda request: found,
        classify=lambda folder, image: {},
        count=lambda structure: {},
        models=[Offer("resnet18", 11_689_512)],
    )


def blocks_of(app: FastAPI) -> gr.Blocks:
    (mounted,) = (route.app for route in app.routes if type(route).__name__ == "Mount")
    return mounted.get_blocks()


def answer_of(server: AppServer, endpoint: str, **data: Any) -> tuple[int, str]:
    begun = httpx.post(f"{server.url}/gradio_api/call/v2/{endpoint}", json=data)
    if begun.status_code != 200:
        return begun.status_code, begun.text
    return 200, httpx.get(f"{server.url}/gradio_api/call/{endpoint}/{begun.json()['event_id']}").text


def upload(server: AppServer, name: str = "mine.pth", content: bytes = b"weights") -> str:
    answer = httpx.post(f"{server.url}/gradio_api/upload", files={"files": (name, content)})
    assert answer.status_code == 200, answer.text
    return answer.json()[0]


def holds(folder: Path, text: str) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and text.encode() in path.read_bytes()]


# ---- which routes are open --------------------------------------------------------------------------------------

OPEN = {
    "GET /healthz", "GET /runs/{job_id}/files/{name:path}", "GET /runs/{job_id}/files.zip", "POST /gradio_api/upload",
    "GET /gradio_api/upload_progress", "GET /", "GET /assets/{path:path}", "GET /static/{path:path}", "GET /svelte/{path:path}",
    "GET /theme.css", "GET /gradio_api/theme.css", "GET /favicon.ico", "GET /robots.txt", "GET /manifest.json",
    "GET /gradio_api/startup-events", "GET /gradio_api/app_id", "GET /gradio_api/heartbeat/{session_hash}", "POST /gradio_api/queue/join",
    "GET /gradio_api/queue/data", "POST /gradio_api/run/{api_name}", "POST /gradio_api/api/{api_name}",
    "POST /gradio_api/cancel", "POST /gradio_api/reset", "GET /config", "GET /gradio_api/info", "GET /gradio_api/openapi.json",
    "POST /gradio_api/call/v2/{api_name}", "POST /gradio_api/call/{api_name}", "GET /gradio_api/call/{api_name}/{event_id}",
    "GET /gradio_api/call/v2/{api_name}/{event_id}", "GET /gradio_api/mcp/schema", "ANY /gradio_api/mcp",
}  # fmt: skip
"""Each was looked at: none of them reads, copies or gives out a file that a visitor names, or fetches an address."""
CLOSED = {
    "GET /openapi.json", "POST /login", "GET /logout", "GET /gradio_api/deep_link", "GET /pwa_icon", "GET /pwa_icon/{size}",
    "GET /monitoring", "GET /monitoring/summary", "GET /monitoring/{key}", "GET /gradio_api/user", "GET /gradio_api/login_check",
    "GET /gradio_api/token", "GET /gradio_api/dev/reload", "GET /gradio_api/runs",
    "GET /gradio_api/custom_component/{id}/{environment}/{type}/{file_name}", "GET /gradio_api/proxy={url_path:path}",
    "GET /gradio_api/file={path_or_url:path}", "GET /gradio_api/file/{path:path}", "POST /gradio_api/stream/{event_id}",
    "POST /gradio_api/stream/{event_id}/close", "GET /gradio_api/stream/{session_hash}/{run}/{component_id}/playlist.m3u8",
    "GET /gradio_api/stream/{session_hash}/{run}/{component_id}/{segment_id}.{ext}",
    "GET /gradio_api/stream/{session_hash}/{run}/{component_id}/playlist-file", "POST /gradio_api/component_server",
    "GET /gradio_api/queue/status", "POST /gradio_api/process_recording", "POST /gradio_api/vibe-edit",
    "POST /gradio_api/undo-vibe-edit", "GET /gradio_api/vibe-code", "POST /gradio_api/vibe-code",
    "POST /gradio_api/vibe-starter-queries", "GET /gradio_api/mcp/sse", "ANY /gradio_api/mcp/messages",
}  # fmt: skip
"""Of Gradio, and not needed here."""


def every_route(routes: list[Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """(method, path) of all routes, those of mounted apps and included routers too."""
    for route in routes:
        if (router := getattr(route, "original_router", None)) is not None:
            yield from every_route(router.routes, prefix)
        elif hasattr(route, "app") and hasattr(route.app, "routes"):
            yield from every_route(route.app.routes, prefix + route.path.rstrip("/"))
        else:
            for method in set(getattr(route, "methods", None) or {"ANY"}) - {"HEAD"}:
                yield method, (prefix + route.path).rstrip("/") or "/"


def passes(method: str, path: str) -> bool:
    sample = re.sub(r"\{[a-z_]+(:path)?\}", "x1", path)
    methods = ("GET", "POST") if method == "ANY" else (method,)
    return all(
        any(one in route.methods and re.fullmatch(route.path, sample) for route in open_routes(mcp=True))
        for one in methods
    )


def test_every_route_of_the_app_is_in_the_table_and_is_open_or_closed_as_it_says(app: FastAPI) -> None:
    found = set(every_route(list(app.routes)))
    named = {f"{method} {path}" for method, path in found}
    assert named - OPEN - CLOSED == set(), "a new route: look at what it does, then put it into one of the tables"
    assert (OPEN | CLOSED) - named == set(), "gone from Gradio"
    assert {f"{method} {path}" for method, path in found if passes(method, path)} == OPEN


def test_closed_routes_give_nothing_out(server: AppServer, secret: Path) -> None:
    with httpx.Client(base_url=server.url) as client:
        for told in sorted(CLOSED):
            method, path = told.replace("ANY", "POST").split(" ", 1)
            for value in (str(secret).lstrip("/"), "x1"):
                answer = client.request(method, re.sub(r"\{[a-z_]+(:path)?\}", value, path), follow_redirects=False)
                assert answer.status_code in (403, 404, 405), told
                assert CANARY not in answer.text
        for path in (
            "/config?deep_link=x", "/?deep_link=x", "/config?%64eep_link=x", "/?a=b&deep_link=", "/gradio_api/file%3D/etc/passwd",
            "/gradio_api%2ffile=/etc/passwd", "/GRADIO_API/file=/etc/passwd", "//gradio_api/file=/etc/passwd",
            "/gradio_api/./file=/etc/passwd", "/assets/../../../../etc/passwd", "/assets/%2e%2e/%2e%2e/etc/passwd",
            "/static/..%2f..%2fetc/passwd", "/gradio_api/mcp/", "/gradio_api/file=",
        ):  # fmt: skip
            assert client.get(path).status_code in (404, 405), path


# ---- bodies -------------------------------------------------------------------------------------------------------

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
        (json.dumps({"data": ["[" * 30 + "]" * 30]}).encode(), "more than 24 lists or objects"),
        (b"[" + b"1," * 60_000 + b"1]", "more than 50000 values"),
        (b'{"data": [}', r"is not valid JSON \(line 1, column 11\)"),
        (b'{"data": [], "session_hash": "a/../b"}', "session_hash: expected a string of up to 64 letters"),
        (b'{"data": [], "session_hash": [1]}', "session_hash: expected a text"),
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


# ---- over sockets ---------------------------------------------------------------------------------------------------


def test_no_endpoint_or_event_takes_a_file_that_was_not_uploaded(server: AppServer, secret: Path) -> None:
    config = httpx.get(f"{server.url}/config").json()
    assert len(config["dependencies"]) > 50
    with httpx.Client(base_url=server.url) as client:
        for event in config["dependencies"]:
            named = FORMS[event["id"] % len(FORMS)](str(secret))  # each form at many events, and at any position
            for data in ([named] * max(1, len(event["inputs"])), [None] * (len(event["inputs"]) - 1) + [named]):
                body = {"data": data, "fn_index": event["id"], "session_hash": "s", "trigger_id": None}
                for route in ("run/predict", "queue/join"):
                    answer = client.post(f"/gradio_api/{route}", json=body)
                    assert (answer.status_code, answer.json()["detail"]) == (400, NOT_UPLOADED)
        for endpoint in ("submit", "check", "status", "cancel", "resume", "list", "artifact"):
            for number, route in enumerate(("call/{}", "run/{}", "api/{}/", "call/v2/{}")):
                for form in FORMS[number::2]:
                    for body in ({"data": [form(str(secret))]}, {"checkpoint_file": form(str(secret))}):
                        answer = client.post(f"/gradio_api/{route.format(endpoint)}", json=body)
                        assert (answer.status_code, answer.json()["error"]) == (400, NOT_UPLOADED)
    assert holds(server.data, CANARY) == []


@pytest.mark.parametrize("given", ["/etc/passwd", "http://127.0.0.1:9/x.pth", "../x.pth", "f" * 32, 5, 0.5, True, [1]])
def test_a_text_in_place_of_an_upload_is_no_path(server: AppServer, given: Any) -> None:
    for field in ("checkpoint_file", "data_file", "class_map_file"):
        for endpoint in ("submit", "check"):
            status, answer = answer_of(server, endpoint, **{field: given})
            assert status == 400 or "a file that was uploaded here: upload it again" in answer, answer


def test_an_upload_serves_its_own_visitor_in_every_way(server: AppServer, tmp_path: Path) -> None:
    mine = upload(server)
    for given in (mine, {"path": mine}, {"path": mine, "meta": MARK}):
        assert '"state": "queued"' in answer_of(server, "submit", checkpoint_file=given)[1]
    assert '"possible": true' in answer_of(server, "check", checkpoint_file=mine)[1]
    (tmp_path / "sent.pth").write_bytes(b"sent weights")
    client = Client(server.url, verbose=False)
    job = client.predict(checkpoint_file=handle_file(str(tmp_path / "sent.pth")), api_name="/submit")
    (taken,) = (server.data / "runs" / job["job_id"] / "uploads").rglob("*.pth")
    assert (taken.name, taken.read_bytes()) == ("sent.pth", b"sent weights")
    assert httpx.get(f"{server.url}/gradio_api/file={mine}").status_code == 404, "nobody gets it back"
    assert client.predict(checkpoint_file=handle_file(str(tmp_path / "sent.pth")), api_name="/check")["possible"]


def test_the_server_makes_no_connection_for_a_path(server: AppServer) -> None:
    import socket

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        listener.settimeout(0.5)
        address = f"http://127.0.0.1:{listener.getsockname()[1]}/x.pth"
        for form in FORMS:
            assert answer_of(server, "submit", checkpoint_file=form(address))[0] == 400
        assert "a file that was uploaded here" in answer_of(server, "submit", checkpoint_file=address)[1]
        with pytest.raises(TimeoutError):
            listener.accept()


# ---- each wall alone --------------------------------------------------------------------------------------------------


def test_without_the_door_gradio_itself_takes_no_path(app: FastAPI, secret: Path, tmp_path: Path) -> None:
    """The second wall: `has_launched`, and fields whose handlers look ids up instead of opening paths."""
    app.user_middleware[:] = [item for item in app.user_middleware if item.cls is not RouteFilter]
    named = {"path": str(secret), "meta": MARK}
    with TestClient(app, base_url="http://127.0.0.1", raise_server_exceptions=False) as client:
        for event in blocks_of(app).fns.values():
            body = {"data": [named] * len(event.inputs), "fn_index": event._id, "session_hash": "s"}
            answer = client.post("/gradio_api/run/predict", json=body)
            assert CANARY not in answer.text
        link = client.get("/gradio_api/deep_link?session_hash=s").json()
        assert CANARY not in client.get(f"/config?deep_link={link}").text
        for path in (secret, *(tmp_path / "data").rglob("*")):
            assert CANARY not in client.get(f"/gradio_api/file={path}").text
    assert holds(tmp_path / "data", CANARY) == []


def test_without_gradios_wall_the_door_holds(app: FastAPI, secret: Path, tmp_path: Path) -> None:
    blocks_of(app).has_launched = False
    with TestClient(app, base_url="http://127.0.0.1", raise_server_exceptions=False) as client:
        for event in blocks_of(app).fns.values():
            body = {"data": [{"path": str(secret), "meta": MARK}], "fn_index": event._id, "session_hash": "s"}
            assert client.post("/gradio_api/run/predict", json=body).status_code == 400
        assert client.get("/gradio_api/deep_link?session_hash=s").status_code == 404
    assert holds(tmp_path / "data", CANARY) == []


def test_without_both_handlers_find_no_upload_under_a_path(tmp_path: Path, secret: Path) -> None:
    uploads = Uploads(tmp_path / "in", most_bytes=100, most_bytes_in_all=100, age_s=60, floor_bytes=0)
    uploads.open()
    for given in (str(secret), secret.name, "../secret.pth", "", None, 5, ["x"], {"path": str(secret)}):
        with pytest.raises(RequestError, match="expected a file that was uploaded here: upload it again"):
            uploads.find(given, "")


# ---- the uploads themselves ---------------------------------------------------------------------------------------


@pytest.fixture
def clock() -> list[float]:
    return [1000.0]


@pytest.fixture
def uploads(tmp_path: Path, clock: list[float]) -> Iterator[Uploads]:
    uploads = Uploads(
        tmp_path / "in", most_bytes=100, most_bytes_in_all=250, age_s=3600, floor_bytes=0, clock=lambda: clock[0]
    )
    uploads.open()
    yield uploads
    uploads.close()


def sent(uploads: Uploads, visitor: str = "a", content: bytes = b"w" * 40, name: str = "x.pth") -> str:
    upload = uploads.begin(visitor, name)
    try:
        uploads.write(upload, content)
        uploads.finish(upload)
    except NoRoomError:
        uploads.remove(upload)
        raise
    return upload.id


def test_an_upload_is_found_by_who_sent_it_alone(uploads: Uploads) -> None:
    mine = sent(uploads, "a")
    assert uploads.find(mine, "a").read_bytes() == b"w" * 40 and uploads.has(mine, "a")
    for visitor in ("b", "", "A"):
        assert not uploads.has(mine, visitor)
        with pytest.raises(RequestError, match="a file that was uploaded here"):
            uploads.find(mine, visitor)
    half = uploads.begin("a", "y.pth")
    assert not uploads.has(half.id, "a"), "not before it is whole"


def test_uploads_keep_nothing_of_a_name_but_its_end(uploads: Uploads, tmp_path: Path) -> None:
    for name in (
        "../../../evil.pth",
        "/etc/evil.pth",
        "..\\evil.pth",
        "...pth",
        "\x7f\x1b\n\u202e.pth",
        "n" * 300 + ".pth",
    ):
        path = uploads.find(sent(uploads, "a", b"w", name), "a")
        assert path.resolve().is_relative_to(tmp_path / "in") and re.fullmatch(r"[A-Za-z0-9_][\w.-]*", path.name), name
    for name in ("x.engine", "x.onnx", "x.html", "x.svg", "x", "x.pth.exe", "pth"):
        with pytest.raises(RequestError, match=r"expected one that ends in \.safetensors, \.pth, "):
            uploads.begin("a", name)


def test_each_visitor_and_all_together_have_a_quota(uploads: Uploads, clock: list[float]) -> None:
    first = sent(uploads, "a")
    sent(uploads, "a")
    with pytest.raises(NoRoomError, match="Your uploads would exceed"):
        sent(uploads, "a")
    sent(uploads, "b", b"w" * 100)
    with pytest.raises(NoRoomError, match="The uploads of all visitors have reached the limit"):
        sent(uploads, "c", b"w" * 71)
    clock[0] += 1000
    uploads.refuse_announced("a", 40)
    assert not uploads.has(first, "a"), "the oldest of the same visitor makes room once it is not young any more"
    sent(uploads, "a")
    clock[0] += 3601
    uploads.expire()
    assert not uploads.has(sent(uploads, "b"), "a") and len(uploads._uploads) == 1


def test_uploads_under_way_are_few_and_leave_the_disk_room(tmp_path: Path) -> None:
    free = [1000]
    uploads = Uploads(
        tmp_path / "in",
        most_bytes=500,
        most_bytes_in_all=500,
        age_s=60,
        floor_bytes=900,
        free_bytes=lambda folder: free[0],
    )
    uploads.open()
    with pytest.raises(NoRoomError, match="The disk of this server is nearly full"):
        uploads.refuse_announced("a", 200)
    for _ in range(MOST_AT_ONCE):
        begun = uploads.begin("a", "x.pth")
    with pytest.raises(NoRoomError, match="files of yours are being uploaded already"):
        uploads.begin("a", "x.pth")
    free[0] = 950
    with pytest.raises(NoRoomError, match="The disk of this server is nearly full"):
        uploads.write(begun, b"w" * 60)
    uploads.close()
    assert list((tmp_path / "in").iterdir()) == []


def test_what_servers_left_is_removed_at_the_next_start_and_what_lives_is_not(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    dead = Uploads(folder, most_bytes=100, most_bytes_in_all=100, age_s=60, floor_bytes=0)
    dead.open()
    left = sent(dead)
    os.close(dead._held)  # as if it was killed
    (folder / "tmp1234").write_bytes(b"of a version before")
    alive = Uploads(folder, most_bytes=100, most_bytes_in_all=100, age_s=60, floor_bytes=0)
    alive.open()
    mine = sent(alive)
    third = Uploads(folder, most_bytes=100, most_bytes_in_all=100, age_s=60, floor_bytes=0)
    third.open()
    assert alive.find(mine, "a").is_file() and not dead._uploads[left].path.exists()
    assert {path.name for path in folder.iterdir()} == {alive._own.name, third._own.name}


FORM = {"content-type": "multipart/form-data; boundary=b"}


@pytest.mark.parametrize(
    ("headers", "body"),
    [
        ({}, b"x"),
        ({"content-type": "application/json"}, b"[]"),
        ({"content-type": "multipart/form-data"}, b"x"),
        (FORM, b"no form"),
        (FORM, b'--b\r\nContent-Disposition: form-data; name="files"\r\n\r\nx\r\n--b--\r\n'),
        (FORM, b'--b\r\nContent-Disposition: form-data; name="f"; filename="x.pth"\r\n\r\nx\r\n--b--\r\n'),
        (FORM, b'--b\r\nContent-Disposition: form-data; name="files"; filename="x.pth"\r\n\r\nx'),
    ],
)  # fmt: skip
def test_what_is_no_form_of_files_is_refused_and_leaves_nothing(server: AppServer, headers: dict, body: bytes) -> None:
    before = {path for path in (server.data / "incoming").rglob("*") if path.is_file()}
    answer = httpx.post(f"{server.url}/gradio_api/upload", content=body, headers=headers)
    assert (answer.status_code, "Send uploads as multipart/form-data" in answer.text) == (400, True), answer.text
    assert {path for path in (server.data / "incoming").rglob("*") if path.is_file()} == before


def test_a_full_disk_ends_an_upload_with_a_sentence_and_leaves_nothing(
    app: FastAPI, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, fails = Uploads.begin, ["write"]

    def begin(self: Uploads, visitor: str, name: str) -> Any:
        upload = begun(self, visitor, name)
        upload.file = _Full(upload.file, fails[0])
        return upload

    monkeypatch.setattr(Uploads, "begin", begin)
    with TestClient(app, base_url="http://127.0.0.1") as client:
        for fails[0] in ("write", "finish"):
            answer = client.post("/gradio_api/upload", files={"files": ("x.pth", b"w" * 100)})
            assert answer.status_code == 507
            assert "could not be stored on this server (No space left on device): try again later." in answer.text
            assert [path.name for path in (tmp_path / "data" / "incoming").rglob("*.pth")] == []


class _Full:
    """A file on a disk that is full when something is written, or only when the file is closed."""

    def __init__(self, file: Any, when: str) -> None:
        self._file, self._when = file, when

    def write(self, data: bytes) -> None:
        if self._when == "write":
            raise OSError(28, "No space left on device")

    def close(self) -> None:
        self._file.close()
        if self._when == "finish":
            raise OSError(28, "No space left on device")


def test_the_page_is_told_how_far_an_upload_is(server: AppServer) -> None:
    answer = httpx.get(f"{server.url}/gradio_api/upload_progress?upload_id=nobody", timeout=10)
    assert answer.text == 'data: {"msg": "done"}\n\n'


def test_uploads_end_with_their_server(tmp_path: Path) -> None:
    server = AppServer(tmp_path)
    try:
        upload(server)
        assert list((tmp_path / "incoming").rglob("*.pth"))
        server.process.terminate()
        server.process.wait(20)
        assert list((tmp_path / "incoming").iterdir()) == []
    finally:
        server.close()
