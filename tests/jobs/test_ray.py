"""What is refused before a run goes to a cluster, what travels there, and what a node refuses; without Ray."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from queues import QUICK, fake_command, wait
from typer.testing import CliRunner

from compress import __version__, processes, signing
from compress.cli.main import cli
from compress.errors import RequestError, RunError
from compress.jobs import Queue, ray_node
from compress.jobs import ray as job_ray
from compress.jobs.executor import Executor
from compress.jobs.ray import Attempt, Cluster, cluster_command
from compress.jobs.ray_node import Ended, Order
from compress.request import Request
from compress.ui.web.settings import Settings

pytestmark = pytest.mark.integration

ADDRESS = "10.0.0.1:6379"
NODE = platform.node()


@pytest.mark.parametrize("address", ["auto", "local", "ray://10.0.0.1:10001", "10.0.0.1", "a b:1", "10.0.0.1:6379; ls"])
def test_only_the_address_of_a_running_cluster_is_taken(address: str) -> None:
    with pytest.raises(RequestError, match="cluster: got .*, expected HOST:PORT of a running cluster's head"):
        Cluster(address)


def test_what_no_run_can_use_is_refused() -> None:
    with pytest.raises(RequestError, match="cluster-cpus: got 0, expected a whole number from 1 to 1024"):
        Cluster(ADDRESS, cpus=0)
    with pytest.raises(
        RequestError, match="cluster-gpus: got 1.5, expected a number from 0 to 1, or a whole number up to 64"
    ):
        Cluster(ADDRESS, gpus=1.5)
    assert Cluster("[fd00::1]:6379", gpus=0.5).gpus == 0.5 and Cluster(ADDRESS, gpus=4.0).gpus == 4


def test_the_queue_starts_the_shell_command_of_the_same_run(tmp_path: Path) -> None:
    settings = Settings.from_environment(
        {"ESPALIER_CLUSTER": ADDRESS, "ESPALIER_CLUSTER_CPUS": "4", "ESPALIER_CLUSTER_GPUS": "0.5"}
    )
    words = settings.queue_limits["command"](tmp_path, True)
    assert words[:5] == [sys.executable, "-P", "-m", "compress", "run"]
    assert words[-7:] == ["--resume", "--cluster", ADDRESS, "--cluster-cpus", "4", "--cluster-gpus", "0.5"]
    assert list(cluster_command(Cluster(ADDRESS, 4, 0.5))(tmp_path, True)) == words
    assert "RAY_AUTH_TOKEN" in settings.queue_limits["passes"]
    assert "command" not in Settings().queue_limits


def test_only_the_child_that_submits_gets_the_token(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", "canary")
    for passes, expected in ((job_ray.ENVIRONMENT, True), ((), False)):
        with Queue(data_dir, command=fake_command, passes=passes) as queue:
            job_id = queue.submit(Request(**QUICK))
            wait(queue, job_id, "done")
        assert ("canary" in (queue.folder(job_id) / "environ.json").read_text()) is expected


def test_runs_may_lie_on_another_disk_than_their_record(data_dir: Path, tmp_path: Path) -> None:
    shared = tmp_path / "shared" / "runs"
    shared.mkdir(parents=True)
    stranger = tmp_path / "shared" / "deleted" / ("0" * 32)
    stranger.mkdir(parents=True)
    data_dir.mkdir()
    (data_dir / "runs").symlink_to(shared)
    with Queue(data_dir, command=fake_command) as queue:
        job_id = queue.submit(Request(**QUICK))
        wait(queue, job_id, "done")
        assert queue.artifact(job_id, "report.json") == shared / job_id / "report.json"
        queue.delete(job_id)
    assert list(shared.rglob("*")) == [shared / ".deleted"] and stranger.is_dir()


def test_without_ray_the_remedy_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    result = CliRunner().invoke(cli, ["run", "--cluster", ADDRESS, "--out", str(tmp_path / "run")])
    assert isinstance(result.exception, RunError)
    assert str(result.exception) == (
        "Ray is not installed, so no cluster can be used: pip install -r requirements-cluster.txt."
    )


def test_files_named_relative_to_this_folder_are_named_for_every_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("weights.pth", "auto", "photos"):
        (tmp_path / name).touch()
    request = job_ray._with_absolute_paths(Request(checkpoint="weights.pth", data="photos"))
    assert (request.checkpoint, request.data) == (str(tmp_path / "weights.pth"), str(tmp_path / "photos"))
    unchanged = Request(checkpoint="auto", data="fashion-mnist")
    assert job_ray._with_absolute_paths(unchanged) == unchanged


@pytest.fixture
def order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Order:
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    signing.prepare()
    text = Request().to_json()
    (tmp_path / "request.json").write_text(text)
    return Order(str(tmp_path), text, __version__, signing.fingerprint(), fake_command)


def test_a_node_that_fits_has_no_objection(order: Order) -> None:
    assert ray_node.why_unfit(order) is None


def test_a_node_refuses_what_it_would_do_wrongly(order: Order, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refusal(**changed: str) -> str | None:
        return ray_node.why_unfit(dataclasses.replace(order, **changed))

    assert refusal(version="9.9") == (
        f"The node {NODE} has Espalier {__version__}, not 9.9: install the same version on every node."
    )
    assert refusal(folder="/nowhere") == (
        f"The node {NODE} cannot see the run in /nowhere: use a folder that all nodes share."
    )
    assert "cannot see the run" in str(refusal(request="{}")), "another folder of the same name"
    assert refusal(key="0" * 16) == (
        f"The node {NODE} signs results with a different key: set ESPALIER_SIGNING_KEY to the same file on every node."
    )
    monkeypatch.setenv("ESPALIER_SIGNING_KEY", str(tmp_path / "none.key"))
    assert "signs results with a different key" in str(refusal())
    assert not (tmp_path / "none.key").exists(), "a node makes no key of its own"
    monkeypatch.delenv("RAY_AUTH_MODE")
    assert refusal() == (
        f"The node {NODE} accepts unauthenticated connections: start Ray with RAY_AUTH_MODE=token on every node, see "
        "docs/cluster.md."
    )
    assert ray_node.execute(order).console.startswith("Error: The node"), "and starts nothing"


def test_a_node_carries_the_order_out_and_tells_how_it_ended(order: Order, tmp_path: Path) -> None:
    folder = tmp_path / "data" / "runs" / "one"
    folder.mkdir(parents=True)
    text = Request(model="resnet152").to_json()
    (folder / "request.json").write_text(text)
    ended = ray_node.execute(dataclasses.replace(order, folder=str(folder), request=text))
    assert ended.returncode == 1
    assert ended.console.endswith("Error: The runtime tensorrt is not installed here: choose another.\n")


def test_a_node_needs_no_temporary_folder(order: Order, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", "/nowhere")
    ended = ray_node.execute(dataclasses.replace(order, command=lambda folder, resume: ["echo", "hello"]))
    assert ended == Ended(0, "hello\n")


def test_a_folder_that_is_lost_does_not_hold_up_a_cancellation(tmp_path: Path) -> None:
    cancelled = []
    ray = SimpleNamespace(cancel=lambda task, force: cancelled.append((task, force)), wait=lambda *_, **__: ([], []))
    Attempt(ray, "task", tmp_path / "lost").cancel()
    assert cancelled == [("task", True)]


@pytest.mark.parametrize(
    ("events", "working"),
    [
        ([], True),
        ([{"stage": "baseline"}], True),
        ([{"state": "submitted", "time": 0.0}], False),
        ([{"state": "submitted", "time": 0.0}, {"state": "started", "time": 1.0}], True),
    ],
)
def test_an_attempt_works_from_its_start_unless_it_waits_for_a_node(
    tmp_path: Path, events: list[dict[str, object]], working: bool
) -> None:
    path, before = tmp_path / "events.jsonl", b'{"state": "submitted", "time": 0.0}\n'
    path.write_bytes(before + b"".join(json.dumps(event).encode() + b"\n" for event in events) + b'{"half')
    me = processes.identify(os.getpid())
    assert me is not None
    worked_s = Executor().worked_s(me, path, len(before))
    assert worked_s == pytest.approx(processes.age_s(me) if working else 0.0, abs=0.5)
    path.write_text(json.dumps({"state": "started", "time": time.time()}))
    assert Executor().worked_s(me, path, 0) < 0.5 < Executor().worked_s(me, tmp_path / "none", 0)
