"""The browser of the tests: Chromium of ESPALIER_CHROMIUM, of Debian, or Playwright's own."""

import os
from pathlib import Path

from playwright.sync_api import Browser, Playwright

DEBIAN = Path("/usr/bin/chromium")


def launch(playwright: Playwright) -> Browser:
    """Raises playwright's `Error` when it cannot be started."""
    named = os.environ.get("ESPALIER_CHROMIUM") or (DEBIAN if DEBIAN.exists() else None)
    return playwright.chromium.launch(executable_path=named, args=["--no-sandbox", "--disable-gpu"])
