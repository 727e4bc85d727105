"""Kill at random, all the time, everything that a run consists of: the dataset comes out the same.

``RANDOM_KILLS=12 RANDOM_SEED=3 pytest tests/faults/test_random_kills.py`` makes it a short one.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from ray.cluster_utils import Cluster

from pipeline.account import ExitCode
from pipeline.config import RunConfig
from pipeline.plan_store import read_generations
from pipeline.storage import Storage
from tests.faults.nodes import add_node, raylets, remove_node, two_nodes
from tests.faults.runs import Watcher, check_outcome, read_rows, start_driver
from tests.faults.victims import DECODE_TASK, find_actors, find_decoders
from tests.jobs.conftest import CLIPS, GOOD_CLIPS, save_tiny_vae, small_config

KILLS = int(os.environ.get("RANDOM_KILLS", "200"))
SEED = int(os.environ.get("RANDOM_SEED", "0"))
NUM_CLIPS = max(24, 3 * KILLS // 2)
LIGHT = ("decoder child",) * 5 + ("decode worker",) * 2
HEAVY = ("actor",) * 3 + ("node", "driver")
"""Whoever dies takes a model with him, that has to be loaded again."""
MOST_SECONDS_A_KILL = 30
"""On a busy machine; half of it is Ray's own discovery that a node is gone."""

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300 + (MOST_SECONDS_A_KILL + 5) * KILLS)]


@dataclass
class Scene:
    """Two nodes with one actor each, and the driver of a run on them."""

    config: RunConfig
    folder: Path
    cluster: Cluster
    driver: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self.driver = start_driver(self.config, self.folder, RAY_ADDRESS=self.cluster.address)

    @property
    def brake(self) -> Path:
        """While it is there, forward passes wait."""
        return self.folder / "brake"

    @property
    def log(self) -> str:
        return (self.folder / "driver.log").read_text()

    def kill(self, kind: str, dice: random.Random) -> bool:
        """False where there is no such victim at the moment."""
        match kind:
            case "driver":
                self.kill_driver()
                self.start()
                return True
            case "node":
                remove_node(self.cluster)
                self.brake.touch()  # nobody looks after it while the node starts
                add_node(self.cluster)
                return True
            case "actor":
                victims = find_actors(raylets(self.cluster))
            case _:
                roots = raylets(self.cluster)
                pairs = find_decoders(roots, DECODE_TASK) or find_decoders(roots)
                victims = [pair[kind == "decoder child"] for pair in pairs]
        return bool(victims) and dice.choice(victims).send(signal.SIGKILL)

    def kill_driver(self) -> None:
        if self.driver is not None:
            self.driver.kill()
            self.driver.wait()

    @property
    def exit_code(self) -> int | None:
        """None while the driver lives."""
        assert self.driver is not None, "not started"
        return self.driver.poll()


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    clips, folder = tmp_path / "clips", tmp_path / "run"
    for path in (clips, folder):
        path.mkdir()
    for number in range(NUM_CLIPS):
        name = GOOD_CLIPS[number % len(GOOD_CLIPS)]
        shutil.copy2(CLIPS / name, clips / f"{number:03}-{name}")
    config = small_config(
        clips,
        save_tiny_vae(tmp_path / "vae"),
        tmp_path / "latents",
        output={"shard_bytes": 18 << 10},  # two clips
        cluster={"actors": 2},
    )
    with two_nodes(is_head_used=True) as cluster:
        scene = Scene(config, folder, cluster)
        yield scene
        scene.kill_driver()


def run_undisturbed(scene: Scene, folder: Path) -> Storage:
    """The same run with another output."""
    folder.mkdir()
    output = scene.config.output.model_copy(update={"uri": str(folder / "latents")})
    driver = start_driver(scene.config.model_copy(update={"output": output}), folder, RAY_ADDRESS=scene.cluster.address)
    try:
        assert driver.wait(120 + NUM_CLIPS) == ExitCode.COMPLETE, (folder / "driver.log").read_text()
    finally:
        driver.kill()
        driver.wait()
    return Storage(output.uri)


def kill_at_random(scene: Scene, num_shards: int) -> Counter[str]:
    """Run until the driver ends by itself. Returns who was killed how often.

    The run is held up where it is ahead of the killing, lest it end first; the killing waits for a commit after each heavy
    victim, lest the run never end.
    """
    dice = random.Random(SEED)
    deck = [(LIGHT + HEAVY)[number % 12] for number in range(KILLS)]
    dice.shuffle(deck)
    killed: Counter[str] = Counter()
    seen = 0
    started = time.monotonic()
    next_kill = 0.0
    scene.start()
    while scene.exit_code is None:
        assert time.monotonic() - started < 120 + MOST_SECONDS_A_KILL * KILLS, f"does not end; killed: {killed}\n{scene.log}"
        committed = sum(1 for _ in Path(scene.config.output.uri).glob("data/**/*.parquet"))
        if deck and committed >= 2 + (num_shards - 8) * killed.total() / KILLS:
            scene.brake.touch()
        else:
            scene.brake.unlink(missing_ok=True)
        if deck and committed and time.monotonic() > next_kill:
            wanted = next((kind for kind in deck if kind in LIGHT or committed > seen), None)
            if wanted is not None and scene.kill(wanted, dice):
                deck.remove(wanted)
                killed[wanted] += 1
                seen = committed if wanted in HEAVY else seen
                next_kill = time.monotonic() + dice.uniform(0.1, 2.0)
        time.sleep(0.1)
    return killed


def test_random_kills_of_everything_leave_the_same_dataset(scene: Scene, tmp_path: Path) -> None:
    undisturbed = run_undisturbed(scene, tmp_path / "undisturbed")
    expected = read_rows(undisturbed)
    assert len(expected) == NUM_CLIPS
    num_shards = sum(generation.num_shards for generation in read_generations(undisturbed))
    output = Storage(scene.config.output.uri)
    started = time.monotonic()
    with Watcher(output, NUM_CLIPS) as watcher:
        killed = kill_at_random(scene, num_shards)
    print(f"killed {dict(killed)} over {NUM_CLIPS} clips in {num_shards} shards, {time.monotonic() - started:.0f} s")
    assert scene.exit_code == ExitCode.COMPLETE, scene.log
    assert killed.total() == KILLS
    heavy = sum(killed[kind] for kind in set(HEAVY))
    # Two clips a shard; a light victim costs one shard, a heavy one at most two on each of two actors.
    most_passes = NUM_CLIPS + 2 * (KILLS - heavy) + 8 * heavy
    check_outcome(output, expected, scene.folder / "tally", watcher, most_passes)
