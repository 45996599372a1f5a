"""What holds for a run wherever it works: as a child of this machine, and on a Ray cluster of several nodes on this machine.

Ray comes with requirements-cluster.txt; where it is not installed, its half is skipped.
"""

from __future__ import annotations

import importlib.util
import json
import os
import secrets
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from example_report import example_report
from places import PYTHONPATH, TESTS
from queues import ENDLESS, QUICK, child_of, fake_command, staged_command, wait, wait_for_stage
from staged_run import STAGES, seed_of

from compress import processes
from compress.jobs import Queue, Status, ray
from compress.jobs.executor import Command
from compress.request import Request

pytestmark = pytest.mark.integration

LOOPBACK = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
"""Set to 0, Ray connects to a cluster on 127.0.0.1 by that address; then nothing of it listens on others."""
NODE = {"num_cpus": 1, "node_ip_address": "127.0.0.1"}
PATIENCE_S = 60
"""For a run to begin on the cluster: its processes share the cores of this machine with the tests."""


class Local:
    """Runs as children of this process."""

    def options(self, command: Command) -> dict[str, Any]:
        return {"command": command}

    def executor_of(self, queue: Queue, job_id: str) -> int:
        """The process whose death takes the run along."""
        return child_of(queue, job_id).pid


class OnRay:
    """Runs on a node with one CPU beside a head with none; the queue's child submits them."""

    def __init__(self, ray_cluster: Any) -> None:
        self.ray_cluster = ray_cluster

    def options(self, command: Command, cpus: int = 1, gpus: float = 0.0) -> dict[str, Any]:
        def child(folder: Path, resume: bool) -> list[str]:
            words = [sys.executable, str(TESTS / "helpers" / "cluster_child.py"), self.ray_cluster.address, str(cpus), str(gpus)]
            return [*words, command.__name__, str(folder), str(folder / "request.json"), *["--resume"] * resume]

        return {"command": child, "passes": (*ray.ENVIRONMENT, "PYTHONPATH", LOOPBACK)}

    def executor_of(self, queue: Queue, job_id: str) -> int:
        """The worker of Ray above the supervisor."""
        supervisors = [pid for pid in pids_of(queue.folder(job_id)) if b"compress.jobs.supervisor" in processes._arguments(pid)]
        holders = {parent_of(pid) for pid in supervisors} - set(supervisors)
        assert len(holders) == 1, "one attempt at a time"
        return holders.pop()

    def kill_node(self, raylet: int) -> None:
        """Kills all processes of a node and reaps them: workers take a zombie for a raylet that lives."""
        nodes = self.ray_cluster.worker_nodes
        node = next(n for n in nodes if raylet in [info.process.pid for info in n.all_processes["raylet"]])
        self.ray_cluster.remove_node(node, allow_graceful=False)


@pytest.fixture(scope="module")
def on_ray() -> Iterator[OnRay]:
    if importlib.util.find_spec("ray") is None:
        pytest.skip("Ray is not installed: pip install -r requirements-cluster.txt")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "token")
        patch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv(LOOPBACK, "0")
        patch.setenv("PYTHONPATH", PYTHONPATH)
        from ray.cluster_utils import Cluster

        made = Cluster(initialize_head=True, head_node_args=NODE | {"num_cpus": 0, "include_dashboard": False})
        try:
            made.add_node(**NODE)
            yield OnRay(made)
        finally:
            for node in [*made.worker_nodes, made.head_node]:
                node.kill_all_processes(check_alive=False, allow_graceful=False)


@pytest.fixture(params=["local", "ray"])
def where(request: pytest.FixtureRequest) -> Local | OnRay:
    return Local() if request.param == "local" else request.getfixturevalue("on_ray")


@dataclass
class Contract:
    """A queue at a place, and what tests do to it."""

    where: Local | OnRay
    data_dir: Path

    def queue(self, command: Command = fake_command, **options: Any) -> Queue:
        return Queue(self.data_dir, **self.where.options(command), **options)

    def nothing_lives_of(self, queue: Queue, job_id: str) -> bool:
        return pids_of(queue.folder(job_id)) == []


@pytest.fixture
def contract(where: Local | OnRay, data_dir: Path) -> Contract:
    data_dir.mkdir()
    (data_dir / "points").mkdir()
    (data_dir / "example-report.json").write_text(example_report().to_json())
    return Contract(where, data_dir)


def pids_of(folder: Path) -> list[int]:
    """Processes that were started with the run's folder as an argument: of the queue, of the node, and the run itself."""
    return [pid for pid in processes._pids() if any(str(folder).encode() in word for word in processes._arguments(pid))]


