"""One sample: its video, source frame, channels and metadata."""

from __future__ import annotations

import re

import numpy as np
import numpy.typing as npt
import pytest
import torch

from tests.browser.datasets import FRAME_COLOUR, HOSTILE, NUM_WIDE, TALL, WIDE, make_broken_latent, make_latent, sample_id
from tests.browser.page import Page
from tests.browser.serving import grey_of

pytestmark = pytest.mark.browser


def expected_picture(latent: torch.Tensor, channel: int, frame: int) -> npt.NDArray[np.float64]:
    """Greys of a channel: its own 1st percentile is black, its 99th white."""
    values = latent[channel].double().numpy()
    low, high = np.quantile(values[np.isfinite(values)], [0.01, 0.99], method="nearest")
    return np.clip((values[frame] - low) / (high - low), 0, 1) * 255


def assert_shows(page: Page, latent: torch.Tensor, channel: int, frame: int) -> None:
    shown = page.channel(channel)
    expected = expected_picture(latent, channel, frame)
    assert shown.shape == (*expected.shape, 4)
    assert np.all(shown[..., 3] == 255)
    assert np.ptp(shown[..., 0]) > 100, "a picture of nothing"
    for colour in range(3):
        assert np.abs(shown[..., colour] - expected).max() <= 1


def move_slider(page: Page, frame: int) -> None:
    page.js(
        "(s => { s.value = arguments[0]; s.dispatchEvent(new Event('input')) })(document.getElementById('latent-frame'))", frame
    )


def test_click_on_a_sample_plays_its_decoded_video(page: Page) -> None:
    page.open()
    page.wait_text("#list", "clip 2")
    page.click("#list li:nth-child(3) a")
    page.wait_sample(sample_id(2))
    page.wait_video()
    video = page.js("(v => [v.videoWidth, v.videoHeight, v.duration, v.loop, v.muted])(document.getElementById('video'))")
    assert video == [WIDE.width, WIDE.height, pytest.approx(WIDE.num_frames / WIDE.fps, abs=0.01), True, True]
    before = page.js("document.getElementById('video').currentTime")
    page.wait("document.getElementById('video').currentTime !== arguments[0]", before)
    greys = [grey_of(frame) for frame in range(WIDE.num_frames)]
    red, green, blue = page.pixel("#video")
    assert max(red, green, blue) - min(red, green, blue) <= 4
    assert min(abs(green - grey) for grey in greys) <= 4
    assert page.text("#video-facts") == "9 frames · 48 × 32 · 8 fps"


def test_video_of_another_bucket_has_its_own_size(page: Page) -> None:
    page.open(dataset="walk", page=2, sample=sample_id(NUM_WIDE))
    page.wait_sample(sample_id(NUM_WIDE))
    page.wait_video()
    assert page.js("(v => [v.videoWidth, v.videoHeight])(document.getElementById('video'))") == [TALL.width, TALL.height]


def test_metadata_is_a_table_of_the_columns(page: Page) -> None:
    page.open(dataset="walk", sample=sample_id(2))
    page.wait_sample(sample_id(2))
    shown = page.metadata
    assert shown["caption"] == "clip 2"
    assert shown["psnr"] == "32.125"
    assert shown["source_fps"] == "29.97"
    assert shown["source_uri"] == "videos/2.mp4"
    assert shown["degraded"] == "—"
    assert shown["frame_end"] == "11"
    assert shown["vae_latent_shape"] == "[16,3,4,6]"
    assert not page.is_visible("#tensor-metadata")
    page.click("#tensor-columns summary")
    assert page.is_visible("#tensor-metadata")


def test_stored_source_frame_stands_beside_the_video(page: Page) -> None:
    page.open(dataset="walk", sample=sample_id(2))
    page.wait_sample(sample_id(2))
    page.wait("document.getElementById('frame').naturalWidth === arguments[0]", WIDE.width)
    assert page.pixel("#frame") == list(FRAME_COLOUR)
    video, frame = (page.js(f"document.getElementById('{name}').getBoundingClientRect().toJSON()") for name in ("video", "frame"))
    assert (video["y"], video["height"]) == (frame["y"], frame["height"])
    assert frame["x"] > video["right"]


def test_dataset_without_source_frames_shows_none(page: Page) -> None:
    page.open(dataset="half", sample=sample_id(0))
    page.wait_sample(sample_id(0))
    page.wait_video()
    assert not page.is_visible("#frame-figure")
    assert not any(url.endswith("frame.png") for url in page.requests)


@pytest.mark.parametrize(("dataset", "dtype"), [("walk", "bfloat16"), ("half", "float16"), ("full", "float32")])
def test_channels_are_pictures_of_the_stored_values(page: Page, dataset: str, dtype: str) -> None:
    page.open(dataset=dataset, sample=sample_id(0))
    page.wait_sample(sample_id(0))
    page.wait_channels()
    latent = make_latent(0, WIDE, dtype)
    assert page.text("#latent-facts") == f"16 × 3 × 4 × 6 · {dtype}"
    for frame in (2, 0):
        move_slider(page, frame)
        for channel in (0, 7, 15):
            assert_shows(page, latent, channel, frame)


