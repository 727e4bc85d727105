"""What the page says and does when not all is well: busy, broken, locked, in a hurry, on a small screen."""

from __future__ import annotations

import pytest
from selenium.webdriver.common.keys import Keys

from tests.browser.conftest import TOKEN
from tests.browser.datasets import NUM_TALL, NUM_WIDE, sample_id
from tests.browser.page import Page
from tests.browser.serving import Refusal, RunningService

pytestmark = pytest.mark.browser

TOTAL = NUM_WIDE + NUM_TALL


def test_busy_service_is_asked_again_when_it_says(page: Page, service: RunningService) -> None:
    page.expected_failures = {"429"}
    service.obstacles.refusals = [Refusal("/video", 429, "the queue is full", {"Retry-After": "2"})]
    page.open(dataset="walk", sample=sample_id(5))
    page.wait_text("#video-state", "The service is busy; asking again in 2 s.")
    page.wait_text("#video-state", "asking again in 1 s.")
    page.wait_video()
    assert not page.is_visible("#video-state")
    assert len([url for url in page.requests if "/video" in url]) == 2


def test_failed_part_is_tried_again_alone(page: Page, service: RunningService) -> None:
    page.expected_failures = {"422"}
    service.obstacles.refusals = [Refusal("/latent", 422, "its bytes are damaged")]
    page.open(dataset="walk", sample=sample_id(5))
    page.wait_text("#latent-state", "its bytes are damaged")
    page.wait_video()
    page.click("#latent-state button")
    page.wait_channels()
    assert not page.is_visible("#latent-state")
    assert len([url for url in page.requests if "/video" in url]) == 1


def test_leaving_a_sample_gives_up_its_requests(page: Page, service: RunningService) -> None:
    service.obstacles.held = f"{sample_id(5)}/video"
    page.open(dataset="walk", sample=sample_id(5))
    page.wait_text("#video-state", "Decoding…")
    page.wait("/^[1-9]+ s$/.test(document.querySelector('#video-state .clock')?.textContent)")
    assert service.obstacles.given_up == []
    page.press("j")
    page.wait_sample(sample_id(6))
    page.wait_video()
    assert service.obstacles.given_up == [f"/v1/datasets/walk/samples/{sample_id(5)}/video"]


def test_samples_that_are_passed_quickly_are_not_decoded(page: Page) -> None:
    page.open()
    page.wait_range(f"1–50 of {TOTAL}")
    pauses_ms = page.driver.execute_async_script(_HOLD_KEY, "j", 12, 60)
    page.wait_sample(sample_id(11))
    page.wait_video()
    decoded = [url for url in page.requests if "/video" in url]
    assert decoded[-1] == f"{page.base}/v1/datasets/walk/samples/{sample_id(11)}/video?container=mp4"
    # On a busy machine the walk itself may pause on a sample for long enough to look at it.
    assert len(decoded) <= 1 + sum(pause_ms > 140 for pause_ms in pauses_ms)
    for _ in range(1 + sum(pause_ms > 390 for pause_ms in pauses_ms)):
        page.driver.back()  # one step for the whole run
    page.wait_text("#detail-state", "Choose a sample")


_HOLD_KEY = """
const [key, times, pause, done] = arguments;
const pressed = [];
const timer = setInterval(() => {
  pressed.push(performance.now());
  document.body.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }));
  if (pressed.length < times) return;
  clearInterval(timer);
  done(pressed.slice(1).map((time, index) => time - pressed[index]));
}, pause);
"""


def test_video_is_let_go_when_the_sample_changes(page: Page, service: RunningService) -> None:
    page.open(dataset="walk", sample=sample_id(5))
    page.wait_sample(sample_id(5))
    page.wait_video()
    service.obstacles.held = f"{sample_id(6)}/video"
    page.press("j")
    page.wait_sample(sample_id(6))
    assert page.js("(v => [v.hasAttribute('src'), v.videoWidth])(document.getElementById('video'))") == [False, 0]


