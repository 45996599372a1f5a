"""The optional login: nothing is answered without it, whichever way it is asked; and the option that offers tools."""

from __future__ import annotations

import ast
import asyncio
import base64
import contextlib
import http.client
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from app_server import AppServer
from fastapi.testclient import TestClient
from gradio.utils import get_function_description
from gradio_client import Client, handle_file
from mcp import ClientSession
from mcp.client.streamable_http import streamablehttp_client
from playwright.sync_api import Browser, expect
from test_api_client import ENDLESS, QUICK, wait
from test_app_browser import watched
from test_form import no_count, no_images

from compress.errors import RequestError
from compress.jobs import Queue
from compress.ui.handlers import App
from compress.ui.page import build_page
from compress.ui.web import settings as settings_module
from compress.ui.web.login import SENTENCE, Login
from compress.ui.web.server import build_app
from compress.ui.web.settings import Settings

pytestmark = pytest.mark.integration

ADA, BOB = ("ada", "correct:horse"), ("böb", "Grüße-12345")
LOGIN = " ".join(":".join(account) for account in (ADA, BOB))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AppServer]:
    server = AppServer(tmp_path_factory.mktemp("login"), ESPALIER_LOGIN=LOGIN, ESPALIER_MAX_PER_VISITOR="1")
    yield server
    server.close()


@pytest.fixture(scope="module")
def finished(server: AppServer) -> str:
    client = Client(server.url, verbose=False, httpx_kwargs={"auth": ADA})
    job_id = client.predict(**QUICK, api_name="/submit")["job_id"]
    wait(client, job_id, "done")
    return job_id


def paths(job_id: str) -> tuple[str, ...]:
    return (
        "/", f"/?job={job_id}", "/config", "/theme.css", "/login", "/openapi.json", "/gradio_api/info", "/gradio_api/openapi.json",
        "/gradio_api/startup-events", "/gradio_api/queue/data", "/gradio_api/mcp/", f"/runs/{job_id}/files/report.json",
        f"/runs/{job_id}/files.zip", "/nothing/here", "//healthz", "/healthz/", "/healthz/../config",
    )  # fmt: skip


def test_nothing_is_answered_without_a_login(server: AppServer, finished: str) -> None:
    for path in paths(finished):
        for method in ("GET", "HEAD", "POST"):
            connection = http.client.HTTPConnection("127.0.0.1", server.port)
            connection.request(method, path)  # as it stands: httpx would resolve dots
            answer = connection.getresponse()
            assert answer.status == 401, (method, path)
            assert answer.headers["www-authenticate"] == 'Basic realm="Espalier", charset="UTF-8"'
            assert answer.headers["x-content-type-options"] == "nosniff"
            assert method == "HEAD" or answer.read().decode() == SENTENCE
            connection.close()
    upload = httpx.post(f"{server.url}/gradio_api/upload", files={"files": ("x.pth", b"w")})
    assert upload.status_code == 401 and not [path for path in (server.data / "incoming").rglob("*") if path.is_file()]
    assert httpx.get(f"{server.url}/healthz").json() == {"status": "ok"}, "for what starts the server again"
    assert httpx.head(f"{server.url}/healthz").status_code == 200
    assert httpx.post(f"{server.url}/healthz").status_code == 401, "which would be answered by another part of the app"


@pytest.mark.parametrize(("accounts", "told"), [((), True), ((ADA,), False)])
def test_why_the_server_is_not_well_is_told_to_those_who_may_come_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, accounts: tuple, told: bool
) -> None:
    monkeypatch.setattr(Queue, "trouble", "The disk of /srv/espalier is full.")
    settings = Settings(data=tmp_path, accounts=accounts)
    app = build_app(settings, Queue(tmp_path), check=dict, classify=no_images, count=no_count, models=[])
    answer = TestClient(app, base_url="http://localhost").get("/healthz")
    assert (answer.status_code, "/srv" in answer.text, answer.json()["status"]) == (503, told, "trouble")


def test_everything_is_answered_with_one(server: AppServer, finished: str) -> None:
    with httpx.Client(base_url=server.url, auth=BOB) as client:
        for path in ("/", "/config", "/gradio_api/info", f"/runs/{finished}/files/report.json"):
            assert client.get(path).status_code == 200, path
        assert client.get(f"/runs/{finished}/files.zip").content.startswith(b"PK")
        foreign = client.post("/gradio_api/call/v2/list", json={}, headers={"sec-fetch-site": "cross-site"})
        assert foreign.status_code == 403, "a browser adds the password to requests of other sites' pages as well"


