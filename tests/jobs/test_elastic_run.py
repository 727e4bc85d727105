"""Nodes that go and come in the middle of a run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.jobs.conftest import ROOT
from tests.jobs.elastic import SHARDS
from tests.jobs.processes import environment

pytestmark = pytest.mark.slow


def run(action: str, tmp: Path) -> dict[str, Any]:
    variables = {**environment(tmp), "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
    command = [sys.executable, "-m", "tests.jobs.elastic", action]
    result = subprocess.run(command, env=variables, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)
    assert result.returncode == 0, result.stderr
    outcome: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return outcome


def test_a_node_that_is_lost_costs_nobody_an_attempt_and_the_rest_goes_on_without_it(ray_tmp: Path) -> None:
    outcome = run("remove", ray_tmp)
    assert outcome["shards"] == SHARDS
    assert outcome["attempts"] == {"1": SHARDS}


def test_a_node_that_is_added_gets_an_actor(ray_tmp: Path) -> None:
    outcome = run("add", ray_tmp)
    assert outcome["shards"] == SHARDS
    assert len(outcome["nodes"]) == 3
