"""Datasets, pages, and who is let in, over HTTP through a real server."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch

from pipeline.client import DecoderClient
from pipeline.service.app import build_app
from pipeline.service.config import ServedDataset
from pipeline.service.datasets import ServedDatasets
from pipeline.service.errors import RequestError
from tests.pipeline.service.asking import Make, count_frames, decode, metric, reason, wait_until
from tests.pipeline.service.conftest import TOKEN, running
from tests.pipeline.service.fakes import FakeDecoder, make_body


def test_datasets_are_described(client: httpx.Client) -> None:
    (described,) = client.get("/v1/datasets").json()["datasets"]
    assert (described["name"], described["num_samples"], described["buckets"]) == ("clips", 12, {"49x64x96@8": 12})
    assert (described["model"], described["has_first_frame"]) == ("cogvideox-5b", True)
    assert {"caption", "psnr", "source_uri"} <= set(described["columns"])


def test_a_dataset_of_another_vae_is_shown_with_a_warning(dataset: Path, caplog: pytest.LogCaptureFixture) -> None:
    served = {"clips": ServedDataset(uri=str(dataset))}
    (described,) = ServedDatasets(served, 1.15258426).describe()
    assert "scaling factor 0.7 (cogvideox-5b)" in described["warning"]
    assert "one of 1.15258" in caplog.text
    (described,) = ServedDatasets(served, 0.7).describe()
    assert described["warning"] is None


def ids(client: httpx.Client, **query: Any) -> list[str]:
    answer = client.get("/v1/datasets/clips/samples", params=query)
    assert answer.status_code == 200, answer.text
    return [sample["id"] for sample in answer.json()["samples"]]


def test_samples_come_in_pages_that_add_up(client: httpx.Client) -> None:
    everything = ids(client)
    assert len(everything) == 12
    assert [found for offset in (0, 5, 10) for found in ids(client, offset=offset, limit=5)] == everything
    page = client.get("/v1/datasets/clips/samples", params={"offset": 10, "limit": 5}).json()
    assert (page["total"], page["offset"], page["limit"], len(page["samples"])) == (12, 10, 5, 2)
    assert set(page["samples"][0]) == {"id", "bucket_key", "num_frames", "height", "width", "fps", "caption", "source_uri"}


def test_samples_are_found_by_caption_bucket_and_conditions(client: httpx.Client) -> None:
    assert ids(client, caption="CAPTION 11") == ["sample-0011"]
    assert ids(client, filter=["psnr>33", "psnr<=38"]) == ["sample-0004", "sample-0006", "sample-0008"]
    assert len(ids(client, bucket="49x64x96@8")) == 12
    assert ids(client, caption="caption 1", filter="frame_start>=10") == ["sample-0010", "sample-0011"]


@pytest.mark.parametrize(
    ("query", "status", "expected"),
    [
        ({"filter": "nonsense"}, 422, "bad_filter"),
        ({"filter": "psnr>many"}, 422, "bad_filter"),
        ({"filter": "vae_latent_bytes=1"}, 422, "no_column"),
        ({"bucket": "9x9x9@9"}, 422, "no_bucket"),
        ({"limit": "0"}, 422, "bad_parameter"),
        ({"limit": "100000"}, 422, "bad_parameter"),
        ({"offset": "-1"}, 422, "bad_parameter"),
        ({"ofset": "1"}, 422, "bad_parameter"),
    ],
)
def test_a_bad_query_is_refused(client: httpx.Client, query: dict[str, str], status: int, expected: str) -> None:
    answer = client.get("/v1/datasets/clips/samples", params=query)
    assert (answer.status_code, reason(answer)) == (status, expected)


def test_a_sample_shows_its_columns_without_bytes_and_without_nan(client: httpx.Client) -> None:
    sample = client.get("/v1/datasets/clips/samples/sample-0003").json()
    assert sample["latent"] == {"shape": [16, 13, 8, 12], "dtype": "bfloat16"}
    assert (sample["columns"]["caption"], sample["columns"]["psnr"], sample["has_first_frame"]) == ("caption 3", None, True)


def test_a_stored_latent_and_first_frame_come_as_they_are_stored(client: httpx.Client) -> None:
    data = client.get("/v1/datasets/clips/samples/sample-0003/latent").content
    latent = safetensors.torch.load(data)["latent"]
    assert (tuple(latent.shape), latent.dtype) == ((16, 13, 8, 12), torch.bfloat16)
    frame = client.get("/v1/datasets/clips/samples/sample-0003/frame.png")
    assert (frame.headers["content-type"], frame.content[:4], len(frame.content)) == ("image/png", b"\x89PNG", 107)


@pytest.mark.parametrize("path", ["video", "latent"])
def test_a_sample_that_is_read_counts_against_the_memory(make_client: Make, path: str) -> None:
    client = make_client(memory_bytes=200_000, max_body_bytes=25_000)  # its latent has 19,968 values
    answer = client.get(f"/v1/datasets/clips/samples/sample-0003/{path}")
    assert (answer.status_code, reason(answer)) == (413, "too_large")
    assert metric(client, "latents_held_bytes") == 0


def test_a_sample_and_its_latent_posted_are_one_video(client: httpx.Client, engine: FakeDecoder) -> None:
    video = client.get("/v1/datasets/clips/samples/sample-0003/video")
    posted = decode(client, client.get("/v1/datasets/clips/samples/sample-0003/latent").content, scale="none")
    assert count_frames(video.content) == 49
    assert (posted.content, posted.headers["etag"]) == (video.content, video.headers["etag"])
    assert len(engine.batches) == 1


@pytest.mark.parametrize(
    "path", ["samples/nope", "samples/nope/video", "samples/nope/latent", "samples/nope/frame.png", "samples/%00"]
)
def test_a_sample_that_is_not_there_is_a_404(client: httpx.Client, path: str) -> None:
    answer = client.get(f"/v1/datasets/clips/{path}")
    assert (answer.status_code, reason(answer)) == (404, "no_sample")


def test_a_dataset_of_another_program_is_shown_by_the_ids_it_is_given(make_service: Any, tmp_path: Path) -> None:
    latent = np.zeros((16, 3, 4, 6), np.float32)
    columns = {
        "vae_latent_bytes": [latent.tobytes()] * 3,
        "vae_latent_shape": [[16, 3, 4, 6]] * 3,
        "vae_latent_dtype": ["float32"] * 3,
    }
    (tmp_path / "foreign" / "part").mkdir(parents=True)
    pq.write_table(pa.table({**columns, "caption": ["a", "b", "c"]}), tmp_path / "foreign" / "part" / "0.parquet")
    service = make_service(datasets={"foreign": str(tmp_path / "foreign")})
    with running(build_app(service)) as url, DecoderClient(url) as client:
        found = list(client.samples("foreign", caption="b"))
        assert [sample["id"] for sample in found] == ["part/0.parquet#1"]
        assert found[0]["num_frames"] is None
        assert client.sample("foreign", "part/0.parquet#1")["columns"]["caption"] == "b"
        assert count_frames(client.video("foreign", "part/0.parquet#1")) == 9
        with pytest.raises(RequestError, match="no first frames"):
            client.first_frame("foreign", "part/0.parquet#1")


def test_a_dataset_that_is_not_there_is_a_404_that_names_those_there_are(client: httpx.Client) -> None:
    answer = client.get("/v1/datasets/other/samples")
    assert (answer.status_code, reason(answer)) == (404, "no_dataset")
    assert "clips" in answer.json()["error"]["detail"]


VIDEO = "/v1/datasets/clips/samples/sample-0001/video"


@pytest.mark.parametrize(
    ("asked", "start", "end"),
    [("bytes=0-", 0, None), ("bytes=10-19", 10, 20), ("bytes=-5", -5, None), ("bytes=5-999999999", 5, None), ("bytes=0-0", 0, 1)],
)
def test_a_range_is_that_part_of_the_video(client: httpx.Client, asked: str, start: int, end: int | None) -> None:
    whole = client.get(VIDEO)
    assert whole.headers["accept-ranges"] == "bytes"
    part = client.get(VIDEO, headers={"range": asked})
    assert (part.status_code, part.content) == (206, whole.content[start:end])
    first = start % len(whole.content)
    assert part.headers["content-range"] == f"bytes {first}-{first + len(part.content) - 1}/{len(whole.content)}"


@pytest.mark.parametrize("asked", ["bytes=0-1,5-6", "bytes=-", "bytes=a-b", "lines=0-1", "bytes=9-3"])
def test_a_range_that_cannot_be_answered_alone_gives_everything(client: httpx.Client, asked: str) -> None:
    answer = client.get(VIDEO, headers={"range": asked})
    assert answer.status_code == 200
    assert count_frames(answer.content) == 49


def test_a_range_behind_the_end_is_416(client: httpx.Client) -> None:
    size = client.get(VIDEO).headers["content-length"]
    answer = client.get(VIDEO, headers={"range": "bytes=99999999-"})
    assert (answer.status_code, answer.headers["content-range"]) == (416, f"bytes */{size}")


def test_a_known_etag_is_not_sent_again_and_a_changed_one_gives_everything(client: httpx.Client) -> None:
    etag = client.get(VIDEO).headers["etag"]
    again = client.get(VIDEO, headers={"if-none-match": etag})
    assert (again.status_code, again.content) == (304, b"")
    assert client.get(VIDEO, headers={"range": "bytes=0-1", "if-range": etag}).status_code == 206
    assert client.get(VIDEO, headers={"range": "bytes=0-1", "if-range": '"other"'}).status_code == 200


def test_with_a_token_only_who_has_it_is_let_in_and_probes(make_client: Make) -> None:
    client = make_client(token=TOKEN)
    for path in ("/v1/datasets", VIDEO, "/metrics"):
        assert client.get(path).status_code == 401
        assert client.get(path, headers={"authorization": f"Bearer {TOKEN}"}).status_code == 200
    assert decode(client).status_code == 401
    assert [client.get(path).status_code for path in ("/healthz", "/readyz", "/docs", "/openapi.json")] == [200] * 4


def test_a_session_cookie_lets_a_page_in(make_client: Make) -> None:
    client = make_client(token=TOKEN)
    assert client.post("/v1/session", headers={"authorization": "Bearer wrong-token-of-some-length"}).status_code == 401
    answer = client.post("/v1/session", headers={"authorization": f"Bearer {TOKEN}"})
    assert answer.status_code == 204
    cookie = answer.headers["set-cookie"].lower()
    assert "httponly" in cookie
    assert "samesite=strict" in cookie
    assert client.get("/v1/datasets").status_code == 200
    client.cookies.clear()
    assert client.get("/v1/datasets").status_code == 401


def test_another_name_for_this_machine_is_refused_without_a_token(client: httpx.Client) -> None:
    answer = client.get("/v1/datasets", headers={"host": "evil.example"})
    assert (answer.status_code, reason(answer)) == (403, "other_host")


def test_a_page_of_another_site_starts_no_decoding_and_may_lead_to_the_viewer(client: httpx.Client, engine: FakeDecoder) -> None:
    elsewhere = {"sec-fetch-site": "cross-site"}
    answer = client.get(VIDEO, headers=elsewhere)
    assert (answer.status_code, reason(answer)) == (403, "other_site")
    assert engine.batches == []
    for path in ("/", "/viewer.js", "/viewer.css"):
        assert client.get(path, headers=elsewhere).status_code == 200


def test_pages_answer_head(client: httpx.Client) -> None:
    for path in ("/", "/docs", "/viewer.js"):
        answer = client.head(path)
        assert (answer.status_code, answer.content) == (200, b"")
        assert answer.headers["content-length"] == str(len(client.get(path).content))


def test_pages_load_nothing_from_elsewhere(client: httpx.Client) -> None:
    for path in ("/docs", "/"):
        answer = client.get(path)
        assert "default-src 'none'" in answer.headers["content-security-policy"]
        assert "http://" not in answer.text.replace("http://www.w3.org/2000/svg", "")
        assert "https://" not in answer.text
    assert "/v1/decode" in client.get("/docs").text
    assert "/v1/decode" in client.get("/openapi.json").json()["paths"]


@pytest.mark.parametrize("path", ["/nothing", "/v1/nothing/at/all", "/../etc/passwd", "/config.py"])
def test_what_is_not_there_is_a_404_in_json(client: httpx.Client, path: str) -> None:
    assert reason(client.get(path)) == "no_page"


def test_metrics_count_by_route_never_by_address(client: httpx.Client) -> None:
    decode(client)
    client.get("/v1/datasets/clips/samples/sample-0003")
    client.get("/v1/x/y/z")
    assert metric(client, "latents_requests_total", route="/v1/decode", status="200", replica="replica-1") == 1
    assert metric(client, "latents_requests_total", route="/v1/datasets/{name}/samples/{sample_id:path}") == 1
    assert metric(client, "latents_decoded_frames_total") == 9
    assert "y/z" not in client.get("/metrics").text


def test_closing_answers_what_waits(make_service: Any, engine: FakeDecoder) -> None:
    service = make_service(max_batch=1)
    engine.gate.clear()
    with (
        running(build_app(service)) as url,
        httpx.Client(base_url=url, timeout=30) as client,
        ThreadPoolExecutor(4) as pool,
    ):
        first = pool.submit(decode, client, make_body(0))
        wait_until(lambda: bool(engine.batches))
        waiting = pool.submit(decode, client, make_body(1))
        wait_until(lambda: metric(client, "latents_queue") == 1)
        closing = pool.submit(service.close)
        answer = waiting.result()
        assert (answer.status_code, reason(answer)) == (503, "stopping")
        engine.gate.set()
        closing.result()
        first.exception()  # the model was at it, but its client may come too late for the file
    assert len(engine.batches) == 1
    with pytest.raises(RuntimeError):
        service.decoder.check_health()
