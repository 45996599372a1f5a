"""Pictures of the web app in every state, wide and on a phone, light and dark: `python scripts/app_pictures.py FOLDER`.

To be looked at as a newcomer would. The runs train nothing (see tests/helpers/fake_run.py) and show a made-up report.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests" / "helpers"), str(ROOT)]

import chromium  # noqa: E402
from app_server import AppServer  # noqa: E402
from playwright.sync_api import Browser, Page, expect, sync_playwright  # noqa: E402
from test_app_browser import choose_model, compress  # noqa: E402

SOON = 60_000
"""Milliseconds."""
LOOKS = (
    ("wide-light", 1280, "light"),
    ("wide-dark", 1280, "dark"),
    ("phone-light", 390, "light"),
    ("phone-dark", 390, "dark"),
)


def open_start(page: Page, url: str) -> None:
    page.goto(url)
    expect(page.locator(".meaning")).to_be_visible(timeout=SOON)


def empty(page: Page, url: str) -> None:
    open_start(page, url)
    expect(page.locator(".plan")).to_be_visible(timeout=SOON)


def unfolded(page: Page, url: str) -> None:
    open_start(page, url)
    page.get_by_role("button", name="All other settings").click()
    page.get_by_role("button", name="Preview the plan").click()
    expect(page.locator(".checked")).to_be_visible(timeout=SOON)


def refused(page: Page, url: str) -> None:
    open_start(page, url)
    page.get_by_role("radio", name="My checkpoint").check()
    page.get_by_role("button", name="Compress", exact=True).click()
    expect(page.locator(".side .alert")).to_be_visible()


def running(page: Page, url: str) -> None:
    _run(page, url, "resnet34")
    expect(page.locator(".now")).to_contain_text("Training the smaller model", timeout=SOON)


def cancelled(page: Page, url: str) -> None:
    running(page, url)
    page.get_by_role("button", name="Cancel the run").click()
    expect(page.locator(".badge")).to_have_text("Cancelled", timeout=SOON)


def failed(page: Page, url: str) -> None:
    _run(page, url, "resnet50")
    expect(page.locator(".badge")).to_have_text("Failed", timeout=SOON)


def finished(page: Page, url: str) -> None:
    _run(page, url, "resnet18")
    expect(page.locator("#plot-training .main-svg").first).to_be_visible(timeout=SOON)


def tried(page: Page, url: str) -> None:
    finished(page, url)
    photo = {"name": "photo.png", "mimeType": "image/png", "buffer": b"image"}
    page.locator('input[type=file][accept*=".webp"]').set_input_files(photo)
    expect(page.locator(".file-preview", has_text="photo")).to_be_visible(timeout=SOON)
    page.get_by_role("button", name="Classify").click()
    expect(page.locator(".tried section")).to_have_count(2, timeout=SOON)
    page.get_by_text("How to use these files").click()
    page.get_by_role("button", name="Rename, keep or delete").click()


def compare(page: Page, url: str) -> None:
    open_start(page, url)
    boxes = page.locator("#runs input")
    for number in range(2):
        boxes.nth(number).check()
    page.get_by_role("button", name="Compare the ticked").click()
    expect(page.locator("#plot-compare .main-svg").first).to_be_visible(timeout=SOON)


def listed(page: Page, url: str) -> None:
    open_start(page, url)
    expect(page.locator("#runs li").first).to_be_visible(timeout=SOON)


def unknown(page: Page, url: str) -> None:
    page.goto(f"{url}/?job=nothing")
    expect(page.locator(".side .alert")).to_be_visible(timeout=SOON)


STATES: tuple[Callable[[Page, str], None], ...] = (
    empty, unfolded, refused, running, cancelled, failed, finished, tried, listed, compare, unknown,
)  # fmt: skip
"""In an order in which each finds the runs that it shows."""


def take(browser: Browser, url: str, state: Callable[[Page, str], None], folder: Path) -> list[str]:
    """The state in all its looks, and what went wrong on the page meanwhile: sideways scrolling, errors, strangers."""
    trouble = []
    for look, width, colours in LOOKS:
        with browser.new_context(viewport={"width": width, "height": 900}, color_scheme=colours) as context:
            page = context.new_page()
            page.set_default_timeout(SOON)
            page.on("console", lambda message: trouble.append(message.text) if message.type == "error" else None)
            page.on(
                "request",
                lambda sent: None if sent.url.startswith((url, "data:", "blob:")) else trouble.append(sent.url),
            )
            state(page, url)
            page.wait_for_timeout(500)  # until colours and bars have come to rest
            page.screenshot(path=folder / f"{state.__name__}-{look}.png", full_page=True)
            if page.evaluate("document.documentElement.scrollWidth > innerWidth"):
                trouble.append(f"{state.__name__} scrolls sideways, {look}")
    return trouble


def _run(page: Page, url: str, model: str) -> None:
    open_start(page, url)
    choose_model(page, model)
    compress(page)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("states", nargs="*", help=f"of {', '.join(state.__name__ for state in STATES)}; default: all")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    wanted = [state for state in STATES if not options.states or state.__name__ in options.states]
    with tempfile.TemporaryDirectory() as data, sync_playwright() as playwright:
        os.environ["ESPALIER_SIGNING_KEY"] = str(Path(data) / "signing.key")  # of its own, as in the tests
        troubles = []
        with (
            contextlib.closing(chromium.launch(playwright)) as browser,
            contextlib.closing(
                AppServer(Path(data), ESPALIER_KEEP_DAYS="30", ESPALIER_MAX_QUEUED="100", ESPALIER_RUNS_AT_ONCE="40")
            ) as server,
        ):
            for state in wanted:
                found = take(browser, server.url, state, options.folder)
                print(f"{state.__name__}: {found or 'fine'}")
                troubles += found
    raise SystemExit(1 if troubles else 0)


if __name__ == "__main__":
    main()
