"""Decoding over HTTP with a fake model, through a real server."""

from __future__ import annotations

import asyncio
import gc
import io
import threading
import time
import weakref
import zipfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import av
import httpx
import pytest
import safetensors.torch
import torch
from PIL import Image

from pipeline.errors import ConfigError, TerminalError
from pipeline.service.cache import VideoCache
from pipeline.service.config import ServiceConfig
from pipeline.service.core import DecoderService
from pipeline.service.decoding import Decoder
from pipeline.service.parameters import DecodeParameters, VideoRequest, read_request
from pipeline.service.spool import SpooledVideo
from tests.pipeline.fakes import ExhaustedError
from tests.pipeline.service.asking import SCALE, Make, count_frames, decode, metric, reason, wait_until
from tests.pipeline.service.fakes import MODEL, FakeDecoder, make_body, make_latent


@pytest.mark.parametrize(("frames", "expected"), [(1, 1), (3, 9), (4, 16), (13, 49)])
def test_a_latent_comes_back_as_a_video_with_its_length(client: httpx.Client, frames: int, expected: int) -> None:
    answer = decode(client, make_body(shape=(16, frames, 4, 6)), fps="30000/1001")
    assert (answer.status_code, answer.headers["content-type"]) == (200, "video/mp4")
    assert int(answer.headers["content-length"]) == len(answer.content)
    assert answer.headers["etag"]
    assert count_frames(answer.content) == expected
    with av.open(io.BytesIO(answer.content)) as container:
        stream = container.streams.video[0]
        assert (stream.width, stream.height, float(stream.average_rate or 0)) == (48, 32, pytest.approx(29.97, abs=0.01))


def test_a_stream_begins_before_it_ends_and_ends_in_an_mfra_box(client: httpx.Client, engine: FakeDecoder) -> None:
    with client.stream(
        "POST", "/v1/decode", params={**SCALE, "stream": "true"}, content=make_body(shape=(16, 13, 4, 6))
    ) as answer:
        assert "content-length" not in answer.headers
        pieces = answer.iter_raw()
        engine.gate.clear()
        data = next(pieces)
        assert data[4:8] == b"ftyp"
        assert engine.chunks < 6
        engine.gate.set()
        data += b"".join(pieces)
    assert data[-12:-8] == b"mfro"
    assert count_frames(data) == 49


def test_png_is_a_zip_of_the_frames_in_order(client: httpx.Client) -> None:
    answer = decode(client, make_body(shape=(16, 5, 4, 6)), container="png")
    assert answer.headers["content-type"] == "application/zip"
    with zipfile.ZipFile(io.BytesIO(answer.content)) as archive:
        assert archive.namelist() == [f"{number:05d}.png" for number in range(17)]
        assert Image.open(archive.open("00016.png")).size == (48, 32)


@pytest.mark.parametrize(("container", "media_type"), [("mkv", "video/x-matroska"), ("webp", "image/webp")])
def test_other_containers_have_their_types(client: httpx.Client, container: str, media_type: str) -> None:
    answer = decode(client, container=container)
    assert (answer.status_code, answer.headers["content-type"]) == (200, media_type)
    assert len(answer.content) > 100


def test_the_same_request_is_decoded_once(client: httpx.Client, engine: FakeDecoder) -> None:
    first, second = decode(client), decode(client)
    assert first.content == second.content
    assert first.headers["etag"] == second.headers["etag"]
    assert len(engine.batches) == 1
    assert decode(client, crf=30).content != first.content
    assert decode(client, make_body(1)).content != first.content


def test_equal_requests_at_the_same_time_share_one_decoding(client: httpx.Client, engine: FakeDecoder) -> None:
    engine.gate.clear()
    with ThreadPoolExecutor(4) as pool:
        answers = [pool.submit(decode, client) for _ in range(4)]
        wait_until(lambda: metric(client, "latents_cache_total", outcome="joined") == 3)
        engine.gate.set()
        assert len({answer.result().content for answer in answers}) == 1
    assert len(engine.batches) == 1


