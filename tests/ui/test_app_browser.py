"""The web app in a real Chromium: from the first page to a finished run, and everything that can come between."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from app_server import AppServer
from playwright.sync_api import Browser, BrowserContext, Page, expect

from compress.jobs import Queue

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AppServer]:
    server = AppServer(tmp_path_factory.mktemp("browser"))
    yield server
    server.close()


@pytest.fixture
def queue(server: AppServer) -> Iterator[Queue]:
    """The queue behind the page, as `jobs list` sees it; ends what a test leaves behind."""
    queue = Queue(server.data)
    yield queue
    for status in queue.list():
        if status.state in ("queued", "running"):
            queue.cancel(status.job_id)


@pytest.fixture
def page(browser: Browser, server: AppServer) -> Iterator[Page]:
    """A page that must end without an error in its console and without a request to another host."""
    with browser.new_context(viewport={"width": 1280, "height": 900}, color_scheme="light") as context:
        page = watched(context, server.url)
        yield page
        assert page.trouble == []


def watched(context: BrowserContext, url: str) -> Page:
    page = context.new_page()
    page.trouble = []
    page.on("console", lambda message: page.trouble.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: page.trouble.append(str(error)))
    page.on(
        "request",
        lambda request: None if request.url.startswith((url, "data:", "blob:")) else page.trouble.append(request.url),
    )
    return page


def open_start(page: Page, url: str) -> None:
    page.goto(url)
    expect(page.locator(".meaning")).to_be_visible(timeout=20_000)  # drawn by the first event: the page is alive


def choose_model(page: Page, name: str) -> None:
    field = page.get_by_role("combobox", name="Architecture")
    field.click()
    field.fill(name)
    page.get_by_role("option", name=name, exact=True).click()
    expect(field).to_have_value(name)


def compress(page: Page) -> str:
    """Presses Compress; the id of the run that opens."""
    page.get_by_role("button", name="Compress", exact=True).click()
    page.wait_for_url(re.compile(r"\?job=[0-9a-f]{32}$"))
    expect(page.locator(".run-head")).to_be_visible()
    return page.url.rpartition("=")[2]


def no_sideways_scroll(page: Page) -> bool:
    return page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_reading_that_ends_because_the_page_is_left_is_no_error(page: Page, server: AppServer) -> None:
    def rejected(name: str) -> None:
        page.evaluate("name => { Promise.reject(new DOMException('ended', name)); }", name)
        page.wait_for_timeout(200)

    open_start(page, server.url)
    rejected("AbortError")
    assert len(page.trouble) == 1, "on a page that stays it is told"
    page.evaluate("dispatchEvent(new Event('beforeunload'))")
    page.evaluate("dispatchEvent(new PageTransitionEvent('pageshow'))")
    rejected("AbortError")
    assert len(page.trouble) == 1, "also where the page has finished loading only now"
    rejected("DataError")
    assert len(page.trouble) == 2, "anything else is told all the same"
    page.evaluate("dispatchEvent(new PageTransitionEvent('pageshow', { persisted: true }))")
    rejected("AbortError")
    assert len(page.trouble) == 3, "who comes back has left no longer"
    page.trouble.clear()


def test_one_click_leads_to_the_examples_result(page: Page, server: AppServer) -> None:
    open_start(page, server.url)
    job_id = compress(page)
    expect(page.locator("#verdict .headline")).to_contain_text("12.1x faster", timeout=20_000)
    expect(page.locator(".tiles li")).to_have_count(4)
    expect(page.locator("#summary tbody tr")).to_have_count(3)
    expect(page.locator(".badge")).to_have_text("Done")
    expect(page.locator("#live .progress")).to_have_count(0)
    bars = page.locator("#plot-size .bars path")
    expect(bars).to_have_count(9, timeout=20_000)
    heights = [bars.nth(number).bounding_box()["height"] for number in range(3)]
    assert heights[0] > 100 and heights[1] / heights[0] == pytest.approx(2.80 / 11.18, abs=0.02), (
        "bars do not show the numbers"
    )
    for key in ("latency", "accuracy", "channels", "training"):
        expect(page.locator(f"#plot-{key} .main-svg").first).to_be_visible()
        page.locator(f"#chart-{key} summary").click()
        assert page.locator(f"#chart-{key} tbody tr").count() > 2
    assert page.get_by_text("<b>Shirt & top</b>").is_visible(), "text of a report became part of the page"
    row = page.locator("#files tr", has_text="quantized.onnxruntime.onnx")
    with page.expect_download() as begun:
        row.get_by_role("link").click()
    assert hashlib.sha256(Path(begun.value.path()).read_bytes()).hexdigest() == row.locator("code").inner_text()
    with page.expect_download() as begun:
        page.get_by_role("link", name="<img src=x onerror=alert(1)> & odd.txt").click()
    assert Path(begun.value.path()).read_text() == "a name that is not HTML"
    page.get_by_role("link", name="Espalier, start page").click()
    expect(page.locator(f'#runs a[href="?job={job_id}"]')).to_contain_text("Done", timeout=20_000)


def test_a_run_survives_reload_opens_elsewhere_and_is_cancelled(
    page: Page, server: AppServer, queue: Queue, browser: Browser
) -> None:
    open_start(page, server.url)
    choose_model(page, "resnet34")
    expect(page.locator(".hint p")).to_contain_text("Another model needs a checkpoint that was trained on them")
    job_id = compress(page)
    now = page.locator(".now")
    expect(now).to_contain_text(
        "Training the smaller model to recover · epoch 1 of 2, loss 0.31 · about 75 s left in this stage",
        timeout=15_000,
    )
    page.reload()
    expect(now).to_contain_text("about 75 s left", timeout=15_000)
    expect(page.locator(".steps .past")).to_have_count(2)
    expect(page.locator('.steps [aria-current="step"]')).to_contain_text("Fine-tune")
    expect(page.locator("#log .log")).to_contain_text("finetune: epoch 1 of 2")
    with browser.new_context() as other:
        second = watched(other, server.url)
        second.goto(f"{server.url}/?job={job_id}")
        expect(second.locator(".now")).to_contain_text("Training the smaller model", timeout=20_000)
        assert second.trouble == []
    page.get_by_role("button", name="Cancel the run").click()
    expect(page.locator(".badge")).to_have_text("Cancelled", timeout=6_000)
    assert queue.status(job_id).state == "cancelled"
    expect(page.get_by_role("button", name="Cancel the run")).to_be_hidden()
    page.get_by_role("button", name="Resume the run").click()
    expect(page.locator("#verdict .headline")).to_be_visible(timeout=20_000)


def test_a_failed_run_shows_its_sentence_as_text(page: Page, server: AppServer) -> None:
    open_start(page, server.url)
    choose_model(page, "resnet50")
    compress(page)
    alert = page.locator("#live .alert")
    expect(alert).to_have_text(
        "This run failed. The loss is not a number in epoch 1: choose a smaller learning_rate than <b>0.04</b>.",
        timeout=15_000,
    )
    expect(page.locator(".badge")).to_have_text("Failed")
    expect(page.locator(".steps .broken")).to_contain_text("Fine-tune")
    expect(page.locator("#results")).to_be_hidden()


def test_settings_are_explained_and_refused_before_a_run_starts(page: Page, server: AppServer, queue: Queue) -> None:
    before = len(queue.list())
    open_start(page, server.url)
    words = page.locator(".meaning p")
    expect(words).to_have_text(
        "50 % of the channels go: about 1/4 of the parameters stay. "
        "8-bit integers take a quarter of the space of 32-bit numbers."
    )
    page.get_by_label("number input for Channels to remove, %").fill("30")
    page.keyboard.press("Tab")
    expect(words).to_contain_text("30 % of the channels go: about 1/2 of the parameters stay.")
    plan = page.locator(".plan")
    expect(plan).to_contain_text(
        "Counted from the plan for resnet18 with 10 classes at 32 × 32 pixels.", timeout=15_000
    )
    plan.get_by_text("Layers that shrink (2)").click()
    expect(plan.locator("tbody tr").first).to_contain_text("their <outputs> are added")
    expect(page.locator(".bar", has_text="Multiplications per image")).to_contain_text(
        "37.0 million → about 18.1 million"
    )
    page.get_by_label("number input for Channels to remove, %").fill("40")
    page.keyboard.press("Tab")
    expect(words).to_contain_text("40 % of the channels go")
    expect(plan.locator("details").first).to_have_attribute("open", "")
    expect(plan.locator("details").last).not_to_have_attribute("open", "")
    page.get_by_role("radio", name="16-bit floats").check()
    expect(words).to_contain_text("16-bit numbers take half the space")
    expect(page.get_by_label("number input for Bits per weight")).to_be_hidden()
    page.get_by_role("button", name="All other settings").click()
    page.get_by_role("textbox", name=re.compile("^Mean ")).fill("0.5, 0.5, 0.5")
    page.keyboard.press("Tab")
    refusal = "std: got None, expected three numbers, because mean was given and both belong to one normalisation."
    expect(page.locator(".side .alert").first).to_have_text(refusal)
    page.get_by_role("button", name="Compress", exact=True).click()
    expect(page.locator(".side .alert")).to_have_text([refusal, refusal])
    assert len(queue.list()) == before
    page.get_by_role("textbox", name=re.compile("^Mean ")).fill("")
    page.get_by_role("button", name="Preview the plan").click()
    expect(page.locator(".checked")).to_contain_text("resnet18 can be compressed as asked", timeout=15_000)
    page.get_by_text("Layers that shrink (1)").click()
    expect(page.locator(".checked")).to_contain_text("feeds <one> layer")


def test_an_uploaded_checkpoint_and_zip_belong_to_the_run(
    page: Page, server: AppServer, queue: Queue, tmp_path: Path
) -> None:
    weights, images = tmp_path / "weights.pth", tmp_path / "my <images>.zip"
    weights.write_bytes(b"w" * 5000)
    images.write_bytes(b"z" * 5000)
    open_start(page, server.url)
    page.get_by_role("radio", name="My checkpoint").check()
    page.get_by_role("button", name="Compress", exact=True).click()
    expect(page.locator(".side .alert")).to_have_text(
        "No checkpoint was chosen: upload one, or choose another source above the upload field."
    )
    page.get_by_role("radio", name="My images").check()
    for kind, file in ((".pth", weights), (".zip", images)):
        page.locator(f'input[type=file][accept*="{kind}"]').set_input_files(file)
        expect(page.locator(".file-preview", has_text=file.stem[:5])).to_be_visible(timeout=15_000)
    job_id = compress(page)
    request = queue.request(job_id)
    assert Path(request.checkpoint).read_bytes() == weights.read_bytes()
    assert Path(request.data).read_bytes() == images.read_bytes()
    assert Path(request.data).is_relative_to(server.data / "runs" / job_id / "uploads")


def test_an_unknown_link_says_so_on_the_start_page(page: Page, server: AppServer) -> None:
    page.goto(f"{server.url}/?job=<b>nothing</b>")
    expect(page.locator(".side .alert")).to_have_text(
        "There is no run with the id '<b>nothing</b>'. Check the link, or choose a run from the list.", timeout=20_000
    )
    expect(page.get_by_role("button", name="Compress", exact=True)).to_be_visible()


def test_an_open_page_goes_on_after_the_server_was_killed(browser: Browser, server: AppServer, queue: Queue) -> None:
    with browser.new_context() as context:
        page = context.new_page()
        open_start(page, server.url)
        choose_model(page, "resnet34")
        job_id = compress(page)
        expect(page.locator(".now")).to_contain_text("Training the smaller model", timeout=15_000)
        page.evaluate("window.before = true")
        server.kill()
        try:
            assert queue.status(job_id).state == "running", "the run has to outlive the server"
            expect(page.locator("body")).to_contain_text(
                "onnection", timeout=10_000
            )  # Gradio says that the server does not answer
        finally:
            server.start()
        page.wait_for_function("!window.before", timeout=20_000)  # Gradio loads the page anew when the server is back
        page.get_by_role("button", name="Cancel the run").click()
        expect(page.locator(".badge")).to_have_text("Cancelled", timeout=20_000)


def test_light_and_dark_and_phone(page: Page, server: AppServer, queue: Queue) -> None:
    open_start(page, server.url)
    compress(page)
    ink = page.locator("#plot-size .xtick text").first
    expect(ink).to_be_visible(timeout=20_000)
    light = ink.evaluate("text => getComputedStyle(text).fill")
    page.get_by_role("button", name="Light or dark").click()
    page.wait_for_function(
        "([selector, light]) => { const text = document.querySelector(selector);"
        " return text && getComputedStyle(text).fill !== light; }",
        arg=["#plot-size .xtick text", light],
        timeout=15_000,
    )
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(17, 20, 18)"
    page.set_viewport_size({"width": 390, "height": 840})
    page.reload()
    expect(ink).to_be_visible(timeout=20_000)
    assert page.evaluate("document.body.classList.contains('dark')"), "the choice was forgotten"
    assert no_sideways_scroll(page)
    last = page.get_by_role("link", name="New run").bounding_box()
    assert last["x"] + last["width"] <= 390, "cut off at the right"
    open_start(page, server.url)
    page.get_by_role("button", name="All other settings").click()
    expect(page.get_by_label("Seed")).to_be_visible()
    assert no_sideways_scroll(page)


@pytest.mark.integration
def test_the_example_is_really_compressed(browser: Browser, tmp_path: Path) -> None:
    """The app as it is started by hand, the bundled data and checkpoint, and as little training as possible."""
    server = AppServer(tmp_path, real=True, OMP_NUM_THREADS="2")
    try:
        with browser.new_context() as context:
            page = watched(context, server.url)
            open_start(page, server.url)
            page.get_by_role("button", name="All other settings").click()
            for field, value in (("Finetune epochs", "0"), ("QAT epochs", "0"), ("Calibration images", "64")):
                page.get_by_label(field, exact=True).fill(value)
            page.keyboard.press("Tab")
            job_id = compress(page)
            expect(page.locator(".badge")).to_have_text(re.compile("Done|Failed"), timeout=480_000)
            assert page.locator(".badge").inner_text() == "Done", page.locator("#live").inner_text()
            expect(page.locator("#plot-size .bars path").first).to_be_visible(timeout=20_000)
            queue = Queue(tmp_path)
            for name in queue.artifacts(job_id):
                queue.artifact(job_id, name)
            assert "artifacts/quantized.onnxruntime.onnx" in queue.artifacts(job_id)
            assert page.trouble == []
    finally:
        server.close()
