"""The service on a real Ray Serve: what its proxy does with full queues, lost replicas and clients that leave."""

from __future__ import annotations

import contextlib
import json
import random
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from statistics import median
from typing import Any

import httpx
import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.client import AnswerCutError, DecoderClient, connect, to_body
from pipeline.errors import ConfigError, PipelineError
from pipeline.service.config import ServerConfig
from pipeline.service.deployment import serving
from pipeline.service.errors import RequestError
from pipeline.service.gate import TokenDigests
from tests.jobs.videos import count_frames, free_port
from tests.pipeline.service.fakes import load_fake, make_latent

SHAPES = ((16, 1, 8, 8), (16, 3, 8, 12), (16, 5, 12, 8), (16, 13, 8, 8))


@pytest.fixture(scope="module")
def served(cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a service with a fake model that takes 20 ms a chunk."""
    config = ServerConfig(
        vae={"weights": "unused", "device": "cpu"},  # type: ignore[arg-type]
        service={  # type: ignore[arg-type]
            "port": free_port(),
            "folder": str(tmp_path_factory.mktemp("disk")),
            "max_queue": 32,
            "deadline_s": 60,
            "cache_bytes": 4 << 20,
        },
    )
    with serving(config, None, load_fake) as url:
        yield url.rstrip("/")


@pytest.fixture
def client(served: str) -> Iterator[DecoderClient]:
    with DecoderClient(served, patience_s=60) as client:
        yield client


def find_process(name: str) -> psutil.Process:
    """The one process of this test's cluster whose name begins so."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if process.cmdline() and process.cmdline()[0].startswith(name):
                found.append(process)
    assert len(found) == 1, [process.cmdline() for process in found]
    return found[0]


def replica() -> psutil.Process:
    return find_process("ray::ServeReplica:latents-decoder")


def wait_until(condition: Callable[[], bool], seconds: float = 30) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.05)


def is_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/readyz", timeout=2).status_code == 200
    except httpx.TransportError:
        return False


def metric(url: str, name: str) -> float:
    lines = httpx.get(f"{url}/metrics").text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith((f"{name}{{", f"{name} ")))


@pytest.mark.parametrize("seconds", [6, pytest.param(60, marks=pytest.mark.slow)])
def test_sixteen_clients_with_mixed_shapes(served: str, seconds: int) -> None:
    """No 5xx, bounded memory, and no shape waits much longer than another."""
    processes = [replica(), find_process("ray::ProxyActor")]
    statuses: Counter[int] = Counter()
    latencies: dict[tuple[int, ...], list[float]] = defaultdict(list)
    lock = threading.Lock()
    until = time.monotonic() + seconds

    def work(number: int) -> None:
        rng = random.Random(number)
        with httpx.Client(base_url=served, timeout=60) as http:
            while time.monotonic() < until:
                shape = rng.choice(SHAPES)
                body = to_body(make_latent(rng.randrange(200), shape))
                parameters = {"scale": "none", "stream": rng.choice(["true", "false"])}
                started = time.monotonic()
                answer = http.post("/v1/decode", params=parameters, content=body)
                with lock:
                    statuses[answer.status_code] += 1
                    if answer.status_code == 200:
                        latencies[shape].append(time.monotonic() - started)
                if answer.status_code == 429:
                    time.sleep(float(answer.headers["retry-after"]))

    with ThreadPoolExecutor(16) as pool:
        futures = [pool.submit(work, number) for number in range(16)]
        time.sleep(seconds / 3)
        early = [process.memory_info().rss for process in processes]
        for future in futures:
            future.result()
    grown = [process.memory_info().rss - before for process, before in zip(processes, early, strict=True)]
    medians = {shape: median(values) for shape, values in latencies.items()}
    print(f"\n{dict(statuses)} grown={[value >> 20 for value in grown]} MiB medians={medians}")
    assert set(statuses) <= {200, 429}
    assert statuses[200] > 2 * seconds
    assert max(grown) < 100 << 20
    assert max(medians.values()) < 4 * min(medians.values()) + 0.5
    # Through Serve's proxy too the replica learns when a client has its answer.
    wait_until(lambda: metric(served, "latents_spool_bytes") == metric(served, "latents_held_bytes") == 0)


