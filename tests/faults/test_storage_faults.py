"""Storage on a real S3 that misbehaves: what may pass is waited out, what is wrong is noticed, what stays is said."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from s3fs import S3FileSystem

from pipeline.config import VaeConfig
from pipeline.engine import describe_model
from pipeline.errors import ConfigError, StorageFullError, TerminalError, TransientError
from pipeline.inputs import fetch_input, read_input_range, stat_input
from pipeline.storage import ObjectChangedError, Storage, read_span
from tests.conftest import ObjectStore
from tests.faults.proxy import KINDS, FaultProxy, Kind, Rule
from tests.jobs.conftest import save_tiny_vae
from tests.pipeline.fakes import FlakyFileSystem

SMALL = os.urandom(5_000)
LARGE = os.urandom(300_000)  # five pieces
pytestmark = pytest.mark.usefixtures("quick")


def reads(storage: Storage, tmp_path: Path) -> dict[str, tuple[Callable[[], Any], Any]]:
    """Every way to read, and what it must give."""
    uri = f"{storage.uri}/large"

    def fetch() -> bytes:
        with fetch_input(uri, storage.options, tmp_path) as (path, _):
            return path.read_bytes()

    return {
        "whole": (lambda: storage.read("small"), SMALL),
        "whole, in pieces": (lambda: storage.read("large"), LARGE),
        "range": (lambda: storage.read_range("large", 1000, 5000), LARGE[1000:6000]),
        "range, in pieces": (lambda: storage.read_range("large", 10, 200_000), LARGE[10:200_010]),
        "list": (lambda: [found.uri for found in storage.list("")], ["large", "small"]),
        "size": (lambda: storage.size("large"), len(LARGE)),
        "fetch": (fetch, LARGE),
    }


@pytest.mark.parametrize("kind", KINDS)
def test_fault_that_passes_changes_no_answer(
    disturbed: Storage, direct: Storage, proxy: FaultProxy, tmp_path: Path, kind: Kind
) -> None:
    direct.put("small", SMALL)
    direct.put("large", LARGE)
    for name, (read, expected) in reads(disturbed, tmp_path).items():
        if kind == "flip" and name not in ("whole",):
            continue  # of a range nothing says what it should be: Parquet's pages and our tensors carry sums of their own
        proxy.rules = [Rule(kind, times=1)]
        assert read() == expected, name
        assert proxy.rules[0].times == 0 or (kind in ("truncate", "shorten") and name == "size"), name


def test_fault_in_the_middle_of_a_long_listing_costs_one_page(
    disturbed: Storage, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [f"data/{number}" for number in range(5)]
    for name in names:
        disturbed.put(name, b"")
    call_s3 = S3FileSystem._call_s3

    async def two_a_page(self: S3FileSystem, method: str, *others: Any, **arguments: Any) -> Any:
        more = {"MaxKeys": 2} if method == "list_objects_v2" else {}
        return await call_s3(self, method, *others, **arguments, **more)

    monkeypatch.setattr(S3FileSystem, "_call_s3", two_a_page)
    proxy.reset_counts()
    proxy.rules = [Rule("slow_down", after=1, times=1)]
    assert [found.uri for found in disturbed.list("data")] == names
    assert proxy.requests == 4


@pytest.mark.parametrize("kind", ["reset", "truncate", "slow_down"])
def test_weights_are_read_through_faults(
    disturbed: Storage, direct: Storage, proxy: FaultProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: Kind
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = save_tiny_vae(tmp_path / "vae")
    for file in folder.iterdir():
        direct.put(file.name, file.read_bytes())
    config = VaeConfig(weights=direct.uri, dtype="float32", storage_options=disturbed.options)
    proxy.rules = [Rule(kind, 0.5, times=3)]
    assert describe_model(config).fingerprint == describe_model(VaeConfig(weights=str(folder), dtype="float32")).fingerprint
    assert proxy.faults[kind] > 0


def test_proxy_counts_what_passes(disturbed: Storage, proxy: FaultProxy) -> None:
    disturbed.put("a", LARGE)
    assert (proxy.requests, proxy.bytes_in, proxy.methods["PUT"]) == (1, len(LARGE), 1)
    proxy.reset_counts()
    disturbed.read_range("a", 7, 4321)
    assert (proxy.requests, proxy.bytes_out) == (1, 4321)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("truncate", "shorten", "flip")])  # those are of answers
def test_put_that_meets_a_fault_stands_whole(disturbed: Storage, direct: Storage, proxy: FaultProxy, kind: Kind) -> None:
    for number, put in enumerate((disturbed.put, disturbed.put_if_absent)):
        proxy.rules = [Rule(kind, times=1)]
        put(f"{number}", LARGE)
        assert proxy.faults[kind] == number + 1
        assert direct.read(f"{number}") == LARGE


def test_lost_reply_is_not_taken_for_a_win_and_the_bytes_stand(disturbed: Storage, direct: Storage, proxy: FaultProxy) -> None:
    proxy.rules = [Rule("lost_reply", methods=("PUT",), times=1)]
    assert disturbed.put_if_absent("a", b"ours") is False
    assert direct.read("a") == b"ours"


def test_two_writers_through_faults_leave_one_winner_each_that_both_know(direct: Storage, proxy: FaultProxy) -> None:
    proxy.rules = [Rule("slow_down", 0.1), Rule("reset", 0.1), Rule("lost_reply", 0.2, methods=("PUT",))]
    writers = [Storage(direct.uri, {"endpoint_url": proxy.endpoint, "default_block_size": 50 << 20 | n}) for n in range(2)]

    def write(number: int) -> list[bytes]:
        """What each writer believes to stand there after its put, as ``commit_shard`` finds out."""
        found = []
        for key in range(20):
            mine = b"%d" % number
            found.append(mine if writers[number].put_if_absent(f"{key}", mine) else writers[number].read(f"{key}"))
        return found

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(write, range(2))
    assert first == second == [direct.read(f"{key}") for key in range(20)]
    assert proxy.faults["lost_reply"] > 0


@pytest.mark.parametrize("kind", ["stall", "slow_down", "reset"])
def test_fault_that_stays_ends_in_bounded_time(
    disturbed: Storage, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch, kind: Kind
) -> None:
    monkeypatch.setattr("pipeline.storage.client.REQUEST_TIMEOUT_S", 0.2)
    monkeypatch.setattr("pipeline.storage.faults.PATIENCE_S", 1.0)
    proxy.rules = [Rule(kind)]
    calls: list[Callable[[], Any]] = [
        lambda: disturbed.read("a"),
        lambda: disturbed.put_if_absent("a", b""),
        lambda: disturbed.list(""),
    ]
    for call in calls:
        started = time.monotonic()
        with pytest.raises(TransientError, match=r"failed \d times, last by "):
            call()
        assert time.monotonic() - started < 10


def test_object_that_drips_is_given_up_although_bytes_come(
    disturbed: Storage, direct: Storage, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    direct.put("a", SMALL)
    monkeypatch.setattr("pipeline.storage.client.REQUEST_TIMEOUT_S", 0.3)
    proxy.rules = [Rule("stall", methods=("GET",), times=2)]
    started = time.monotonic()
    assert disturbed.read("a") == SMALL
    assert time.monotonic() - started < 10


def test_versions_of_an_object_that_is_replaced_while_it_is_read_never_mix(direct: Storage) -> None:
    contents = [bytes([number]) * 300_000 for number in range(3)]
    direct.put("a", contents[0])
    ended = threading.Event()
    seen: list[bytes] = []

    def replace() -> None:
        turn = 0
        while not ended.wait(0.1):
            turn += 1
            direct.put("a", contents[turn % 3])

    writer = threading.Thread(target=replace)
    writer.start()
    try:
        for _ in range(10):
            with contextlib.suppress(TransientError):  # replaced faster than it is read
                seen.append(direct.read("a"))
    finally:
        ended.set()
        writer.join()
    assert len(seen) > 1
    assert all(data in contents for data in seen)


def test_input_of_another_version_is_refused(direct: Storage, tmp_path: Path) -> None:
    direct.put("a", LARGE)
    planned = stat_input(f"{direct.uri}/a")
    assert read_input_range(planned.uri, None, 5, 10, planned.version) == LARGE[5:15]
    direct.put("a", LARGE[::-1])
    with pytest.raises(ObjectChangedError):
        read_span(direct._fs, direct._full("a"), 0, 10, "read a", planned.version)
    with pytest.raises(TerminalError, match=r"fetch: changed: .*is no longer"):
        read_input_range(planned.uri, None, 5, 10, planned.version)
    with fetch_input(planned.uri, None, tmp_path) as (path, found):
        assert path.read_bytes() == LARGE[::-1]
        assert found.version != planned.version


def test_object_damaged_at_rest_is_never_delivered(disturbed: Storage, direct: Storage, proxy: FaultProxy) -> None:
    direct.put("small", SMALL)
    proxy.rules = [Rule("flip", methods=("GET",))]
    with pytest.raises(TransientError, match="failed 8 times"):
        disturbed.read("small")


# Answers that stay


@pytest.mark.parametrize(
    ("status", "code", "advice"),
    [
        (400, "ExpiredToken", "the credential has expired; renew it and run the same command, which resumes"),
        (400, "InvalidToken", "the session token is not valid"),
        (403, "InvalidAccessKeyId", "check AWS_ACCESS_KEY_ID and AWS_ENDPOINT_URL"),
        (403, "SignatureDoesNotMatch", "check AWS_SECRET_ACCESS_KEY"),
        (403, "RequestTimeTooSkewed", r"this machine's clock differs from the store's; set it \(NTP\)"),
        (403, "AccessDenied", "access refused: check the credentials, and what they may do here"),
    ],
)
def test_refusal_says_at_once_what_to_do(disturbed: Storage, proxy: FaultProxy, status: int, code: str, advice: str) -> None:
    proxy.rules = [Rule("refuse", status=status, code=code)]
    calls: list[Callable[[], Any]] = [
        lambda: disturbed.read("a"),
        lambda: disturbed.list(""),
        lambda: disturbed.put("a", b""),
        lambda: disturbed.put_if_absent("a", b""),
    ]
    for call in calls:
        proxy.reset_counts()
        with pytest.raises(ConfigError, match=f"{disturbed.uri}: cannot be (read|written): .*{advice}"):
            call()
        assert proxy.requests == 1


@pytest.mark.parametrize("code", ["ExpiredToken", "RequestTimeTooSkewed"])
def test_credential_that_ran_out_blames_no_input(disturbed: Storage, proxy: FaultProxy, tmp_path: Path, code: str) -> None:
    proxy.rules = [Rule("refuse", status=400 if code == "ExpiredToken" else 403, code=code)]
    with pytest.raises(ConfigError, match=r"which resumes|then run the same command"):
        stat_input(f"{disturbed.uri}/a.mp4", disturbed.options)


def test_one_object_that_may_not_be_read_is_a_finding_about_it(disturbed: Storage, proxy: FaultProxy) -> None:
    proxy.rules = [Rule("refuse", code="AccessDenied")]
    with pytest.raises(TerminalError, match="not_permitted"):
        stat_input(f"{disturbed.uri}/a.mp4", disturbed.options)


def test_output_that_may_only_be_read_is_said_so(disturbed: Storage, direct: Storage, proxy: FaultProxy) -> None:
    direct.put("a", SMALL)
    proxy.rules = [Rule("refuse", methods=("PUT",))]
    assert disturbed.read("a") == SMALL
    with pytest.raises(ConfigError, match=r"cannot be written: .*access refused"):
        assert disturbed.has_conditional_put


@pytest.mark.parametrize("code", ["XMinioStorageFull", "QuotaExceeded"])
def test_bucket_without_room_is_told_from_a_busy_one(disturbed: Storage, proxy: FaultProxy, code: str) -> None:
    proxy.rules = [Rule("refuse", methods=("PUT",), status=507, code=code)]
    with pytest.raises(StorageFullError, match=r"it is full .*Make room and run the same command"):
        disturbed.put_if_absent("a", b"")


def test_endpoint_that_is_no_address_names_the_setting() -> None:
    with pytest.raises(ConfigError, match="check AWS_ENDPOINT_URL"):
        Storage("s3://lab/x", {"endpoint_url": "nowhere", "key": "k", "secret": "s"}).read("a")


# The conditional put


def test_store_with_conditional_put_is_recognised_and_nothing_stays_of_the_trial(
    disturbed: Storage, direct: Storage, proxy: FaultProxy
) -> None:
    assert disturbed.has_conditional_put
    assert proxy.methods["PUT"] == 2
    assert disturbed.has_conditional_put
    assert proxy.methods["PUT"] == 2
    assert direct.list("") == []


@pytest.mark.parametrize("kind", ["lost_reply", "reset", "slow_down"])
def test_trial_is_right_through_faults(disturbed: Storage, proxy: FaultProxy, kind: Kind) -> None:
    proxy.rules = [Rule(kind, methods=("PUT",), times=2)]
    assert disturbed.has_conditional_put


def test_store_that_does_not_know_the_condition_is_recognised(disturbed: Storage, proxy: FaultProxy) -> None:
    proxy.rules = [Rule("refuse", methods=("PUT",), status=501, code="NotImplemented")]
    assert not disturbed.has_conditional_put


def test_without_conditional_put_a_commit_looks_first(flaky: type[FlakyFileSystem], monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = FlakyFileSystem.pipe_file
    monkeypatch.setattr(FlakyFileSystem, "pipe_file", lambda self, path, value, mode="", **rest: pipe(self, path, value))
    storage = Storage("flaky://out")
    assert not storage.has_conditional_put
    assert storage.put_if_absent("a", b"first") is True
    assert storage.put_if_absent("a", b"second") is False
    assert storage.read("a") == b"first"
    assert storage.list("")[0].uri == "a"


def test_disk_without_hard_links_looks_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(source: str, target: str) -> None:
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr("os.link", refuse)
    storage = Storage(str(tmp_path))
    assert not storage.has_conditional_put
    assert storage.put_if_absent("a", b"first") is True
    assert storage.put_if_absent("a", b"second") is False
    assert storage.read("a") == b"first"


# Secrets


def test_secrets_stand_in_no_message_and_no_log_line(
    s3: ObjectStore, proxy: FaultProxy, caplog: pytest.LogCaptureFixture
) -> None:
    secrets = {"key": "AKIDEXAMPLE", "secret": "very-secret-string", "token": "session-token-string"}
    storage = Storage(s3.uri("x"), {**secrets, "endpoint_url": proxy.endpoint})
    texts = [repr(storage), str(storage), storage.uri]
    with caplog.at_level(logging.DEBUG, logger="pipeline"):
        for rule in (Rule("slow_down", times=3), Rule("refuse"), Rule("refuse", status=400, code="ExpiredToken"), Rule("reset")):
            proxy.rules = [rule]
            for call in (lambda: storage.put("a", b""), lambda: storage.read("a"), lambda: storage.has_conditional_put):
                with pytest.raises((ConfigError, TransientError)) as caught:
                    call()
                error: BaseException | None = caught.value
                while error is not None:
                    texts += [str(error), repr(error)]
                    error = error.__cause__
    texts.append(caplog.text)
    assert "storage retry" in caplog.text
    for secret in secrets.values():
        assert not any(secret in text for text in texts)
