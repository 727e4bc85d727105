"""Items go to disk mixed and come back shape by shape, in order, as many at a time as asked for."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pytest

from pipeline.plan import PlannedClip
from pipeline.plan_rows import CLIP_ROWS
from pipeline.plan_spool import ItemSpool
from pipeline.types import Bucket
from tests.pipeline.fakes import SMALL, make_clip

OTHER = Bucket.parse("17x16x16@8")


def read_all(spool: ItemSpool[PlannedClip], key: str, sizes: list[int]) -> list[list[PlannedClip]]:
    shards = []
    for table, columns in spool.read(key, sizes):
        rows = zip(table.to_pylist(), columns, strict=True)
        shards.append([CLIP_ROWS.from_row(row | {"columns": values}) for row, values in rows])
    return shards


@pytest.mark.parametrize(("piece", "buffered"), [(4096, 65536), (3, 65536), (3, 4), (1, 1)])
def test_items_come_back_by_shape_in_order(piece: int, buffered: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.plan_spool.PIECE_ROWS", piece)
    monkeypatch.setattr("pipeline.plan_spool.MAX_BUFFERED_ROWS", buffered)
    clips = [make_clip(number, bucket=(SMALL, OTHER)[number % 3 == 0], caption=f"ü {number}", n=number) for number in range(20)]
    with ItemSpool(CLIP_ROWS) as spool:
        for clip in clips:
            spool.add(clip)
        assert spool.counts == {SMALL.key: 13, OTHER.key: 7}
        assert spool.firsts == {OTHER.key: clips[0], SMALL.key: clips[1]}
        other = [clip for clip in clips if clip.clip.bucket == OTHER]
        assert read_all(spool, OTHER.key, [3, 3, 1]) == [other[:3], other[3:6], other[6:]]
        assert read_all(spool, SMALL.key, [13]) == [[clip for clip in clips if clip.clip.bucket == SMALL]]


@pytest.mark.parametrize(
    ("declared", "columns"),
    [
        (None, {"a": 2**70, "b": [1, {"c": None}], "d": float("inf")}),
        (pa.schema([("a", pa.binary()), ("b", pa.list_(pa.int8()))]), {"a": b"\0", "b": [1]}),
        (pa.schema([]), {}),
    ],
)
def test_what_passes_through_survives(declared: pa.Schema | None, columns: dict[str, Any]) -> None:
    with ItemSpool(CLIP_ROWS, declared) as spool:
        spool.add(make_clip(0, **columns))
        ((read,),) = read_all(spool, SMALL.key, [1])
    assert read.columns == columns
