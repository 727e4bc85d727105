"""Everything by keyboard."""

from __future__ import annotations

import pytest
from selenium.webdriver.common.keys import Keys

from tests.browser.datasets import NUM_TALL, NUM_WIDE, sample_id
from tests.browser.page import Page

pytestmark = pytest.mark.browser

TOTAL = NUM_WIDE + NUM_TALL


@pytest.mark.parametrize(("forward", "backward"), [("j", "k"), (Keys.ARROW_DOWN, Keys.ARROW_UP)])
def test_keys_walk_through_the_samples(page: Page, forward: str, backward: str) -> None:
    page.open()
    page.wait_range(f"1–50 of {TOTAL}")
    for key, number in ((forward, 0), (forward, 1), (forward, 2), (backward, 1)):
        page.press(key)
        page.wait_sample(sample_id(number))


def test_walk_goes_on_over_the_ends_of_a_page(page: Page) -> None:
    page.open(dataset="walk", sample=sample_id(49))
    page.wait_sample(sample_id(49))
    page.press("j")
    page.wait_sample(sample_id(50))
    page.wait_range(f"51–{TOTAL} of {TOTAL}")
    page.press("k")
    page.wait_sample(sample_id(49))
    page.wait_range(f"1–50 of {TOTAL}")


@pytest.mark.parametrize(
    ("key", "end", "page_number", "back", "before"), [("k", 0, 1, "j", 1), ("j", TOTAL - 1, 2, "k", TOTAL - 2)]
)
def test_walk_stops_at_the_first_and_at_the_last_sample(
    page: Page, key: str, end: int, page_number: int, back: str, before: int
) -> None:
    page.open(dataset="walk", page=page_number, sample=sample_id(end))
    page.wait_sample(sample_id(end))
    page.press(key)
    assert page.js("location.hash").endswith(sample_id(end))
    page.press(back)  # had the step beyond the end led anywhere, this one would lead back to it
    page.wait_sample(sample_id(before))


def test_n_and_p_turn_pages(page: Page) -> None:
    page.open()
    page.wait_range(f"1–50 of {TOTAL}")
    page.press("n")
    page.wait_range(f"51–{TOTAL} of {TOTAL}")
    page.press("n", "p")
    page.wait_range(f"1–50 of {TOTAL}")


def test_space_plays_and_pauses(page: Page) -> None:
    page.open(dataset="walk", sample=sample_id(0))
    page.wait_sample(sample_id(0))
    page.wait_video()
    page.press(" ")
    page.wait("document.getElementById('video').paused")
    page.press(" ")
    page.wait("!document.getElementById('video').paused")


def test_slash_leads_to_the_filter_where_letters_are_text(page: Page) -> None:
    page.open()
    page.wait_range(f"1–50 of {TOTAL}")
    page.press("/", "j", "n", "?", " ")
    page.wait("document.getElementById('caption').value === 'jn? '")
    page.wait_text("#list-state", "No sample matches")
    assert not page.js("location.hash").endswith("page=2")
    page.press(Keys.ESCAPE)
    assert page.js("document.activeElement === document.body")


def test_question_mark_opens_help_and_escape_closes_it(page: Page) -> None:
    page.open()
    page.wait_range(f"1–50 of {TOTAL}")
    page.press("?")
    page.wait_text("#help", "next sample")
    assert "psnr" in page.text("#help-columns")
    page.press("j")  # not for the page behind it
    page.press(Keys.ESCAPE)
    page.wait("!document.getElementById('help').open")
    page.click("#help-open")
    page.wait_text("#help", "next sample")
    page.click("#help button")
    page.wait("!document.getElementById('help').open")
    assert "sample" not in page.js("location.hash")


def test_tab_reaches_every_control_and_shows_where_it_is(page: Page) -> None:
    page.open(dataset="walk", caption="cockatoos", sample=sample_id(0))
    page.wait_sample(sample_id(0))
    page.wait_channels()
    seen = []
    for _ in range(40):
        page.press(Keys.TAB)
        name, outline = page.js("(e => [e.id || e.tagName, getComputedStyle(e).outlineStyle])(document.activeElement)")
        if name in ("BODY", "dataset") and seen:
            break
        if name not in seen:  # a video's own buttons count as the video, and draw their own focus
            assert outline != "none", name
        seen.append(name)
    assert seen[:5] == ["dataset", "help-open", "caption", "bucket", "filter"]
    assert {"A", "copy-id", "copy-link", "video", "latent-frame", "follow"} <= set(seen)
