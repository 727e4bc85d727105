"""What the pool makes of the answers that an actor does not give while it starts."""

from __future__ import annotations

from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayTaskError

from pipeline import pool
from pipeline.actors import ActorSpec, VaeActor
from pipeline.cluster import ActorResources
from pipeline.errors import ConfigError, TransientError
from pipeline.messages import ActorFailedToStart, Event, StartActor
from pipeline.pool import ActorPool


class FakeActor:
    """Never answers by itself; remembers what was asked."""

    def __init__(self) -> None:
        self.asked: list[Future[Any]] = []
        self.ready = SimpleNamespace(remote=self._ask)

    def _ask(self) -> Any:
        self.asked.append(Future())
        return SimpleNamespace(future=lambda: self.asked[-1])


class FakeCluster:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.alive = {"a": True, "b": True}
        self.actor = FakeActor()
        monkeypatch.setattr(pool, "ray", SimpleNamespace(nodes=self._nodes, kill=lambda actor: None))
        start = SimpleNamespace(remote=lambda spec: self.actor)
        monkeypatch.setattr(pool, "VaeActor", SimpleNamespace(options=lambda **settings: start))
        self.pool = ActorPool(
            ActorResources(actors=1, num_gpus=1, threads=1, frame_budget_bytes=1),
            ActorSpec(make_worker=lambda meter: None, log_level="info"),  # type: ignore[arg-type,return-value]
        )
        self.pool.do(StartActor(actor=0))

    def _nodes(self) -> list[dict[str, Any]]:
        return [{"NodeID": name, "Alive": alive} for name, alive in self.alive.items()]

    def answer(self, error: Exception) -> list[Event]:
        self.actor.asked[-1].set_exception(error)
        return self.pool.poll(0)


def failed_in_constructor() -> ActorDiedError:
    return ActorDiedError(RayTaskError("__init__", "trace", ValueError("weights")))


@pytest.mark.parametrize(("gone", "charged"), [((), True), (("b",), False)])
def test_an_actor_that_dies_at_birth_while_a_node_goes_is_lost_with_it(
    monkeypatch: pytest.MonkeyPatch, gone: tuple[str, ...], charged: bool
) -> None:
    cluster = FakeCluster(monkeypatch)
    cluster.alive.update(dict.fromkeys(gone, False))
    (event,) = cluster.answer(ActorDiedError())
    assert isinstance(event, ActorFailedToStart)
    assert event.is_charged == charged


def test_an_error_of_its_own_is_charged_whatever_goes_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = FakeCluster(monkeypatch)
    cluster.alive["b"] = False
    (event,) = cluster.answer(failed_in_constructor())
    assert isinstance(event, ActorFailedToStart)
    assert event.is_charged


def test_an_actor_that_is_unavailable_at_birth_is_asked_again_until_ray_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = FakeCluster(monkeypatch)
    assert cluster.answer(ActorUnavailableError("connection reset", None)) == []
    monkeypatch.setattr(cluster.pool, "_next_beat", 0.0)
    cluster.pool.poll(0)
    assert len(cluster.actor.asked) == 2
    cluster.alive["a"] = False
    (event,) = cluster.answer(ActorDiedError())
    assert isinstance(event, ActorFailedToStart)
    assert not event.is_charged


def test_settings_that_work_nowhere_end_the_run_as_what_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(meter: Any) -> Any:
        raise ConfigError("vae.weights: not there")

    make_actor: Any = VaeActor.__ray_metadata__.modified_class  # type: ignore[attr-defined]
    with pytest.raises(ConfigError) as raised:
        make_actor(ActorSpec(make_worker=refuse, log_level="info")).ready()
    with pytest.raises(ConfigError, match=r"vae\.weights: not there"):
        FakeCluster(monkeypatch).answer(RayTaskError("ready", "trace", raised.value))


def test_a_node_that_does_not_see_the_shared_paths_gets_no_actor() -> None:
    make_actor: Any = VaeActor.__ray_metadata__.modified_class  # type: ignore[attr-defined]
    spec = ActorSpec(make_worker=lambda meter: pytest.fail("begun"), log_level="info", shared=("/not/mounted",))
    with pytest.raises(TransientError, match="this node does not see /not/mounted"):
        make_actor(spec)
