"""The viewer in a real browser, as a person has it: looks, clicks and keys."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import quote, urlencode

import numpy as np
import numpy.typing as npt
from selenium.webdriver import ActionChains
from selenium.webdriver.chrome.webdriver import WebDriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.select import Select

WAIT_S = 20.0
_STATUS = re.compile(r"status of (\d{3})|(net::ERR_\w+)")


class Page:
    """One tab on the viewer of a service."""

    def __init__(self, driver: WebDriver, base: str) -> None:
        self.driver = driver
        self.base = base
        self.expected_failures: set[str] = set()
        """Statuses (``429``) and network errors that a test brings about: the console reports them on its own."""
        self._requests: list[dict[str, Any]] = []

    def open(self, **view: str | int) -> None:
        """Follow a link to a view: ``dataset``, ``page``, ``caption``, ``bucket``, ``filter``, ``sample``."""
        self.driver.get("about:blank")
        self.driver.get(f"{self.base}/#{urlencode(view, quote_via=quote)}" if view else f"{self.base}/")

    def js(self, expression: str, *arguments: Any) -> Any:
        return self.driver.execute_script(f"return {expression}", *arguments)

    def wait(self, expression: str, *arguments: Any) -> Any:
        """The value of an expression once it is true to JavaScript."""
        deadline = time.monotonic() + WAIT_S
        while not (value := self.js(expression, *arguments)):
            if time.monotonic() > deadline:
                seen = self.js("[location.hash, ...[...document.querySelectorAll('.browse, .detail')].map(e => e.innerText)]")
                said = "\n--\n".join(part[:600] for part in seen)
                raise AssertionError(f"{expression} {arguments}: not true within {WAIT_S:g} s. The page says:\n{said}")
            time.sleep(0.02)
        return value

    def wait_text(self, selector: str, text: str) -> None:
        """Wait until an element is in sight and its text contains this."""
        self.wait(
            "(e => e && e.checkVisibility() && e.innerText.includes(arguments[1]))(document.querySelector(arguments[0]))",
            selector,
            text,
        )

    def text(self, selector: str) -> str:
        return str(self.driver.find_element(By.CSS_SELECTOR, selector).text)

    def is_visible(self, selector: str) -> bool:
        return bool(self.js("document.querySelector(arguments[0]).checkVisibility()", selector))

    def click(self, selector: str) -> None:
        self.driver.find_element(By.CSS_SELECTOR, selector).click()

    def type(self, selector: str, text: str) -> None:
        """Replace the text of a field, key by key."""
        field = self.driver.find_element(By.CSS_SELECTOR, selector)
        field.click()
        field.send_keys(Keys.CONTROL, "a")
        field.send_keys(Keys.BACKSPACE, text)

    def choose(self, selector: str, value: str) -> None:
        """Take an option of a select box."""
        Select(self.driver.find_element(By.CSS_SELECTOR, selector)).select_by_value(value)

    def press(self, *keys: str) -> None:
        """Press keys one after the other, wherever the focus is."""
        for key in keys:
            ActionChains(self.driver).send_keys(key).perform()

    # -- what the viewer shows -------------------------------------------------------------------------------------

    @property
    def ids(self) -> list[str]:
        """Of the samples listed."""
        return list(self.js("[...document.querySelectorAll('#list a')].map(a => a.dataset.id)"))

    def wait_range(self, text: str) -> None:
        """Wait for a page of the list by its line ``1–50 of 62``."""
        self.wait("document.getElementById('range').textContent === arguments[0] && !document.querySelector('[aria-busy]')", text)

    def wait_sample(self, sample_id: str) -> None:
        """Wait until a sample is open and marked in the list."""
        self.wait(
            "document.getElementById('sample').checkVisibility()"
            " && document.getElementById('sample-id').textContent === arguments[0]"
            " && document.querySelector('#list a[aria-current]')?.dataset.id === arguments[0]",
            sample_id,
        )

    def wait_video(self) -> None:
        """Wait until the video plays and has shown a few frames."""
        self.wait("(v => !v.paused && v.readyState >= 2 && v.currentTime > 0)(document.getElementById('video'))")

    def wait_channels(self) -> None:
        self.wait("document.querySelectorAll('#channels canvas').length === 16")

    def channel(self, number: int) -> npt.NDArray[np.uint8]:
        """The pixels of a channel's picture ``[H, W, 4]``."""
        width, height, values = self.js(
            "(c => { const copy = new OffscreenCanvas(c.width, c.height).getContext('2d');"
            " copy.drawImage(c, 0, 0); return [c.width, c.height, [...copy.getImageData(0, 0, c.width, c.height).data]] })"
            "(document.querySelectorAll('#channels canvas')[arguments[0]])",
            number,
        )
        return np.array(values, np.uint8).reshape(height, width, 4)

    def pixel(self, selector: str) -> list[int]:
        """RGB in the middle of what an image or a video shows now."""
        return list(
            self.js(
                "(e => { const c = new OffscreenCanvas(1, 1).getContext('2d');"
                " const w = e.videoWidth || e.naturalWidth, h = e.videoHeight || e.naturalHeight;"
                " c.drawImage(e, w >> 1, h >> 1, 1, 1, 0, 0, 1, 1); return [...c.getImageData(0, 0, 1, 1).data].slice(0, 3) })"
                "(document.querySelector(arguments[0]))",
                selector,
            )
        )

    @property
    def metadata(self) -> dict[str, str]:
        rows = self.js(
            "[...document.querySelectorAll('#metadata tr, #tensor-metadata tr')].map(r => [...r.cells].map(c => c.textContent))"
        )
        return dict(rows)

    # -- what the browser noticed ----------------------------------------------------------------------------------

    @property
    def requests(self) -> list[str]:
        """Every address that was asked for since the test began, in order."""
        for entry in self.driver.get_log("performance"):
            message = json.loads(entry["message"])["message"]
            if message["method"] == "Network.requestWillBeSent":
                self._requests.append(message["params"]["request"]["url"])
        return self._requests

    @property
    def complaints(self) -> list[str]:
        """What stands in the console, without the failures that were expected."""
        return [
            entry["message"]
            for entry in self.driver.get_log("browser")
            if entry["level"] in ("WARNING", "SEVERE") and not self._is_expected(entry["message"])
        ]

    def _is_expected(self, message: str) -> bool:
        found = _STATUS.search(message)
        return found is not None and (found[1] or found[2]) in self.expected_failures

    @contextmanager
    def emulate(self, *, width: int = 1280, height: int = 860, phone: bool = False, dark: bool = False) -> Iterator[None]:
        """Another screen."""
        metrics = {"width": width, "height": height, "deviceScaleFactor": 2 if phone else 1, "mobile": phone}
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": scheme})
        try:
            yield
        finally:
            self.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
            self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
