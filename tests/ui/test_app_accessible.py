"""axe-core on every page of the app, light and dark: no serious or critical finding."""

from __future__ import annotations

import pytest
from app_server import AppServer
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, expect
from test_app_browser import choose_model, compress, open_start, queue, server, watched  # noqa: F401 - fixtures

pytestmark = pytest.mark.browser
RULES = {"runOnly": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "best-practice"]}


def start(page: Page, url: str) -> None:
    open_start(page, url)


def everything_unfolded(page: Page, url: str) -> None:
    open_start(page, url)
    page.get_by_role("button", name="All other settings").click()
    page.get_by_role("button", name="Preview the plan").click()
    expect(page.locator(".checked")).to_be_visible(timeout=15_000)


def refused(page: Page, url: str) -> None:
    open_start(page, url)
    page.get_by_role("radio", name="My checkpoint").check()
    page.get_by_role("button", name="Compress", exact=True).click()
    expect(page.locator(".side .alert")).to_be_visible()


def running(page: Page, url: str) -> None:
    open_start(page, url)
    choose_model(page, "resnet34")
    compress(page)
    expect(page.locator(".now")).to_contain_text("Training the smaller model", timeout=15_000)


def failed(page: Page, url: str) -> None:
    open_start(page, url)
    choose_model(page, "resnet50")
    compress(page)
    expect(page.locator(".badge")).to_have_text("Failed", timeout=15_000)


def finished(page: Page, url: str) -> None:
    open_start(page, url)
    compress(page)
    for key in ("size", "latency", "accuracy", "channels", "training"):
        expect(page.locator(f"#plot-{key} .main-svg").first).to_be_visible(timeout=20_000)
        page.locator(f"#chart-{key} summary").click()


def side_by_side(page: Page, url: str) -> None:
    finished(page, url)
    page.get_by_role("link", name="Compare").click()
    expect(page.locator("#plot-compare .main-svg").first).to_be_visible(timeout=20_000)
    page.locator("#chart-compare summary").click()


def unfolded_run(page: Page, url: str) -> None:
    finished(page, url)
    page.get_by_text("Copy as", exact=True).click()
    page.get_by_text("How to use these files").click()
    page.get_by_role("button", name="Rename, keep or delete").click()
    page.locator('input[type=file][accept*=".webp"]').set_input_files(
        {"name": "photo.png", "mimeType": "image/png", "buffer": b"image"}
    )
    expect(page.locator(".file-preview", has_text="photo")).to_be_visible(timeout=15_000)
    page.get_by_role("button", name="Classify").click()
    expect(page.locator(".tried section")).to_have_count(2, timeout=15_000)


@pytest.mark.parametrize("look", ["light", "dark"])
@pytest.mark.parametrize("state", [start, everything_unfolded, refused, running, failed, unfolded_run, side_by_side])
def test_no_serious_finding(browser: Browser, server: AppServer, queue, state, look) -> None:  # noqa: F811 - fixtures
    with browser.new_context(viewport={"width": 1280, "height": 900}, color_scheme=look) as context:
        page = watched(context, server.url)
        state(page, server.url)
        findings = Axe().run(page, options=RULES).response["violations"]
        serious = [
            f"{finding['id']}: {node['html'][:160]} {node.get('failureSummary', '')[:200]}"
            for finding in findings
            if finding["impact"] in ("serious", "critical")
            for node in finding["nodes"]
        ]
        assert serious == []


def test_a_finding_would_be_seen(browser: Browser, server: AppServer) -> None:  # noqa: F811 - fixtures
    with browser.new_context() as context:
        page = watched(context, server.url)
        open_start(page, server.url)
        page.evaluate("document.body.insertAdjacentHTML('beforeend', '<button></button>')")
        found = {finding["id"] for finding in Axe().run(page, options=RULES).response["violations"]}
        assert "button-name" in found
