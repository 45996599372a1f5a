"""Shared by all tests: two threads at most, a GPU that is not there, and one real browser."""

import os
from collections.abc import Iterator
from pathlib import Path

import gpu_double
import pytest
import torch
from playwright.sync_api import Browser, Error, sync_playwright
from queues import data_dir, queue  # noqa: F401  (fixtures)

torch.set_num_threads(min(2, torch.get_num_threads()))


DEBIAN_CHROMIUM = Path("/usr/bin/chromium")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Chromium: of ESPALIER_CHROMIUM, of Debian, or Playwright's own; without any the test is skipped, or fails where
    ESPALIER_NEEDS_BROWSER is set."""
    named = os.environ.get("ESPALIER_CHROMIUM") or (str(DEBIAN_CHROMIUM) if DEBIAN_CHROMIUM.exists() else None)
    with sync_playwright() as playwright:
        try:
            browser = playwright.chromium.launch(executable_path=named, args=["--no-sandbox", "--disable-gpu"])
        except Error as error:
            told = f"{named or 'Chromium'} cannot be started: install it, or name one in ESPALIER_CHROMIUM ({error})"
            (pytest.fail if os.environ.get("ESPALIER_NEEDS_BROWSER") else pytest.skip)(told.splitlines()[0])
        yield browser
        browser.close()


@pytest.fixture(autouse=True, scope="session")
def signing_key(tmp_path_factory):
    """Runs of the tests are signed with a key of their own, in child processes too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ESPALIER_SIGNING_KEY", str(tmp_path_factory.mktemp("key") / "signing.key"))
        yield


@pytest.fixture
def device(monkeypatch):
    """`device(release)` puts a GPU that is not there in place of the packages of that release, and returns it."""

    def put(release: str, **options) -> gpu_double.Gpu:
        double = gpu_double.Gpu(**options)
        gpu_double.install(monkeypatch, double, release)
        return double

    return put
