"""Which clips are planned, under which names, at which rates."""

from __future__ import annotations

import json
import math
import pickle
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import ConfigError, TerminalError
from pipeline.latents import PlannedLatent, ProbedLatents, plain_columns, plan_latents
from pipeline.latents.naming import Names, clean_name
from pipeline.latents.types import FoundLatent
from pipeline.storage import Storage
from pipeline.types import Rejection
from tests.pipeline.latents.builders import (
    configure,
    file_bytes,
    make_latent,
    plan,
    plan_all,
    probe,
    rejections,
    triplet,
    write_rows,
    write_table,
)


def make_probed(name: str = "a.pt", count: int = 1, **changes: Any) -> ProbedLatents:
    latents = tuple(
        FoundLatent(key="latent", member=member if count > 1 else None, shape=(16, 5, 4, 6), dtype="float32")
        for member in range(count)
    )
    return ProbedLatents(**{"uri": f"/in/{name}", "size_bytes": 9, "version": "1", "latents": latents, **changes})


def plan_probed(probed: list[ProbedLatents], names: Names | None = None, recipe: str = "r", **settings: Any) -> list[Any]:
    return list(plan_latents(probed, configure("/in", **settings), recipe, 8.0, names or Names()))


def names_of(probed: list[ProbedLatents], **settings: Any) -> list[str]:
    return [item.name for item in plan_probed(probed, **settings)]


ROWS = [
    {"caption": "a dog", "psnr": 31.0, "fps": 16},
    {"caption": "a cat", "psnr": 29.0, "fps": None},
    {"caption": "two dogs", "psnr": None, "fps": 24},
]


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "part.parquet", [{**triplet(make_latent(n)), **row} for n, row in enumerate(ROWS)])


def test_files_that_cannot_be_read_are_rejected_by_name(tmp_path: Path) -> None:
    (tmp_path / "a.npy").write_bytes(b"nonsense")
    (tmp_path / "b.pt").write_bytes(b"nonsense")
    (tmp_path / "c.npz").write_bytes(file_bytes(make_latent(shape=(32, 5, 4, 6)), ".npz"))
    (tmp_path / "d.safetensors").write_bytes(file_bytes(make_latent(), ".safetensors"))
    found = rejections(configure(tmp_path))
    assert [(item.uri, item.status, item.stage, item.reason) for item in found] == [
        (f"{tmp_path}/a.npy", "quarantined", "read", "damaged"),
        (f"{tmp_path}/b.pt", "quarantined", "read", "damaged"),
        (f"{tmp_path}/c.npz", "quarantined", "read", "layout_unknown"),
    ]
    assert all(item.detail.startswith(item.uri) for item in found)
    assert "moments" in found[2].detail
    assert found[0].sample_id == probe(configure(tmp_path))[0].key


@pytest.mark.parametrize(
    ("filters", "kept"),
    [
        (["psnr>30"], ["a dog"]),
        (["caption~DOG"], ["a dog", "two dogs"]),
        (["caption~dog", "psnr<100"], ["a dog"]),
        ("caption!=a cat", ["a dog", "two dogs"]),
        (["psnr>100"], []),
    ],
)
def test_filters_select_rows_by_their_columns(rows: Path, filters: Any, kept: list[str]) -> None:
    assert [item.columns["caption"] for item in plan_all(configure(rows, filters=filters))] == kept


@pytest.mark.parametrize("settings", [{"filters": ["pnsr>3"]}, {"fps_column": "rate"}, {"name_column": "title"}])
def test_column_that_is_nowhere_is_an_error_that_names_those_there_are(rows: Path, settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"no column '(pnsr|rate|title)'; there are: caption, fps, psnr"):
        plan(configure(rows, **settings))


def test_filter_on_a_column_that_some_files_lack_passes_over_those(tmp_path: Path) -> None:
    write_rows(tmp_path / "a.parquet", [{**triplet(make_latent()), "psnr": 40.0}])
    write_rows(tmp_path / "b.parquet", [triplet(make_latent())])
    assert [item.name for item in plan_all(configure(tmp_path, filters="psnr>30"))] == ["a"]


def test_file_that_cannot_be_read_is_told_though_a_filter_asks_for_its_rows() -> None:
    broken = make_probed("b.pt", latents=(), error=TerminalError("read", "damaged", "/in/b.pt: cut"), columns={"set": "x"})
    fine = make_probed(columns={"set": "x", "psnr": 40.0})
    assert [type(item) for item in plan_probed([broken, fine], filters=["psnr>30"])] == [Rejection, PlannedLatent]
    assert [type(item) for item in plan_probed([broken, fine], filters=["set=y"])] == []