@pytest.mark.parametrize(
    "given",
    [
        "Basic " + base64.b64encode(b"ada:wrong").decode(),
        "Basic " + base64.b64encode(b"ada:").decode(),
        "Basic " + base64.b64encode("böb:correct:horse".encode()).decode(),
        "Basic " + base64.b64encode(b"ada").decode(),
        "Basic \xff\xff",
        "Basic",
        "Bearer correct:horse",
        "",
    ],
)
def test_what_is_no_login_is_refused(server: AppServer, given: str) -> None:
    answer = httpx.get(f"{server.url}/config", headers={"authorization": given.encode("latin-1")})
    assert (answer.status_code, answer.text) == (401, SENTENCE)


def test_the_api_is_used_with_a_login_and_runs_belong_to_names(server: AppServer, tmp_path: Path) -> None:
    with pytest.raises(Exception, match="credentials were not provided"):
        Client(server.url, verbose=False)
    (tmp_path / "w.pth").write_bytes(b"weights")
    for account in (ADA, BOB):
        client = Client(server.url, verbose=False, httpx_kwargs={"auth": account})
        first = client.predict(model="resnet34", checkpoint_file=handle_file(tmp_path / "w.pth"), api_name="/submit")
        assert Queue(server.data)._store.get(first["job_id"]).owner == account[0]
        with pytest.raises(Exception, match="this server allows 1 for each user"):
            client.predict(**QUICK, api_name="/submit")
    for status in Queue(server.data).list():
        if status.state in ("queued", "running"):
            Queue(server.data).cancel(status.job_id)


@pytest.mark.browser
def test_the_page_works_behind_a_login(browser: Browser, server: AppServer, finished: str) -> None:
    credentials = {"username": ADA[0], "password": ADA[1]}
    with browser.new_context(http_credentials=credentials) as context:
        page = watched(context, server.url)
        page.goto(f"{server.url}/?job={finished}")
        expect(page.locator("#verdict .headline")).to_be_visible(timeout=60_000)
        with page.expect_download() as begun:
            page.locator("#files tr", has_text="quantized.onnxruntime.onnx").get_by_role("link").click()
        assert Path(begun.value.path()).stat().st_size == 5000
        unasked = [
            text for text in page.trouble if "401" not in text
        ]  # a browser asks once before it gives the password
        assert unasked == []


class Requests:
    """Of one address to a `Login` around an app that answers everything."""

    def __init__(self, login: Login) -> None:
        self.login = login

    def __call__(self, account: tuple[str, str], address: str = "10.0.0.1", kind: str = "http") -> int:
        encoded = base64.b64encode(":".join(account).encode())
        sent: list[Any] = []
        scope = {"type": kind, "path": "/", "method": "GET", "client": (address, 1)}
        scope["headers"] = [(b"authorization", b"Basic " + encoded)]

        async def send(message: Any) -> None:
            sent.append(message)

        with contextlib.suppress(
            StopIteration
        ):  # nothing is waited for; the browser of another test has the event loop
            self.login(scope, None, send).send(None)  # type: ignore[arg-type]
        return sent[0].get("status") or sent[0]["code"]


async def answering(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})


def test_wrong_passwords_of_an_address_are_limited_and_shut_nobody_out_who_is_in() -> None:
    ask = Requests(Login(answering, [ADA, BOB], wrong_per_min=3))
    assert ask(BOB) == 200
    assert [ask(("ada", f"guess-{number}")) for number in range(4)] == [401, 401, 401, 429]
    assert ask(ADA) == 429, "the right one could be a guess as well"
    assert (ask(BOB), ask(ADA, "10.0.0.2")) == (200, 200)
    assert ask(ADA, kind="websocket") == 1008


@pytest.mark.parametrize("text", ["ada", "ada:", ":longenough", "ada:short", "ada:longenough bob:short", " "])
def test_a_login_that_cannot_be_meant_is_refused_without_showing_it(text: str) -> None:
    with pytest.raises(RequestError) as refused:
        Settings.from_environment({"ESPALIER_LOGIN": text})
    assert str(refused.value) == (
        "ESPALIER_LOGIN: got 'something that is not shown here', expected name:password, with at least 8 characters in the "
        "password and several separated by spaces."
    )