def test_channels_have_their_statistics(page: Page) -> None:
    page.open(dataset="full", sample=sample_id(0))
    page.wait_sample(sample_id(0))
    page.wait_channels()
    latent = make_latent(0, WIDE, "float32").double()
    titles = page.js("[...document.querySelectorAll('#channels figcaption')].map(c => c.title)")
    for channel, title in enumerate(titles):
        numbers = [float(line.split()[-1]) for line in title.splitlines()]
        values = latent[channel]
        expected = [values.mean(), values.std(correction=0), values.min(), values.max()]
        assert numbers == pytest.approx([float(value) for value in expected], rel=1e-6)
    mean, std = latent[15].mean(), latent[15].std(correction=0)
    assert page.text("#channels figure:last-child").split("\n")[1:3] == [f"μ {mean:.2f}", f"σ {std:.2f}"]


def test_values_that_are_no_numbers_are_counted_and_loud(page: Page) -> None:
    page.expected_failures = {"422"}
    page.open(dataset="half", sample=sample_id(1))
    page.wait_sample(sample_id(1))
    page.wait_channels()
    page.wait_text("#channels figure:nth-child(3)", "3 not finite")
    latent = make_broken_latent("float16")
    assert page.channel(2)[0, :3].tolist() == [[255, 0, 200, 255]] * 3
    assert np.abs(page.channel(2)[0, 3:, 0] - expected_picture(latent, 2, 0)[0, 3:]).max() <= 1
    assert_shows(page, latent, 3, 0)  # values below float16's normal ones
    page.wait_text("#video-state", "Try again")  # it cannot be decoded, and what is known is still there
    assert page.metadata["caption"] == "clip 1"


def test_channels_follow_the_video_until_the_slider_is_moved(page: Page) -> None:
    page.open(dataset="walk", sample=sample_id(2))
    page.wait_sample(sample_id(2))
    page.wait_channels()
    page.wait_video()
    page.press(" ")
    page.wait("document.getElementById('video').paused")
    for seconds, frame, text in ((0.01, 0, "video frame 0"), (0.55, 1, "video frames 1–4"), (1.1, 2, "video frames 5–8")):
        page.js("(v => { v.currentTime = arguments[0] })(document.getElementById('video'))", seconds)
        page.wait_text("#latent-frame-label", text)
        assert page.js("document.getElementById('latent-frame').value") == str(frame)
    move_slider(page, 1)
    page.wait_text("#latent-frame-label", "video frames 1–4")
    assert not page.js("document.getElementById('follow').checked")
    page.click("#follow")
    page.wait_text("#latent-frame-label", "video frames 5–8")


def test_hostile_caption_is_only_text(page: Page) -> None:
    page.open(dataset="walk", sample=sample_id(3))
    page.wait_sample(sample_id(3))
    page.wait_video()
    assert page.text("#sample-caption") == HOSTILE
    assert page.text("#list a[aria-current] .title").startswith("<img src=x")
    assert page.metadata["caption"] == HOSTILE
    assert page.js("document.querySelectorAll('#list img, #sample h2 *, #metadata td *, b:not(.channels b)').length") == 0
    assert "pwned" not in page.driver.title
    assert not any(url.endswith("/x") for url in page.requests)


def test_id_and_link_can_be_copied(page: Page) -> None:
    permissions = ["clipboardReadWrite", "clipboardSanitizedWrite"]
    page.driver.execute_cdp_cmd("Browser.grantPermissions", {"origin": page.base, "permissions": permissions})
    page.open(dataset="walk", sample=sample_id(2))
    page.wait_sample(sample_id(2))
    for button, expected in (("#copy-id", sample_id(2)), ("#copy-link", page.js("location.href"))):
        page.click(button)
        page.wait_text(button, "Copied")
        assert page.driver.execute_async_script("navigator.clipboard.readText().then(arguments[0])") == expected


def test_downloads_are_links(page: Page) -> None:
    page.open(dataset="walk", sample=sample_id(2))
    page.wait_sample(sample_id(2))
    links = page.js("[...document.querySelectorAll('#sample a[download]')].map(a => a.href)")
    paths = [link.removeprefix(f"{page.base}/v1/datasets/walk/samples/{sample_id(2)}/") for link in links]
    assert paths == ["video?container=mp4", "video?container=mkv", "latent"]


def test_sample_that_is_not_there_says_so(page: Page) -> None:
    page.expected_failures = {"404"}
    page.open(dataset="walk", sample="nobody")
    page.wait_text("#detail-state", "'nobody'")
    assert re.search("Try again", page.text("#detail-state"))