def test_requests_of_equal_shape_are_decoded_together(make_client: Make, engine: FakeDecoder) -> None:
    client = make_client(max_batch=3)
    engine.gate.clear()
    with ThreadPoolExecutor(8) as pool:
        blocker = pool.submit(decode, client, make_body(99))
        wait_until(lambda: bool(engine.batches))
        answers = [pool.submit(decode, client, make_body(seed)) for seed in range(5)]
        wait_until(lambda: metric(client, "latents_queue") == 5)
        engine.gate.set()
        assert [answer.result().status_code for answer in [blocker, *answers]] == [200] * 6
    assert [len(batch) for batch in engine.batches] == [1, 3, 2]


def test_a_scale_that_names_a_model_of_another_vae_is_refused_and_a_factor_is_not(client: httpx.Client) -> None:
    answer = decode(client, scale="cogvideox-2b")
    assert (answer.status_code, reason(answer)) == (422, "other_model")
    assert decode(client, scale="1.15258426").status_code == 200
    assert decode(client, scale="cogvideox-1.5-5b", role="first_frame").status_code == 200


BAD_PARAMETERS: list[tuple[dict[str, Any], str]] = [
    ({"scale": "nan"}, "scale"),
    ({"scale": "0"}, "scale"),
    ({"scale": "-1"}, "scale"),
    ({"scale": "1e999"}, "scale"),
    ({"scale": "cogvideox-9b"}, "cogvideox-5b"),
    ({"fps": "0"}, "fps"),
    ({"fps": "1/0"}, "fps"),
    ({"fps": "1e9"}, "fps"),
    ({"fps": "-8"}, "fps"),
    ({"fps": "100000"}, "fps"),
    ({"crf": "52"}, "crf"),
    ({"crf": "0"}, "crf"),
    ({"container": "avi"}, "container"),
    ({"container": "webp", "stream": "true"}, "stream"),
    ({"layout": "HWFC"}, "layout"),
    ({"layout": "FCHW"}, "layout"),
    ({"role": "x"}, "role"),
    ({"key": "other"}, "'latent'"),
    ({"drop_frames": "3"}, "drop_frames"),
    ({"drop_frames": "-1"}, "drop_frames"),
    ({"containr": "mkv"}, "containr: no such parameter"),
]


@pytest.mark.parametrize(("parameters", "said"), BAD_PARAMETERS, ids=str)
def test_a_bad_parameter_is_refused_by_its_name(client: httpx.Client, parameters: dict[str, Any], said: str) -> None:
    answer = decode(client, **parameters)
    assert answer.status_code == 422
    assert said in answer.json()["error"]["detail"]
    assert "input." not in answer.json()["error"]["detail"]


def test_the_scale_must_be_said(client: httpx.Client) -> None:
    answer = client.post("/v1/decode", content=make_body())
    assert answer.status_code == 422
    assert "scale: is required" in answer.json()["error"]["detail"]


BAD_BODIES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", ""),
    "cut": (make_body()[:-1], ""),
    "text": (b"hello, I am a latent", ""),
    "huge header": (b"\xff" * 8 + b"{}", ""),
    "no tensor": (safetensors.torch.save({}), ""),
    "two": (safetensors.torch.save({"a": make_latent(), "b": make_latent()}), "key"),
    "integers": (safetensors.torch.save({"latent": torch.zeros(16, 3, 4, 6, dtype=torch.int32)}), ""),
    "nan": (safetensors.torch.save({"latent": torch.full((16, 3, 4, 6), torch.nan)}), "NaN"),
    "infinite": (safetensors.torch.save({"latent": torch.full((16, 3, 4, 6), torch.inf)}), "infinite"),
    "moments": (safetensors.torch.save({"latent": torch.zeros(32, 3, 4, 6)}), "mean"),
    "ambiguous": (safetensors.torch.save({"latent": torch.zeros(16, 16, 4, 6)}), "layout"),
    "batch": (safetensors.torch.save({"latent": torch.zeros(2, 16, 3, 4, 6)}), "2 clips"),
    "flat": (safetensors.torch.save({"latent": torch.zeros(16, 3, 24)}), ""),
    "hollow": (safetensors.torch.save({"latent": torch.zeros(16, 3, 0, 6)}), ""),
}


