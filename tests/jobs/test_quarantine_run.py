"""The quarantine as work, from end to end: list it, mend what is wrong, requeue, run again; nothing is counted twice."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from jobs import quarantine, validate_dataset
from pipeline.account import ExitCode
from pipeline.dataset import LatentDataset
from pipeline.engine import load_engine
from pipeline.errors import TerminalError
from pipeline.types import EncodedClip, Frames
from tests.jobs.conftest import CLIPS, GOOD_CLIPS, read_quarantine, read_rows, run_decode, run_encode
from tests.jobs.sabotage import SabotagedEngine

pytestmark = pytest.mark.usefixtures("cluster")


class IllEngine(SabotagedEngine):
    """Says of every clip that its latent has NaN, as a model under a wrong setting would."""

    def encode(self, clips: Sequence[Frames]) -> list[EncodedClip | TerminalError]:
        return [TerminalError("encode", "not_finite", "the latent has NaN") for _ in clips]

    def decode(self, latents: Sequence[Any]) -> Any:
        return [TerminalError("decode", "not_finite", "the latent has NaN") for _ in latents]


def load_ill(*arguments: Any) -> IllEngine:
    return IllEngine(load_engine(*arguments), Path("/nonexistent"), "raise", 0)


def status_of(folder: str) -> tuple[int, ...]:
    status = json.loads((Path(folder) / "status.json").read_text())
    return tuple(status[name] for name in ("planned", "written", "quarantined", "filtered", "pending"))


def listed(output: str, capsys: pytest.CaptureFixture[str], *options: str) -> list[list[str]]:
    capsys.readouterr()
    code = quarantine.main(["list", output, *options])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert code == (0 if lines else 1)
    return lines


def test_what_failed_is_requeued_and_tried_again(make_config: Any, clips: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copy2(CLIPS / "broken.mp4", clips)
    shutil.copy2(CLIPS / "broken.mp4", clips / "mended.mp4")
    config = make_config()
    output = config.output.uri
    assert run_encode(config, load_ill) == ExitCode.COMPLETE
    assert status_of(output) == (6, 0, 6, 0, 0)
    assert listed(output, capsys) == [
        ["4", "quarantined", "encode", "not_finite"],
        ["2", "quarantined", "probe", "truncated"],
    ]
    shutil.copy2(CLIPS / "cockatoo_portrait.mp4", clips / "mended.mp4")
    assert quarantine.main(["requeue", output, "--all"]) == 0
    assert "4 clips to be tried again, 2 files to be looked at again" in capsys.readouterr().out
    assert validate_dataset.main([output]) == 1  # four clips are pending

    assert run_encode(config) == ExitCode.COMPLETE
    assert status_of(output) == (6, 5, 1, 0, 0)
    assert listed(output, capsys) == [["1", "quarantined", "probe", "truncated"]]
    assert [Path(row["uri"]).name for row in read_quarantine(Path(output))] == ["broken.mp4"]
    names = {Path(row["source_uri"]).name for row in read_rows(Path(output)).values()}
    assert names == {*GOOD_CLIPS, "mended.mp4"}
    assert len(set(LatentDataset(output).sample_ids)) == len(LatentDataset(output)) == 5
    assert validate_dataset.main([output]) == 0

    files = set(Path(output).rglob("data/**/*.parquet"))
    assert run_encode(config) == ExitCode.COMPLETE  # nothing is asked for a second time
    assert set(Path(output).rglob("data/**/*.parquet")) == files
    assert status_of(output) == (6, 5, 1, 0, 0)

    lost = sorted(files)[0]
    (Path(output) / "trash").mkdir()
    lost.rename(Path(output) / "trash" / lost.name)  # as the runbook says of a damaged shard
    assert run_encode(config) == ExitCode.COMPLETE
    assert lost.exists()
    assert validate_dataset.main([output]) == 0


def test_append_after_mending_a_file_replaces_what_was_said_of_it(make_config: Any, clips: Path) -> None:
    shutil.copy2(CLIPS / "broken.mp4", clips / "mended.mp4")
    run_encode(make_config())
    shutil.copy2(CLIPS / "cockatoo_portrait.mp4", clips / "mended.mp4")
    config = make_config(run={"append": True})
    assert run_encode(config) == ExitCode.COMPLETE
    assert status_of(config.output.uri) == (5, 5, 0, 0, 0)
    assert read_quarantine(Path(config.output.uri)) == []
    assert validate_dataset.main([config.output.uri]) == 0


def test_latents_that_could_not_be_decoded_are_requeued_too(
    make_config: Any, make_decode_config: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    run_encode(make_config())
    config = make_decode_config()
    output = config.output.uri
    assert run_decode(config, load_ill) == ExitCode.COMPLETE
    assert status_of(output) == (4, 0, 4, 0, 0)
    assert quarantine.main(["requeue", output, "--reason", "not_finite"]) == 0
    assert run_decode(config) == ExitCode.COMPLETE
    assert status_of(output) == (4, 4, 0, 0, 0)
    capsys.readouterr()
    assert validate_dataset.main([output]) == 0, capsys.readouterr().out
    video = next(Path(output).glob("videos/*.mkv"))
    data = bytearray(video.read_bytes())
    data[len(data) // 2] ^= 1
    video.write_bytes(data)
    assert validate_dataset.main([output, "--quick"]) == 0
    assert validate_dataset.main([output]) == 1
    assert "checksum" in capsys.readouterr().out
