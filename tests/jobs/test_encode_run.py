"""The encode run from end to end in this process: real clips, real model, real actors."""

from __future__ import annotations

import functools
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from pipeline.account import ExitCode
from pipeline.config import RunConfig
from pipeline.dataset import LatentDataset
from pipeline.engine import load_engine
from pipeline.errors import ConfigError, DatasetError, RunRefusedError
from pipeline.schedule import Limits
from pipeline.types import Frames
from tests.jobs.conftest import CLIPS, GOOD_CLIPS, read_quarantine, read_rows, run_encode
from tests.jobs.sabotage import SabotagedEngine, load_sabotaged

pytestmark = pytest.mark.usefixtures("cluster")


def outcome(config: RunConfig) -> dict[str, Any]:
    return json.loads((Path(config.output.uri) / "status.json").read_text())


def test_every_clip_is_a_row_with_its_caption_and_the_account_adds_up(make_config: Any) -> None:
    config = make_config(output={"first_frame": True}, encode={"qa_share": 1.0})
    assert run_encode(config) == ExitCode.COMPLETE
    rows = read_rows(Path(config.output.uri))
    by_name = {Path(row["source_uri"]).name: row for row in rows.values()}
    assert sorted(by_name) == sorted(GOOD_CLIPS)
    row = by_name["bunny_wakes_up.mp4"]
    assert "rabbit" in row["caption"]
    assert row["vae_latent_shape"] == [16, 3, 4, 6]
    assert row["first_frame_latent_shape"] == [16, 1, 4, 6]
    assert row["first_frame_png"].startswith(b"\x89PNG")
    assert row["psnr"] is not None
    status = outcome(config)
    assert (status["state"], status["exit_code"]) == ("complete", 0)
    assert (status["planned"], status["written"], status["pending"]) == (4, 4, 0)
    assert len(LatentDataset(config.output.uri)) == 4


def test_running_again_encodes_nothing_and_changes_no_shard(make_config: Any) -> None:
    config = make_config()
    run_encode(config)
    shards = {path: path.stat().st_mtime_ns for path in Path(config.output.uri).rglob("data/**/*.parquet")}
    shutil.rmtree(config.input.uri)  # committed input is not read again, nor even listed
    assert run_encode(config) == ExitCode.COMPLETE
    assert {path: path.stat().st_mtime_ns for path in Path(config.output.uri).rglob("data/**/*.parquet")} == shards


def test_an_actor_killed_in_the_middle_of_a_shard_leaves_the_same_rows(make_config: Any, tmp_path: Path) -> None:
    frames = {"buckets": ["1x32x48@8"], "windows": "all"}  # about a hundred clips, three or four a shard
    undisturbed = make_config(output={"uri": str(tmp_path / "undisturbed")}, clip=frames)
    run_encode(undisturbed)
    config = make_config(clip=frames, cluster={"actors": 2})
    mark = tmp_path / "killed"
    code = run_encode(config, functools.partial(load_sabotaged, mark, "die", 6))
    assert mark.exists()
    assert code == ExitCode.COMPLETE
    rows = read_rows(Path(config.output.uri))
    assert len(rows) > 90
    assert rows == read_rows(Path(undisturbed.output.uri))