@pytest.mark.parametrize("name", BAD_BODIES)
def test_a_bad_body_is_refused_with_what_is_wrong(client: httpx.Client, engine: FakeDecoder, name: str) -> None:
    body, said = BAD_BODIES[name]
    answer = decode(client, body)
    assert answer.status_code == 422, answer.text
    assert said in answer.json()["error"]["detail"]
    assert engine.batches == []


@pytest.mark.parametrize(
    ("shape", "limits", "expected"),
    [
        ((16, 5, 4, 6), {"max_frames": 16}, "too_many_frames"),
        ((16, 1, 40, 60), {"max_pixels": 320 * 480 - 1}, "too_many_pixels"),
        ((16, 1, 1, 1025), {}, "too_many_pixels"),
        ((16, 5, 4, 6), {"spool_bytes": 17 * 32 * 48 * 3 - 1}, "video_too_large"),
        ((16, 5, 4, 6), {"max_body_bytes": 1000}, "body_too_large"),
    ],
)
def test_what_is_over_a_limit_is_refused_413(make_client: Make, shape: Any, limits: dict[str, Any], expected: str) -> None:
    answer = decode(make_client(**limits), make_body(shape=shape))
    assert (answer.status_code, reason(answer)) == (413, expected)


def test_a_body_of_unsaid_length_is_held_only_up_to_the_limit(make_client: Make) -> None:
    client = make_client(max_body_bytes=50_000)
    answer = client.post("/v1/decode", params=SCALE, content=(b"x" * 10_000 for _ in range(1000)))
    assert (answer.status_code, reason(answer)) == (413, "body_too_large")
    assert metric(client, "latents_held_bytes") == 0


def test_a_full_queue_answers_429_with_a_time_and_serves_again_later(make_client: Make, engine: FakeDecoder) -> None:
    client = make_client(max_queue=2, max_batch=1)
    engine.gate.clear()
    with ThreadPoolExecutor(8) as pool:
        first = pool.submit(decode, client, make_body(0))
        wait_until(lambda: bool(engine.batches))
        queued = [pool.submit(decode, client, make_body(seed)) for seed in (1, 2)]
        wait_until(lambda: metric(client, "latents_queue") == 2)
        refused = decode(client, make_body(3))
        assert (refused.status_code, reason(refused)) == (429, "queue_full")
        assert int(refused.headers["retry-after"]) >= 1
        engine.gate.set()
        assert [answer.result().status_code for answer in (first, *queued)] == [200, 200, 200]
    assert decode(client, make_body(3)).status_code == 200


def test_requests_over_the_memory_limit_are_told_to_come_again(make_client: Make, engine: FakeDecoder) -> None:
    shape = (16, 13, 4, 6)
    size = len(make_body(shape=shape))
    client = make_client(memory_bytes=8 * size + 1000, max_body_bytes=size)
    engine.gate.clear()
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(decode, client, make_body(0, shape), crf=51)
        wait_until(lambda: bool(engine.batches))
        refused = decode(client, make_body(1, shape))
        assert (refused.status_code, reason(refused)) == (429, "memory_full")
        engine.gate.set()
        assert first.result().status_code == 200
    wait_until(lambda: metric(client, "latents_held_bytes") == 0)


def test_an_answer_counts_as_held_until_its_client_has_it(make_client: Make) -> None:
    body = make_body(shape=(16, 5, 40, 60))
    client = make_client(memory_bytes=8 * len(body) + (2 << 20), max_body_bytes=len(body))
    large = {**SCALE, "container": "mkv"}
    with client.stream("POST", "/v1/decode", params=large, content=body) as answer:
        size = int(answer.headers["content-length"])
        assert size > 2 << 20  # more than sockets hold
        pieces = answer.iter_raw(1000)
        next(pieces)
        time.sleep(0.2)
        assert metric(client, "latents_held_bytes") == size
        refused = client.post("/v1/decode", params=large, content=body)
        assert (refused.status_code, reason(refused)) == (429, "memory_full")
        assert sum(map(len, pieces)) == size - 1000
    wait_until(lambda: metric(client, "latents_held_bytes") == 0)
    assert client.post("/v1/decode", params=large, content=body).status_code == 200


