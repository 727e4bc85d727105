"""Every setting of a run, its default and its meaning, in one place.

YAML files and the command line both end here; what a run used is saved beside its output. The docstring
under a field is what ``--help`` prints.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, PositiveFloat, PositiveInt, model_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from pipeline.types import Bucket, StoredTensors

StorageOptions = dict[str, Any]
SECRET_OPTIONS = ("key", "secret", "token", "pass", "pwd", "connection_string", "credential", "sas", "auth", "cookie")
REDACTED = "***"
_USERINFO = re.compile(r"//[^/@\s]+@")


def _bucket_key(value: str) -> str:
    return Bucket.parse(value).key


def _extension(value: str) -> str:
    return "." + value.lower().removeprefix(".")


def _without_credentials(value: str) -> str:
    if _USERINFO.search(value):
        # Addresses are written into the plan, the dataset and the log.
        raise ValueError("holds credentials (user:password@); give them by the environment or in storage_options")
    return value


def _split_keys(value: Any) -> Any:
    """One key, or several with commas between them, may stand without brackets."""
    return value.split(",") if isinstance(value, str) else value


BucketKey = Annotated[str, AfterValidator(_bucket_key)]
Extension = Annotated[str, AfterValidator(_extension)]
Address = Annotated[str, AfterValidator(_without_credentials)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, validate_default=True)


class SourceConfig(Section):
    """Where a job's input comes from."""

    uri: Address
    """What to read, on any fsspec URL."""
    limit: PositiveInt | None = None
    """Plan so many new items at most. Also written --limit."""
    storage_options: StorageOptions = Field(default_factory=dict)
    """Passed to fsspec for the input, such as {endpoint_url: ...}. Credentials belong in the environment."""


class DestinationConfig(Section):
    """Where a job's output goes."""

    uri: Address
    """Folder of the output, on any fsspec URL."""
    storage_options: StorageOptions = Field(default_factory=dict)
    """Passed to fsspec for the output."""


class InputConfig(SourceConfig):
    """Where the videos come from."""

    uri: Address
    """Folder, glob or single file of videos or of WebDataset tars, or table of videos (.jsonl, .csv, .parquet), on any
    fsspec URL. Tars may be written shard-{000000..000019}.tar, or listed one a line in a .txt file."""
    format: Literal["auto", "files", "table", "webdataset"] = "auto"
    """What the URI names; auto tells tables and tars by their extensions."""
    extensions: tuple[Extension, ...] = (".mp4", ".mov", ".m4v", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".flv", ".gif")
    """Files in a folder, and members of a tar, that count as videos."""
    video_column: str = "video"
    """Table column that holds the video's path; relative paths start at the table's folder."""
    limit: PositiveInt | None = None
    """Stop listing after so many new videos. Also written --limit."""


class OutputConfig(DestinationConfig):
    """Where the latents go, and in which form."""

    uri: Address
    """Folder of the dataset, on any fsspec URL."""
    dtype: Literal["float16", "bfloat16", "float32"] | None = None
    """Stored dtype of the latents. Unset: that of the model."""
    logvar: bool = True
    """Store the log-variance too, so that training can sample the posterior. Doubles the size."""
    first_frame: bool = False
    """Also encode frame 0 alone and keep its pixels, for image-to-video training."""
    compression: Literal["none", "zstd"] = "none"
    """Of the tensor columns. zstd saves about a tenth and gives up reading one sample by its offset."""
    shard_bytes: PositiveInt = 192 << 20
    """Aimed size of one Parquet object."""
    row_group_bytes: PositiveInt = 24 << 20
    """Aimed size of one row group."""


