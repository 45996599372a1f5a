"""The named endpoints through the real gradio_client, the files' own route, and what protects both."""

from __future__ import annotations

import hashlib
import io
import subprocess
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from app_server import REAL, AppServer
from fastapi import FastAPI
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError

from compress.request import Request, snippets
from compress.ui.web.server import listen
from compress.ui.web.settings import Settings

pytestmark = pytest.mark.integration

QUICK: dict[str, Any] = {"model": "resnet18", "learning_rate": 0.001}
ENDLESS: dict[str, Any] = {"model": "resnet34", "learning_rate": 0.001}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AppServer]:
    server = AppServer(tmp_path_factory.mktemp("api"))
    yield server
    server.close()


@pytest.fixture(scope="module")
def client(server: AppServer) -> Client:
    return Client(server.url, verbose=False)


def wait(client: Client, job_id: str, *states: str) -> dict[str, Any]:
    deadline = time.monotonic() + 20
    while (status := client.predict(job_id, api_name="/status"))["state"] not in states:
        assert time.monotonic() < deadline, status
        time.sleep(0.1)
    return status


def test_submit_wait_download_and_compare_hashes(client: Client, server: AppServer, tmp_path: Path) -> None:
    weights = tmp_path / "my weights.safetensors"
    weights.write_bytes(b"tensors" * 1000)
    status = client.predict(**QUICK, sparsity=0.3, checkpoint_file=handle_file(weights), api_name="/submit")
    assert (status["state"] in ("queued", "running"), status["title"]) == (
        True,
        "resnet18 on fashion-mnist, 30 % pruned, 8 bits",
    )
    done = wait(client, status["job_id"], "done", "failed")
    assert (done["state"], done["fraction"]) == ("done", 1.0)
    names = {file["name"] for file in done["files"]}
    assert {"report.json", "request.json", "artifacts/quantized.onnxruntime.onnx"} <= names
    for file in done["files"]:
        told = client.predict(status["job_id"], file["name"], api_name="/artifact")
        answer = httpx.get(f"{server.url}/{told['url']}")
        assert answer.status_code == 200
        assert hashlib.sha256(answer.content).hexdigest() == told["sha256"] == file["sha256"]
        assert len(answer.content) == told["bytes"]
    request = Request.from_json(httpx.get(f"{server.url}/runs/{status['job_id']}/files/request.json").text)
    assert request.sparsity == 0.3
    assert Path(request.checkpoint).read_bytes() == weights.read_bytes()


def test_cancel_resume_and_list(client: Client) -> None:
    job_id = client.predict(**ENDLESS, api_name="/submit")["job_id"]
    wait(client, job_id, "running")
    cancelled = client.predict(job_id, api_name="/cancel")
    assert (cancelled["state"], cancelled["resumable"]) == ("cancelled", True)
    assert client.predict(job_id, api_name="/resume")["state"] in ("queued", "running")
    assert wait(client, job_id, "done", "failed")["state"] == "done"
    assert client.predict(1, api_name="/list")[0]["job_id"] == job_id


def test_endpoints_are_named_typed_and_documented(client: Client) -> None:
    told = client.view_api(return_format="dict", print_info=False)
    assert isinstance(told, dict)
    named = told["named_endpoints"]
    assert set(named) == {"/submit", "/status", "/cancel", "/resume", "/list", "/artifact", "/check"}
    submit = {p["parameter_name"]: p for p in named["/submit"]["parameters"]}
    assert set(submit) == {*Request.model_fields, "checkpoint_file", "data_file", "class_map_file"} - {"class_map"}
    assert submit["sparsity"]["parameter_has_default"] and submit["sparsity"]["parameter_default"] == 0.5
    assert submit["sparsity"]["type"] == {"type": "number"}
    assert "Queues a run" in named["/submit"]["description"]
    assert all(named[name]["description"] for name in named)


