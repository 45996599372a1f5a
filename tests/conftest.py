"""Shared by all tests: two threads at most, a GPU that is not there, and one real browser."""

import functools
import os
from collections.abc import Iterator

import chromium
import gpu_double
import onnx_registry
import pytest
import torch
from playwright.sync_api import Browser, Error, sync_playwright
from queues import data_dir, queue  # noqa: F401  (fixtures)

from compress.engines import benchmark

torch.set_num_threads(min(2, torch.get_num_threads()))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with integration tests come first: they take longest, and at the end one worker would wait for the other."""
    long = {item.path for item in items if item.get_closest_marker("integration")}
    items.sort(key=lambda item: item.path not in long)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Without Chromium the test is skipped, or fails where ESPALIER_NEEDS_BROWSER is set."""
    with sync_playwright() as playwright:
        try:
            browser = chromium.launch(playwright)
        except Error as error:
            told = f"Chromium cannot be started: install it, or name one in ESPALIER_CHROMIUM ({error})"
            (pytest.fail if os.environ.get("ESPALIER_NEEDS_BROWSER") else pytest.skip)(told.splitlines()[0])
        yield browser
        browser.close()


@pytest.fixture(autouse=True, scope="session")
def signing_key(tmp_path_factory):
    """Runs of the tests are signed with a key of their own, in child processes too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ESPALIER_SIGNING_KEY", str(tmp_path_factory.mktemp("key") / "signing.key"))
        yield


@pytest.fixture(autouse=True, scope="session")
def _quick_export() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        onnx_registry.read_once(patch)
        yield


@pytest.fixture
def short_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs in this process try small other input sizes alone and race for two rounds: the rest costs most of their time."""
    monkeypatch.setattr("compress.stages.gate.SIZES", (28, 32, 64))
    monkeypatch.setattr("compress.stages.gate.FEW_SIZES", (32, 64))
    monkeypatch.setattr(benchmark, "race", functools.partial(benchmark.race, rounds=2, burst_ms=5, max_calls=5))


@pytest.fixture
def device(monkeypatch):
    """`device(release)` puts a GPU that is not there in place of the packages of that release, and returns it."""

    def put(release: str, **options) -> gpu_double.Gpu:
        double = gpu_double.Gpu(**options)
        gpu_double.install(monkeypatch, double, release)
        return double

    return put