def test_passwords_are_in_no_text_of_the_settings() -> None:
    settings = Settings.from_environment({"ESPALIER_LOGIN": LOGIN})
    assert settings.accounts == (ADA, BOB) and ADA[1] not in repr(settings)


# ---- MCP ------------------------------------------------------------------------------------------------------------


def test_every_endpoint_tells_what_each_of_its_parameters_means(tmp_path: Path) -> None:
    """What tools are made from, whether or not they are offered."""
    app = App(Queue(tmp_path), dict, Settings(data=tmp_path), (), no_images, no_count)
    page = build_page(app)
    endpoints = {fn.api_name: fn.fn for fn in page.fns.values() if fn.api_visibility == "public"}
    assert set(endpoints) == {"submit", "status", "cancel", "resume", "list", "artifact", "check"}
    for name, told in page.get_api_info()["named_endpoints"].items():
        description, meanings, _ = get_function_description(endpoints[name.removeprefix("/")])
        assert description and told["returns"][0]["type"], name
        for parameter in told["parameters"]:
            assert meanings[parameter["parameter_name"]], (name, parameter["parameter_name"])
            assert parameter["type"] and parameter["python_type"]["type"] != "Any", (name, parameter["parameter_name"])


def test_tools_without_their_package_are_refused_with_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings_module, "find_spec", lambda name: None)
    with pytest.raises(
        RequestError, match="^ESPALIER_MCP: got '1', expected the package mcp to be installed first: .*-mcp.txt.$"
    ):
        Settings.from_environment({"ESPALIER_MCP": "1"})


def test_tools_and_login_exclude_each_other() -> None:
    with pytest.raises(RequestError, match="expected no ESPALIER_LOGIN beside it, because Gradio's tools call the app"):
        Settings.from_environment({"ESPALIER_LOGIN": LOGIN, "ESPALIER_MCP": "1"})


def test_the_named_endpoints_are_tools_with_their_docs(tmp_path: Path) -> None:
    server = AppServer(tmp_path, ESPALIER_MCP="1")
    try:
        told = httpx.get(f"{server.url}/gradio_api/mcp/schema").json()
        tools = {tool["name"]: tool for tool in told}
        assert set(tools) == {"submit", "status", "cancel", "resume", "list", "artifact", "check"}
        assert "How a run is doing." in tools["status"]["description"]
        job_id = tools["status"]["inputSchema"]["properties"]["job_id"]
        assert (job_id["type"], job_id["description"]) == ("string", "The id that submit returned.")
        assert "Fraction of output channels" in tools["submit"]["inputSchema"]["properties"]["sparsity"]["description"]
    finally:
        server.close()


def test_a_run_is_submitted_watched_and_cancelled_with_tools(tmp_path: Path) -> None:
    async def use_them(url: str) -> None:
        async with (
            streamablehttp_client(f"{url}/gradio_api/mcp/") as (read, write, _),
            ClientSession(read, write) as tools,
        ):
            await tools.initialize()

            async def call(name: str, **arguments: Any) -> tuple[bool, str]:
                found = await tools.call_tool(name, arguments)
                return found.isError, found.content[0].text  # of a dict what Python prints: so Gradio does it

            refused, sentence = await call("submit", sparsity=2)
            assert refused and "sparsity: got 2" in sentence, sentence
            refused, text = await call("submit", **(ENDLESS | {"learning_rate": 1.0}))  # resumed it takes 8 s, time to cancel it
            assert not refused, text
            job_id = ast.literal_eval(text)["job_id"]
            assert ast.literal_eval((await call("status", job_id=job_id))[1])["state"] in ("queued", "running")
            assert ast.literal_eval((await call("cancel", job_id=job_id))[1])["state"] == "cancelled"
            assert ast.literal_eval((await call("resume", job_id=job_id))[1])["state"] == "queued"
            assert ast.literal_eval((await call("cancel", job_id=job_id))[1])["state"] == "cancelled"

    with contextlib.closing(AppServer(tmp_path, ESPALIER_MCP="1")) as server, ThreadPoolExecutor(1) as apart:
        apart.submit(asyncio.run, use_them(server.url)).result()  # a browser of other tests has its loop in this thread