def test_service_that_is_gone_is_told_apart(page: Page, locked_service: RunningService) -> None:
    page.expected_failures = {"401", "net::ERR_CONNECTION_REFUSED", "net::ERR_SOCKET_NOT_CONNECTED"}
    page.base = locked_service.base
    page.open()
    page.wait_text("#sign-in", "asks for a token")
    locked_service.stop()
    page.type("#token", TOKEN + Keys.ENTER)
    page.wait_text("#sign-in-error", "The service did not answer")


def test_token_opens_the_service_for_everything_on_the_page(locked_page: Page) -> None:
    page = locked_page
    page.expected_failures = {"401"}
    page.open(dataset="walk", sample=sample_id(2))
    page.wait_text("#sign-in", "This service asks for a token")
    page.type("#token", "another-token-entirely" + Keys.ENTER)
    page.wait_text("#sign-in-error", "token")
    page.type("#token", TOKEN + Keys.ENTER)
    page.wait_sample(sample_id(2))
    page.wait_video()
    page.wait_channels()
    page.wait("document.getElementById('frame').naturalWidth > 0")
    assert not page.js("document.getElementById('sign-in').open")
    assert page.js("document.cookie") == ""  # not for scripts
    assert page.js("document.getElementById('token').value") == ""
    assert TOKEN not in page.js("JSON.stringify([localStorage, sessionStorage, location.href])")
    page.open(dataset="walk", sample=sample_id(3))
    page.wait_sample(sample_id(3))
    page.wait_video()


def test_first_answer_that_fails_offers_to_try_again(page: Page, service: RunningService) -> None:
    page.expected_failures = {"500"}
    service.obstacles.refusals = [Refusal("/v1/datasets", 500, "the service failed by RuntimeError")]
    page.open()
    page.wait_text("#list-state", "the service failed by RuntimeError")
    page.click("#list-state button")
    page.wait_range(f"1–50 of {TOTAL}")


def test_phone_shows_one_pane_at_a_time(page: Page) -> None:
    with page.emulate(width=390, height=844, phone=True):
        page.open()
        page.wait_range(f"1–50 of {TOTAL}")
        assert not page.is_visible("#detail")
        page.click("#list li:nth-child(3) a")
        page.wait_sample(sample_id(2))
        page.wait_video()
        page.wait_channels()
        assert not page.is_visible("#list")
        assert page.js("document.documentElement.scrollWidth") <= 390
        page.click("#back")
        page.wait("document.getElementById('list').checkVisibility()")
        assert not page.is_visible("#detail")


@pytest.mark.parametrize("dark", [False, True])
def test_text_is_readable_in_both_colour_schemes(page: Page, dark: bool) -> None:
    with page.emulate(dark=dark):
        page.open(dataset="walk", sample=sample_id(4))
        page.wait_sample(sample_id(4))
        pairs = page.js(_COLOURS)
        assert len(pairs) > 20
        for text, colour, ground in pairs:
            assert _contrast(colour, ground) >= 4.5, (text, colour, ground)
        is_dark = _luminance(page.js("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)")) < 0.1
        assert is_dark == dark


_COLOURS = """(() => {
  const numbers = (colour) => colour.match(/[\\d.]+/g).map(Number);
  const ground = (element) => {
    for (let e = element; e; e = e.parentElement) {
      const colour = numbers(getComputedStyle(e).backgroundColor);
      if (colour.length === 3) return colour;
    }
  };
  return [...document.querySelectorAll("h1, h2, h3, a, p, span, code, th, td, button, select, input, label")]
    .filter((e) => e.checkVisibility() && !e.disabled && !e.closest(".hidden") && (e.innerText || e.value))
    .map((e) => [e.innerText || e.value, numbers(getComputedStyle(e).color), ground(e)]);
})()"""


def _luminance(colour: list[float]) -> float:
    """Relative luminance of sRGB, as WCAG has it."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (value / 255 for value in colour[:3])]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _contrast(one: list[float], other: list[float]) -> float:
    lighter, darker = sorted((_luminance(one), _luminance(other)), reverse=True)
    return (lighter + 0.05) / (darker + 0.05)
