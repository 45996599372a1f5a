"""What one visitor can take of the server, which names and proxies it answers to, and what a visitor is told when it errs."""

from __future__ import annotations

import asyncio
import http.client
import json
import logging
import stat
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr
import httpx
import pytest
from app_server import AppServer
from queues import QUICK, wait

from compress.errors import RequestError, RunError
from compress.jobs import Queue
from compress.jobs.folders import Folders
from compress.request import Request
from compress.ui.errors import MISTAKE, without_folders, without_traceback
from compress.ui.web.fair_queue import FairQueue
from compress.ui.web.guard import Guard
from compress.ui.web.sessions import _NoState, skip_unchanged_outputs
from compress.ui.web.settings import Settings
from compress.ui.web.streams import FULL, SENTENCE, Streams, StreamsError

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AppServer]:
    server = AppServer(tmp_path_factory.mktemp("limits"), ESPALIER_REQUESTS_PER_MIN="100000")
    yield server
    server.close()


def told(server: AppServer, endpoint: str, **data: Any) -> str:
    begun = httpx.post(f"{server.url}/gradio_api/call/v2/{endpoint}", json=data)
    if begun.status_code != 200:
        return begun.text
    return httpx.get(f"{server.url}/gradio_api/call/{endpoint}/{begun.json()['event_id']}").text


# ---- names, proxies, origins ----------------------------------------------------------------------------------------


def answer(guard: Guard, headers: dict[str, str], method: str = "GET", version: str = "1.1") -> tuple[int, dict, dict]:
    """(status, headers of the answer, headers that reached the app)."""
    sent: list[Any] = []
    reached: dict[str, str] = {}

    async def app(scope: Any, receive: Any, send: Any) -> None:
        reached.update({name.decode(): value.decode() for name, value in scope["headers"]})
        cors = [(b"access-control-allow-origin", b"http://localhost:1"), (b"Access-Control-Allow-Credentials", b"true")]
        await send({"type": "http.response.start", "status": 200, "headers": cors})
        await send({"type": "http.response.body", "body": b""})

    async def send(message: Any) -> None:
        sent.append(message)

    guard.app = app
    raw = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    scope = {"type": "http", "method": method, "path": "/", "headers": raw, "http_version": version}
    asyncio.run(guard(scope, None, send))  # type: ignore[arg-type]
    return sent[0]["status"], {name.decode().lower(): value.decode() for name, value in sent[0]["headers"]}, reached


def guard_of(**settings: Any) -> Guard:
    known = Settings(data=Path("x"), **settings)
    return Guard(None, hosts=known.hosts, local=known.trusts_visitors, addresses=known.answers_to_addresses)


@pytest.mark.parametrize(
    ("settings", "host", "answered"),
    [
        ({}, "127.0.0.1:7860", True), ({}, "localhost", True), ({}, "[::1]:7860", True), ({}, "192.0.2.1", False),
        ({}, "evil.example", False), ({}, "", False),
        ({"host": "0.0.0.0"}, "evil.example", False), ({"host": "0.0.0.0"}, "192.0.2.7:7860", True),
        ({"host": "0.0.0.0"}, "[2001:db8::1]:7860", True), ({"host": "0.0.0.0"}, "localhost:7860", True),
        ({"host": "0.0.0.0"}, "2130706433", False), ({"host": "0.0.0.0"}, "0x7f.1", False), ({"host": "::"}, "evil.example", False),
        ({"host": "0.0.0.0"}, "192.0.2.7.evil.example", False), ({"host": "192.0.2.9"}, "evil.example", False),
        ({"host": "gpu.lan"}, "gpu.lan:7860", True), ({"host": "gpu.lan"}, "evil.lan", False),
        ({"host": "0.0.0.0", "allowed_hosts": ("app.example",)}, "app.example", True),
        ({"host": "0.0.0.0", "allowed_hosts": ("app.example",)}, "192.0.2.7", False),
    ],
)  # fmt: skip
def test_only_its_own_names_are_answered(settings: dict[str, Any], host: str, answered: bool) -> None:
    assert (answer(guard_of(**settings), {"host": host})[0] == 200) is answered


