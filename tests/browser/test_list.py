"""Looking for samples: pages, filters, links, Back."""

from __future__ import annotations

import pytest
from selenium.webdriver.common.keys import Keys

from tests.browser.datasets import NUM_TALL, NUM_WIDE, TALL, sample_id
from tests.browser.page import Page

pytestmark = pytest.mark.browser

TOTAL = NUM_WIDE + NUM_TALL


def test_pages_of_fifty_samples_follow_each_other(page: Page) -> None:
    page.open()
    page.wait_range(f"1–50 of {TOTAL}")
    assert page.ids == [sample_id(number) for number in range(50)]
    assert page.js("document.getElementById('previous-page').disabled")
    page.click("#next-page")
    page.wait_range(f"51–{TOTAL} of {TOTAL}")
    assert page.ids == [sample_id(number) for number in range(50, TOTAL)]
    assert page.js("document.getElementById('next-page').disabled")
    page.click("#previous-page")
    page.wait_range(f"1–50 of {TOTAL}")


def test_list_says_what_a_sample_is(page: Page) -> None:
    page.open()
    page.wait_text("#list", "two cockatoos look up")
    assert page.text("#list li:first-child").splitlines() == ["two cockatoos look up", "0.mp4", "9 f · 48 × 32 · 8 fps"]
    assert page.text("#list li:nth-child(5) .title") == "no caption"


def test_dataset_of_another_vae_is_shown_with_a_warning(page: Page) -> None:
    page.open(dataset="half")
    page.wait_range("1–2 of 2")
    assert "made by a VAE with scaling factor 1.15258 (cogvideox-2b)" in page.text("#dataset-warning")
    page.choose("#dataset", "walk")
    page.wait_range(f"1–50 of {TOTAL}")
    assert not page.is_visible("#dataset-warning")


def test_caption_filter_waits_for_the_end_of_typing(page: Page) -> None:
    page.open()
    page.wait_range(f"1–50 of {TOTAL}")
    page.type("#caption", "CLIP 1")
    page.wait_range("1–11 of 11")  # 1 and 10 to 19
    asked = [url for url in page.requests if "/samples?" in url]
    assert len(asked) < 1 + len("CLIP 1")


def test_bucket_filter_lists_its_samples_alone(page: Page) -> None:
    page.open()
    page.wait_range(f"1–50 of {TOTAL}")
    page.choose("#bucket", TALL.key)
    page.wait_range(f"1–{NUM_TALL} of {NUM_TALL}")
    assert page.ids == [sample_id(number) for number in range(NUM_WIDE, TOTAL)]


def test_metadata_filters_join_with_a_semicolon(page: Page) -> None:
    page.open()
    page.wait_range(f"1–50 of {TOTAL}")
    page.type("#filter", "psnr>60; num_frames=9")
    page.wait_range("1–14 of 14")  # psnr = 30.125 + number of the even ones
    assert page.ids == [sample_id(number) for number in range(30, NUM_WIDE, 2)]


def test_mistake_in_a_filter_is_explained_beside_it(page: Page) -> None:
    page.expected_failures = {"422"}
    page.open()
    page.wait_range(f"1–50 of {TOTAL}")
    page.type("#filter", "sharpness>3")
    page.wait_text("#filter-error", "'sharpness'")  # the service's sentence
    assert page.js("document.getElementById('filter').getAttribute('aria-invalid')") == "true"
    assert page.ids == []
    page.type("#filter", "psnr>80")
    page.wait_range("1–6 of 6")
    assert not page.is_visible("#filter-error")
    assert page.js("document.getElementById('filter').getAttribute('aria-invalid')") == "false"


def test_no_match_offers_to_clear_the_filters(page: Page) -> None:
    page.open(caption="no such words")
    page.wait_text("#list-state", "No sample matches")
    assert page.js("document.getElementById('caption').value") == "no such words"
    page.click("#list-state button")
    page.wait_range(f"1–50 of {TOTAL}")
    assert page.js("document.getElementById('caption').value") == ""


def test_link_opens_page_filter_and_sample(page: Page) -> None:
    page.open(dataset="walk", page=2, filter="psnr>0; num_frames>=9", caption="", sample=sample_id(0))
    page.wait_text("#list-state", "There are only 1 pages")
    page.open(dataset="walk", page=2, filter="num_frames>=9", sample=sample_id(55))
    page.wait_sample(sample_id(55))
    page.wait_range(f"51–{TOTAL} of {TOTAL}")
    assert page.js("document.getElementById('filter').value") == "num_frames>=9"


def test_back_and_forward_walk_through_what_was_looked_at(page: Page) -> None:
    page.open()
    page.wait_range(f"1–50 of {TOTAL}")
    page.click("#list li:nth-child(2) a")
    page.wait_sample(sample_id(1))
    page.click("#next-page")
    page.wait_range(f"51–{TOTAL} of {TOTAL}")
    page.type("#caption", "clip 5")
    page.wait_range("1–11 of 11")
    page.driver.back()
    page.wait_range(f"51–{TOTAL} of {TOTAL}")
    assert page.js("document.getElementById('caption').value") == ""
    page.driver.back()
    page.wait_range(f"1–50 of {TOTAL}")
    page.wait_sample(sample_id(1))
    page.driver.back()
    page.wait_text("#detail-state", "Choose a sample")
    page.driver.forward()
    page.wait_sample(sample_id(1))


def test_another_dataset_begins_at_its_first_page(page: Page) -> None:
    page.open(dataset="walk", page=2, caption="clip")
    page.wait_text("#dataset-facts", f"{TOTAL} samples")
    page.choose("#dataset", "half")
    page.wait_range("1–2 of 2")
    assert page.js("location.hash") == "#dataset=half"


def test_link_to_a_dataset_that_is_not_there_says_so(page: Page) -> None:
    page.expected_failures = {"404"}
    page.open(dataset="lost")
    page.wait_text("#list-state", "no dataset 'lost'")


def test_escape_leaves_a_field_and_enter_applies_it_at_once(page: Page) -> None:
    page.open()
    page.wait_range(f"1–50 of {TOTAL}")
    page.type("#caption", "cockatoos" + Keys.ENTER)
    page.wait_range("1–1 of 1")
    page.press(Keys.ESCAPE)
    assert page.js("document.activeElement === document.body")
