"""The encode run on WebDataset tars: the same latents as from files, with what stands beside each member."""

from __future__ import annotations

import io
import shutil
import tarfile
from pathlib import Path
from typing import Any

import pytest

from pipeline.account import ExitCode
from pipeline.config import RunConfig
from tests.jobs.conftest import GOOD_CLIPS, read_quarantine, read_rows, run_encode

pytestmark = pytest.mark.usefixtures("cluster")


def pack(clips: Path, folder: Path) -> Path:
    """The folder's clips in two tars, with their captions, a column for each, and a link."""
    folder.mkdir()
    for number, videos in enumerate((GOOD_CLIPS[:2], GOOD_CLIPS[2:])):
        with tarfile.open(folder / f"shard-{number:06d}.tar", "w") as tar:
            for name in videos:
                for path in sorted(clips.glob(Path(name).stem + ".*")):
                    tar.add(path, arcname=f"clips/{path.name}")
                note = tarfile.TarInfo(f"clips/{Path(name).stem}.note.txt")
                note.size = len(name)
                tar.addfile(note, io.BytesIO(name.encode()))
            link = tarfile.TarInfo("clips/link.mp4")
            link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
            tar.addfile(link)
    return folder


def facts(config: RunConfig) -> dict[str, tuple[Any, ...]]:
    columns = ("vae_latent_xxh3", "source_hash", "caption")
    rows = read_rows(Path(config.output.uri)).values()
    return {Path(row["source_uri"].replace("#", "/")).name: tuple(row[name] for name in columns) for row in rows}


def test_tars_give_the_rows_that_files_give(make_config: Any, clips: Path, tmp_path: Path) -> None:
    from_files = make_config()
    assert run_encode(from_files) == ExitCode.COMPLETE
    tars = pack(clips, tmp_path / "tars")
    config = make_config(input={"uri": str(tars / "shard-{000000..000001}.tar")}, output={"uri": str(tmp_path / "from-tars")})
    assert run_encode(config) == ExitCode.COMPLETE
    assert facts(config) == facts(from_files)
    rows = {row["source_uri"]: row for row in read_rows(Path(config.output.uri)).values()}
    row = rows[f"{tars}/shard-000000.tar#clips/bunny_wakes_up.mp4"]
    assert "rabbit" in row["caption"]
    assert row["note.txt"] == "bunny_wakes_up.mp4"
    assert {(entry["uri"], entry["reason"]) for entry in read_quarantine(Path(config.output.uri))} == {
        (f"{tars}/shard-{number:06d}.tar#clips/link.mp4", "link") for number in range(2)
    }
    before = read_rows(Path(config.output.uri))
    shutil.rmtree(tars)  # what is done is not read again, nor even listed
    assert run_encode(config) == ExitCode.COMPLETE
    assert read_rows(Path(config.output.uri)) == before
