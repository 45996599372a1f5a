"""What a stranger may try against the web app, over real sockets."""

from __future__ import annotations

import json
import re
import secrets
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from app_server import AppServer
from queues import QUICK, wait

from compress import signing
from compress.checkpoints import reader
from compress.data import archives
from compress.errors import CheckpointError, DataError
from compress.jobs import Queue
from compress.report import Report, card
from compress.report.tables import tables
from compress.request import Request
from compress.ui import views
from compress.ui.views import results
from compress.ui.web.limits import Rate

pytestmark = pytest.mark.integration

CANARY = "hf_canaryCANARYcanary0123456789"
MIB = 2**20


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AppServer]:
    server = AppServer(
        tmp_path_factory.mktemp("attacked"),
        ESPALIER_MAX_UPLOAD_MB="2",
        ESPALIER_UPLOADS_PER_HOUR="40",
        ESPALIER_REQUESTS_PER_MIN="100000",
        ESPALIER_LIST_RUNS="0",
        HF_TOKEN=CANARY,
    )
    yield server
    server.close()


@pytest.fixture(scope="module")
def job_id(server: AppServer) -> str:
    queue = Queue(server.data)
    job_id = queue.submit(Request(**QUICK))
    wait(queue, job_id, "done")
    return job_id


def call(server: AppServer, endpoint: str, **data: Any) -> str:
    """The server-sent events of an endpoint's answer."""
    begun = httpx.post(f"{server.url}/gradio_api/call/v2/{endpoint}", json=data)
    if begun.status_code == 400:  # refused before Gradio saw it
        return begun.text
    return httpx.get(f"{server.url}/gradio_api/call/{endpoint}/{begun.json()['event_id']}").text


def stored(server: AppServer) -> set[str]:
    return {str(path) for path in (server.data / "incoming").rglob("*") if path.is_file()}


def until(holds: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def test_a_thousand_guessed_ids_find_nothing(server: AppServer, job_id: str) -> None:
    with httpx.Client(base_url=server.url) as client:
        for _ in range(1000):
            guess = secrets.token_hex(16)
            assert client.get(f"/runs/{guess}/files/report.json").status_code == 404
        near = [
            job_id[:-1],
            job_id.upper(),
            job_id + "0",
            job_id[:-1] + "g",
            f"{job_id}%00",
            f"x/../{job_id}x",
            "*",
            "%25",
        ]
        for guess in near:
            assert client.get(f"/runs/{guess}/files/report.json").status_code == 404, guess
    assert "does not list runs" in call(server, "list")
    for endpoint in ("status", "cancel", "resume"):
        assert "There is no run with the id" in call(server, endpoint, job_id=secrets.token_hex(16))


PATHS = (
    "../request.json", "..%2f..%2fqueue.sqlite", "%2e%2e/%2e%2e/queue.sqlite", "....//....//queue.sqlite", "..\\..\\queue.sqlite",
    "/etc/passwd", "//etc/passwd", "%2fetc%2fpasswd", "artifacts/../../../queue.sqlite", "report.json%00.txt", "log.txt",
    "events.jsonl", "uploads", "stages/report.json", "manifest.json/", "C:%5Cwindows%5Cwin.ini", "file:///etc/passwd",
)  # fmt: skip


@pytest.mark.parametrize("path", PATHS)
def test_paths_lead_nowhere(server: AppServer, job_id: str, path: str) -> None:
    assert httpx.get(f"{server.url}/runs/{job_id}/files/{path}").status_code in (403, 404)


def test_gradios_own_file_route_gives_out_none_of_the_servers_files(server: AppServer, job_id: str) -> None:
    key = signing.key_path()
    assert key.is_file()
    for path in (
        "/etc/passwd", "/proc/self/environ", key, server.data / "queue.sqlite", server.data / "server.txt",
        server.data / "runs" / job_id / "report.json", server.data / "consoles" / f"{job_id}.txt",
        f"{server.data}/incoming/../queue.sqlite", f"{server.data}/RUNS/../queue.sqlite", "http://127.0.0.1:22/",
        "http://169.254.169.254/latest/meta-data/", "file:///etc/passwd",
    ):  # fmt: skip
        for route in ("file=", "file/"):
            answer = httpx.get(f"{server.url}/gradio_api/{route}{path}", follow_redirects=False)
            assert answer.status_code in (400, 403, 404), (route, path, answer.status_code)


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1:22/x.pth", "http://[::1]/x.pth", "http://169.254.169.254/latest", "http://localhost/x",
        "http://0x7f000001/x", "file:///etc/passwd", "ftp://127.0.0.1/x", "gopher://127.0.0.1/x",
    ],
)  # fmt: skip
def test_the_server_fetches_nothing_for_a_visitor(server: AppServer, url: str) -> None:
    for upload in ({"path": url}, {"path": url, "url": url, "meta": {"_type": "gradio.FileData"}}):
        answer = call(server, "submit", checkpoint_file=upload)
        assert "error" in answer and "job_id" not in answer
    assert "error" in call(server, "submit", checkpoint=url)
    assert httpx.get(f"{server.url}/gradio_api/proxy={url}").status_code in (400, 403, 404)


