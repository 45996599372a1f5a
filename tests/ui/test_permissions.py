"""Who may change a run on a server that others reach: its key or its login, never its link alone."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from app_server import AppServer
from gradio_client import Client
from gradio_client.exceptions import AppError
from playwright.sync_api import Browser, expect
from test_api_client import ENDLESS, QUICK, wait
from test_app_browser import choose_model, compress, open_start, watched

from compress import signing
from compress.errors import RunError
from compress.jobs import Queue
from compress.jobs.retention import Limits
from compress.request import Request
from compress.ui.views.runs import keeping
from compress.ui.web.permissions import REFUSAL, Permissions, run_key
from compress.ui.web.settings import Settings

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AppServer]:
    folder = tmp_path_factory.mktemp("reached")
    server = AppServer(folder, ESPALIER_ALLOWED_HOSTS="app.example", ESPALIER_KEEP_DAYS="30", ESPALIER_MAX_DISK_GB="1")
    yield server
    server.close()


def test_a_key_belongs_to_one_run_and_one_installation(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    first, second = run_key("a" * 32), run_key("b" * 32)
    assert re.fullmatch(r"[0-9a-f]{32}", first) and first != second and first == run_key("a" * 32)
    assert signing.token("something else", "a" * 32) != first
    monkeypatch.setenv("ESPALIER_SIGNING_KEY", str(tmp_path / "another.key"))
    assert run_key("a" * 32) != first


@pytest.mark.parametrize(
    ("settings", "stranger"),
    [
        ({}, True),
        ({"allowed_hosts": ("app.example",)}, False),
        ({"host": "0.0.0.0"}, False),
        ({"accounts": (("ada", "longenough"),)}, False),
    ],
)
def test_who_may_change_a_run(tmp_path: Path, settings: dict, stranger: bool) -> None:
    queue = Queue(tmp_path)
    job_id = queue.submit(Request(), owner="ada")
    rights = Permissions(queue, Settings(data=tmp_path, **settings))
    assert rights.may_change(job_id, "", "") is stranger
    assert rights.may_change(job_id, "", "bob") is stranger
    assert rights.may_change(job_id, "ä" * 32, "") is stranger
    assert rights.may_change(job_id, "\ud800", "") is stranger, "half of a surrogate pair, which JSON can carry"
    assert rights.may_change(job_id, run_key("0" * 32), "") is stranger
    assert rights.may_change(job_id, run_key(job_id), "") is True
    assert rights.may_change(job_id, "", "ada") is True
    nobodys = queue.submit(Request())
    assert rights.may_change(nobodys, "", "") is stranger, "an empty login is nobody's"
    with pytest.raises(RunError, match="There is no run with the id"):
        rights.refuse("0" * 32, "", "")


def test_the_api_changes_a_run_with_its_key_alone(server: AppServer) -> None:
    client = Client(server.url, verbose=False)
    job = client.predict(**ENDLESS, api_name="/submit")
    wait(client, job["job_id"], "running")
    for key in ("", "0" * 32, run_key("0" * 32)):
        with pytest.raises(AppError) as refused:
            client.predict(job["job_id"], key, api_name="/cancel")
        assert str(refused.value) == REFUSAL
    assert "key" not in client.predict(job["job_id"], api_name="/status")
    assert client.predict(job["job_id"], job["key"], api_name="/cancel")["state"] == "cancelled"
    with pytest.raises(AppError, match="Only the person who started this run may change it"):
        client.predict(job["job_id"], api_name="/resume")
    assert client.predict(job["job_id"], key=job["key"], api_name="/resume")["state"] in ("queued", "running")
    wait(client, job["job_id"], "done")


def test_no_answer_tells_the_key_to_who_has_the_link(server: AppServer) -> None:
    client = Client(server.url, verbose=False)
    job = client.predict(**QUICK, api_name="/submit")
    wait(client, job["job_id"], "done")
    for path in ("config", f"?job={job['job_id']}", "gradio_api/info"):
        assert job["key"] not in httpx.get(f"{server.url}/{path}").text
    for file in client.predict(job["job_id"], api_name="/status")["files"]:
        assert job["key"].encode() not in httpx.get(f"{server.url}/{file['url']}").content


@pytest.mark.browser
def test_a_shared_link_shows_a_run_and_changes_nothing(browser: Browser, server: AppServer) -> None:
    queue = Queue(server.data)
    with browser.new_context() as own, browser.new_context() as foreign:
        page, other = watched(own, server.url), watched(foreign, server.url)
        open_start(page, server.url)
        choose_model(page, "resnet34")
        job_id = compress(page)
        expect(page.locator(".now")).to_contain_text("Training the smaller model", timeout=60_000)
        other.goto(f"{server.url}/?job={job_id}")
        expect(other.locator(".now")).to_contain_text("Training the smaller model", timeout=60_000)
        expect(other.locator(".run-head")).to_contain_text("begun by somebody else")
        expect(other.get_by_role("button", name="Cancel the run")).to_be_hidden()
        expect(other.get_by_role("button", name="Rename, keep or delete")).to_be_hidden()
        expect(other.get_by_role("link", name="Change and run again")).to_be_visible()
        page.reload()
        expect(page.get_by_role("button", name="Cancel the run")).to_be_visible(timeout=60_000)
        assert "begun by somebody else" not in page.locator(".run-head").inner_text()
        page.get_by_role("button", name="Cancel the run").click()
        expect(page.locator(".badge")).to_have_text("Cancelled", timeout=30_000)
        page.get_by_role("button", name="Rename, keep or delete").click()
        expect(page.locator("#run")).to_contain_text(
            "This server removes runs 30 days after they ended, and the oldest runs as soon as all together take more than 1 GB"
        )
        page.get_by_role("button", name="Keep the run").click()
        expect(page.locator(".run-head")).to_contain_text("· kept", timeout=30_000)
        assert queue.is_kept(job_id)
        page.get_by_role("button", name="Stop keeping it").click()
        expect(page.get_by_role("button", name="Keep the run")).to_be_visible(timeout=30_000)
        assert not queue.is_kept(job_id)
        assert page.trouble == other.trouble == []


def test_a_forged_event_of_the_page_changes_nothing(server: AppServer) -> None:
    """The page's own events are reached through HTTP as well, whatever buttons it shows."""
    client = Client(server.url, verbose=False)
    job_id = client.predict(**QUICK, api_name="/submit")["job_id"]
    wait(client, job_id, "done")
    config = httpx.get(f"{server.url}/config").json()
    ids = {c["props"].get("elem_id"): c["id"] for c in config["components"]}
    for button in ("delete", "keep", "rename"):
        (event,) = [d for d in config["dependencies"] if [ids[button], "click"] in [list(t) for t in d["targets"]]]
        data = [job_id, "", "light wide", "renamed"][: len(event["inputs"])]
        answer = httpx.post(
            f"{server.url}/gradio_api/run/predict", json={"fn_index": event["id"], "data": data, "session_hash": "x"}
        )
        assert answer.status_code == 200 and REFUSAL in json.dumps(answer.json()), button
    queue = Queue(server.data)
    assert (queue.status(job_id).title, queue.is_kept(job_id)) == (
        "resnet18 on fashion-mnist, 50 % pruned, 8 bits",
        False,
    )


def test_when_runs_are_removed_is_told_in_one_sentence() -> None:
    assert keeping(Limits()) == ""
    assert "removes runs 1 day after they ended; never" in keeping(Limits(keep_days=1))
    assert "removes the oldest runs as soon as all together take more than 5 GB; never" in keeping(
        Limits(None, 5 * 10**9)
    )
