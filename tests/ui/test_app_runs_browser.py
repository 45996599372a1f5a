"""What is done with runs in a real Chromium: found, renamed, deleted, repeated, copied, tried and set side by side."""

from __future__ import annotations

import io
import json
import os
import re
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from app_server import AppServer
from playwright.sync_api import Browser, Page, expect
from test_app_browser import compress, no_sideways_scroll, open_start, server, watched  # noqa: F401 - fixtures

from compress import signing
from compress.files import sha256
from compress.jobs import Queue
from compress.request import Request
from compress.runs import MANIFEST

pytestmark = pytest.mark.browser
PICTURES = os.environ.get("ESPALIER_PICTURES")
"""Folder for pictures of every view, to be looked at; none are taken without it."""


@pytest.fixture(scope="module")
def finished(server: AppServer) -> list[str]:  # noqa: F811
    """Three runs that are done, one of them with another accuracy and time; their ids."""
    queue = Queue(server.data)
    quick = {"learning_rate": 0.001}
    jobs = [queue.submit(Request(**quick, sparsity=share)) for share in (0.3, 0.5, 0.7)]
    deadline = time.monotonic() + 40
    while any(queue.status(job).state != "done" for job in jobs):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    alter_report(server.data / "runs" / jobs[2], accuracy=0.85, p50_ms=0.09, sparsity=0.7)
    alter_report(server.data / "runs" / jobs[0], accuracy=0.911, p50_ms=0.31, sparsity=0.3)
    return jobs


def alter_report(folder: Path, *, accuracy: float, p50_ms: float, sparsity: float) -> None:
    """Other figures in the report of a finished run, and its manifest accordingly."""
    report, manifest = folder / "report.json", folder / "manifest.json"
    facts = json.loads(report.read_text())
    facts["variants"][-1] |= {"accuracy": accuracy, "accuracy_ci95": [accuracy - 0.01, accuracy + 0.01]}
    facts["measurements"][-1] |= {"p50_ms": p50_ms}
    facts["request"] |= {"sparsity": sparsity}
    report.write_text(json.dumps(facts))
    listed = signing.opened(MANIFEST, manifest)
    listed["files"]["report.json"]["sha256"] = sha256(report)
    manifest.write_text(signing.sealed(MANIFEST, listed, manifest))


@pytest.fixture
def page(browser: Browser, server: AppServer, finished: list[str]) -> Iterator[Page]:  # noqa: F811
    with browser.new_context(viewport={"width": 1280, "height": 900}, color_scheme="light") as context:
        context.grant_permissions(["clipboard-read", "clipboard-write"])
        page = watched(context, server.url)
        yield page
        assert page.trouble == []


def open_run(page: Page, url: str, job_id: str) -> None:
    """The page of a finished run, with its last chart drawn."""
    page.goto(f"{url}/?job={job_id}")
    expect(page.locator("#plot-training .main-svg").first).to_be_visible(timeout=40_000)


def pictured(page: Page, name: str) -> None:
    """The view in light and dark, wide and on a phone: no sideways scroll, and a picture of each where asked for."""
    for width in (1280, 390):
        page.set_viewport_size({"width": width, "height": 900})
        for look in ("light", "dark"):
            page.evaluate("dark => document.body.classList.toggle('dark', dark)", look == "dark")
            assert no_sideways_scroll(page), f"{name} at {width} pixels"
            if PICTURES:
                page.wait_for_timeout(400)
                page.screenshot(path=Path(PICTURES, f"{name}-{width}-{look}.png"), full_page=True)
    page.set_viewport_size({"width": 1280, "height": 900})
    page.evaluate("document.body.classList.remove('dark')")


def test_runs_are_found_renamed_and_deleted(page: Page, server: AppServer) -> None:  # noqa: F811
    open_start(page, server.url)
    job_id = compress(page)
    expect(page.locator("#verdict .headline")).to_be_visible(timeout=20_000)
    page.get_by_role("button", name="Rename, keep or delete").click()
    page.get_by_label("Name of this run").fill("the <b>best</b> one")
    page.get_by_role("button", name="Rename", exact=True).click()
    expect(page.locator(".run-head h1")).to_have_text("the <b>best</b> one", timeout=10_000)
    open_start(page, server.url)
    row = page.locator(f'#runs a[href="?job={job_id}"]')
    expect(row).to_contain_text("the <b>best</b> one")
    count = page.locator("#runs li").count()
    assert count >= 4
    page.get_by_role("textbox", name="Search").fill("BEST done")
    expect(page.locator("#runs li")).to_have_count(1)
    expect(row).to_be_visible()
    page.get_by_role("textbox", name="Search").fill("no such run")
    expect(page.locator("#runs")).to_have_text("No run matches.")
    page.get_by_role("textbox", name="Search").fill("")
    expect(page.locator("#runs li")).to_have_count(count)
    pictured(page, "start")
    row.click()
    expect(page.locator("#verdict .headline")).to_be_visible(timeout=20_000)
    page.get_by_role("button", name="Rename, keep or delete").click()
    page.once("dialog", lambda dialog: dialog.dismiss())
    page.get_by_role("button", name="Delete the run").click()
    page.wait_for_timeout(500)
    assert Queue(server.data).status(job_id).state == "done", "the question was answered with no"
    page.once("dialog", lambda dialog: dialog.accept())
    page.get_by_role("button", name="Delete the run").click()
    page.wait_for_url(f"{server.url}/", timeout=15_000)
    expect(page.locator("#runs li")).to_have_count(count - 1, timeout=20_000)
    assert not (server.data / "runs" / job_id).exists()