class VaeConfig(Section):
    """The model."""

    weights: Address
    """Folder, fsspec URL or hub id of an AutoencoderKLCogVideoX: config.json and safetensors."""
    subfolder: str | None = None
    """Folder of the VAE inside the weights, usually vae for a whole pipeline."""
    revision: str | None = None
    """Branch, tag or commit of a hub repository."""
    variant: str | None = None
    """Variant of the weight files, such as fp16."""
    dtype: Literal["float16", "bfloat16", "float32"] = "bfloat16"
    """Dtype in which the model runs."""
    decode_dtype: Literal["float16", "bfloat16", "float32"] | None = None
    """Dtype in which the decoder runs, where it is another than the encoder's. Unset: as dtype."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes a GPU where the cluster has one."""
    tiling: Literal["exact", "blend"] = "exact"
    """exact has no seams; blend equals diffusers' tiling, seams included, and needs memory for one tile only."""
    memory_budget_bytes: PositiveInt | None = None
    """What one forward pass may take beside weights, input and result, with tiling: exact. Unset: no bound."""
    model: str | None = None
    """How readers scale the latents: cogvideox-2b, cogvideox-5b or cogvideox-1.5-5b. Unset: by the weights' own factor."""
    storage_options: StorageOptions = Field(default_factory=dict)
    """Passed to fsspec for the weights."""

    @model_validator(mode="after")
    def _budget_has_a_keeper(self) -> VaeConfig:
        if self.memory_budget_bytes is not None and self.tiling == "blend":
            raise ValueError("memory_budget_bytes needs tiling: exact; with blend the tiles bound the memory")
        return self

    @property
    def decoder_dtype(self) -> str:
        """In which latents become frames."""
        return self.decode_dtype or self.dtype


class ClipConfig(Section):
    """How a video becomes clips of fixed shape."""

    buckets: Annotated[tuple[BucketKey, ...], BeforeValidator(_split_keys), Field(min_length=1)] = ("49x480x720@8",)
    """Shapes FRAMESxHEIGHTxWIDTH@FPS. A clip takes the nearest aspect ratio that it is long enough for."""
    windows: Literal["first", "all"] = "first"
    """first: one clip a video. all: as many non-overlapping clips as the video holds."""
    short: Literal["drop", "repeat_last"] = "drop"
    """A video too short for every bucket: left out, or its last frame repeated."""
    min_fps_share: float = Field(default=0.9, ge=0, le=1)
    """Leave out sources slower than this share of the bucket's rate: their frames would repeat."""
    max_upscale: PositiveFloat | None = None
    """Leave out sources that would be enlarged by more than this factor. Unset: no limit."""


class DecodeConfig(Section):
    """Limits of video decoding. A file that passes one is quarantined, never the run stopped."""

    timeout_s: PositiveFloat = 120
    """Wall clock for probing or decoding one video."""
    memory_bytes: PositiveInt = 4 << 30
    """Memory of the decoding process."""
    max_side: PositiveInt = 8192
    """Longest side of the source in pixels."""
    max_pixels: PositiveInt = 4096 * 2304
    """Pixels of one source frame."""
    max_duration_s: PositiveFloat = 3600
    """Length of the source."""
    threads: PositiveInt = 1
    """Codec threads of one decoding task."""


class WorkConfig(Section):
    """The work of one actor."""

    batch_size: PositiveInt = 1
    """Clips per forward pass. The first thing to lower when the GPU runs out of memory."""
    max_attempts: PositiveInt = 3
    """Times that one shard is tried before the run gives it up."""
    batch_timeout_s: PositiveFloat = 1800
    """Longest that the model may take for one batch: an actor that takes longer is killed and replaced. One that only
    waits, for its input or for storage, has four times as long. Minutes are enough on a GPU; a few cores may need an hour."""
    deterministic: bool = False
    """Ask for bit-equal results on a GPU, at some cost in speed. A CPU is always deterministic."""


class EncodeConfig(WorkConfig):
    """The work of one actor."""

    qa_share: float = Field(default=0.0, ge=0, le=1)
    """Share of clips that are also decoded to measure PSNR. Costs about two encodings each."""


class ClusterConfig(Section):
    """How many actors, and what they may hold."""

    actors: PositiveInt | None = None
    """VAE actors. Unset: one a GPU, or one on a cluster without GPUs."""
    gpus_per_actor: float = Field(default=1.0, gt=0, le=1)
    """Below 1, several actors share a GPU."""
    threads_per_actor: PositiveInt | None = None
    """torch threads of an actor on CPU. Unset: the node's cores shared among the actors."""
    frame_budget_bytes: PositiveInt = 2 << 30
    """Decoded frames that one actor may hold or have on order."""


