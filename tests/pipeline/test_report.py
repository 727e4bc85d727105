"""The page that a person opens after a run."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path

from pipeline.account import Account
from pipeline.report import REPORT_PATH, write_report
from pipeline.storage import Storage
from tests.pipeline.dataset.builders import make_dataset


class Cells(HTMLParser):
    """The table cells of a page, and the tags that it uses."""

    def __init__(self) -> None:
        super().__init__()
        self.cells: list[str] = []
        self.tags: set[str] = set()
        self._tag = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._tag = tag
        self.tags.add(tag)

    def handle_endtag(self, tag: str) -> None:
        self._tag = ""

    def handle_data(self, data: str) -> None:
        if self._tag in ("th", "td"):
            self.cells.append(data)


def test_page_shows_account_buckets_reasons_and_recipe(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path / "out <b>"))
    (tmp_path / "spool").mkdir()
    manifest = make_dataset(storage, tmp_path / "spool", (3, 2))
    account = Account(planned=7, written=5, quarantined=1, filtered=1, size_bytes=2_000_000)
    account.reasons.update({"<script>": 2})
    write_report(storage, manifest, account)
    text = storage.read(REPORT_PATH).decode()
    page = Cells()
    page.feed(text)
    rows = dict(zip(page.cells[::2], page.cells[1::2], strict=True))
    assert (rows["planned"], rows["written"], rows["pending"], rows["tensors, MB"]) == ("7", "5", "0", "2.0")
    assert rows["49x64x96@8"] == "5"
    assert rows["<script>"] == "2"
    assert rows["fingerprint"] == "recipe-1"
    assert not page.tags & {"script", "link", "img", "b"}
    assert "out &lt;b&gt;" in text


def test_page_of_a_run_without_losses_says_so(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path / "out"))
    (tmp_path / "spool").mkdir()
    write_report(storage, make_dataset(storage, tmp_path / "spool", (1,)), Account(planned=1, written=1))
    assert "<p>Nothing.</p>" in storage.read(REPORT_PATH).decode()
