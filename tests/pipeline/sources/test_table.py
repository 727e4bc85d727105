"""Tables of videos: JSONL, CSV and Parquet, whose other columns pass through with their types."""

from __future__ import annotations

import json
import uuid
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
import pytest

from pipeline.config import InputConfig
from pipeline.errors import ConfigError
from pipeline.sources import SourceItem, SourceListing, open_source
from pipeline.storage import Storage
from tests.conftest import ObjectStore

ROWS = [
    {"video": "a.mp4", "caption": "a cat, asleep", "views": 3, "score": 0.5, "good": True},
    {"video": "sub/b.mp4", "caption": 'says "hi"\nand goes', "views": 4, "score": 1.5, "good": False},
]
TYPES = pa.schema([("caption", pa.string()), ("views", pa.int64()), ("score", pa.float64()), ("good", pa.bool_())])


def write_table(folder: Path, kind: str, rows: list[dict[str, Any]] | None = None, name: str = "table") -> Path:
    table = pa.Table.from_pylist(ROWS if rows is None else rows)
    path = folder / f"{name}.{kind}"
    if kind == "parquet":
        pq.write_table(table, path)
    elif kind == "csv":
        pa_csv.write_csv(table, path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in table.to_pylist()))
    return path


def list_rows(uri: Any, **settings: Any) -> list[SourceItem]:
    return list(open_listing(uri, **settings).items)


def open_listing(uri: Any, **settings: Any) -> SourceListing:
    return open_source(InputConfig(uri=str(uri), **settings))


@pytest.mark.parametrize("kind", ["jsonl", "ndjson", "csv", "parquet"])
def test_rows_come_in_order_with_their_columns_and_types(tmp_path: Path, kind: str) -> None:
    listing = open_listing(write_table(tmp_path, kind))
    assert listing.schema == TYPES
    assert list(listing.items) == [
        SourceItem(uri=f"{tmp_path}/{row['video']}", columns={k: v for k, v in row.items() if k != "video"}) for row in ROWS
    ]


def test_parquet_keeps_types_that_text_has_not(tmp_path: Path) -> None:
    moment = datetime(2025, 5, 1, 12, tzinfo=UTC)
    rows = [{"video": "a.mp4", "tags": ["x", "y"], "at": moment, "raw": b"\0", "box": {"x": 1}}]
    listing = open_listing(write_table(tmp_path, "parquet", rows))
    assert [str(column.type) for column in listing.schema] == [
        "list<element: string>",
        "timestamp[us, tz=UTC]",
        "binary",
        "struct<x: int64>",
    ]
    (item,) = listing.items
    assert item.columns["tags"] == ["x", "y"]
    assert item.columns["at"] == moment


def test_relative_paths_start_at_the_tables_folder_and_others_stand(tmp_path: Path) -> None:
    videos = ["a.mp4", "./b.mp4", "../c.mp4", "/data/d.mp4", "s3://bucket/e.mp4", "https://host/f.mp4?x=../1"]
    items = list_rows(write_table(tmp_path, "jsonl", [{"video": video} for video in videos]))
    assert [item.uri for item in items] == [
        f"{tmp_path}/a.mp4",
        f"{tmp_path}/b.mp4",
        f"{tmp_path.parent}/c.mp4",
        "/data/d.mp4",
        "s3://bucket/e.mp4",
        "https://host/f.mp4?x=../1",
    ]


def test_relative_paths_of_a_table_in_s3_are_s3_uris(s3: ObjectStore) -> None:
    storage = Storage(s3.uri(uuid.uuid4().hex))
    storage.put("meta/table.jsonl", b'{"video": "a.mp4"}\n{"video": "../videos/b.mp4"}\n{"video": "./c.mp4"}\n')
    items = list_rows(f"{storage.uri}/meta/table.jsonl")
    assert [item.uri.removeprefix(storage.uri) for item in items] == ["/meta/a.mp4", "/videos/b.mp4", "/meta/c.mp4"]