def test_a_stream_may_be_larger_raw_than_the_memory(make_client: Make) -> None:
    body = make_body(shape=(16, 13, 40, 60))
    client = make_client(memory_bytes=8 * len(body), max_body_bytes=len(body))
    assert 8 * len(body) < 49 * 320 * 480 * 3
    assert count_frames(decode(client, body, stream="true").content) == 49
    wait_until(lambda: metric(client, "latents_held_bytes") == 0)


def test_a_client_that_stops_reading_is_cut_off_and_holds_nothing_any_more(
    make_client: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.service.answers.PATIENCE_S", 0.5)
    monkeypatch.setattr("pipeline.service.answers.MIN_BYTES_PER_S", 1 << 40)
    client = make_client(cache_bytes=0)
    body = make_body(shape=(16, 13, 40, 60))
    with client.stream("POST", "/v1/decode", params={**SCALE, "container": "mkv"}, content=body) as answer:
        assert int(answer.headers["content-length"]) > 5 << 20  # more than sockets hold
        wait_until(lambda: metric(client, "latents_held_bytes") == metric(client, "latents_spool_bytes") == 0)
        with pytest.raises(httpx.HTTPError):
            answer.read()


def test_the_deadline_runs_from_the_arrival_of_the_request(make_client: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    client = make_client(deadline_s=20)
    deadlines, sent_at = list[float](), list[float]()
    open_now = Decoder.open

    def open_noted(decoder: Decoder, request: VideoRequest, deadline: float) -> SpooledVideo:
        deadlines.append(deadline)
        return open_now(decoder, request, deadline)

    def upload() -> Iterator[bytes]:
        yield make_body()[:100]
        time.sleep(1)
        sent_at.append(time.monotonic())
        yield make_body()[100:]

    monkeypatch.setattr(Decoder, "open", open_noted)
    assert client.post("/v1/decode", params=SCALE, content=upload()).status_code == 200
    assert deadlines[0] < sent_at[0] + 20


def test_a_request_past_its_deadline_is_answered_408(make_client: Make, engine: FakeDecoder) -> None:
    client = make_client(deadline_s=0.3)
    engine.gate.clear()
    with ThreadPoolExecutor(2) as pool:
        running = pool.submit(decode, client, make_body(shape=(16, 13, 4, 6)))
        wait_until(lambda: bool(engine.batches))
        waiting = decode(client, make_body(1))
        assert (waiting.status_code, reason(waiting)) == (408, "deadline")
        engine.gate.set()
        answer = running.result()
        assert (answer.status_code, reason(answer)) == (408, "deadline")
    # On a busy machine even a good one may be late the first time.
    wait_until(lambda: decode(client, make_body(2)).status_code == 200)


def test_a_latent_that_decodes_to_nothing_finite_fails_alone(make_client: Make, engine: FakeDecoder) -> None:
    bad = 300.0

    def fails(latents: Sequence[torch.Tensor]) -> Exception | None:
        is_bad = any(float(latent.max()) > 100 for latent in latents)
        return TerminalError("decode", "not_finite", "the frames have NaN") if is_bad else None

    engine.fails = fails
    client = make_client(max_batch=4)
    engine.gate.clear()
    with ThreadPoolExecutor(8) as pool:
        blocker = pool.submit(decode, client, make_body(99, (16, 1, 4, 6)))
        wait_until(lambda: bool(engine.batches))
        body = make_body(latent=torch.full((16, 13, 4, 6), bad))
        answers = [
            pool.submit(decode, client, data, stream="true")
            for data in (make_body(1, (16, 13, 4, 6)), body, make_body(2, (16, 13, 4, 6)))
        ]
        wait_until(lambda: metric(client, "latents_queue") == 3)
        engine.gate.set()
        assert blocker.result().status_code == 200
        good, wrong, other = (answer.result() if not answer.exception() else None for answer in answers)
    assert good is not None
    assert other is not None
    # Their first chunk was coded before the batch failed: it is there once, not twice.
    assert [count_frames(answer.content) for answer in (good, other)] == [49, 49]
    assert wrong is None  # its stream had begun: the connection was cut


def test_a_gpu_out_of_memory_says_so_without_harm_to_the_next(client: httpx.Client, engine: FakeDecoder) -> None:
    engine.fails = lambda latents: ExhaustedError() if latents[0].shape[1] > 3 else None
    answer = decode(client, make_body(shape=(16, 13, 4, 6)))
    assert (answer.status_code, reason(answer)) == (413, "out_of_memory")
    assert decode(client).status_code == 200
    assert client.get("/healthz").status_code == 200


def test_a_batch_is_repeated_without_the_memory_of_the_failed_one(make_client: Make, engine: FakeDecoder) -> None:
    held: list[weakref.ref[torch.Tensor]] = []
    alive: list[int] = []

    def fails(latents: Sequence[torch.Tensor]) -> Exception | None:
        alive.append(sum(reference() is not None for reference in held))
        try:
            activations = torch.zeros(8)
            held.append(weakref.ref(activations))
            if len(latents) > 1 or float(latents[0].max()) > 100:
                raise ExhaustedError
        except ExhaustedError as inner:
            raise ExhaustedError from inner
        return None

    client = make_client()
    engine.gate.clear()
    with ThreadPoolExecutor(8) as pool:
        blocker = pool.submit(decode, client, make_body(99))
        wait_until(lambda: bool(engine.batches))
        engine.fails = fails
        bodies = [make_body(latent=torch.full((16, 3, 4, 6), 300.0)), make_body(1), make_body(2)]
        answers = []
        for number, body in enumerate(bodies, 1):
            answers.append(pool.submit(decode, client, body))
            wait_until(lambda: metric(client, "latents_queue") == number)  # noqa: B023
        engine.gate.set()
        assert [answer.result().status_code for answer in (blocker, *answers)] == [200, 413, 200, 200]
    assert alive == [0, 0, 0, 0]


def test_an_error_that_nobody_foresaw_is_a_500_and_the_replica_stays_if_the_model_is_well(
    client: httpx.Client, engine: FakeDecoder
) -> None:
    engine.fails = lambda latents: RuntimeError("secret detail") if latents[0].shape[1] > 3 else None
    answer = decode(client, make_body(shape=(16, 13, 4, 6)))
    assert (answer.status_code, reason(answer)) == (500, "internal")
    assert "secret" not in answer.text
    wait_until(lambda: client.get("/healthz").status_code == 200)


def test_a_replica_whose_model_fails_on_a_blank_latent_too_is_unhealthy(client: httpx.Client, engine: FakeDecoder) -> None:
    engine.fails = lambda latents: RuntimeError("an illegal memory access was encountered")
    assert decode(client).status_code == 500
    wait_until(lambda: client.get("/healthz").status_code == 503)
    assert client.get("/readyz").status_code == 503


def test_an_answer_that_fails_in_the_middle_does_not_look_whole(client: httpx.Client, engine: FakeDecoder) -> None:
    engine.fails = lambda latents: RuntimeError("broken") if latents[0].shape[1] > 3 else None
    with pytest.raises(httpx.RemoteProtocolError):
        decode(client, make_body(shape=(16, 13, 4, 6)), stream="true")


def test_a_client_that_leaves_while_its_video_is_opened_leaves_nothing_behind(
    make_service: Callable[..., DecoderService], monkeypatch: pytest.MonkeyPatch
) -> None:
    service = make_service(cache_bytes=0)
    begun, go, opened = threading.Event(), threading.Event(), list[SpooledVideo]()
    open_now = service.decoder.open

    def open_late(*asked: Any) -> SpooledVideo:
        begun.set()
        assert go.wait(20)
        opened.append(open_now(*asked))
        return opened[-1]

    monkeypatch.setattr(service.decoder, "open", open_late)

    def is_left(video: SpooledVideo) -> bool:
        if video.join():
            video.leave()  # only asked
            return False
        return True

    async def leave() -> None:
        asking = asyncio.create_task(service.decode(make_body(), DecodeParameters(scale="none")))
        await asyncio.to_thread(begun.wait, 20)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        go.set()
        await asyncio.to_thread(wait_until, lambda: bool(opened) and is_left(opened[0]) and not opened[0].path.exists())

    asyncio.run(leave())
    wait_until(lambda: 'latents_spool_bytes{replica="replica-1"} 0.0' in service.metrics.to_text())


@pytest.mark.parametrize("container", ["mp4", "mkv", "webp", "png"])
def test_a_video_being_made_lies_in_the_folder_of_the_service_alone(
    make_client: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, container: str
) -> None:
    client = make_client()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "nowhere"))
    answer = decode(client, container=container)
    assert answer.status_code == 200, answer.text