def test_an_actor_that_hangs_is_replaced(make_config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.driver.Limits", functools.partial(Limits, answer_s=5.0))
    config = make_config(cluster={"actors": 1})
    assert run_encode(config, functools.partial(load_sabotaged, tmp_path / "hung", "hang", 2)) == ExitCode.COMPLETE
    assert (tmp_path / "hung").exists()
    assert outcome(config)["written"] == 4


def test_an_engine_that_raises_once_costs_an_attempt_and_no_clip(make_config: Any, tmp_path: Path) -> None:
    config = make_config()
    assert run_encode(config, functools.partial(load_sabotaged, tmp_path / "raised", "raise", 1)) == ExitCode.COMPLETE
    assert (tmp_path / "raised").exists()
    assert outcome(config)["written"] == 4


def test_unusable_files_are_quarantined_with_a_reason_and_nothing_else_is_touched(make_config: Any, clips: Path) -> None:
    shutil.copy2(CLIPS / "broken.mp4", clips)
    (clips / "empty.mp4").touch()
    (clips / "letter.mp4").write_text("Dear reader, this is no video.\n" * 50)
    (clips / "loop.mp4").symlink_to("loop.mp4")
    os.mkfifo(clips / "pipe.mp4")
    config = make_config()
    assert run_encode(config) == ExitCode.COMPLETE
    quarantine = {Path(row["uri"]).name: row for row in read_quarantine(Path(config.output.uri))}
    assert {name: row["reason"] for name, row in quarantine.items()} == {
        "broken.mp4": "truncated",
        "empty.mp4": "empty_file",
        "letter.mp4": "not_a_video",
        "loop.mp4": "unreadable",
        "pipe.mp4": "unreadable",
    }
    assert all(name in row["detail"] for name, row in quarantine.items())
    assert len(read_rows(Path(config.output.uri))) == 4


def test_append_encodes_the_new_videos_and_nothing_else(make_config: Any, clips: Path) -> None:
    config = make_config()
    run_encode(config)
    before = read_rows(Path(config.output.uri))
    files = set(Path(config.output.uri).rglob("data/**/*.parquet"))
    for name in ("racing_car_1906.gif", "cockatoo_portrait.mp4"):
        shutil.copy2(CLIPS / name, clips)
    assert run_encode(config) == ExitCode.COMPLETE  # without --append the plan stands
    assert read_rows(Path(config.output.uri)) == before
    assert run_encode(make_config(run={"append": True})) == ExitCode.COMPLETE
    after = read_rows(Path(config.output.uri))
    new = {Path(row["source_uri"]).name for sample_id, row in after.items() if sample_id not in before}
    assert new == {"racing_car_1906.gif", "cockatoo_portrait.mp4"}
    assert {sample_id: after[sample_id] for sample_id in before} == before
    assert files < set(Path(config.output.uri).rglob("data/**/*.parquet"))
    assert len(LatentDataset(config.output.uri)) == 6
    assert run_encode(make_config(run={"append": True})) == ExitCode.COMPLETE
    assert outcome(config)["planned"] == 6


def test_a_rule_that_leaves_everything_new_out_still_reaches_the_dataset(make_config: Any, clips: Path) -> None:
    config = make_config()
    run_encode(config)
    shutil.copy2(CLIPS / "cockatoo_portrait.mp4", clips)
    assert run_encode(make_config(run={"append": True}, clip={"buckets": ["49x32x48@8"]})) == ExitCode.COMPLETE
    assert [row["reason"] for row in read_quarantine(Path(config.output.uri))] == ["too_short"]
    assert outcome(config)["filtered"] == 1


def test_other_settings_are_refused_rather_than_ignored(make_config: Any) -> None:
    run_encode(make_config())
    with pytest.raises(RunRefusedError, match=r"clip\.buckets: 9x32x48@8 there, 17x32x48@8 here"):
        run_encode(make_config(clip={"buckets": ["17x32x48@8"]}))


def test_another_recipe_is_refused_with_both_fingerprints_and_the_difference(make_config: Any) -> None:
    run_encode(make_config())
    with pytest.raises(RunRefusedError, match=r"recipe \w{16}, this run has \w{16} \(dtype: 'float32' there, 'bfloat16' here"):
        run_encode(make_config(vae={"dtype": "bfloat16"}))


def test_a_smaller_batch_resumes(make_config: Any) -> None:
    run_encode(make_config(encode={"batch_size": 2}))
    assert run_encode(make_config(encode={"batch_size": 1})) == ExitCode.COMPLETE


def test_too_many_quarantined_clips_give_exit_code_3_and_say_why(
    make_config: Any, clips: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (clips / "empty.mp4").touch()
    config = make_config(run={"max_quarantined": 0})
    assert run_encode(config) == ExitCode.OVER_MAX_QUARANTINED
    assert outcome(config)["exit_code"] == 3
    assert outcome(config)["written"] == 0  # it stopped early
    assert "too many quarantined: 1 of 5 planned, run.max_quarantined is 0.0; reasons: empty_file 1" in caplog.text


def test_a_run_that_is_not_finished_has_no_manifest_and_is_not_read(make_config: Any) -> None:
    config = make_config(encode={"max_attempts": 1})
    code = run_encode(config, load_hopeless)
    assert code == ExitCode.FAILED
    status = outcome(config)
    assert (status["state"], status["pending"]) == ("failed", 4)
    with pytest.raises(DatasetError, match="allow_incomplete"):
        LatentDataset(config.output.uri)
    assert run_encode(make_config()) == ExitCode.COMPLETE


class HopelessEngine(SabotagedEngine):
    def encode(self, clips: Sequence[Frames]) -> Any:
        raise RuntimeError("no kernel image is available")


def load_hopeless(*arguments: Any) -> HopelessEngine:
    return HopelessEngine(load_engine(*arguments), Path("/nonexistent"), "raise", 0)


def test_weights_that_are_not_there_are_a_usage_error_that_says_so(make_config: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"vae\.weights"):
        run_encode(make_config(vae={"weights": str(tmp_path / "nowhere")}))


def test_a_table_passes_its_columns_through_with_their_types(make_config: Any, clips: Path) -> None:
    table = clips / "clips.jsonl"
    lines = [{"video": name, "caption": f"about {name}", "score": i, "fps": 5.0} for i, name in enumerate(GOOD_CLIPS)]
    table.write_text("".join(json.dumps(line) + "\n" for line in [*lines, {"video": "missing.mp4", "score": 9}]))
    config = make_config(input={"uri": str(table)})
    assert run_encode(config) == ExitCode.COMPLETE
    rows = {row["caption"]: row for row in read_rows(Path(config.output.uri)).values()}
    assert rows[f"about {GOOD_CLIPS[2]}"]["score"] == 2
    assert rows[f"about {GOOD_CLIPS[2]}"]["input_fps"] == 5.0
    assert [row["reason"] for row in read_quarantine(Path(config.output.uri))] == ["not_found"]


def test_all_windows_of_a_long_video_are_cut_from_one_pass(make_config: Any, clips: Path) -> None:
    config = make_config(input={"uri": str(clips / "bunny_wakes_up.mp4")}, clip={"windows": "all"})
    assert run_encode(config) == ExitCode.COMPLETE
    rows = sorted(read_rows(Path(config.output.uri)).values(), key=lambda row: row["frame_start"])
    assert [(row["frame_start"], row["frame_end"]) for row in rows] == [(0, 9), (9, 18)]
    assert rows[0]["vae_latent_bytes"] != rows[1]["vae_latent_bytes"]


def test_short_videos_are_filtered_or_padded_by_setting(make_config: Any, clips: Path) -> None:
    config = make_config(clip={"buckets": ["49x32x48@8"]})
    assert run_encode(config) == ExitCode.COMPLETE
    assert outcome(config)["filtered"] == 4
    padded = make_config(clip={"buckets": ["49x32x48@8"], "short": "repeat_last"}, output={"uri": str(clips.parent / "padded")})
    assert run_encode(padded) == ExitCode.COMPLETE
    assert outcome(padded)["written"] == 4