def test_row_without_a_video_is_an_item_with_a_problem(tmp_path: Path) -> None:
    path = write_table(tmp_path, "jsonl", [{"video": "a.mp4", "n": 1}, {"video": None, "n": 2}, {"video": "", "n": 3}])
    items = list_rows(path)
    assert [item.problem is None for item in items] == [True, False, False]
    assert items[1].uri == f"{path}#2"
    assert items[1].columns == {"n": 2}
    assert items[1].problem == f"{path}: row 2 has None for a video, expected a path or URI"


def test_video_that_is_no_text_is_a_problem_told_in_short(tmp_path: Path) -> None:
    path = write_table(tmp_path, "parquet", [{"video": {"bytes": b"x" * 10_000, "path": "a.mp4"}}])
    (item,) = list_rows(path)
    assert item.problem is not None
    assert len(item.problem) < len(str(path)) + 200


def test_video_column_may_have_another_name(tmp_path: Path) -> None:
    path = write_table(tmp_path, "csv", [{"path": "a.mp4", "video": "the first"}])
    (item,) = list_rows(path, video_column="path")
    assert (item.uri, item.columns) == (f"{tmp_path}/a.mp4", {"video": "the first"})


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_missing_video_column_is_an_error_that_names_the_others(tmp_path: Path, kind: str) -> None:
    path = write_table(tmp_path, kind, [{"file": "a.mp4", "text": "x"}])
    with pytest.raises(ConfigError, match=r"has no column 'video', only file, text; set input\.video_column"):
        list_rows(path)