def test_a_cache_that_cannot_be_read_is_a_miss_that_leaves_nothing_behind(
    make_client: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = make_client()
    first = decode(client)

    def fetch(cache: VideoCache, name: str, target: Path) -> bool:
        raise PermissionError("not yours")

    monkeypatch.setattr(VideoCache, "fetch", fetch)
    assert decode(client).content == first.content
    assert metric(client, "latents_cache_total", outcome="miss") == 2
    wait_until(lambda: metric(client, "latents_spool_bytes") == 0)


def make_request(seed: int = 0) -> VideoRequest:
    return read_request(make_body(seed), DecodeParameters(scale="none"), MODEL, ServiceConfig())


@pytest.mark.parametrize("cache_bytes", [0, 1 << 30])
def test_readers_of_one_whole_video_share_its_place_on_disk(
    make_service: Callable[..., DecoderService], engine: FakeDecoder, cache_bytes: int
) -> None:
    decoder = make_service(cache_bytes=cache_bytes).decoder
    deadline = time.monotonic() + 20
    first = decoder.open(make_request(), deadline)
    asyncio.run(first.wait_whole())
    if cache_bytes:
        first.leave()
        first = decoder.open(make_request(), deadline)  # from the cache
    assert decoder.open(make_request(), deadline) is first
    first.leave()
    assert first.path.exists()
    first.leave()
    assert not first.path.exists()
    assert len(engine.batches) == 1


def test_a_video_that_is_still_read_does_not_hold_its_latent(make_service: Callable[..., DecoderService]) -> None:
    decoder = make_service().decoder
    request = make_request()
    latent = weakref.ref(request.latent)
    video = decoder.open(request, time.monotonic() + 20)
    asyncio.run(video.wait_whole())
    del request
    gc.disable()  # a cycle that is found some time is not enough
    try:
        wait_until(lambda: latent() is None)
    finally:
        gc.enable()
    video.leave()


def test_a_folder_that_others_can_change_is_refused_as_a_whole(make_client: Make, tmp_path: Path) -> None:
    folder = tmp_path / "disk"
    for name in ("spool", "cache"):
        (folder / name).mkdir(parents=True, mode=0o700)
    folder.chmod(0o777)  # who can rename its folders can put others in their places
    with pytest.raises(ConfigError, match=f"{folder}: is no folder that only this user writes to"):
        make_client()


def test_the_spool_is_empty_when_nobody_reads(make_client: Make) -> None:
    client = make_client(cache_bytes=0)
    assert decode(client).status_code == 200
    wait_until(lambda: metric(client, "latents_spool_bytes") == 0)


def test_a_model_never_waits_for_a_slow_client(make_client: Make, engine: FakeDecoder) -> None:
    client = make_client()
    body = make_body(shape=(16, 13, 40, 60))
    with client.stream("POST", "/v1/decode", params={**SCALE, "stream": "true", "crf": 1}, content=body) as answer:
        pieces = answer.iter_raw(1000)
        data = next(pieces)
        wait_until(lambda: engine.chunks == 6)  # all of it is decoded, though this client has read 1000 bytes
        assert decode(client, make_body(7)).status_code == 200
        data += b"".join(pieces)
    assert count_frames(data) == 49