def parent_of(pid: int) -> int:
    fields = processes._stat(pid)
    assert fields is not None
    return int(fields[1])


def until(true: Callable[[], bool], what: str, seconds: float = PATIENCE_S) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.05)


def works(queue: Queue, job_id: str) -> Status:
    """The run after it has begun to fine-tune."""
    until(lambda: queue.status(job_id).stage is not None or queue.status(job_id).state == "failed", "the run begins")
    return wait_for_stage(queue, job_id, "finetune")


def test_a_run_is_carried_out_and_gives_out_its_files(contract: Contract) -> None:
    with contract.queue() as queue:
        job_id = queue.submit(Request(**QUICK))
        assert wait(queue, job_id, "done", "failed", seconds=PATIENCE_S).error is None
        assert queue.artifact(job_id, "artifacts/quantized.onnxruntime.onnx").is_file()
        assert "report: done" in queue.log_tail(job_id)
        until(lambda: contract.nothing_lives_of(queue, job_id), "its processes end", 10)


def test_progress_reaches_the_run_database(contract: Contract) -> None:
    with contract.queue() as queue:
        job_id = queue.submit(Request(**ENDLESS))
        status = works(queue, job_id)
        assert (status.state, status.stage_index, status.stage_fraction) == ("running", 3, 0.42)
        assert (status.seconds_left, status.message) == (75.0, "epoch 1 of 2, loss 0.31")
        queue.cancel(job_id)


@pytest.mark.parametrize("model", ["resnet34", "mobilenet_v2"])
def test_cancel_leaves_no_process_after_five_seconds_and_the_run_can_be_resumed(contract: Contract, model: str) -> None:
    """mobilenet_v2 does not listen to SIGTERM and has a child."""
    with contract.queue() as queue:
        job_id = queue.submit(Request(model=model, learning_rate=0.001))
        works(queue, job_id)
        grandchild = queue.folder(job_id) / "grandchild"
        begin = time.monotonic()
        assert queue.cancel(job_id).state == "cancelled"
        assert time.monotonic() - begin < 5
        assert contract.nothing_lives_of(queue, job_id)
        left = processes._stat(int(grandchild.read_text())) if grandchild.exists() else None
        assert left is None or left[0] in processes.DEAD, "a zombie waits for init alone"
        queue.resume(job_id)
        assert wait(queue, job_id, "done", "failed", seconds=PATIENCE_S).error is None


@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        ("resnet50", "The loss is not a number in epoch 1: choose a smaller learning_rate than <b>0.04</b>."),
        ("resnet152", "The runtime tensorrt is not installed here: choose another."),
        (
            "resnet101",
            "The run was interrupted. Its process was killed (signal 9, often because the machine ran out of memory). "
            "Resume it: finished stages are not repeated.",
        ),
    ],
)
def test_why_a_run_failed_is_told_in_the_same_words(contract: Contract, model: str, sentence: str) -> None:
    with contract.queue() as queue:
        job_id = queue.submit(Request(model=model, learning_rate=0.001))
        status = wait(queue, job_id, "done", "failed", seconds=PATIENCE_S)
        assert (status.state, status.error, status.resumable) == ("failed", sentence, True)
        assert model != "resnet152" or "Traceback of interest" in queue.log_tail(job_id)


def test_a_run_sees_no_secret(contract: Contract, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "canary")
    with contract.queue() as queue:
        job_id = queue.submit(Request(**QUICK))
        wait(queue, job_id, "done", seconds=PATIENCE_S)
        seen = json.loads((queue.folder(job_id) / "environ.json").read_text())
        assert "canary" not in json.dumps(seen) and not [name for name in seen if name.startswith("RAY_AUTH")]


def test_a_killed_worker_costs_one_stage_at_most(contract: Contract) -> None:
    """A run of this machine is interrupted and resumed by hand; on a cluster it goes on by itself."""
    with contract.queue(staged_command) as queue:
        job_id = queue.submit(Request(seed=seed_of("quantize", "middle")))
        reached = contract.data_dir / "points" / f"{job_id}.reached"
        until(reached.exists, "the run is in the middle of a stage")
        os.kill(contract.where.executor_of(queue, job_id), signal.SIGKILL)
        if wait(queue, job_id, "done", "failed", seconds=PATIENCE_S).state == "failed":
            assert isinstance(contract.where, Local), queue.status(job_id).error
            queue.resume(job_id)
        assert wait(queue, job_id, "done", "failed", seconds=PATIENCE_S).error is None
        carried_out = (contract.data_dir / "points" / f"{job_id}.done").read_text().split()
        assert sorted(carried_out) == sorted([*STAGES, "quantize"])
        until(lambda: contract.nothing_lives_of(queue, job_id), "its processes end", 10)