@pytest.mark.parametrize(
    "extra",
    [
        {"x-forwarded-for": "1"}, {"X-Forwarded-Proto": "https"}, {"x-forwarded-server": "a"}, {"forwarded": "for=1"}, {"via": "1.1 a"},
        {"x-real-ip": "1"}, {"cf-connecting-ip": "1"}, {"true-client-ip": "1"},
        {"origin": "https://app.example", "sec-fetch-site": "same-origin"},
    ],
)  # fmt: skip
def test_a_server_that_trusts_its_visitors_answers_no_proxy(extra: dict[str, str]) -> None:
    """Also one that hides that it is one, as far as a browser tells of it."""
    assert answer(guard_of(), {"host": "127.0.0.1"} | extra, "POST")[0] == 403
    named = guard_of(allowed_hosts=("app.example",))
    assert answer(named, {"host": "app.example"} | extra, "POST")[0] == 200, "its settings name that proxy"


def test_nor_the_old_protocol_that_proxies_speak_unless_told_otherwise() -> None:
    assert answer(guard_of(), {"host": "127.0.0.1"}, version="1.0")[0] == 403
    assert answer(guard_of(host="0.0.0.0"), {"host": "127.0.0.1"}, version="1.0")[0] == 200


def test_nobody_else_names_the_server_to_gradio() -> None:
    named = guard_of(allowed_hosts=("app.example",))
    for value, kept in (("evil.example", False), ("app.example", True), ("169.254.169.254", False)):
        reached = answer(named, {"host": "app.example", "x-forwarded-host": value})[2]
        assert ("x-forwarded-host" in reached) is kept


def test_no_answer_may_be_read_by_a_page_of_another_origin(server: AppServer) -> None:
    assert not [name for name in answer(guard_of(), {"host": "localhost"})[1] if name.startswith("access-control")]
    for origin in ("http://localhost:9999", "http://127.0.0.1:1", "null"):
        headers = httpx.get(f"{server.url}/config", headers={"origin": origin}).headers
        assert not [name for name in headers if name.startswith("access-control")], origin


def test_two_host_headers_are_refused(server: AppServer) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", server.port)
    connection.putrequest("GET", "/config", skip_host=True)
    connection.putheader("Host", "127.0.0.1")
    connection.putheader("Host", "evil.example")
    connection.endheaders()
    assert connection.getresponse().status in (400, 403)


