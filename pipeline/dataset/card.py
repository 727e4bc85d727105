"""The dataset card: what a person reads first, and what HF ``datasets`` loads by."""

from __future__ import annotations

from pipeline.dataset.manifest import Manifest

_CARD = """\
---
configs:
- config_name: default
  data_files:
  - split: train
    path: data/**/*.parquet
tags:
- cogvideox
- video-latents
---

# CogVideoX latents

{num_samples} clips as latents of the CogVideoX VAE: posterior means, **unscaled**, `[C, F, H, W]`, {dtype}.

| bucket | samples |
|---|---|
{buckets}

{num_shards} shards with {size_mb:,.1f} MB of tensors. {num_quarantined} clips were quarantined and {num_filtered} filtered;
`quarantine.parquet` says why.

Scaling: model {model}, `scaling_factor` {scaling_factor}. Multiply before training; nothing is scaled here,
since conventions differ between models and trainers.

```python
from pipeline.dataset import LatentDataset

dataset = LatentDataset("<this folder>"{scale})
dataset[0]["latent"]  # torch.{dtype}, [C, F, H, W]
```

The shards are ordinary Parquet: `datasets.load_dataset("<this folder>")`, DuckDB, Polars and pyarrow read them.
A tensor is three columns, `<name>_bytes` (little-endian, C order), `<name>_shape` and `<name>_dtype`; view bfloat16,
do not cast it: `torch.frombuffer(bytearray(row["vae_latent_bytes"]), dtype=torch.bfloat16).view(row["vae_latent_shape"])`.

## Columns

| column | type |
|---|---|
{columns}
"""


def dataset_card(manifest: Manifest) -> str:
    """README.md with the YAML front matter that keeps loaders to ``data/``."""
    return _CARD.format(
        num_samples=f"{manifest.num_samples:,}",
        num_shards=f"{manifest.num_shards:,}",
        num_quarantined=f"{manifest.num_quarantined:,}",
        num_filtered=f"{manifest.num_filtered:,}",
        size_mb=manifest.size_bytes / 1e6,
        dtype=manifest.dtype,
        model=manifest.model or "not named",
        scaling_factor=manifest.scaling_factor,
        scale=f', scale={{"model": "{manifest.model}"}}' if manifest.model else "",
        buckets="\n".join(f"| `{key}` | {count:,} |" for key, count in manifest.buckets.items()),
        columns="\n".join(f"| `{c['name']}` | {c['type'].replace('|', '/')} |" for c in manifest.columns),
    )
