"""The examples of docs/http-api.md as they stand there, against the real server: what is printed there has to work."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from app_server import AppServer
from places import ROOT

from compress.jobs import Queue

pytestmark = pytest.mark.integration

PAGE = ROOT / "docs" / "http-api.md"
ADDRESS = "http://127.0.0.1:7860"


def example(language: str) -> str:
    """The one code block of the page in `language`."""
    (block,) = re.findall(rf"^```{language}\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    assert block.count(ADDRESS) == 1
    return block


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AppServer]:
    server = AppServer(tmp_path_factory.mktemp("readme"))
    yield server
    server.close()


def latest(server: AppServer) -> tuple[str, str]:
    """(id, sha256 of report.json) of the newest run, which has to be done."""
    queue = Queue(server.data)
    status = queue.list(1)[0]
    assert (status.state, status.title) == ("done", "resnet18 on fashion-mnist, 50 % pruned, 8 bits")
    return status.job_id, queue.artifacts(status.job_id)["report.json"]["sha256"]


def test_the_python_example(server: AppServer, capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(example("python").replace(ADDRESS, server.url), PAGE.name, "exec"), {})
    job_id, digest = latest(server)
    assert capsys.readouterr().out.split() == ["done", f"runs/{job_id}/files/report.json", digest]


@pytest.mark.skipif(shutil.which("curl") is None, reason="the example uses curl, which is not installed here")
def test_the_plain_http_example(server: AppServer, tmp_path: Path) -> None:
    script = example("sh").replace(ADDRESS, server.url)
    ended = subprocess.run(["bash", "-euo", "pipefail", "-c", script], cwd=tmp_path, timeout=60, capture_output=True)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, b"", b"")
    job_id, _ = latest(server)
    received, written = tmp_path / "report.json", server.data / "runs" / job_id / "report.json"
    assert received.read_bytes() == written.read_bytes() and json.loads(received.read_text())["verdict"]