def test_a_start_on_every_address_says_which_names_are_answered(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from compress.ui.web import server as module

    monkeypatch.setattr(module, "listen", lambda app, settings: None)
    monkeypatch.setattr(module, "build_app", lambda *given, **named: None)
    monkeypatch.setattr(module.backend, "models", lambda cache: ())
    with caplog.at_level(logging.WARNING):
        module.serve(Settings(data=tmp_path / "a"))
        assert "ESPALIER_ALLOWED_HOSTS" not in caplog.text
        module.serve(Settings(data=tmp_path / "b", host="0.0.0.0"))
    assert "The app listens on 0.0.0.0 and accepts only numeric addresses" in caplog.text


def test_a_space_answers_to_its_own_name() -> None:
    settings = Settings.from_environment({"ESPALIER_HOST": "0.0.0.0", "SPACE_HOST": "ada-espalier.hf.space"})
    assert "ada-espalier.hf.space" in settings.hosts and not settings.answers_to_addresses


# ---- turns ------------------------------------------------------------------------------------------------------------


def test_visitors_take_turns_however_much_one_of_them_asks_for() -> None:
    async def scene() -> list[str]:
        queue, order, first = FairQueue(most_waiting=3), [], threading.Event()

        async def ask(visitor: str, number: int) -> None:
            await queue.run(visitor, lambda: (first.wait(5), order.append(f"{visitor}{number}")))

        tasks = [asyncio.create_task(ask("greedy", number)) for number in range(4)]
        await asyncio.sleep(0.05)
        with pytest.raises(RunError, match="3 checks of yours are waiting already"):
            await queue.run("greedy", lambda: None)
        tasks += [asyncio.create_task(ask(visitor, 0)) for visitor in ("ada", "bob")]
        await asyncio.sleep(0.05)
        first.set()
        await asyncio.gather(*tasks)
        await queue.run("greedy", lambda: order.append("later"))
        return order

    order = asyncio.run(scene())
    assert order == ["greedy0", "greedy1", "ada0", "bob0", "greedy2", "greedy3", "later"]


def test_who_leaves_gives_the_turn_away_and_all_together_are_limited() -> None:
    async def scene() -> None:
        queue, first, done = FairQueue(most_waiting=5, most_in_all=2), threading.Event(), []
        working = asyncio.create_task(queue.run("a", lambda: first.wait(5)))
        await asyncio.sleep(0.02)
        leaver = asyncio.create_task(queue.run("b", lambda: done.append("b")))
        stayer = asyncio.create_task(queue.run("c", lambda: done.append("c")))
        await asyncio.sleep(0.02)
        with pytest.raises(RunError, match="Too many checks are waiting on this server"):
            await queue.run("d", lambda: None)
        leaver.cancel()
        await asyncio.sleep(0.02)
        first.set()
        await asyncio.gather(working, stayer)
        assert done == ["c"] and not queue._busy and not queue._waiting
        with pytest.raises(ZeroDivisionError):
            await queue.run("a", lambda: 1 / 0)
        assert not queue._busy, "the turn goes on after a failure"

    asyncio.run(scene())


# ---- streams and sessions -----------------------------------------------------------------------------------------------


def test_streams_of_one_visitor_and_of_all_are_limited() -> None:
    streams = Streams(most_of_one=2, most_in_all=3)
    with streams.listening("a"), streams.listening("a"):
        with pytest.raises(StreamsError, match=SENTENCE), streams.listening("a"):
            pass
        with streams.listening("b"), pytest.raises(StreamsError, match=FULL), streams.listening("c"):
            pass
    assert not streams._open


def test_a_visitor_who_opens_many_streams_leaves_room_for_others(server: AppServer) -> None:
    connections, codes = [], []
    for number in range(40):
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
        connection.request("GET", f"/gradio_api/heartbeat/s{number}")
        codes.append(connection.getresponse().status)
        connections.append(connection)
    assert codes == [200] * 24 + [429] * 16
    assert httpx.get(f"{server.url}/healthz").status_code == 200
    for connection in connections:
        connection.close()
    deadline = time.monotonic() + 20
    while httpx.get(f"{server.url}/gradio_api/upload_progress?upload_id=x", timeout=20).status_code != 200:
        assert time.monotonic() < deadline, "streams that are closed count no more"
        time.sleep(0.2)


def memory(server: AppServer) -> int:
    """Resident bytes."""
    pages = int(Path(f"/proc/{server.process.pid}/statm").read_text().split()[1])
    return pages * 4096


def test_requests_of_many_sessions_do_not_fill_the_memory(server: AppServer) -> None:
    config = httpx.get(f"{server.url}/config").json()
    event = max(config["dependencies"], key=lambda one: len(one["inputs"]))
    with httpx.Client(base_url=server.url, timeout=60) as client:
        grown = 0
        for number in range(150):
            data: list[Any] = [None] * len(event["inputs"])
            data[-1] = "x" * 100_000
            body = {"data": data, "fn_index": event["id"], "session_hash": f"session{number}"}
            client.post("/gradio_api/run/predict", json=body)
            if number == 20:
                grown = memory(server)
        assert memory(server) - grown < 12 * 2**20


def test_answers_that_nobody_fetches_are_limited(server: AppServer) -> None:
    config = httpx.get(f"{server.url}/config").json()
    event = next(one for one in config["dependencies"] if one["api_name"] == "status")
    body = {"data": ["0" * 32], "fn_index": event["id"], "session_hash": "hoarder"}
    codes = [httpx.post(f"{server.url}/gradio_api/queue/join", json=body).status_code for _ in range(40)]
    assert codes == [200] * 32 + [400] * 8
    assert "fetch them before" in httpx.post(f"{server.url}/gradio_api/queue/join", json=body).text
    body["session_hash"] = "another"
    assert httpx.post(f"{server.url}/gradio_api/queue/join", json=body).status_code == 200


def test_what_stays_on_the_page_is_not_built_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """One of twenty watchers waited 1.5 s when each look built fifty components."""
    with gr.Blocks() as page:
        parts = [gr.HTML(), gr.Textbox(), gr.Number()]
        parts[0].change(lambda: None, [], parts)
    skip_unchanged_outputs(page)
    (event,) = page.fns.values()
    stays, state = gr.skip(), _NoState(page)

    def built(*given: Any, **named: Any) -> None:
        raise AssertionError("a component was built")

    for kind in (gr.HTML, gr.Textbox):
        monkeypatch.setattr(kind, "__init__", built)
    run = lambda values: asyncio.run(page.postprocess_data(event, values, state))  # noqa: E731
    assert run([stays, stays, stays]) == [stays, stays, stays]
    assert run([stays, stays, 5]) == [stays, stays, 5]
    assert run([stays, "x", 5]) == [stays, "x", 5]
    assert run([stays, stays, gr.update(visible=False)]) == [stays, stays, {"visible": False, "__type__": "update"}]


# ---- what a visitor is told -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("endpoint", "given", "sentence"),
    [
        ("list", {"limit": 1.5}, "limit: got 1.5, expected a whole number."),
        ("list", {"limit": True}, "limit: got True, expected a whole number."),
        ("list", {"limit": "x" * 9000}, "expected a whole number."),
        ("status", {"job_id": 5}, "job_id: got 5, expected a text of up to 500 characters."),
        ("status", {"job_id": ["a"]}, "job_id: got 'list', expected a text"),
        ("status", {"job_id": "a" * 501}, "expected a text of up to 500 characters."),
        ("cancel", {"job_id": "a", "key": {"a": 1}}, "key: got 'dict', expected a text"),
        ("artifact", {"job_id": "a", "name": None}, "name: got 'NoneType', expected a text"),
        ("submit", {"model": "m" * 100_000}, "expected the name of a torchvision classifier"),
        ("submit", {"model": 5}, "model: got 5, expected the name of a torchvision classifier"),
        ("submit", {"seed": "x" * 100_000}, "seed: got "),
        ("submit", {"config_list": json.loads("[" * 40 + "]" * 40)}, "nests lists and objects more than 24 levels deep"),
    ],
)
def test_every_parameter_is_held_to_its_type_and_size(
    server: AppServer, endpoint: str, given: dict[str, Any], sentence: str
) -> None:
    answer = told(server, endpoint, **given)
    assert sentence in answer and len(answer) < 1200, answer[:2000]