def test_a_node_that_dies_costs_one_stage_at_most(on_ray: OnRay, data_dir: Path) -> None:
    (data_dir / "points").mkdir(parents=True)
    on_ray.ray_cluster.add_node(**NODE)
    with Queue(data_dir, **on_ray.options(staged_command)) as queue:
        job_id = queue.submit(Request(seed=seed_of("export", "middle")))
        until((data_dir / "points" / f"{job_id}.reached").exists, "the run is in the middle of a stage")
        on_ray.kill_node(parent_of(on_ray.executor_of(queue, job_id)))
        assert wait(queue, job_id, "done", "failed", seconds=120).error is None
        carried_out = (data_dir / "points" / f"{job_id}.done").read_text().split()
        assert sorted(carried_out) == sorted([*STAGES, "export"])
        until(lambda: pids_of(queue.folder(job_id)) == [], "its processes end", 10)


@pytest.mark.parametrize("model", ["resnet34", "mobilenet_v2"])
def test_a_run_ends_when_the_process_that_submitted_it_is_killed(on_ray: OnRay, data_dir: Path, model: str) -> None:
    """As a queue does with one that has not cancelled its run in time."""
    with Queue(data_dir, **on_ray.options(fake_command)) as queue:
        job_id = queue.submit(Request(model=model, learning_rate=0.001))
        works(queue, job_id)
        os.kill(child_of(queue, job_id).pid, signal.SIGKILL)
        assert "interrupted" in str(wait(queue, job_id, "failed").error)
        until(lambda: pids_of(queue.folder(job_id)) == [], "the processes on the cluster end", 15)
        queue.resume(job_id)
        assert wait(queue, job_id, "done", "failed", seconds=PATIENCE_S).error is None


def test_waiting_for_a_node_is_not_working(on_ray: OnRay, data_dir: Path, tmp_path: Path) -> None:
    limited = on_ray.options(fake_command) | {"max_seconds": 5}
    with Queue(data_dir, **on_ray.options(fake_command)) as other, Queue(tmp_path / "limited", **limited) as queue:
        first = other.submit(Request(**ENDLESS))
        works(other, first)
        job_id = queue.submit(Request(**ENDLESS))
        wait(queue, job_id, "running")
        until(lambda: processes.age_s(child_of(queue, job_id)) > 7, "it has waited longer than it may work")
        assert queue.status(job_id).state == "running"
        other.cancel(first)
        works(queue, job_id)
        assert str(wait(queue, job_id, "failed", seconds=PATIENCE_S).error).startswith(
            "The run was stopped because it exceeded the time limit of 0.0833333 minutes of this server."
        )


def test_a_run_that_no_node_could_execute_is_refused(on_ray: OnRay, data_dir: Path) -> None:
    with Queue(data_dir, **on_ray.options(fake_command, gpus=1)) as queue:
        status = wait(queue, queue.submit(Request(**QUICK)), "failed", "done", seconds=PATIENCE_S)
    assert status.error == (
        f"No node of the cluster {on_ray.ray_cluster.address} has the 1 CPU and 1 GPU of a run (its nodes have: "
        "0 CPUs and 0 GPUs; 1 CPU and 0 GPUs). Request less, or add such a node."
    )


def test_nobody_gets_in_without_the_token(on_ray: OnRay, data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
    with Queue(data_dir, **on_ray.options(fake_command)) as queue:
        status = wait(queue, queue.submit(Request(**QUICK)), "failed", "done", seconds=PATIENCE_S)
    error = str(status.error)
    assert error.startswith(f"This machine cannot join the cluster {on_ray.ray_cluster.address} (ConnectionError: ")
    assert "Either the token is wrong (RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH), or this machine" in error


def test_a_run_whose_node_has_no_memory_left_is_not_begun_for_ever(on_ray: OnRay, data_dir: Path) -> None:
    """Ray itself would begin it again without end."""
    scarce = {"RAY_memory_usage_threshold": "0.0", "RAY_memory_monitor_refresh_ms": "100"}
    on_ray.ray_cluster.add_node(**NODE | {"num_cpus": 2}, env_vars=scarce)
    with Queue(data_dir, **on_ray.options(fake_command, cpus=2)) as queue:
        status = wait(queue, queue.submit(Request(**ENDLESS)), "failed", "done", seconds=120)
    assert status.error == (
        "The run was ended 3 times because its node ran out of memory. Reserve more CPUs for a run (cluster-cpus), so that "
        "fewer runs share a node, then resume it: finished stages are not repeated."
    )