@pytest.mark.parametrize(
    ("endpoint", "given", "sentence"),
    [
        ("/submit", {"sparsity": 1.5}, "sparsity: got 1.5, expected a fraction strictly between 0 and 1."),
        ("/submit", {"data": "/etc"}, "data: got '/etc', expected fashion-mnist or none or a file given as data_file."),
        (
            "/submit",
            {"checkpoint": "../x.pth"},
            "expected auto or published or random or hf://owner/name or a file given as checkpoint_file.",
        ),
        ("/status", {"job_id": "../../etc/passwd"}, "There is no run with the id '../../etc/passwd'."),
        ("/cancel", {"job_id": "0" * 32}, "There is no run with the id"),
        ("/list", {"limit": 0}, "limit: got 0, expected a whole number from 1 to 1000."),
    ],
)
def test_refusals_reach_the_client_word_for_word(
    client: Client, endpoint: str, given: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(AppError) as refused:
        client.predict(**given, api_name=endpoint)
    assert sentence in str(refused.value)


def test_a_file_of_the_server_cannot_be_named_as_an_upload(server: AppServer) -> None:
    """See test_web_files.py for every other way to name one."""
    for path in ("/etc/passwd", str(server.data / "queue.sqlite"), f"{server.data}/incoming/../queue.sqlite"):
        answer = httpx.post(f"{server.url}/gradio_api/call/v2/submit", json={"checkpoint_file": {"path": path}})
        assert answer.status_code == 400 and "names a file that you did not upload here" in answer.json()["error"]


def test_check_tells_the_plan(client: Client) -> None:
    found = client.predict(**QUICK, api_name="/check")
    assert found["possible"] is True
    assert found["groups"][0]["channels_after"] == 32


def test_files_are_downloads_and_nothing_else_is_given_out(client: Client, server: AppServer) -> None:
    job_id = client.predict(**QUICK, api_name="/submit")["job_id"]
    wait(client, job_id, "done")
    answer = httpx.get(f"{server.url}/runs/{job_id}/files/report.json")
    assert answer.headers["content-disposition"].startswith("attachment")
    assert answer.headers["content-type"] == "application/octet-stream"
    assert answer.headers["x-content-type-options"] == "nosniff"
    for path in ("log.txt", "uploads/x", "../../queue.sqlite", "%2e%2e/%2e%2e/queue.sqlite"):
        assert httpx.get(f"{server.url}/runs/{job_id}/files/{path}").status_code == 404
    assert httpx.get(f"{server.url}/runs/{'0' * 32}/files/report.json").status_code == 404
    report = server.data / "runs" / job_id / "report.json"
    report.write_text(report.read_text() + " ")
    changed = httpx.get(f"{server.url}/runs/{job_id}/files/report.json")
    assert (changed.status_code, "was changed or removed after the run" in changed.text) == (409, True)


def test_everything_is_one_zip_with_hashes_or_nothing(client: Client, server: AppServer) -> None:
    job_id = client.predict(**QUICK, api_name="/submit")["job_id"]
    files = {file["name"]: file["sha256"] for file in wait(client, job_id, "done")["files"]}
    url = f"{server.url}/runs/{job_id}/files.zip"
    answer = httpx.get(url)
    root = f"espalier-{job_id[:8]}"
    assert answer.headers["content-disposition"] == f'attachment; filename="{root}.zip"'
    assert (answer.headers["content-type"], answer.headers["x-content-type-options"]) == ("application/zip", "nosniff")
    with zipfile.ZipFile(io.BytesIO(answer.content)) as archive:
        assert {name.removeprefix(f"{root}/") for name in archive.namelist()} == {*files, "manifest.json", "SHA256SUMS"}
        for name, digest in files.items():
            assert hashlib.sha256(archive.read(f"{root}/{name}")).hexdigest() == digest
    assert httpx.head(url).status_code == 200 and httpx.head(url).content == b""
    assert not [path for path in server.data.rglob("*.zip")], "nothing is stored twice"
    report = server.data / "runs" / job_id / "report.json"
    report.write_text(report.read_text() + " ")
    assert httpx.get(url).status_code == 409
    assert httpx.get(f"{server.url}/runs/{'0' * 32}/files.zip").status_code == 404


def test_the_copied_client_code_does_the_same_run(
    server: AppServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "it's mine.pth").write_bytes(b"weights")
    monkeypatch.chdir(tmp_path)
    asked = Request(
        **QUICK,
        checkpoint="it's mine.pth",
        layer_sparsity={"layer1": 0.3},
        exclude=("fc",),
        mean=(0.1,) * 3,
        std=(1,) * 3,
    )
    code = snippets.client_code(asked.model_dump(mode="json"), f"{server.url}/", ("checkpoint",))
    exec(compile(code, "copied", "exec"), {})
    state, *files = capsys.readouterr().out.splitlines()
    assert state.strip() == "done"
    name, url, digest = next(line.rsplit(" ", 2) for line in files if line.startswith("request.json"))
    answer = httpx.get(f"{server.url}/{url}")
    assert (name, hashlib.sha256(answer.content).hexdigest()) == ("request.json", digest)
    ran = Request.from_json(answer.text)
    assert Path(ran.checkpoint).read_bytes() == b"weights"
    assert ran.model_copy(update={"checkpoint": asked.checkpoint}) == asked


def test_files_of_the_queue_are_not_reachable_through_gradio(client: Client, server: AppServer) -> None:
    job_id = client.predict(**QUICK, api_name="/submit")["job_id"]
    wait(client, job_id, "done")
    for path in (server.data / "runs" / job_id / "report.json", server.data / "queue.sqlite", Path("/etc/passwd")):
        assert httpx.get(f"{server.url}/gradio_api/file={path}").status_code in (403, 404)


def test_every_answer_carries_the_security_headers(server: AppServer) -> None:
    for path in ("/", "/healthz", "/gradio_api/info", "/runs/x/files/y"):
        headers = httpx.get(server.url + path).headers
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "no-referrer"
        assert "object-src 'none'" in headers["content-security-policy"]
        assert "frame-ancestors 'self'" in headers["content-security-policy"]


def test_other_names_and_other_sites_are_refused(server: AppServer) -> None:
    answer = httpx.get(server.url, headers={"host": "attacker.example"})
    assert (answer.status_code, "does not accept the host name" in answer.text) == (403, True)
    for site, status in (("cross-site", 403), ("same-site", 403), ("same-origin", 200), ("none", 200)):
        answer = httpx.post(
            f"{server.url}/gradio_api/call/v2/status", json={"job_id": "x"}, headers={"sec-fetch-site": site}
        )
        assert answer.status_code == status
    assert httpx.get(f"{server.url}/healthz", headers={"host": f"localhost:{server.port}"}).json() == {"status": "ok"}


@pytest.mark.parametrize(
    ("origin", "status"),
    [("http://attacker.example", 403), ("null", 403), ("http://127.0.0.1:1", 403), ("", 200), (None, 200)],
)
def test_by_plain_http_a_page_is_known_by_its_origin(server: AppServer, origin: str | None, status: int) -> None:
    headers = {"origin": origin or server.url} if origin is not None else {}
    answer = httpx.post(f"{server.url}/gradio_api/call/v2/status", json={"job_id": "x"}, headers=headers)
    assert answer.status_code == status


def test_a_proxy_that_the_settings_do_not_name_is_refused(server: AppServer) -> None:
    for header in ("x-forwarded-for", "forwarded", "X-Forwarded-Host"):
        answer = httpx.get(server.url, headers={header: "203.0.113.7"})
        assert answer.status_code == 403 and "add the host name that the proxy serves to ESPALIER_ALLOWED_HOSTS" in answer.text


@pytest.mark.parametrize(
    "path",
    [
        "file=https://example.com/x",
        "file=HTTP%3A//example.com",
        "file/https://example.com",
        "proxy=https://a.hf.space/x",
    ],
)
def test_nothing_is_fetched_from_other_addresses(server: AppServer, path: str) -> None:
    answer = httpx.get(f"{server.url}/gradio_api/{path}")
    assert (answer.status_code, answer.text) == (
        403,
        "This server does not fetch files from other addresses: upload the file.",
    )


def test_an_address_in_a_header_counts_only_where_the_settings_say_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = []
    monkeypatch.setattr(uvicorn, "run", lambda app, **options: given.append(options["proxy_headers"]))
    monkeypatch.delenv("FORWARDED_ALLOW_IPS", raising=False)
    listen(FastAPI(), Settings(data=tmp_path))
    monkeypatch.setenv("FORWARDED_ALLOW_IPS", "10.0.0.1")
    listen(FastAPI(), Settings(data=tmp_path))
    assert given == [False, True]


def test_a_wrong_setting_ends_the_app_with_one_sentence(tmp_path: Path) -> None:
    ended = subprocess.run(
        REAL, env={"PATH": "", "ESPALIER_PORT": "http"}, cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert (ended.returncode, ended.stderr) == (
        1,
        "Error: ESPALIER_PORT: got 'http', expected a whole number from 1 to 65535.\n",
    )
    assert list(tmp_path.iterdir()) == []
