"""The two kinds of work, encoding and decoding, as the driver sees them: all that it does not do itself."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Protocol

from pipeline.account import Account
from pipeline.actors import Meter, Worker
from pipeline.cluster import ActorResources
from pipeline.config import JobConfig
from pipeline.plan_store import Generation, ShardRef
from pipeline.planning import Planner, ProbeBatches
from pipeline.recipe import Recipe
from pipeline.sources import SourceItem
from pipeline.storage import Storage
from pipeline.types import ShardSummary


class Work(Protocol):
    """One kind of work on one output."""

    @property
    def name(self) -> str:
        """``encode`` or ``decode``, as the plan names it."""
        ...

    @property
    def activity(self) -> str:
        """``encoding`` or ``decoding``, as progress and status say it."""
        ...

    @property
    def config(self) -> JobConfig: ...

    @property
    def storage(self) -> Storage:
        """The output."""
        ...

    @property
    def recipe(self) -> Recipe: ...

    @property
    def probe(self) -> Callable[[list[SourceItem]], list[Any]]:
        """Looks at input files, on any node; pickles."""
        ...

    def planner(self, probe: ProbeBatches[Any], on_probed: Callable[[list[Any], int], None]) -> Planner[Any, Any]:
        """What adds a generation to the plan."""
        ...

    def worker(self, generations: list[Generation], resources: ActorResources) -> Callable[[Meter], Worker]:
        """What an actor calls to get its model and do shards; pickles."""
        ...

    @property
    def commits(self) -> tuple[str, str]:
        """Folder and suffix of the objects whose existence is the commit of a shard."""
        ...

    def commit_path(self, shard: ShardRef) -> str:
        """The object whose existence is the commit of a shard."""
        ...

    def read_summary(self, path: str, size_bytes: int) -> ShardSummary:
        """The account in such an object."""
        ...

    def is_published(self, generations: list[Generation], account: Account) -> bool:
        """Whether the output already speaks of all that is committed, as after running a finished job again."""
        ...

    def publish(self, generations: list[Generation], shards: Iterable[str], account: Account) -> None:
        """Make what is committed a finished output: quarantine table, manifest, report.

        Args:
            shards: paths of the objects that commit the shards, in plan order.

        Raises:
            DatasetError: a shard is damaged, or together they hold something else than the account says.
        """
        ...
