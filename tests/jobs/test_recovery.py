"""A damaged run database: reported, read-only, never recreated silently, and rebuilt on request."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from app_server import AppServer
from gradio_client import Client
from gradio_client.exceptions import AppError
from queues import ENDLESS, QUICK, fake_command, wait, wait_for_stage
from typer.testing import CliRunner

from compress.cli.main import cli
from compress.errors import RunError, StorageError
from compress.jobs import Queue
from compress.jobs.database import RUN_ID
from compress.jobs.recovery import UNKNOWN
from compress.request import Request

pytestmark = pytest.mark.integration

JUNK = b"not a database, but as long as one" * 500
ADVICE = "restore a backup of it, or rebuild it from the folders of the runs: python -m compress jobs recover"


def damaged(data_dir: Path) -> tuple[str, str]:
    """A folder with a finished and a refused run, whose record is then overwritten; their ids."""
    with Queue(data_dir, command=fake_command) as queue:
        good = queue.submit(Request(**QUICK))
        bad = queue.submit(Request(model="resnet50", learning_rate=0.001))
        wait(queue, good, "done")
        wait(queue, bad, "failed")
    overwrite(data_dir)
    return good, bad


def overwrite(data_dir: Path) -> None:
    for name in ("queue.sqlite-wal", "queue.sqlite-shm"):
        (data_dir / name).unlink(missing_ok=True)
    (data_dir / "queue.sqlite").write_bytes(JUNK)


def test_a_damaged_record_is_told_and_left_alone(data_dir: Path) -> None:
    damaged(data_dir)
    with pytest.raises(StorageError, match=f"The run database .* is damaged .*{ADVICE}"):
        Queue(data_dir)
    assert (data_dir / "queue.sqlite").read_bytes() == JUNK


def test_read_only_shows_finished_runs_and_refuses_every_change(data_dir: Path) -> None:
    good, bad = damaged(data_dir)
    with Queue(data_dir, command=fake_command, read_only_when_damaged=True) as queue:
        assert "is damaged" in str(queue.trouble) and "no run can be started" in str(queue.trouble)
        assert {status.job_id: status.state for status in queue.list()} == {good: "done", bad: "failed"}
        assert queue.status(good).title == "resnet18 on fashion-mnist, 50 % pruned, 8 bits"
        assert queue.status(bad).error == UNKNOWN
        assert queue.artifact(good, "report.json").is_file()
        with pytest.raises(StorageError, match="is damaged.*no run can be started"):
            queue.submit(Request(**QUICK))
        with pytest.raises(StorageError, match="is damaged"):
            queue.resume(bad)
        with pytest.raises(RunError, match="There is no run with the id"):
            queue.status("../../etc")
    assert (data_dir / "queue.sqlite").read_bytes() == JUNK
    assert {path.name for path in (data_dir / "runs").glob(RUN_ID)} == {good, bad}


def test_a_record_that_is_gone_is_not_made_anew_beside_runs(data_dir: Path) -> None:
    damaged(data_dir)
    for empty in (False, True):
        (data_dir / "queue.sqlite").unlink()
        if empty:
            (data_dir / "queue.sqlite").touch()
        with pytest.raises(StorageError, match="is missing, but there are folders of runs beside it"):
            Queue(data_dir)
        (data_dir / "queue.sqlite").write_bytes(JUNK)


def test_every_page_of_the_record_that_is_damaged_is_found_or_does_no_harm(data_dir: Path) -> None:
    """Junk over each page in turn: it is told, or what is read is what was written."""
    queue = Queue(data_dir)
    ids = {queue.submit(Request(seed=seed)) for seed in range(12)}
    whole = (data_dir / "queue.sqlite").read_bytes()
    assert len(whole) >= 2 * 4096
    for page in range(0, len(whole), 4096):
        (data_dir / "queue.sqlite").write_bytes(whole[:page] + JUNK[:4096] + whole[page + 4096 :])
        try:
            assert {status.job_id for status in Queue(data_dir).list()} == ids, f"page at {page}"
        except StorageError as error:
            assert "is damaged" in str(error)


def test_recover_keeps_the_damaged_record_and_lists_every_run(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good, bad = damaged(data_dir)
    monkeypatch.setenv("ESPALIER_DATA", str(data_dir))
    told = CliRunner().invoke(cli, ["jobs", "recover"])
    assert told.exit_code == 0 and "The rebuilt database lists 2 runs. The damaged one is kept as" in told.output
    (aside,) = data_dir.glob("queue.sqlite.damaged-*")
    assert aside.read_bytes() == JUNK
    with Queue(data_dir, command=fake_command) as queue:
        assert queue.artifact(good, "report.json").is_file()
        queue.resume(bad)
        wait(queue, bad, "done")
    assert isinstance(CliRunner().invoke(cli, ["jobs", "recover"]).exception, RunError)


def test_recover_waits_until_nothing_works(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    queue = Queue(data_dir, command=fake_command).start()
    job_id = queue.submit(Request(**ENDLESS))
    wait_for_stage(queue, job_id, "finetune")
    child = queue._row(job_id).child
    assert child is not None
    queue.close()
    overwrite(data_dir)
    monkeypatch.setenv("ESPALIER_DATA", str(data_dir))
    refused = CliRunner().invoke(cli, ["jobs", "recover"])
    assert "is still active. Stop it first" in str(refused.exception)
    assert Queue(data_dir, read_only_when_damaged=True).status(job_id).state == "running"
    os.killpg(child.pid, signal.SIGKILL)


@pytest.fixture
def server(data_dir: Path) -> Iterator[AppServer]:
    damaged(data_dir)
    server = AppServer(data_dir)
    yield server
    server.close()


def test_the_app_starts_read_only_with_a_banner(server: AppServer) -> None:
    health = httpx.get(f"{server.url}/healthz")
    assert health.status_code == 503 and "is damaged" in health.json()["reason"]
    (good,) = [path.parent.name for path in server.data.glob("runs/*/manifest.json")]
    assert httpx.get(f"{server.url}/runs/{good}/files/report.json").status_code == 200
    client = Client(server.url, verbose=False)
    assert client.predict(good, api_name="/status")["state"] == "done"
    with pytest.raises(AppError, match="is damaged.*no run can be started"):
        client.predict(**QUICK, api_name="/submit")
    config = httpx.get(f"{server.url}/config").json()
    (banner,) = [part["id"] for part in config["components"] if part["props"].get("elem_id") == "banner"]
    (event,) = [event["id"] for event in config["dependencies"] if event["outputs"] == [banner]]
    begun = httpx.post(
        f"{server.url}/gradio_api/run/predict", json={"fn_index": event, "data": [], "session_hash": "x"}
    )
    assert 'role="alert"' in begun.json()["data"][0] and "is damaged" in begun.json()["data"][0]
    assert (server.data / "queue.sqlite").read_bytes() == JUNK
