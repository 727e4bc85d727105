"""The encode job as a process of its own: signals, sudden death, exit codes, object storage, `ray job submit`."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import RunConfig
from pipeline.dataset import LatentDataset
from pipeline.storage import Storage
from tests.jobs.conftest import ROOT, read_rows
from tests.jobs.processes import DEADLINE_S, environment, run_job, start_job_and_wait

JOB = ROOT / "jobs" / "encode_dataset.py"


def job_arguments(config: RunConfig) -> list[str]:
    return [
        f"--input.uri={config.input.uri}",
        f"--output.uri={config.output.uri}",
        f"--vae.weights={config.vae.weights}",
        "--vae.dtype=float32",
        "--clip.buckets=9x32x48@8",
        "--cluster.actors=2",
        "--cluster.threads_per_actor=1",
        "--cluster.frame_budget_bytes=1000000",
        "--run.log_every_s=0.5",
    ]


def committed(config: RunConfig) -> int:
    return len(list(Path(config.output.uri).rglob("data/**/*.parquet")))


@pytest.mark.slow  # the matrix has a short cell of a killed driver
@pytest.mark.usefixtures("many_clips")
def test_a_driver_killed_in_the_middle_resumes_to_the_same_rows(make_config: Any, tmp_path: Path, ray_tmp: Path) -> None:
    undisturbed = make_config(output={"uri": str(tmp_path / "undisturbed")})
    assert run_job(JOB, job_arguments(undisturbed), ray_tmp).returncode == 0
    config = make_config()
    process = start_job_and_wait(JOB, job_arguments(config), ray_tmp, lambda: committed(config) >= 1)
    process.kill()
    process.wait()
    assert committed(config) < 20, "the run was over before it was killed"
    again = run_job(JOB, job_arguments(config), ray_tmp)
    assert again.returncode == 0, again.stderr
    assert "died without finishing; resuming" in again.stderr
    assert read_rows(Path(config.output.uri)) == read_rows(Path(undisturbed.output.uri))


@pytest.mark.usefixtures("many_clips")
def test_sigterm_stops_with_code_4_and_the_same_command_finishes(make_config: Any, ray_tmp: Path) -> None:
    config = make_config()
    process = start_job_and_wait(JOB, job_arguments(config), ray_tmp, lambda: committed(config) >= 1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(DEADLINE_S) == 4
    status = json.loads((Path(config.output.uri) / "status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("stopped", 4)
    assert run_job(JOB, job_arguments(config), ray_tmp).returncode == 0
    assert len(LatentDataset(config.output.uri)) == 20


def test_usage_errors_exit_with_2_and_name_the_setting(make_config: Any, ray_tmp: Path) -> None:
    config = make_config(input={"uri": "/nowhere/at/all"})
    result = run_job(JOB, job_arguments(config), ray_tmp)
    assert result.returncode == 2
    assert "input.uri /nowhere/at/all: there is nothing there" in result.stderr
    assert json.loads((Path(config.output.uri) / "status.json").read_text())["exit_code"] == 2
    result = run_job(JOB, [*job_arguments(config), "--encode.batch_size=0"], ray_tmp)
    assert result.returncode == 2
    assert "encode.batch_size" in result.stderr


@pytest.mark.slow  # the matrix has input and output there
def test_input_output_and_weights_may_be_in_object_storage(
    make_config: Any, s3: Any, tiny_vae: Path, clips: Path, ray_tmp: Path
) -> None:
    root = f"s3://{s3.bucket}/end-to-end"
    for folder, name in ((clips, "clips"), (tiny_vae, "vae")):
        target = Storage(f"{root}/{name}")
        for file in folder.iterdir():
            target.put(file.name, file.read_bytes())
    uris = [f"--input.uri={root}/clips", f"--output.uri={root}/latents", f"--vae.weights={root}/vae"]
    rest = [argument for argument in job_arguments(make_config()) if ".uri=" not in argument and "weights" not in argument]
    result = run_job(JOB, [*uris, *rest], ray_tmp)
    assert result.returncode == 0, result.stderr
    assert os.environ["AWS_SECRET_ACCESS_KEY"] not in result.stdout + result.stderr
    remote = LatentDataset(f"{root}/latents", columns=["caption"])
    assert len(remote) == 4
    local = make_config()
    assert run_job(JOB, job_arguments(local), ray_tmp).returncode == 0
    by_name = {Path(row["source_uri"]).name: row for row in read_rows(Path(local.output.uri)).values()}
    named = LatentDataset(f"{root}/latents", columns=["source_uri"])
    for item in named:
        row = by_name[item["source_uri"].rpartition("/")[2]]
        assert item["latent"].numpy().tobytes() == row["vae_latent_bytes"]


@pytest.fixture
def ray_head(ray_tmp: Path) -> Iterator[dict[str, str]]:
    """A cluster started in the project's root, as `ray start --head` does it; ended by its process group."""
    env = {**environment(ray_tmp), "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
    env["PATH"] = f"{Path(sys.executable).parent}:{env['PATH']}"
    port, dashboard = free_port(), free_port()
    command = [
        str(Path(sys.executable).with_name("ray")),
        "start",
        "--head",
        "--block",
        "--num-cpus=3",
        f"--port={port}",
        f"--dashboard-port={dashboard}",
        "--dashboard-host=127.0.0.1",
        "--node-ip-address=127.0.0.1",
        "--object-store-memory=200000000",
        "--disable-usage-stats",
    ]
    head = subprocess.Popen(
        command, env=env, cwd=ROOT, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    env["RAY_API_SERVER_ADDRESS"] = f"http://127.0.0.1:{dashboard}"
    try:
        yield env
    finally:
        with contextlib.suppress(subprocess.TimeoutExpired):
            os.killpg(head.pid, signal.SIGTERM)
            head.wait(10)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(head.pid, signal.SIGKILL)
        head.wait(10)


def free_port() -> int:
    import socket

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def submit(arguments: list[str], env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).with_name("ray")), "job", "submit", *arguments]
    deadline = time.monotonic() + DEADLINE_S
    while True:
        result = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)
        if "Failed to connect" not in result.stderr + result.stdout or time.monotonic() > deadline:
            return result
        time.sleep(1)


@pytest.mark.slow
def test_the_job_runs_in_all_forms_of_ray_job_submit(make_config: Any, ray_head: dict[str, str], tmp_path: Path) -> None:
    config = make_config()
    long_form = ["--working-dir", str(ROOT), "--", "python", "jobs/encode_dataset.py", *job_arguments(config)]
    result = submit(long_form, ray_head)
    assert result.returncode == 0, result.stdout + result.stderr
    assert len(LatentDataset(config.output.uri)) == 4
    failing = make_config(output={"uri": str(tmp_path / "failing")}, input={"uri": "/nowhere"})
    assert submit([*long_form[:5], *job_arguments(failing)], ray_head).returncode == 1
    for form in (["--working-dir", str(ROOT)], []):
        short = make_config(output={"uri": str(tmp_path / f"short{len(form)}")})
        result = submit([*form, "--", "jobs/encode_dataset.py", *job_arguments(short)], ray_head)
        assert result.returncode == 0, result.stdout + result.stderr
        assert len(LatentDataset(short.output.uri)) == 4
