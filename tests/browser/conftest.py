"""A headless Chromium and JupyterLab; where one is missing, these tests are skipped and say what to install."""

from __future__ import annotations

import os
import shutil

import pytest

PROGRAMS = ("chromium", "chromium-browser", "google-chrome")


@pytest.fixture(scope="session")
def chromium():
    """A browser of this machine; the environment variable CHROMIUM names another."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="Playwright is missing: make test-browser installs it")
    program = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, PROGRAMS)), None)
    if program is None:
        pytest.skip("Chromium is missing: install the package chromium, or name a program in CHROMIUM")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox", "--disable-dev-shm-usage"])
        yield browser
        browser.close()
