"""Searches: columns at once give what rows give one by one, and a search is in nobody's way."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import ConfigError
from pipeline.filters import Filter
from pipeline.latents.types import plain_columns
from pipeline.service.config import ServedDataset
from pipeline.service.datasets import Query, ServedDatasets, ShownDataset
from pipeline.service.errors import RequestError
from pipeline.service.searching import match_rows

TEXTS = st.sampled_from(["", "Straße", "STRASSE", "ss", "a Dog", "DOG", "İ", "ﬁ", "\u212a", "k", "é", "𝄞", "~", "12", "true"])
NUMBERS = st.one_of(st.sampled_from([0, -1, 9, 2**53, 2**53 + 1, 2**62 + 1]), st.integers(-(2**63), 2**63 - 1))
COLUMNS: dict[Any, st.SearchStrategy[Any]] = {
    pa.string(): TEXTS,
    pa.large_string(): TEXTS,
    pa.bool_(): st.booleans(),
    pa.int8(): st.integers(-128, 127),
    pa.int64(): NUMBERS,
    pa.uint64(): st.one_of(st.integers(0, 20), st.integers(0, 2**64 - 1)),
    pa.float32(): st.floats(width=32),
    pa.float64(): st.one_of(st.floats(), st.sampled_from([0.0, 9.0, float(2**53)])),
    pa.list_(pa.int32()): st.lists(st.integers(0, 3), max_size=2),
    pa.null(): st.none(),
}
VALUES = st.one_of(TEXTS, NUMBERS.map(str), st.floats().map(str), st.sampled_from(["true", "False", "9.0", "1e999", str(2**70)]))


@st.composite
def columns(draw: st.DrawFn) -> pa.ChunkedArray:
    kind = draw(st.sampled_from(list(COLUMNS)))
    values = draw(st.lists(st.one_of(st.none(), COLUMNS[kind]), max_size=8))
    cut = draw(st.integers(0, len(values)))
    return pa.chunked_array([pa.array(values[:cut], kind), pa.array(values[cut:], kind)])


@given(columns(), st.sampled_from(["=", "!=", "<", "<=", ">", ">=", "~"]), VALUES)
def test_a_column_at_once_gives_what_its_rows_give_one_by_one(column: pa.ChunkedArray, operator: str, value: str) -> None:
    condition = Filter("x", operator, value)
    try:
        expected = [condition.match(plain_columns({"x": found})) for found in column.to_pylist()]
    except ConfigError:
        with pytest.raises(ConfigError):
            match_rows(pa.table({"x": column}), [condition])
        return
    try:
        assert match_rows(pa.table({"x": column}), [condition]).tolist() == expected
    except ConfigError:  # of numbers, all of which are missing, rows ask for no number
        assert not any(expected)


class Gated:
    """The tables of a dataset, each of which waits for leave to come."""

    def __init__(self, shown: ShownDataset, monkeypatch: pytest.MonkeyPatch) -> None:
        self.gate, self.read = threading.Semaphore(0), 0
        tables = shown._dataset.fact_tables

        def fact_tables(names: Any) -> Iterator[Any]:
            for found in tables(names):
                assert self.gate.acquire(timeout=20)
                self.read += 1
                yield found

        monkeypatch.setattr(shown._dataset, "fact_tables", fact_tables)


@pytest.fixture
def shown(dataset: Path) -> ShownDataset:
    return ServedDatasets({"clips": ServedDataset(uri=str(dataset))}).find("clips")


def test_a_search_by_ids_buckets_and_columns_finds_indices_in_order(shown: ShownDataset) -> None:
    def found(**query: Any) -> list[int]:
        return asyncio.run(shown.search(Query(**query))).tolist()

    assert found() == list(range(12))
    assert found(filters=("sample_id>=sample-0005", "caption~CAPTION 1")) == [10, 11]
    assert found(filters=("bucket_key~49X64", "psnr>=40")) == [10]
    assert found(bucket="49x64x96@8", filters=("psnr<33",)) == [0, 2]


def test_equal_searches_at_the_same_time_are_one(shown: ShownDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    gated = Gated(shown, monkeypatch)

    async def ask() -> list[Any]:
        waiting = [asyncio.create_task(shown.search(Query(caption="1"))) for _ in range(3)]
        await asyncio.sleep(0.05)
        waiting[0].cancel()  # one that leaves takes nothing from the others
        gated.gate.release(2)
        return await asyncio.gather(*waiting[1:], shown.search(Query(caption="1")))

    results = asyncio.run(ask())
    assert all(np.array_equal(result, [1, 10, 11]) for result in results)
    assert gated.read == 2


def test_a_search_that_nobody_waits_for_stops(shown: ShownDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    gated = Gated(shown, monkeypatch)

    async def ask() -> None:
        left = asyncio.create_task(shown.search(Query(caption="1")))
        await asyncio.sleep(0.05)
        (search,) = shown._searches.values()
        left.cancel()
        await asyncio.gather(left, return_exceptions=True)
        gated.gate.release(2)
        with pytest.raises(RequestError, match="nobody waits"):
            search.result.result(20)
        assert gated.read == 1
        gated.gate.release(2)
        assert (await shown.search(Query(caption="1"))).tolist() == [1, 10, 11]

    asyncio.run(ask())


def test_searches_take_no_thread_of_other_requests(shown: ShownDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    gated = Gated(shown, monkeypatch)

    async def ask() -> None:
        searches = [asyncio.create_task(shown.search(Query(caption=str(number)))) for number in range(20)]
        await asyncio.sleep(0.1)
        assert sum(thread.name.startswith("search") for thread in set(threading.enumerate()) - before) == 1
        gated.gate.release(40)
        await asyncio.gather(*searches)

    before = set(threading.enumerate())
    asyncio.run(ask())
