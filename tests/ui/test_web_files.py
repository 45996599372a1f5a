"""A visitor names no file of the server: every route, endpoint and event of the page is tried with one that was not uploaded."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr
import httpx
import pytest
from app_server import AppServer
from fastapi import FastAPI
from fastapi.testclient import TestClient
from gradio_client import Client, handle_file
from test_bodies import FORMS, MARK

from compress.errors import RequestError
from compress.jobs import Queue
from compress.ui.backend import Offer
from compress.ui.web.bodies import NOT_UPLOADED
from compress.ui.web.routes import RouteFilter, open_routes
from compress.ui.web.server import build_app
from compress.ui.web.settings import Settings
from compress.ui.web.uploads import Uploads

pytestmark = pytest.mark.integration

CANARY = "canary-7f3a-of-the-server"


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


# ---- uploading ---------------------------------------------------------------------------------------------------


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