def test_a_working_run_cannot_be_deleted(page: Page, server: AppServer) -> None:  # noqa: F811
    queue = Queue(server.data)
    job_id = queue.submit(Request(model="resnet34", learning_rate=0.001))
    page.goto(f"{server.url}/?job={job_id}")
    expect(page.locator(".now")).to_contain_text("Training the smaller model", timeout=20_000)
    page.get_by_role("button", name="Rename, keep or delete").click()
    expect(page.get_by_role("button", name="Delete the run")).to_be_disabled()
    queue.cancel(job_id)
    expect(page.get_by_role("button", name="Delete the run")).to_be_enabled(timeout=10_000)


def test_a_run_is_repeated_with_changes(page: Page, server: AppServer) -> None:  # noqa: F811
    queue = Queue(server.data)
    weights = server.data / "my weights.pth"
    weights.write_bytes(b"weights")
    asked = Request(
        model="resnet34",
        sparsity=0.35,
        weight_bits=4,
        activation_bits=8,
        seed=7,
        exclude=("fc", "conv1"),
        learning_rate=0.001,
    )
    first = queue.submit(asked, files={"checkpoint": weights})
    queue.cancel(first)
    page.goto(f"{server.url}/?job={first}")
    page.get_by_role("link", name="Change and run again").click()
    expect(page.locator(".note")).to_contain_text(
        "my_weights.pth is used again unless you upload another", timeout=20_000
    )
    expect(page.get_by_role("combobox", name="Architecture")).to_have_value("resnet34")
    expect(page.get_by_role("radio", name="My checkpoint")).to_be_checked()
    expect(page.get_by_label("number input for Channels to remove, %")).to_have_value("35")
    expect(page.locator(".meaning")).to_contain_text("4-bit weights")
    page.get_by_role("button", name="All other settings").click()
    expect(page.get_by_role("textbox", name=re.compile("^Exclude "))).to_have_value("fc conv1")
    page.get_by_label("Seed").fill("8")
    page.keyboard.press("Tab")
    pictured(page, "again")
    second = compress(page)
    request = queue.request(second)
    uploads = queue.uploads(second)
    assert uploads["checkpoint"].read_bytes() == b"weights" and second in str(uploads["checkpoint"])
    assert request == asked.model_copy(update={"seed": 8, "checkpoint": request.checkpoint})
    queue.cancel(second)


def test_a_run_is_copied_as_code(page: Page, server: AppServer, finished: list[str]) -> None:  # noqa: F811
    open_run(page, server.url, finished[0])
    page.get_by_text("Copy as", exact=True).click()
    page.get_by_role("button", name="Copy: Shell command").click()
    expect(page.locator("button.copy", has_text="Copied")).to_be_visible()
    copied = page.evaluate("navigator.clipboard.readText()")
    assert copied == "python -m compress run --model resnet18 --data fashion-mnist --sparsity 0.3\n"
    code = page.get_by_label("gradio_client, through this server", exact=True)
    expect(code).to_contain_text(f"client = Client('{server.url}/', verbose=False)")


def test_everything_is_downloaded_as_one_zip_and_its_use_is_told(
    page: Page,
    server: AppServer,  # noqa: F811
    finished: list[str],
) -> None:
    open_run(page, server.url, finished[1])
    with page.expect_download(timeout=30_000) as begun:
        page.get_by_role("link", name=re.compile("Everything as one zip")).click()
    assert begun.value.suggested_filename == f"espalier-{finished[1][:8]}.zip"
    with zipfile.ZipFile(io.BytesIO(Path(begun.value.path()).read_bytes())) as archive:
        assert archive.testzip() is None
        assert f"espalier-{finished[1][:8]}/artifacts/quantized.onnxruntime.onnx" in archive.namelist()
    page.get_by_text("How to use these files").click()
    expect(page.locator("#files")).to_contain_text("sha256sum -c SHA256SUMS")
    expect(page.locator("#files")).to_contain_text(f'compress.load("espalier-{finished[1][:8]}")')


