"""Latents as input: found in datasets, files and tables, told by layout and scale, and read as the VAE decodes them."""

from pipeline.latents.config import LatentInputConfig
from pipeline.latents.file import choose_tensor, load_tensor, parse_tensors
from pipeline.latents.layout import Layout, find_layout, to_clips
from pipeline.latents.listing import list_latents
from pipeline.latents.planning import plan_latents
from pipeline.latents.probing import probe_latents
from pipeline.latents.reader import LatentReader
from pipeline.latents.scale import drop_pad, unscale
from pipeline.latents.types import FoundLatent, PlannedLatent, ProbedLatents, plain_columns

__all__ = [
    "FoundLatent",
    "LatentInputConfig",
    "LatentReader",
    "Layout",
    "PlannedLatent",
    "ProbedLatents",
    "choose_tensor",
    "drop_pad",
    "find_layout",
    "list_latents",
    "load_tensor",
    "parse_tensors",
    "plain_columns",
    "plan_latents",
    "probe_latents",
    "to_clips",
    "unscale",
]