def test_every_client_that_retries_succeeds_soon_after_a_killed_replica_returns(served: str) -> None:
    stop = threading.Event()
    done: dict[int, list[float]] = defaultdict(list)

    def work(number: int) -> None:
        with DecoderClient(served, patience_s=60) as client:
            seed = number * 1000
            while not stop.is_set():
                seed += 1
                video = client.decode(make_latent(seed, SHAPES[seed % 4]), scale="none", stream=seed % 3 == 0)
                assert count_frames(video) == [1, 9, 17, 49][seed % 4]
                done[number].append(time.monotonic())

    with ThreadPoolExecutor(8) as pool:
        futures = [pool.submit(work, number) for number in range(8)]
        try:
            time.sleep(2)
            victim = replica()
            victim.kill()
            wait_until(lambda: not victim.is_running() or victim.status() == psutil.STATUS_ZOMBIE)
            wait_until(lambda: is_ready(served), 60)
            returned = time.monotonic()
            wait_until(lambda: all(done[number][-1:] > [returned] for number in range(8)), 10)
        finally:
            stop.set()
        for future in futures:
            future.result()
    print(
        f"\nreturned; last client after {max(min(t for t in times if t > returned) for times in done.values()) - returned:.2f} s"
    )


def test_a_stream_whose_replica_dies_is_noticed_and_a_whole_answer_is_asked_for_again(served: str, client: DecoderClient) -> None:
    latent = make_latent(77, (16, 101, 16, 16))
    stream = client.decode_stream(latent, scale="none")
    next(stream)
    replica().kill()
    with pytest.raises((AnswerCutError, httpx.RemoteProtocolError, httpx.ReadError)):
        list(stream)
    assert count_frames(client.decode(latent, scale="none", stream=True)) == 401


def test_what_a_client_abandoned_is_not_decoded_to_its_end(served: str) -> None:
    wait_until(lambda: is_ready(served))
    frames = metric(served, "latents_decoded_frames_total")
    for stream in ("true", "false"):
        body = to_body(make_latent(5, (16, 201, 8, 8)))  # 801 frames, two seconds
        with (
            contextlib.suppress(httpx.TimeoutException),
            httpx.stream(
                "POST", f"{served}/v1/decode", params={"scale": "none", "stream": stream}, content=body, timeout=0.7
            ) as got,
        ):
            for _ in got.iter_raw():
                break
    wait_until(lambda: metric(served, "latents_spool_bytes") == 0, 10)
    assert metric(served, "latents_decoded_frames_total") - frames < 2 * 801 - 400


def test_a_slow_client_keeps_nobody_waiting(served: str, client: DecoderClient) -> None:
    slow = client.decode_stream(make_latent(6, (16, 101, 16, 16)), scale="none", crf=5)
    data = next(slow)
    started = time.monotonic()
    client.decode(make_latent(8), scale="none")
    assert time.monotonic() - started < 10
    assert count_frames(data + b"".join(slow)) == 401


def test_another_ray_program_decodes_without_http(served: str) -> None:
    latent = make_latent(9, (16, 5, 8, 8))
    decoder = connect()
    whole = decoder.decode(latent, scale=0.7, crf=30)
    assert count_frames(whole) == 17
    assert count_frames(b"".join(decoder.decode_stream(latent, scale="none"))) == 17
    with pytest.raises(RequestError, match="crf"):
        decoder.decode(latent, scale="none", crf=99)
    with pytest.raises(RequestError, match="NaN") as caught:
        decoder.decode(torch.full((16, 3, 4, 4), torch.nan), scale="none")
    assert caught.value.status == 422