def test_an_image_goes_through_both_models(page: Page, server: AppServer, finished: list[str], tmp_path: Path) -> None:  # noqa: F811
    good, bad = tmp_path / "photo.png", tmp_path / "bad.png"
    good.write_bytes(b"\x89PNG image")
    bad.write_bytes(b"no image <b>")
    open_run(page, server.url, finished[1])
    page.get_by_role("button", name="Classify").click()
    expect(page.locator("#tried")).to_have_text("No image was selected: upload one first.")
    field = page.locator('input[type=file][accept*=".webp"]')
    field.set_input_files(good)
    expect(page.locator(".file-preview", has_text="photo")).to_be_visible(timeout=15_000)
    page.get_by_role("button", name="Classify").click()
    expect(page.locator(".tried section")).to_have_count(2, timeout=15_000)
    expect(page.locator(".tried section").nth(0)).to_contain_text("1.70 ms · baseline.onnx, openvino fp32")
    expect(page.locator(".shares li").first).to_contain_text("Shirt & <top>75.0 %")
    expect(page.locator("#tried")).to_contain_text("They give different answers.")
    assert page.locator(".tried img").evaluate("image => image.naturalWidth") == 8
    pictured(page, "run")
    page.locator("button[aria-label*='lear'], button[aria-label*='emove']").first.click()
    field.set_input_files(bad)
    expect(page.locator(".file-preview", has_text="bad")).to_be_visible(timeout=15_000)
    page.get_by_role("button", name="Classify").click()
    expect(page.locator("#tried .alert")).to_contain_text("This image cannot be used", timeout=15_000)


def test_runs_are_set_side_by_side_and_points_lead_to_them(page: Page, server: AppServer, finished: list[str]) -> None:  # noqa: F811
    open_start(page, server.url)
    for job_id in (finished[0], finished[2]):
        page.locator(f'#runs input[value="{job_id}"]').check()
    page.get_by_role("textbox", name="Search").fill("50 % done")
    expect(page.locator("#runs li")).to_have_count(3)
    expect(page.locator("#runs li").last.locator("input")).to_have_attribute("value", finished[1])
    for job_id, ticked in zip(finished, (True, False, True), strict=True):
        expect(page.locator(f'#runs input[value="{job_id}"]')).to_be_checked(checked=ticked)
    page.get_by_role("button", name="Compare the ticked").click()
    page.wait_for_url(re.compile("compare="))
    assert {job_id in page.url for job_id in (finished[0], finished[2])} == {True}
    table = page.locator("#side-by-side table")
    expect(table.locator("thead th")).to_have_count(3, timeout=20_000)
    expect(table.locator("tr", has_text="Accuracy").first).to_contain_text("91.1 % (90.1 to 92.1) (best)")
    expect(table.locator("tr", has_text="Batch 1, p50")).to_contain_text("0.09 ms (best)")
    expect(table.locator("tr", has_text="Sparsity")).to_contain_text("0.3")
    points = page.locator("#plot-compare .points path")
    expect(points.first).to_be_visible(timeout=20_000)
    numbers = page.locator("#chart-compare tbody tr")
    assert points.count() == numbers.count() >= 3
    assert page.locator("#plot-compare .js-line").count() == 1, "one front"
    page.locator("#chart-compare summary").click()
    shown = [row.inner_text().split("\t")[-1] for row in numbers.all()]
    assert "yes" in shown and len(shown) == points.count()
    pictured(page, "compare")
    ink = page.locator("#plot-compare .xtick text").first
    light = ink.evaluate("text => getComputedStyle(text).fill")
    page.get_by_role("button", name="Light or dark").click()
    page.wait_for_function(
        "light => { const text = document.querySelector('#plot-compare .xtick text');"
        " return text && getComputedStyle(text).fill !== light; }",
        arg=light,
        timeout=15_000,
    )
    if PICTURES:
        page.screenshot(path=Path(PICTURES, "compare-redrawn-dark.png"), full_page=True)
    number = next(index for index, row in enumerate(numbers.all(), start=1) if finished[2] in row.inner_html())
    point = page.locator("#plot-compare .annotation", has_text=str(number)).first
    point.click(force=True)  # looks again when the chart is drawn anew meanwhile
    page.wait_for_url(f"{server.url}/?job={finished[2]}")
    expect(page.locator("#verdict .headline")).to_be_visible(timeout=20_000)
    page.goto(f"{server.url}/?compare=")
    expect(page.locator("#side-by-side")).to_contain_text("Tick two or more finished runs below", timeout=20_000)
    expect(points.first).to_be_visible(timeout=20_000)