def test_ids_are_sample_ids_of_a_dataset_or_names_of_files(dataset: Storage, tmp_path: Path) -> None:
    config = configure(dataset.uri, scale=None, ids=["sample-0003", "sample-0010"])
    assert [item.columns["sample_id"] for item in plan_all(config)] == ["sample-0003", "sample-0010"]
    files = [make_probed(name) for name in ("a.pt", "b.c.pt", "d.pt")]
    assert names_of(files, ids=["b.c", "a"]) == ["a", "b.c"]
    with pytest.raises(ConfigError, match=r"input\.ids: the input has no x, y;"):
        names_of(files, ids=["a", "x", "y"])


def test_sample_is_the_same_for_a_seed_and_in_order() -> None:
    files = [make_probed(f"{number:03}.pt") for number in range(200)]
    names = names_of(files, sample=20, seed=1)
    assert len(names) == 20
    assert names == sorted(names)
    assert names == names_of(files, sample=20, seed=1)
    assert names == names_of(list(reversed(files)), sample=20, seed=1)[::-1]
    assert names != names_of(files, sample=20, seed=2)
    assert set(names) < set(names_of(files, sample=40, seed=1))
    assert len(names_of(files, sample=1000)) == 200


def test_sample_holds_the_same_clips_for_every_recipe_and_scale() -> None:
    files = [make_probed(f"{number:03}.pt") for number in range(50)]
    picked = [[item.uri for item in plan_probed(files, recipe=recipe, sample=5)] for recipe in "ab"]
    assert picked[0] == picked[1]
    assert picked[0] == [item.uri for item in plan_probed(files, sample=5, scale=0.7)]


def test_sample_is_drawn_from_what_passes_the_filters(dataset: Storage) -> None:
    planned = plan_all(configure(dataset.uri, scale=None, sample=3, filters="psnr>30"))
    assert len(planned) == 3
    assert all(float(str(item.columns["psnr"])) > 30 for item in planned)


def test_limit_stops_after_so_many() -> None:
    files = [make_probed(f"{number}.pt", count=3) for number in range(3)]
    assert names_of(files, limit=4) == ["0-0", "0-1", "0-2", "1-0"]
    assert len(names_of(files, limit=100)) == 9


def test_what_is_listed_twice_is_planned_once(tmp_path: Path) -> None:
    (tmp_path / "a.pt").write_bytes(file_bytes(make_latent(), ".pt"))
    first, second = plan(configure(write_table(tmp_path / "t.jsonl", [{"latent": "a.pt"}, {"latent": "./a.pt"}])))
    assert isinstance(first, PlannedLatent)
    assert isinstance(second, Rejection)
    assert (second.status, second.reason) == ("filtered", "duplicate")


def test_sample_id_follows_from_all_that_decides_the_video() -> None:
    def sample_id(recipe: str = "r", **settings: Any) -> str:
        (item,) = plan_probed([make_probed(**settings.pop("changes", {}))], recipe=recipe, **settings)
        return str(item.sample_id)

    assert sample_id() == sample_id(name_column="name")
    others = [sample_id("s"), sample_id(scale=0.7), sample_id(drop_frames=1), sample_id(changes={"version": "2"})]
    others.append(sample_id(changes={"columns": {"fps": 16}}))
    assert len({sample_id(), *others}) == 6


@pytest.mark.parametrize(
    ("columns", "settings", "fps"),
    [
        ({}, {}, 8.0),
        ({"fps": 16}, {}, 16.0),
        ({"fps": "23.976"}, {}, 23.976),
        ({"fps": None}, {}, 8.0),
        ({"fps": 16, "rate": 30}, {"fps_column": "rate"}, 30.0),
        ({"fps": 16, "rate": None}, {"fps_column": "rate"}, 16.0),
    ],
)
def test_rate_is_the_rows_or_the_default(columns: dict[str, Any], settings: dict[str, Any], fps: float) -> None:
    (item,) = plan_probed([make_probed(columns=columns)], **settings)
    assert item.fps == fps


@pytest.mark.parametrize("value", [0, -8, "fast", True, math.nan, math.inf, 1e9])
def test_rate_that_is_none_is_a_rejection(value: Any) -> None:
    (item,) = plan_probed([make_probed(columns={"fps": value})])
    assert (item.status, item.reason) == ("quarantined", "bad_fps")
    assert item.detail.startswith("/in/a.pt: fps is ")


def test_rows_own_columns_go_before_the_tables() -> None:
    found = FoundLatent(key="x", row=0, shape=(16, 5, 4, 6), dtype="float32", columns={"fps": 16, "name": "inner"})
    (item,) = plan_probed([make_probed(latents=(found,), columns={"fps": 24, "name": "outer", "set": "x"})])
    assert (item.fps, item.name, item.columns) == (16.0, "inner", {"fps": 16, "name": "inner", "set": "x"})


