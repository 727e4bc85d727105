"""``report.html``: what a person looks at after a run. One file, no scripts, nothing fetched."""

from __future__ import annotations

import io
from collections.abc import Mapping
from html import escape
from urllib.parse import quote

import pyarrow.parquet as pq

from pipeline.account import Account
from pipeline.dataset.manifest import Manifest
from pipeline.quarantine import QUARANTINE_PATH
from pipeline.storage import Storage
from pipeline.videos.record import VideoRecord

REPORT_PATH = "report.html"
MOST_REJECTIONS = 100
"""Shown with their reasons."""

_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 46rem; margin: 2rem auto; padding: 0 1rem; color: #222; }}
table {{ border-collapse: collapse; margin: .5rem 0 1.5rem; }}
th, td {{ text-align: left; padding: .25rem 1.5rem .25rem 0; border-bottom: 1px solid #ddd; }}
td.n {{ text-align: right; font-variant-numeric: tabular-nums; }}
figure {{ display: inline-block; width: 14rem; margin: 0 1rem 1rem 0; vertical-align: top; overflow-wrap: anywhere; }}
video, img {{ width: 100%; }}
</style>
<h1>{title}</h1>
<p>{uri}</p>
<h2>Account</h2>
{account}
{middle}
<h2>Left out, by reason</h2>
{reasons}
{rejections}
<p>All of them: <code>quarantine.parquet</code>.</p>
<h2>Recipe</h2>
{recipe}
</html>
"""


def write_report(storage: Storage, manifest: Manifest, account: Account) -> None:
    """Write the page beside a dataset, whose quarantine table names what was left out."""
    recipe = {
        "fingerprint": ", ".join(manifest.recipes),
        "dtype": manifest.dtype,
        "scaling factor (not applied)": manifest.scaling_factor,
    }
    middle = f"<h2>Buckets</h2>\n{_table(dict(manifest.buckets))}"
    _write_page(storage, "Latent dataset", account, "tensors, MB", middle, recipe)


def write_video_report(storage: Storage, first: list[VideoRecord], account: Account, recipe: Mapping[str, object]) -> None:
    """Write the page beside videos: it plays the first of them where they lie."""
    shown = "\n".join(map(_figure, first))
    middle = f"<h2>The first {len(first)} of {account.written} videos</h2>\n{shown}"
    _write_page(storage, "Decoded videos", account, "videos, MB", middle, recipe)


def _write_page(
    storage: Storage, title: str, account: Account, size_label: str, middle: str, recipe: Mapping[str, object]
) -> None:
    left_out = pq.ParquetFile(io.BytesIO(storage.read(QUARANTINE_PATH)))
    first = next(left_out.iter_batches(MOST_REJECTIONS), None)
    details = [(row["uri"], row["detail"]) for row in first.to_pylist()] if first is not None else []
    counts = {
        "planned": account.planned,
        "written": account.written,
        "quarantined": account.quarantined,
        "filtered": account.filtered,
        "pending": account.pending,
        size_label: round(account.size_bytes / 1e6, 1),
    }
    page = _PAGE.format(
        title=title,
        uri=escape(storage.uri),
        account=_table(counts),
        middle=middle,
        reasons=_table(dict(account.reasons.most_common())) if account.reasons else "<p>Nothing.</p>",
        rejections=_table(details),
        recipe=_table(recipe),
    )
    storage.put(REPORT_PATH, page.encode())


def _figure(video: VideoRecord) -> str:
    address = escape(quote(video.path))
    if address.endswith((".mp4", ".mkv")):
        picture = f'<video src="{address}" controls loop muted preload="metadata"></video>'
    elif address.endswith(".webp"):
        picture = f'<img src="{address}" loading="lazy" alt="">'
    else:
        picture = f'<a href="{address}">frames</a>'
    size = f"{video.num_frames} frames, {video.width}x{video.height}, {video.fps:g} fps"
    return f"<figure>{picture}<figcaption>{escape(video.name)}<br>{size}</figcaption></figure>"


def _table(rows: Mapping[str, object] | list[tuple[str, object]]) -> str:
    pairs = rows if isinstance(rows, list) else rows.items()
    cells = "".join(f"<tr><th>{escape(name)}</th><td class=n>{escape(str(value))}</td></tr>" for name, value in pairs)
    return f"<table>{cells}</table>"
