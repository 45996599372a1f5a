"""How quick the web app is: first paint, until it can be used, bytes, and the status of a run under many watchers.

    python -m bench.app [--visits 5] [--watchers 20] [--seconds 20]

The app is started as by hand, on this machine's loopback. Each visit is of a browser that has never been there; the
watchers ask once a second through HTTP, as a page does, while the bundled example is being compressed.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import numpy as np
from playwright.sync_api import Browser, sync_playwright

from bench import made_on

APP = Path(__file__).resolve().parents[1] / "app.py"
CHROMIUM = Path("/usr/bin/chromium")
ENDPOINT = "gradio_api/call/v2"


@contextmanager
def served() -> Iterator[str]:
    """The address of the app, with an empty data folder; its runs end with it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryDirectory() as folder:
        environ = {**os.environ, "ESPALIER_DATA": folder, "ESPALIER_PORT": str(port)} | {
            "ESPALIER_REQUESTS_PER_MIN": "1000000"  # all watchers have one address here
        }
        process = subprocess.Popen([sys.executable, str(APP)], env=environ, stdout=subprocess.DEVNULL)
        try:
            while not _healthy(url):
                time.sleep(0.2)
            yield url
        finally:
            process.terminate()
            process.wait()


def _healthy(url: str) -> bool:
    try:
        return httpx.get(f"{url}/healthz").is_success
    except httpx.TransportError:
        return False


def visit(browser: Browser, url: str) -> dict[str, float]:
    """Milliseconds to the first paint and until the estimate is drawn, and bytes transferred until then."""
    with browser.new_context(viewport={"width": 1280, "height": 900}) as context:
        page = context.new_page()
        start = time.perf_counter()
        page.goto(url)
        page.locator(".meaning").wait_for(timeout=30_000)
        usable = 1000 * (time.perf_counter() - start)
        paint = page.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime")
        sent = page.evaluate(
            "['navigation', 'resource'].flatMap(kind => performance.getEntriesByType(kind))"
            ".reduce((sum, entry) => sum + entry.transferSize, 0)"
        )
    return {"first paint ms": paint, "usable ms": usable, "transferred kB": sent / 1000}


def call(client: httpx.Client, name: str, **values: object) -> dict[str, object]:
    """One of the app's endpoints over plain HTTP."""
    event = client.post(f"{ENDPOINT}/{name}", json=values).json()["event_id"]
    answer = client.get(f"gradio_api/call/{name}/{event}").text
    return json.loads(answer.rpartition("data: ")[2])[0]


def watched(url: str, watchers: int, seconds: float) -> list[float]:
    """Milliseconds of each question after the status of a run that works meanwhile."""
    with httpx.Client(base_url=url, timeout=60) as client:
        job_id = str(call(client, "submit")["job_id"])
        while call(client, "status", job_id=job_id)["state"] == "queued":
            time.sleep(0.2)
    samples: list[float] = []

    def watch() -> None:
        end = time.monotonic() + seconds
        with httpx.Client(base_url=url, timeout=60) as own:
            while time.monotonic() < end:
                start = time.perf_counter()
                call(own, "status", job_id=job_id)
                samples.append(1000 * (time.perf_counter() - start))
                time.sleep(1)

    threads = [threading.Thread(target=watch) for _ in range(watchers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with httpx.Client(base_url=url, timeout=60) as client:
        call(client, "cancel", job_id=job_id)
    return samples


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--visits", type=int, default=5)
    parser.add_argument("--watchers", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=20.0)
    options = parser.parse_args()
    with served() as url, sync_playwright() as playwright:
        named = os.environ.get("ESPALIER_CHROMIUM") or (str(CHROMIUM) if CHROMIUM.exists() else None)
        browser = playwright.chromium.launch(executable_path=named, args=["--no-sandbox", "--disable-gpu"])
        visits = [visit(browser, url) for _ in range(options.visits)]
        browser.close()
        samples = watched(url, options.watchers, options.seconds)
    print(f"On {made_on()}:")
    for key in visits[0]:
        values = [one[key] for one in visits]
        print(f"{key}: median {statistics.median(values):.0f}, from {min(values):.0f} to {max(values):.0f}")
    p50, p95 = np.percentile(samples, [50, 95])
    print(f"status, {options.watchers} watchers, {len(samples)} questions: p50 {p50:.0f} ms, p95 {p95:.0f} ms")


if __name__ == "__main__":
    main()
