"""``report.html``: what a person looks at after a run. One file, no scripts, nothing fetched."""

from __future__ import annotations

import io
from collections.abc import Mapping
from html import escape

import pyarrow.parquet as pq

from pipeline.account import Account
from pipeline.dataset.manifest import Manifest
from pipeline.dataset.publish import QUARANTINE_PATH
from pipeline.storage import Storage

REPORT_PATH = "report.html"
MOST_REJECTIONS = 100
"""Shown with their reasons."""

_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>Latent dataset</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 46rem; margin: 2rem auto; padding: 0 1rem; color: #222; }}
table {{ border-collapse: collapse; margin: .5rem 0 1.5rem; }}
th, td {{ text-align: left; padding: .25rem 1.5rem .25rem 0; border-bottom: 1px solid #ddd; }}
td.n {{ text-align: right; font-variant-numeric: tabular-nums; }}
</style>
<h1>Latent dataset</h1>
<p>{uri}</p>
<h2>Account</h2>
{account}
<h2>Buckets</h2>
{buckets}
<h2>Left out, by reason</h2>
{reasons}
{rejections}
<p>All of them: <code>quarantine.parquet</code>.</p>
<h2>Recipe</h2>
{recipe}
</html>
"""


def write_report(storage: Storage, manifest: Manifest, account: Account) -> None:
    """Write the page beside the dataset, whose quarantine table names what was left out."""
    left_out = pq.ParquetFile(io.BytesIO(storage.read(QUARANTINE_PATH)))
    first = next(left_out.iter_batches(MOST_REJECTIONS), None)
    details = {row["uri"]: row["detail"] for row in first.to_pylist()} if first is not None else {}
    page = _PAGE.format(
        uri=escape(storage.uri),
        account=_table(
            {
                "planned": account.planned,
                "written": account.written,
                "quarantined": account.quarantined,
                "filtered": account.filtered,
                "pending": account.pending,
                "tensors, MB": round(account.size_bytes / 1e6, 1),
            }
        ),
        buckets=_table(dict(manifest.buckets)),
        reasons=_table(dict(account.reasons.most_common())) if account.reasons else "<p>Nothing.</p>",
        rejections=_table(details),
        recipe=_table(
            {
                "fingerprint": ", ".join(manifest.recipes),
                "dtype": manifest.dtype,
                "scaling factor (not applied)": manifest.scaling_factor,
            }
        ),
    )
    storage.put(REPORT_PATH, page.encode())


def _table(rows: Mapping[str, object]) -> str:
    cells = "".join(f"<tr><th>{escape(name)}</th><td class=n>{escape(str(value))}</td></tr>" for name, value in rows.items())
    return f"<table>{cells}</table>"