def test_a_page_of_another_site_changes_nothing(server: AppServer) -> None:
    before = len(Queue(server.data).list())
    for route in (
        "/gradio_api/call/v2/submit",
        "/gradio_api/queue/join",
        "/gradio_api/run/predict",
        "/gradio_api/upload",
    ):
        for site in ("cross-site", "same-site"):
            headers = {"sec-fetch-site": site, "origin": "https://evil.example"}
            assert httpx.post(server.url + route, json={}, headers=headers).status_code == 403
    for origin in ("https://evil.example", "null"):
        asked = {"origin": origin, "access-control-request-method": "POST"}
        answer = httpx.options(f"{server.url}/gradio_api/call/v2/submit", headers=asked)
        assert answer.headers.get("access-control-allow-origin") not in ("*", origin)
    assert len(Queue(server.data).list()) == before


@pytest.mark.parametrize(
    "host",
    ["evil.example", "127.0.0.1.evil.example", "localhost.evil.example:7860", "", "127.0.0.1@evil.example", "[::2]"],
)
def test_the_server_answers_to_its_own_names_only(server: AppServer, host: str) -> None:
    assert httpx.get(server.url, headers={"host": host}).status_code in (400, 403)


def test_a_token_of_the_server_is_in_no_log_file_or_run(server: AppServer, job_id: str) -> None:
    for path in server.data.rglob("*"):
        if path.is_file():
            assert CANARY.encode() not in path.read_bytes(), path
    assert CANARY not in httpx.get(f"{server.url}/config").text
    assert job_id not in (server.data / "server.txt").read_text(), "the id is the key to a run"


def test_an_upload_that_is_too_large_is_refused_before_it_was_read(server: AppServer) -> None:
    before = stored(server)
    head = "POST /gradio_api/upload HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: multipart/form-data; boundary=b\r\n"
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
        connection.sendall(f"{head}Content-Length: {2**31}\r\n\r\n".encode())
        assert connection.recv(100).startswith(b"HTTP/1.1 413")
    part = b'--b\r\nContent-Disposition: form-data; name="files"; filename="x.pth"\r\n\r\n'
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
        connection.sendall(f"{head}Transfer-Encoding: chunked\r\n\r\n".encode())
        chunk = part + b"w" * (256 * 1024)
        answer = b""
        try:
            for _ in range(16):
                connection.sendall(f"{len(chunk):x}\r\n".encode() + chunk + b"\r\n")
                chunk = b"w" * (256 * 1024)
            answer = connection.recv(100)
        except ConnectionError:  # it stopped listening, which is as good
            answer = b"HTTP/1.1 413"
        assert answer.startswith(b"HTTP/1.1 413")
    for size, status in ((128 * 1024 + 1, 413), (128 * 1024, 400)):
        body = b"x" * size  # no upload, so little is enough; the smaller one is read, and is no JSON
        assert httpx.post(f"{server.url}/gradio_api/call/v2/status", content=body).status_code == status
    assert until(lambda: stored(server) == before, 5), "what was stored of it is removed"


def test_an_interrupted_upload_leaves_nothing(server: AppServer) -> None:
    before = stored(server)
    head = "POST /gradio_api/upload HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: multipart/form-data; boundary=b\r\n"
    part = b'--b\r\nContent-Disposition: form-data; name="files"; filename="x.pth"\r\n\r\n'
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
        connection.sendall(f"{head}Content-Length: {MIB}\r\n\r\n".encode() + part + b"w" * 200_000)
        assert until(lambda: stored(server) != before, 5), "it is under way"
    assert until(lambda: stored(server) == before, 5)