def test_what_nobody_expected_is_one_sentence(caplog: pytest.LogCaptureFixture) -> None:
    def broken() -> None:
        raise KeyError("/srv/secret/place")

    async def broken_too() -> None:
        raise KeyError("/srv/secret/place")

    for run in (without_traceback(broken), lambda: asyncio.run(without_traceback(broken_too)())):
        with caplog.at_level(logging.ERROR), pytest.raises(gr.Error) as refused:
            run()
        assert refused.value.message == MISTAKE and "secret" in caplog.text
    with pytest.raises(gr.Error) as refused:
        without_traceback(lambda: (_ for _ in ()).throw(RequestError("a", 1, "b")))()
    assert refused.value.message == "a: got 1, expected b."


def test_an_event_of_the_page_with_nonsense_is_answered_with_a_sentence(server: AppServer) -> None:
    for event in httpx.get(f"{server.url}/config").json()["dependencies"]:
        if event["backend_fn"]:
            for value in (5, "x", None, ["a"], {"a": [1]}):
                body = {"data": [value] * len(event["inputs"]), "fn_index": event["id"], "session_hash": "s"}
                answer = httpx.post(f"{server.url}/gradio_api/run/predict", json=body, timeout=30)
                assert "Traceback" not in answer.text and '"error":null' not in answer.text.replace(" ", ""), body


def test_folders_of_the_server_are_nobodys_business() -> None:
    path = "/srv/app-data/runs/0123/uploads/checkpoint/my.pth"
    assert (
        without_folders(f"{path} could not be read: see {path}, '{path}'.")
        == "my.pth could not be read: see my.pth, 'my.pth'."
    )
    for kept in ("https://huggingface.co/a/b", "3/4 of 5/6", "layer1/conv", "and/or", "1 / 2", "</b></i>", "a/b/c.txt"):
        assert without_folders(kept) == kept


def test_a_failed_run_shows_no_traceback_and_no_folder(server: AppServer) -> None:
    queue = Queue(server.data)
    job_id = queue.submit(Request(**QUICK | {"model": "resnet152"}))
    wait(queue, job_id, "failed")
    assert "Traceback of interest" in queue.log_tail(job_id)
    config = httpx.get(f"{server.url}/config").json()
    context = json.dumps({"job": job_id})
    (event,) = [
        one
        for one in config["dependencies"]
        if "load" in [target[1] for target in one["targets"]] and len(one["inputs"]) == 1 and len(one["outputs"]) > 9
    ]
    body = {"data": [context], "fn_index": event["id"], "session_hash": "s"}
    shown = httpx.post(f"{server.url}/gradio_api/run/predict", json=body).text
    assert "This run failed" in shown and "Traceback" not in shown and str(server.data) not in shown
    assert str(server.data) not in told(server, "status", job_id=job_id)


def test_data_folders_are_the_owners_alone(tmp_path: Path) -> None:
    Folders(tmp_path / "data")
    for folder in (tmp_path / "data", *(tmp_path / "data").iterdir()):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700, folder
