"""Debian's chromium, headless, on the real service with a model that paints grey."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.service import Service as Driver

from tests.browser.datasets import make_full, make_half, make_walk
from tests.browser.page import Page
from tests.browser.serving import RunningService, run_service

TOKEN = "a-token-of-the-tests"
_SWITCHES = (
    "--headless=new",
    "--window-size=1280,860",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--no-first-run",
)


@pytest.fixture(scope="session")
def datasets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """``walk``: 62 samples, bfloat16; ``half``: two, float16, one broken; ``full``: one, float32."""
    folder = tmp_path_factory.mktemp("datasets")
    for name, make in {"walk": make_walk, "half": make_half, "full": make_full}.items():
        make(folder / name)
    return {name: folder / name for name in ("walk", "half", "full")}


@pytest.fixture(scope="session")
def running(datasets: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningService]:
    with run_service(datasets, tmp_path_factory.mktemp("service")) as service:
        yield service


@pytest.fixture
def service(running: RunningService) -> Iterator[RunningService]:
    """The service of all tests, with no obstacle in the way yet."""
    yield running
    running.obstacles.clear()


@pytest.fixture
def locked_service(datasets: dict[str, Path], tmp_path: Path) -> Iterator[RunningService]:
    """A service that asks for ``TOKEN``."""
    with run_service(datasets, tmp_path, token=TOKEN) as service:
        yield service


@pytest.fixture(scope="session")
def browser() -> Iterator[webdriver.Chrome]:
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or "chromium"
    for switch in _SWITCHES:
        options.add_argument(switch)
    if os.geteuid() == 0:
        options.add_argument("--no-sandbox")  # chromium's sandbox refuses root; only these pages of ours are opened
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    # The driver's path is given, so that selenium does not look for one on the internet.
    driver = webdriver.Chrome(options=options, service=Driver(shutil.which("chromedriver") or "chromedriver"))
    yield driver
    driver.quit()


@pytest.fixture
def page(browser: webdriver.Chrome, service: RunningService) -> Iterator[Page]:
    """A page on the service; after the test nothing may have left the host, and the console must be quiet."""
    yield from _watched(Page(browser, service.base))


@pytest.fixture
def locked_page(browser: webdriver.Chrome, locked_service: RunningService) -> Iterator[Page]:
    yield from _watched(Page(browser, locked_service.base))


def _watched(page: Page) -> Iterator[Page]:
    page.driver.get("about:blank")
    page.driver.execute_cdp_cmd("Network.clearBrowserCookies", {})
    for kind in ("browser", "performance"):
        page.driver.get_log(kind)
    yield page
    page.driver.get("about:blank")  # ends what is under way
    elsewhere = [url for url in page.requests if not url.startswith((f"{page.base}/", "blob:", "data:", "about:"))]
    assert elsewhere == []
    assert page.complaints == []