def test_files_and_fields_by_the_thousand_are_refused(server: AppServer) -> None:
    before = stored(server)
    many = [("files", (f"{number}.pth", b"w")) for number in range(9)]
    assert httpx.post(f"{server.url}/gradio_api/upload", files=many, timeout=30).status_code == 400
    assert len(httpx.post(f"{server.url}/gradio_api/upload", files=many[1:], timeout=30).json()) == 8
    before = stored(server)
    assert httpx.post(f"{server.url}/gradio_api/upload", data={str(n): "x" for n in range(1001)}).status_code == 400
    assert until(lambda: stored(server) == before, 5)


def test_an_upload_keeps_no_path_of_the_visitor(server: AppServer) -> None:
    for name in ("../../../evil.pth", "/etc/evil.pth", "..\\evil.pth", "a/../../b.pth"):
        answer = httpx.post(f"{server.url}/gradio_api/upload", files={"files": (name, b"weights")})
        assert answer.status_code == 200
        (upload,) = answer.json()
        assert re.fullmatch("[0-9a-f]{32}", upload)
        (path,) = (server.data / "incoming").glob(f"*/{upload}/*")
        assert path.name in ("evil.pth", "b.pth")


def test_engines_and_onnx_files_are_not_taken(server: AppServer) -> None:
    """By name here; under another name see the next test."""
    for name in ("model.engine", "model.plan", "model.trt", "model.onnx", "model.pkl", "page.html", "image.svg", "x"):
        answer = httpx.post(f"{server.url}/gradio_api/upload", files={"files": (name, b"ftrt" * 100)})
        assert answer.status_code == 415 and "expected one that ends in .safetensors, .pth, " in answer.text, name
    (upload,) = httpx.post(f"{server.url}/gradio_api/upload", files={"files": ("model.zip", b"ftrt" * 100)}).json()
    assert "unsupported suffix" in call(server, "submit", checkpoint_file=upload)


@pytest.mark.parametrize(
    "content", [b"ftrt" + b"\0" * 4000, b"\x08\x08\x12\x07pytorch" + b"\0" * 4000, b"\x7fELF" * 1000]
)
def test_under_another_name_they_are_refused_by_what_is_in_them(
    tmp_path: Path, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    monkeypatch.setattr("compress.engines.passport.checked_engine", lambda *given: opened.append("engine"))
    for name in ("model.pth", "model.safetensors"):
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(CheckpointError):
            reader.read_with_facts(path)
    (tmp_path / "images.zip").write_bytes(content)
    with pytest.raises(DataError):
        archives.open_files(tmp_path / "images.zip")
    assert opened == []


EVIL = "<img src=x onerror=alert(1)>"


def test_markup_in_names_of_layers_classes_and_files_is_only_text(
    server: AppServer, job_id: str, tmp_path: Path
) -> None:
    told = json.loads(httpx.get(f"{server.url}/runs/{job_id}/files/report.json").text)
    text = json.dumps(told)
    for name in (told["layers"][0]["name"], told["data"]["class_names"][0], told["data"]["source"]):
        text = text.replace(json.dumps(name)[1:-1], EVIL)
    report = Report.model_validate_json(text)
    assert EVIL in str(report), "the names are in it"
    shown = [
        results.verdict(report),
        results.findings(report),
        results.machine(report),
        card.html_report(report),
    ]
    for key, (headers, rows) in tables(report).items():
        shown.append(views.table(headers, rows, name=f"{EVIL} {key}"))
    shown.append(results.downloads(job_id, {f"artifacts/{EVIL}": {"bytes": 1, "sha256": EVIL}}))
    shown.append(views.log_text(f"loading {EVIL}"))
    for page in shown:
        assert "<img src=x" not in page


def test_uploads_of_one_address_are_limited(server: AppServer) -> None:
    answers = [httpx.post(f"{server.url}/gradio_api/upload", files={"files": ("x.pth", b"w")}) for _ in range(41)]
    refused = [answer for answer in answers if answer.status_code == 429]
    assert refused and "Too many requests from your address. Try again in" in refused[0].text
    assert int(refused[0].headers["retry-after"]) > 0
    assert refused[0].headers["x-content-type-options"] == "nosniff"
    assert httpx.get(f"{server.url}/healthz").status_code == 200, "others of the same visitor are not touched"


def test_the_rate_is_kept_for_each_visitor() -> None:
    now = [0.0]
    rate = Rate(3, 60, clock=lambda: now[0])
    assert [rate.wait_s("a") for _ in range(4)] == [0, 0, 0, pytest.approx(20)]
    assert rate.wait_s("b") == 0
    now[0] = 20.0
    assert rate.wait_s("a") == 0 and rate.wait_s("a") > 0
    now[0] = 1000.0
    assert [rate.wait_s("a") for _ in range(3)] == [0, 0, 0]
