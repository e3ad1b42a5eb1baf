"""A real Chromium without a window, which asks nobody but the page's own server."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

_OPTIONS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--window-size=1000,900"),
)


@contextmanager
def chromium(*options: str) -> Iterator["webdriver.Chrome"]:  # noqa: F821 (imported where there is a browser)
    """Skips the test where none is installed."""
    webdriver = pytest.importorskip("selenium.webdriver")
    browser, driver = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
    if browser is None or driver is None:
        pytest.skip("no Chromium with its driver is installed")
    chosen = webdriver.ChromeOptions()
    chosen.binary_location = browser
    chosen.set_capability("goog:loggingPrefs", {"browser": "WARNING"})
    with tempfile.TemporaryDirectory() as profile:
        for option in (*_OPTIONS, *options, f"--user-data-dir={profile}"):
            chosen.add_argument(option)
        opened = webdriver.Chrome(chosen, webdriver.ChromeService(driver))
        try:
            yield opened
        finally:
            opened.quit()