@st.composite
def bodies(draw: st.DrawFn) -> bytes:
    """A safetensors file in every stage of decay."""
    dtype = draw(st.sampled_from(["F16", "BF16", "F32", "F64", "I64", "U8", "BOOL", "F8_E4M3", "C64", "x", ""]))
    shape = draw(st.lists(st.one_of(st.sampled_from([0, 1, 2, 3, 4, 16, 32, 2**40]), st.integers(-1, 2**63)), max_size=6))
    size = draw(st.sampled_from([0, 1, 16, 768, 4096]))
    start, end = draw(st.sampled_from([(0, size), (0, 2**62), (-1, size), (size, 0), (0, size // 2)]))
    header: Any = {draw(st.text(max_size=8)): {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}}
    header |= draw(st.dictionaries(st.text(max_size=5), st.sampled_from([None, 1, [], {}, "x", {"dtype": "F32"}]), max_size=2))
    text = draw(st.sampled_from([json.dumps(header), json.dumps(header)[:-1], "", "[]", "\ud800", "[" * 5000])).encode(
        "utf-8", "surrogatepass"
    )
    length = draw(st.sampled_from([len(text), len(text) + 1, 0, 2**63, 2**64 - 1]))
    fill = draw(st.sampled_from([b"\x00", b"\xff", b"\x7f\xc0", b"\x3c"]))
    body = length.to_bytes(8, "little") + text + (fill * size)[:size]
    return body[: draw(st.integers(0, len(body)))] if draw(st.booleans()) else body


@st.composite
def latents(draw: st.DrawFn) -> bytes:
    """A whole file of one tensor of some shape, with values that a model may not bear."""
    shape = draw(st.lists(st.sampled_from([1, 2, 3, 4, 5, 16, 17]), min_size=3, max_size=5))
    dtype = draw(st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]))
    value = draw(st.sampled_from([0.0, 1.0, -65504.0, 3e38, float("nan"), float("inf")]))
    return to_body(torch.full(shape, value, dtype=torch.float64).to(dtype))


PARAMETERS = st.fixed_dictionaries(
    {"scale": st.sampled_from(["none", "0.7", "cogvideox-5b", "cogvideox-1.5-5b", "1e-300", "1e300", "", "x"])},
    optional={
        "fps": st.sampled_from(["8", "30000/1001", "0.1", "240", "29.97", "9999999/9999999", "٣", "8\x00"]),
        "layout": st.sampled_from(["CFHW", "FCHW", "BCFHW", "x"]),
        "key": st.sampled_from(["", "latent", "\x00"]),
        "container": st.sampled_from(["mp4", "mkv", "webp", "png"]),
        "stream": st.sampled_from(["true", "false", "2"]),
        "crf": st.sampled_from(["1", "51", "99"]),
        "drop_frames": st.sampled_from(["auto", "0", "1", "64", "-1"]),
        "convention": st.sampled_from(["diffusers", "cogvideo"]),
        "role": st.sampled_from(["video", "first_frame"]),
    },
)


def check_no_harm(served: str, body: bytes, parameters: dict[str, str]) -> None:
    answer = httpx.post(f"{served}/v1/decode", params=parameters, content=body, timeout=60)
    assert answer.status_code < 500, (answer.status_code, answer.text)
    if answer.status_code != 200:
        assert answer.json()["error"]["detail"]


@settings(max_examples=100)
@given(bodies(), PARAMETERS)
def test_a_fuzzed_body_is_a_4xx(served: str, body: bytes, parameters: dict[str, str]) -> None:
    check_no_harm(served, body, parameters)


@settings(max_examples=60)
@given(latents(), PARAMETERS)
def test_a_tensor_of_any_shape_and_value_is_a_video_or_a_4xx(served: str, body: bytes, parameters: dict[str, str]) -> None:
    check_no_harm(served, body, parameters)


def test_metrics_name_the_replica(served: str) -> None:
    wait_until(lambda: is_ready(served))
    text = httpx.get(f"{served}/metrics").text
    assert text.count("# TYPE latents_queue gauge") == 1
    assert 'latents_queue{replica="' in text


def test_a_second_service_on_the_cluster_needs_a_token(served: str) -> None:
    config = ServerConfig(vae={"weights": "unused"}, service={"name": "other"})  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="LATENTS_TOKEN"), serving(config, None, load_fake):
        pass


def test_a_service_that_runs_already_is_left_alone(served: str) -> None:
    digests = TokenDigests.of("a-token-of-some-length")
    same = ServerConfig(vae={"weights": "unused", "device": "cpu"})  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"service\.name"), serving(same, digests, load_fake):
        pass
    other = ServerConfig(vae={"weights": "unused", "device": "cpu"}, service={"name": "other"})  # type: ignore[arg-type]
    with pytest.raises(PipelineError, match="Prefix / is being used"), serving(other, digests, load_fake):
        pass
    assert is_ready(served)