def test_csv_columns_of_one_name_are_an_error_that_names_them(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("video,tag,tag\na.mp4,1,2\n")
    with pytest.raises(ConfigError, match=r"t\.csv: two columns are named tag"):
        list_rows(tmp_path / "t.csv")


def test_csv_video_that_looks_like_a_number_is_a_path(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("\ufeffvideo,n\n007,1\n", encoding="utf-8")
    (item,) = list_rows(tmp_path / "t.csv")
    assert (item.uri, item.columns) == (f"{tmp_path}/007", {"n": 1})


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_type_of_a_column_follows_from_all_of_its_values(tmp_path: Path, kind: str) -> None:
    rows: list[dict[str, Any]] = [{"video": "a.mp4", "caption": "x" * 1000, "n": 1} for _ in range(3000)]
    rows.append({"video": "a.mp4", "caption": "x", "n": 0.5})
    path = tmp_path / f"t.{kind}"
    lines = [json.dumps(row) if kind == "jsonl" else f"{row['video']},{row['caption']},{row['n']}" for row in rows]
    path.write_text("\n".join(lines if kind == "jsonl" else ["video,caption,n", *lines]))
    listing = open_listing(path)
    assert listing.schema.field("n").type == pa.float64()
    items = list(listing.items)
    assert len(items) == 3001
    assert items[-1].columns["n"] == 0.5


def test_row_longer_than_a_megabyte_is_read(tmp_path: Path) -> None:
    path = write_table(tmp_path, "jsonl", [{"video": "a.mp4", "caption": "y" * 3_000_000}])
    assert len(list_rows(path)[0].columns["caption"]) == 3_000_000


def test_problem_row_is_told_by_its_number_in_the_whole_table(tmp_path: Path) -> None:
    rows = [{"video": "a.mp4"}] * 5000 + [{"video": None}]
    assert list_rows(write_table(tmp_path, "parquet", rows))[-1].uri.endswith("table.parquet#5001")


def test_glob_of_tables_is_one_table_in_order(tmp_path: Path) -> None:
    write_table(tmp_path, "jsonl", [{"video": "b.mp4", "n": 1}], name="2")
    write_table(tmp_path, "jsonl", [{"video": "a.mp4", "caption": "x"}], name="1")
    listing = open_listing(tmp_path / "*.jsonl")
    assert listing.schema == pa.schema([("caption", pa.string()), ("n", pa.int64())])
    assert [item.uri for item in listing.items] == [f"{tmp_path}/a.mp4", f"{tmp_path}/b.mp4"]


def test_folder_of_tables_is_read_when_asked_for(tmp_path: Path) -> None:
    write_table(tmp_path, "jsonl", [{"video": "a.mp4"}])
    assert [item.uri for item in list_rows(tmp_path, format="table")] == [f"{tmp_path}/a.mp4"]
    with pytest.raises(ConfigError, match="none of which ends in"):
        list_rows(tmp_path)


def test_tables_that_do_not_fit_together_are_an_error(tmp_path: Path) -> None:
    write_table(tmp_path, "jsonl", [{"video": "a.mp4", "n": 1}], name="1")
    write_table(tmp_path, "jsonl", [{"video": "b.mp4", "n": "one"}], name="2")
    with pytest.raises(ConfigError, match="columns do not fit together"):
        list_rows(tmp_path / "*.jsonl")


@pytest.mark.parametrize(
    ("name", "content"),
    [("t.jsonl", '{"video": "a.mp4"'), ("t.csv", "video,n\na,1,2\n"), ("t.csv", ""), ("t.parquet", "PAR?"), ("t.jsonl", "\xff")],
)
def test_table_that_does_not_parse_is_an_error_that_names_it(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content, encoding="latin-1")
    with pytest.raises(ConfigError, match=f"{name}: cannot be read as a table"):
        list_rows(tmp_path / name)


def test_missing_table_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is nothing there"):
        list_rows(tmp_path / "t.jsonl")
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(ConfigError, match=r"no table; expected a file ending in \.jsonl, \.ndjson, \.csv, \.parquet"):
        list_rows(tmp_path, format="table")


def test_row_that_leaves_the_bucket_is_an_item_with_a_problem(s3: ObjectStore) -> None:
    storage = Storage(s3.uri(uuid.uuid4().hex))
    bucket = storage.uri.removeprefix("s3://").split("/")[0]
    depth = storage.uri.count("/") - 2  # folders between the table and the bucket
    videos = ["../" * depth + "x.mp4", "../" * (depth + 1) + "etc/x.mp4", "../" * 9 + "x.mp4", "..x/../a.mp4"]
    storage.put("t.jsonl", "".join(json.dumps({"video": video}) + "\n" for video in videos).encode())
    top, *outside, beside = list_rows(f"{storage.uri}/t.jsonl")
    assert (top.uri, beside.uri) == (f"s3://{bucket}/x.mp4", f"{storage.uri}/a.mp4")
    assert [item.uri for item in outside] == [f"{storage.uri}/t.jsonl#2", f"{storage.uri}/t.jsonl#3"]
    assert all("which leaves the bucket" in str(item.problem) for item in outside)


def test_value_that_cannot_be_read_is_an_error_that_names_table_column_and_row(tmp_path: Path) -> None:
    raw = pa.array([b"fine", b"\xff"], pa.binary())
    text = pa.Array.from_buffers(pa.string(), 2, raw.buffers())
    pq.write_table(pa.table({"video": ["a.mp4", "b.mp4"], "caption": text}), tmp_path / "t.parquet")
    with pytest.raises(ConfigError, match=r"t\.parquet: column 'caption', row 2: cannot be read: .*utf-8"):
        list_rows(tmp_path / "t.parquet")


def test_json_value_that_no_column_can_hold_is_no_crash(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text(r'{"video": "a.mp4", "caption": "\ud83d"}')
    with pytest.raises(ConfigError, match=r"t\.jsonl: cannot be read as a table: .*surrogate"):
        list_rows(tmp_path / "t.jsonl")
    (tmp_path / "t.jsonl").write_text('{"video": "a.mp4", "n": 123456789012345678901234567890}')
    assert list_rows(tmp_path / "t.jsonl")[0].columns == {"n": 123456789012345678901234567890.0}
