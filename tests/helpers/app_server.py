"""Starts and ends the web app in a process of its own, as a user would."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
from places import ROOT

from compress import processes

HERE = Path(__file__).parent
FAKE = [sys.executable, str(HERE / "serve_fake.py")]
REAL = [sys.executable, str(ROOT / "app.py")]


class AppServer:
    """The app on a free port of this machine; `real` carries out real runs, else see fake_run.py."""

    def __init__(self, data: Path, *, real: bool = False, **environ: str) -> None:
        self.data, self.real, self.environ = data, real, environ
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.start()

    def start(self) -> None:
        """Returns when the app answers."""
        words = REAL if self.real else [*FAKE, str(self.data), str(self.port)]
        environ = {**os.environ, **self.environ, "ESPALIER_DATA": str(self.data), "ESPALIER_PORT": str(self.port)}
        self.data.mkdir(parents=True, exist_ok=True)
        with (self.data / "server.txt").open("ab") as output:
            self.process = subprocess.Popen(words, env=environ, cwd=self.data, stdout=output, stderr=output)
        deadline = time.monotonic() + 90
        while not self.answers():
            printed = (self.data / "server.txt").read_text()
            assert self.process.poll() is None and time.monotonic() < deadline, f"the app did not start:\n{printed}"
            time.sleep(0.1)

    def answers(self) -> bool:
        try:
            return httpx.get(f"{self.url}/healthz", timeout=5).status_code in (200, 503)
        except httpx.TransportError:
            return False

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def close(self) -> None:
        """Ends the app and every run that it left."""
        self.kill()
        for pid in processes._pids():
            if any(str(self.data).encode() in word for word in processes._arguments(pid)) and pid != os.getpid():
                os.kill(pid, signal.SIGKILL)