class RunControlConfig(Section):
    """One invocation: none of these changes a result."""

    append: bool = False
    """List the input again and add what is new as a further generation. Also written --append."""
    takeover: bool = False
    """Run although status.json says that another run is alive. Also written --takeover."""
    max_quarantined: float | None = Field(default=None, ge=0)
    """Exit code 3 above so many quarantined clips; below 1, a share of the plan. Unset: no limit."""
    stop_grace_s: float = Field(default=20.0, ge=0)
    """After SIGINT, SIGTERM or ray job stop: how long the shards under way may take to finish; the rest is dropped. Inside
    a Ray job it is cut to what RAY_JOB_STOP_WAIT_TIME_S (3 unless set) leaves."""
    progress: Literal["auto", "bar", "log"] = "auto"
    """auto: a bar on a terminal, log lines elsewhere."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Of the pipeline's own loggers."""
    log_every_s: PositiveFloat = 10
    """Seconds between progress lines."""


class Settings(BaseSettings):
    """What every entry point has: given by a YAML file and dotted options, never by the environment."""

    model_config = SettingsConfigDict(
        extra="forbid",
        use_attribute_docstrings=True,
        cli_kebab_case=False,
        cli_implicit_flags=True,
        cli_hide_none_type=True,
        nested_model_default_partial_update=True,
    )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        # The environment is no source: a variable named INPUT must not become a setting.
        return (init_settings,)

    def to_public_dict(self) -> dict[str, Any]:
        """The settings as YAML holds them, with secrets in storage options and addresses replaced."""
        sections = self.model_dump(mode="json").items()
        return {section: {name: redact(value) for name, value in values.items()} for section, values in sections}


class JobConfig(Settings, ABC):
    """What the driver must know of a job, whatever its work is. Sections of the same names add to these."""

    input: SourceConfig
    output: DestinationConfig
    vae: VaeConfig
    cluster: ClusterConfig = ClusterConfig()
    run: RunControlConfig = RunControlConfig()

    @property
    @abstractmethod
    def work(self) -> WorkConfig:
        """The section that says how actors work."""

    @property
    def stored(self) -> StoredTensors:
        """What an engine of this job keeps of a clip that it encodes."""
        return StoredTensors(dtype=self.vae.dtype)

    def plan_settings(self) -> dict[str, Any]:
        """The settings that decide what is planned, as JSON holds them."""
        return self._dotted("input")

    def _dotted(self, *sections: str) -> dict[str, Any]:
        values = {name: getattr(self, name).model_dump(mode="json", exclude={"storage_options"}) for name in sections}
        return {f"{section}.{name}": value for section, settings in values.items() for name, value in settings.items()}


class RunConfig(JobConfig):
    """Everything that one run of the encode job needs."""

    input: InputConfig
    output: OutputConfig
    clip: ClipConfig = ClipConfig()
    decode: DecodeConfig = DecodeConfig()
    encode: EncodeConfig = EncodeConfig()

    @model_validator(mode="after")
    def _budget_holds_a_batch(self) -> RunConfig:
        largest = max(bucket.frame_bytes for bucket in self.buckets)
        needed = largest * self.encode.batch_size
        if self.cluster.frame_budget_bytes < needed:
            raise ValueError(
                f"cluster.frame_budget_bytes is {self.cluster.frame_budget_bytes}, but one batch of "
                f"{self.encode.batch_size} clips of the largest bucket holds {needed}; raise it or lower encode.batch_size"
            )
        return self

    @property
    def buckets(self) -> tuple[Bucket, ...]:
        return tuple(Bucket.parse(key) for key in self.clip.buckets)

    @property
    def stored(self) -> StoredTensors:
        output = self.output
        return StoredTensors(dtype=output.dtype or self.vae.dtype, logvar=output.logvar, first_frame=output.first_frame)

    @property
    def work(self) -> WorkConfig:
        return self.encode

    def plan_settings(self) -> dict[str, Any]:
        return self._dotted("input", "clip")


def redact(value: Any) -> Any:
    """Replace what looks like a secret by ``***``: options by their name, and ``user:password@`` in addresses."""
    if isinstance(value, dict):
        return {
            name: REDACTED if any(word in name.lower() for word in SECRET_OPTIONS) else redact(option)
            for name, option in value.items()
        }
    if isinstance(value, str):
        return _USERINFO.sub(f"//{REDACTED}@", value)
    return [redact(item) for item in value] if isinstance(value, list) else value