def test_names_come_from_the_name_column_the_source_or_the_file(dataset: Storage, tmp_path: Path) -> None:
    planned = plan_all(configure(dataset.uri, scale=None))
    assert [item.name for item in planned[:3]] == ["0", "1", "2"]  # videos/0.mp4
    planned = plan_all(configure(dataset.uri, scale=None, name_column="caption"))
    assert planned[0].name == "caption 0"
    rows = [{**triplet(make_latent(n)), "name": name} for n, name in enumerate(["first", None, ""])]
    assert [item.name for item in plan_all(configure(write_rows(tmp_path / "p.parquet", rows)))] == ["first", "p-1", "p-2"]
    assert names_of([make_probed("x.y.pt")]) == ["x.y"]
    assert names_of([make_probed(uri="https://host/a/b.pt?token=c/d.e")]) == ["b"]
    assert names_of([make_probed(count=2, columns={"name": "both"})]) == ["both-0", "both-1"]


def test_name_that_is_taken_gets_the_start_of_the_id() -> None:
    names = Names()
    names.occupy("Dog")
    files = [make_probed(f"{number}/dog.pt") for number in range(3)]
    planned = plan_probed(files, names)
    assert [item.name for item in planned] == [f"dog-{item.sample_id[:8]}" for item in planned]
    (again,) = plan_probed(files[:1], names)
    assert again.name == f"dog-{again.sample_id[:16]}"
    (accented, other) = plan_probed([make_probed("caf\u00e9.pt"), make_probed("CAFE\u0301.pt")])
    assert accented.name == "caf\u00e9"
    assert other.name == f"CAF\u00c9-{other.sample_id[:8]}"


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("a/b\\c", "a_b_c"),
        ("../../etc/passwd", "_.._etc_passwd"),
        ("...hidden", "hidden"),
        ("a\0b\nc\x1b[31m\u202e", "abc[31m"),
        ("  spaced. ", "spaced"),
        ("ünïcode 漢字", "ünïcode 漢字"),
        ("lone \udcff half", "lone  half"),
        ("..", ""),
        ("", ""),
    ],
)
def test_name_is_cleaned(text: str, name: str) -> None:
    assert clean_name(text) == name


def test_name_without_a_usable_character_is_the_id() -> None:
    names = Names()
    assert names.take("///...", "a" * 32) == "_"
    assert names.take("\0", "b" * 32) == "b" * 16
    assert names.take("", "b" * 16 + "c" * 16) == f"{'b' * 16}-{'b' * 8}"


@given(st.lists(st.text(max_size=200), min_size=1, max_size=12))
def test_any_texts_become_names_that_differ_and_fit(texts: list[str]) -> None:
    names = Names()
    given_out = [names.take(text, f"{number:032x}"[::-1]) for number, text in enumerate(texts)]
    assert len({name.casefold() for name in given_out}) == len(texts)
    for name in given_out:
        assert 0 < len(name.encode()) <= 150
        assert not name.startswith(".")
        assert not set(name) & set("/\\\0\n")


def test_long_name_is_cut_at_a_character() -> None:
    assert clean_name("漢" * 100) == "漢" * 50
    names = Names()
    names.take("漢" * 100, "0" * 32)
    assert names.take("漢" * 100, "1" * 32) == "漢" * 47 + "-11111111"


def test_findings_survive_json() -> None:
    damaged = TerminalError("read", "damaged", "a: cut")
    found = FoundLatent(key="k", row=3, member=1, shape=(16, 1, 2, 3), dtype="float16", columns={"caption": "ä", "n": None})
    for probed in (
        ProbedLatents(uri="a", size_bytes=1, version="v", columns={"x": 1.5}, is_shard=True, latents=(found,)),
        ProbedLatents(uri="a", size_bytes=1, version="v", latents=(FoundLatent(key="k", row=0, error=damaged),), error=damaged),
    ):
        loaded = ProbedLatents.load(json.loads(json.dumps(probed.dump())))
        assert repr(loaded) == repr(probed)
        assert loaded.key == probed.key
        assert loaded.latents[0].shape == probed.latents[0].shape


def test_planned_latent_pickles() -> None:
    (item,) = plan_probed([make_probed()])
    assert pickle.loads(pickle.dumps(item)) == item


def test_columns_are_plain_values(tmp_path: Path) -> None:
    row = {"text": "x", "n": 1, "list": ["ä", None], "object": {"a": None}, "raw": b"\0", "flag": True, "big": "y" * 100_000}
    path = write_rows(tmp_path / "a.parquet", [{**triplet(make_latent()), **triplet(make_latent(), "other"), **row}])
    (item,) = plan_all(configure(path))
    assert item.columns == {"text": "x", "n": 1, "list": '["ä", null]', "object": '{"a": null}', "flag": True}
    assert plain_columns({"at": Path("x"), "none": None, "raw": b""}) == {"at": "x", "none": None}
