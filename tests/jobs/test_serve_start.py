"""Starting the service and stopping it: what is refused, what is said, what is left."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import psutil
import pytest

from pipeline.client import DecoderClient
from pipeline.errors import ConfigError, PipelineError
from pipeline.service.config import ServerConfig
from pipeline.service.deployment import prepare, serving
from pipeline.service.errors import RequestError
from tests.jobs.conftest import ROOT
from tests.jobs.videos import count_frames, free_port
from tests.pipeline.service.fakes import load_fake, load_nothing, make_latent


@pytest.mark.slow
def test_a_port_that_is_taken_and_a_model_that_does_not_load_are_said(cluster: None, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        settings = {"port": port, "folder": str(tmp_path)}
        config = ServerConfig(vae={"weights": "unused", "device": "cpu"}, service=settings)  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match=r"service\.port"), serving(config, None, load_fake):
            pass
    with (
        pytest.raises(PipelineError, match="does not start: ValueError: the weights are sour"),
        serving(config, None, load_nothing),
    ):
        pass


@pytest.mark.slow
def test_a_service_left_by_a_process_that_was_killed_is_named_and_replaced_on_request(cluster: None, tmp_path: Path) -> None:
    def config(takeover: bool) -> ServerConfig:
        settings = {"port": free_port(), "folder": str(tmp_path), "takeover": takeover}
        return ServerConfig(vae={"weights": "unused", "device": "cpu"}, service=settings)  # type: ignore[arg-type]

    with contextlib.ExitStack() as killed:
        left = killed.enter_context(serving(config(takeover=False), None, load_fake))
        with pytest.raises(ConfigError, match=r"serves a latents-decoder already.*service\.takeover"):
            killed.enter_context(serving(config(takeover=False), None, load_fake))
        with serving(config(takeover=True), None, load_fake) as url:
            assert httpx.get(f"{url}readyz").status_code == 200
            with pytest.raises(httpx.ConnectError):
                httpx.get(f"{left}readyz")


def test_an_address_open_to_others_is_refused_without_a_token(tiny_vae: Path) -> None:
    config = ServerConfig(vae={"weights": str(tiny_vae)}, service={"host": "0.0.0.0"})  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="LATENTS_TOKEN"):
        prepare(config, {})
    assert prepare(config, {"LATENTS_TOKEN": "a-token-of-some-length"}) is not None


def test_the_job_serves_a_real_model_and_stops_on_ctrl_c(tiny_vae: Path, tmp_path: Path) -> None:
    port, token = free_port(), "a-token-of-some-length"
    command = [sys.executable, str(ROOT / "jobs" / "serve_decoder.py"), "--vae.weights", str(tiny_vae), "--vae.dtype", "float32"]
    command += ["--service.port", str(port), "--service.folder", str(tmp_path / "disk")]
    environment = {**os.environ, "RAY_ADDRESS": "local", "RAY_AUTH_MODE": "token", "LATENTS_TOKEN": token}
    with (tmp_path / "errors").open("wb") as errors:
        job = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment, cwd=tmp_path, start_new_session=True
        )
    try:
        assert job.stdout is not None
        line = job.stdout.readline()
        assert line.startswith(f"ready: http://127.0.0.1:{port}/ is the viewer"), (line, (tmp_path / "errors").read_text())
        with DecoderClient(f"http://127.0.0.1:{port}", token) as client:
            for latent_frames, frames in ((3, 9), (4, 16)):
                assert count_frames(client.decode(make_latent(0, (16, latent_frames, 4, 4)), scale=0.7)) == frames
        with (
            DecoderClient(f"http://127.0.0.1:{port}", "another-token-of-some-length", patience_s=5) as stranger,
            pytest.raises(RequestError),
        ):
            stranger.datasets()
        below = psutil.Process(job.pid).children(recursive=True)
        assert any(process.name().startswith("ray::") for process in below)
        assert not any(token in process.environ().values() for process in below)
        job.send_signal(signal.SIGINT)
        assert job.wait(40) == 0
        assert job.stdout.read() == "stopping\n"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(job.pid, signal.SIGKILL)
        job.wait()
        job.stdout.close()
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"http://127.0.0.1:{port}/healthz")
