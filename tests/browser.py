"""A headless Chromium that looks at the pages we write, as a reader would: without a network."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
NO_NETWORK = "--host-resolver-rules=MAP * ~NOTFOUND"


@contextmanager
def started() -> Iterator:
    """The browser (Selenium's), at the size of a laptop's screen. A test is skipped where there is none."""
    if not (CHROMIUM and DRIVER):
        pytest.skip("no chromium and chromedriver, the packages chromium and chromium-driver of Debian")
    from selenium import webdriver  # slow to import
    from selenium.common.exceptions import WebDriverException
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for switch in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", NO_NETWORK):
        options.add_argument(switch)
    options.add_argument("--window-size=1366,768")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    try:
        driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    except WebDriverException as error:
        pytest.skip(f"Chromium does not start here: {str(error).splitlines()[0]}")
    try:
        yield driver
    finally:
        driver.quit()


def show(browser, page: Path, scheme: str = "light") -> None:
    """Open a file in it, in the "light" or "dark" scheme; see `assert_quiet`."""
    feature = {"name": "prefers-color-scheme", "value": scheme}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
    browser.get(page.absolute().as_uri())
    assert_quiet(browser)


def assert_quiet(browser) -> None:
    """No error in the page's script, and nothing that it could not load."""
    complaints = [entry["message"] for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    assert not complaints, json.dumps(complaints, indent=1)
