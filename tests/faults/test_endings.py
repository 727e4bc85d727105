"""What stops a run for good: its message, its exit code, and that the same command goes on once it is mended."""

from __future__ import annotations

import errno
import functools
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from pipeline.account import ExitCode
from pipeline.config import RunConfig
from pipeline.encode_work import EncodeWork
from pipeline.job import run_job
from pipeline.storage import Storage
from tests.faults.proxy import FaultProxy, Rule
from tests.faults.runs import load_armed
from tests.jobs.conftest import CLIPS, save_tiny_vae

CLIP = "bunny_wakes_up.mp4"
SECRET = "test-secret"


@dataclass
class Job:
    """The encode job on one clip in the store, by the command line."""

    options: list[str]
    folder: Path
    output: Storage

    def run(self, *options: str, armed: str = "") -> int:
        """The exit code, as the shell sees it."""
        work = functools.partial(EncodeWork, make_engine=functools.partial(load_armed, self.folder, armed))
        return run_job([*self.options, *options], RunConfig, work, about="", example="")

    @property
    def status(self) -> dict[str, Any]:
        found: dict[str, Any] = self.output.read_json("status.json")
        return found


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_vae(tmp_path_factory.mktemp("vae"))


@pytest.fixture
def job(direct: Storage, proxy: FaultProxy, vae: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Job:
    monkeypatch.setattr("pipeline.job.start_logging", lambda level: None)  # pytest has its own
    monkeypatch.setattr("pipeline.storage.faults._FIRST_DELAY_S", 0.0)
    Storage(f"{direct.uri}/in").put(CLIP, (CLIPS / CLIP).read_bytes())
    store = json.dumps({"endpoint_url": proxy.endpoint, "key": "test", "secret": SECRET})
    settings = {
        "input.uri": f"{direct.uri}/in",
        "input.storage_options": store,
        "output.uri": f"{direct.uri}/out",
        "output.storage_options": store,
        "vae.weights": str(vae),
        "vae.dtype": "float32",
        "clip.buckets": "9x32x48@8",
        "cluster.actors": "1",
        "cluster.threads_per_actor": "1",
        "cluster.frame_budget_bytes": str(1 << 20),
        "run.progress": "log",
    }
    return Job(
        [part for name, value in settings.items() for part in (f"--{name}", value)], tmp_path, Storage(f"{direct.uri}/out")
    )


# Before anything is begun: exit code 2, without a cluster


def test_bucket_that_does_not_exist(job: Job, capsys: pytest.CaptureFixture[str]) -> None:
    assert job.run("--output.uri", "s3://no-such-bucket/out") == ExitCode.USAGE
    assert "error: s3://no-such-bucket/out: cannot be written: " in (said := capsys.readouterr().err)
    assert "create the bucket first" in said


@pytest.mark.parametrize(
    ("rule", "advice"),
    [
        (Rule("refuse", methods=("PUT",)), "access refused: check the credentials, and what they may do here"),
        (Rule("refuse", code="InvalidAccessKeyId"), "check AWS_ACCESS_KEY_ID and AWS_ENDPOINT_URL"),
        (Rule("refuse", status=400, code="ExpiredToken"), "the credential has expired; renew it and run the same command"),
        (Rule("refuse", code="RequestTimeTooSkewed"), "this machine's clock differs from the store's"),
    ],
    ids=["read-only output", "unknown key", "expired credential", "clock that jumped"],
)
def test_store_that_refuses(job: Job, proxy: FaultProxy, capsys: pytest.CaptureFixture[str], rule: Rule, advice: str) -> None:
    proxy.rules = [rule]
    assert job.run() == ExitCode.USAGE
    assert advice in capsys.readouterr().err
    assert proxy.requests < 10


def test_disk_that_is_mounted_read_only(
    job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr("os.link", refuse)
    assert job.run("--output.uri", str(tmp_path / "out"), "--output.storage_options", "{}") == ExitCode.USAGE
    assert "the disk is mounted read-only" in capsys.readouterr().err


# In the middle of a run; then the same command goes on


@pytest.mark.usefixtures("cluster")
def test_credential_that_expires_ends_the_run_and_quarantines_nothing(
    job: Job, proxy: FaultProxy, capsys: pytest.CaptureFixture[str]
) -> None:
    proxy.rules = [Rule("refuse", methods=("GET",), path=CLIP, status=400, code="ExpiredToken", after=1)]
    assert job.run() == ExitCode.USAGE
    assert "the credential has expired; renew it and run the same command, which resumes" in capsys.readouterr().err
    assert (job.status["state"], job.status["exit_code"]) == ("failed", 2)
    assert (job.status["quarantined"], job.status["pending"]) == (0, 1)
    proxy.rules = []
    assert job.run() == ExitCode.COMPLETE
    assert job.status["written"] == 1


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_credential_that_expires_while_planning_ends_the_run(
    job: Job, proxy: FaultProxy, capsys: pytest.CaptureFixture[str]
) -> None:
    proxy.rules = [Rule("refuse", methods=("GET", "HEAD"), path=CLIP, status=400, code="ExpiredToken")]
    assert job.run() == ExitCode.USAGE
    assert "the credential has expired" in capsys.readouterr().err
    proxy.rules = []
    assert job.run() == ExitCode.COMPLETE


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_bucket_that_is_full_ends_the_run_with_code_1(job: Job, proxy: FaultProxy, capsys: pytest.CaptureFixture[str]) -> None:
    proxy.rules = [Rule("refuse", methods=("PUT",), path="/data/", status=507, code="XMinioStorageFull")]
    assert job.run() == ExitCode.FAILED
    assert "it is full" in (said := capsys.readouterr().err)
    assert "Make room and run the same command, which resumes" in said
    assert (job.status["state"], job.status["exit_code"]) == ("failed", 1)
    proxy.rules = []
    assert job.run() == ExitCode.COMPLETE


@pytest.mark.usefixtures("cluster")
def test_disk_that_is_full_ends_the_run_with_code_1(job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    local = ("--output.uri", str(tmp_path / "out"), "--output.storage_options", "{}")
    assert job.run(*local, armed="storage.before_put=raise:ENOSPC") == ExitCode.FAILED
    assert f"{tmp_path / 'out'}: cannot be written: it is full" in capsys.readouterr().err
    assert job.run(*local) == ExitCode.COMPLETE


@pytest.mark.usefixtures("cluster")
def test_machine_without_room_for_a_spool_file_costs_no_attempt(job: Job) -> None:
    assert job.run("--encode.max_attempts", "1", armed="encode.after_clip=raise:ENOSPC") == ExitCode.COMPLETE
    assert (job.folder / "reached").exists()
    assert job.status["written"] == 1


@pytest.mark.usefixtures("cluster")
def test_secrets_reach_no_object_no_log_and_no_message(
    job: Job, proxy: FaultProxy, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    with caplog.at_level("DEBUG", logger="pipeline"):
        proxy.rules = [Rule("slow_down", 0.2)]
        assert job.run() == ExitCode.COMPLETE
        proxy.rules = [Rule("refuse", methods=("PUT",))]
        assert job.run("--run.append") == ExitCode.USAGE
    written = [job.output.read(found.uri) for found in job.output.list("")]
    assert {"run.yaml", "status.json", "manifest.json"} <= {found.uri for found in job.output.list("")}
    said = capfd.readouterr()
    assert "storage retry" in caplog.text
    assert not any(SECRET.encode() in data for data in written)
    assert SECRET not in caplog.text + said.out + said.err
