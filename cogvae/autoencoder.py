"""The CogVideoX VAE as users hold it: diffusers' class of this name, without diffusers.

Shape legend: B batch, C channels, T frames, H/W pixels; t, h, w their latent counterparts.
"""

import dataclasses
import functools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, Self

import torch
from torch import Generator, Tensor, nn

from cogvae import exact, weights
from cogvae.blocks import ResnetStack, checkpoint_without_reentry
from cogvae.checks import check_frames, check_latents
from cogvae.chunks import ChunkFunction, FrameLoop, LateLoop, partition, run_in_chunks, split_in_chunks
from cogvae.config import VAEConfig
from cogvae.conv import Tails
from cogvae.decoder import Decoder
from cogvae.encoder import Encoder
from cogvae.outputs import AutoencoderKLOutput, DecoderOutput
from cogvae.posterior import DiagonalGaussianDistribution
from cogvae.precision import cast, cast_chunks, find_dtype, weights_of
from cogvae.streams import check_pieces, from_uint8, run_stream, to_uint8
from cogvae.tiling import Cut, TileAxis, tile_axis


class AutoencoderKLCogVideoX(nn.Module):
    """3D causal VAE: clips to latents of an eighth of the size and, by default, a quarter of the frames.

    Source: CogVideoX, arXiv:2408.06072, section 2.1; same arguments, state dict and numbers as the class of
    this name in diffusers 0.38.
    """

    def __init__(
        self,
        in_channels: int = VAEConfig.in_channels,
        out_channels: int = VAEConfig.out_channels,
        down_block_types: tuple[str, ...] = VAEConfig.down_block_types,
        up_block_types: tuple[str, ...] = VAEConfig.up_block_types,
        block_out_channels: tuple[int, ...] = VAEConfig.block_out_channels,
        latent_channels: int = VAEConfig.latent_channels,
        layers_per_block: int = VAEConfig.layers_per_block,
        act_fn: str = VAEConfig.act_fn,
        norm_eps: float = VAEConfig.norm_eps,
        norm_num_groups: int = VAEConfig.norm_num_groups,
        temporal_compression_ratio: int = VAEConfig.temporal_compression_ratio,
        sample_height: int = VAEConfig.sample_height,
        sample_width: int = VAEConfig.sample_width,
        scaling_factor: float = VAEConfig.scaling_factor,
        shift_factor: float | None = VAEConfig.shift_factor,
        latents_mean: tuple[float, ...] | None = VAEConfig.latents_mean,
        latents_std: tuple[float, ...] | None = VAEConfig.latents_std,
        force_upcast: bool = VAEConfig.force_upcast,
        use_quant_conv: bool = VAEConfig.use_quant_conv,
        use_post_quant_conv: bool = VAEConfig.use_post_quant_conv,
        invert_scale_latents: bool = VAEConfig.invert_scale_latents,
        **hidden: Any,
    ) -> None:
        """What each argument means stands under the field of the same name in `VAEConfig`.

        Keyword arguments that begin with `_` are kept in the config and have no effect.
        """
        surplus = [name for name in hidden if not name.startswith("_")]
        if surplus:
            raise TypeError(f"{type(self).__name__} has no argument {', '.join(surplus)}")
        # Every argument above is a field of the config, `hidden` too.
        config = VAEConfig(**{k: v for k, v in locals().items() if k in VAEConfig.__dataclass_fields__})
        # Not super(): behind the adapter stands diffusers' class, whose modules must not be built.
        nn.Module.__init__(self)
        self._config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        # diffusers sizes these two by out_channels, which no input fits; no published checkpoint has them.
        moments, latents = 2 * config.latent_channels, config.latent_channels
        self.quant_conv = nn.Conv3d(moments, moments, 1) if config.use_quant_conv else None
        self.post_quant_conv = nn.Conv3d(latents, latents, 1) if config.use_post_quant_conv else None

        # Plain attributes that users of diffusers set.
        self.use_slicing = False
        self.use_tiling = False
        self._limits = exact.Limits()
        # Of the exact engine. None: on CUDA, where Triton is installed.
        self.use_triton: bool | None = None
        self.num_latent_frames_batch_size = 2
        self.num_sample_frames_batch_size = 8
        self.tile_sample_min_height = config.sample_height // 2
        self.tile_sample_min_width = config.sample_width // 2
        self.tile_latent_min_height = self.tile_sample_min_height // config.spatial_compression_ratio
        self.tile_latent_min_width = self.tile_sample_min_width // config.spatial_compression_ratio
        self.tile_overlap_factor_height = 1 / 6
        self.tile_overlap_factor_width = 1 / 5

    # Making and saving

    @classmethod
    def from_config(cls, config: Mapping[str, Any], **overrides: Any) -> Self:
        """A model with random weights from a config of ours, a plain dict, or a config of diffusers."""
        return cls(**VAEConfig.from_dict({**config, **overrides}))

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        subfolder: str | None = None,
        torch_dtype: torch.dtype | None = None,
        revision: str | None = None,
        variant: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
        storage_options: Mapping[str, Any] | None = None,
    ) -> Self:
        """Loads a model in evaluation mode from a local folder, an fsspec URL, or a hub repository.

        Without `torch_dtype` the weights become float32, as in diffusers.

        Raises: as `resolve_weights` and `load_weights` do.
        """
        files = weights.resolve_weights(
            pretrained_model_name_or_path,
            subfolder=subfolder,
            revision=revision,
            variant=variant,
            cache_dir=cache_dir,
            token=token,
            local_files_only=local_files_only,
            storage_options=storage_options,
        )
        return cls.from_files(files, torch_dtype=torch_dtype)

    @classmethod
    def from_files(
        cls,
        files: weights.WeightFiles,
        *,
        torch_dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
    ) -> Self:
        """Loads a model in evaluation mode from files that `resolve_weights` found."""
        if torch_dtype is not None and not (isinstance(torch_dtype, torch.dtype) and torch_dtype.is_floating_point):
            raise ValueError(f"torch_dtype={torch_dtype!r}: expected a floating torch.dtype such as torch.bfloat16")
        with torch.device("meta"):  # no random weights that the file would overwrite
            model = cls.from_config(files.read_config())
        weights.load_weights(files, model, torch_dtype=torch_dtype, device=device)
        return model.eval()

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        *,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str = "10GB",
    ) -> None:
        """Writes config.json and safetensors that both `from_pretrained` and diffusers read."""
        if not safe_serialization:
            raise ValueError("safe_serialization=False would write a pickle: only safetensors are written")
        weights.save_weights(save_directory, self.config, self.state_dict(), variant=variant, max_shard_size=max_shard_size)

    # What it is

    @property
    def config(self) -> VAEConfig:
        return self._config

    @property
    def dtype(self) -> torch.dtype:
        """That of the encoder, where `vae.encoder.to(...)` and `vae.decoder.to(...)` have set two."""
        return next(weights_of(self)).dtype

    @property
    def device(self) -> torch.device:
        return next(weights_of(self)).device

    def num_parameters(self, only_trainable: bool = False) -> int:
        return sum(p.numel() for p in self.parameters() if p.requires_grad or not only_trainable)

    # How it runs

    def enable_slicing(self) -> None:
        """Passes the clips of a batch through one at a time."""
        self.use_slicing = True

    def disable_slicing(self) -> None:
        self.use_slicing = False

    def enable_tiling(
        self,
        tile_sample_min_height: int | None = None,
        tile_sample_min_width: int | None = None,
        tile_overlap_factor_height: float | None = None,
        tile_overlap_factor_width: float | None = None,
        *,
        mode: Literal["blend", "exact"] = "blend",
        memory_budget_bytes: int | None = None,
        strip_rows: int | None = None,
    ) -> None:
        """Limits the memory that frames larger than a tile take.

        `mode="blend"` cuts frames into overlapping tiles as diffusers does: tile sizes in pixels, overlaps as
        fractions of a tile; None (and 0, as in diffusers) keeps the present value. `mode="exact"` gives the
        untiled result at any size: `memory_budget_bytes` bounds what an encode or decode takes beside weights, input
        and result, and `strip_rows` sets the rows that a convolution does at once, which the budget else chooses.

        Raises: ValueError if tile times overlap is no whole number of latent cells, or if an argument of one
            mode is given to the other. A budget that a clip does not fit is an error of the call that meets it.
        """
        sizes = (tile_sample_min_height, tile_sample_min_width)
        overlaps = (tile_overlap_factor_height, tile_overlap_factor_width)
        if mode not in ("blend", "exact"):
            raise ValueError(f"mode={mode!r}: expected 'blend' or 'exact'")
        if mode == "exact":
            if any((*sizes, *overlaps)):
                raise ValueError("mode='exact' has no tiles: leave their arguments out, or use mode='blend'")
            self._limits = exact.Limits(memory_budget_bytes=memory_budget_bytes, strip_rows=strip_rows)
            self.use_tiling = False
            return
        if memory_budget_bytes is not None or strip_rows is not None:
            raise ValueError("memory_budget_bytes and strip_rows belong to mode='exact': the tiles bound the memory of 'blend'")
        scale = self.config.spatial_compression_ratio
        height = tile_sample_min_height or self.tile_sample_min_height
        width = tile_sample_min_width or self.tile_sample_min_width
        overlap_height = tile_overlap_factor_height or self.tile_overlap_factor_height
        overlap_width = tile_overlap_factor_width or self.tile_overlap_factor_width
        tile_axis("height", height, height // scale, overlap_height, scale)
        tile_axis("width", width, width // scale, overlap_width, scale)
        self.use_tiling = True
        self._limits = exact.Limits()
        self.tile_sample_min_height, self.tile_sample_min_width = height, width
        self.tile_latent_min_height, self.tile_latent_min_width = height // scale, width // scale
        self.tile_overlap_factor_height, self.tile_overlap_factor_width = overlap_height, overlap_width

    def least_encode_bytes(self, frames_shape: Sequence[int]) -> int:
        """The least `memory_budget_bytes` with which `mode="exact"` encodes frames [B, 3, T, H, W]."""
        return self._least_bytes(self.encoder, frames_shape, self.num_sample_frames_batch_size)

    def least_decode_bytes(self, latents_shape: Sequence[int]) -> int:
        """As `least_encode_bytes`, for latents [B, C, t, h, w]."""
        return self._least_bytes(self.decoder, latents_shape, self.num_latent_frames_batch_size)

    def _least_bytes(self, network: Encoder | Decoder, shape: Sequence[int], chunk_frames: int) -> int:
        batch, channels, num_frames, height, width = shape
        first, *others = partition(num_frames, chunk_frames)
        dtype = next(network.parameters()).dtype
        chunk = torch.empty(batch, channels, len(first), height, width, dtype=dtype, device="meta")
        return exact.find_least_bytes(self._limits, network, chunk, not others)

    def disable_tiling(self) -> None:
        """Whole frames again, and no budget."""
        self.use_tiling = False
        self._limits = exact.Limits()

    @property
    def gradient_checkpointing(self) -> bool:
        return any(stack.gradient_checkpointing for stack in self._resnet_stacks())

    def enable_gradient_checkpointing(self, gradient_checkpointing_func: Callable[..., Any] | None = None) -> None:
        """Keeps only what goes into each resnet and computes its inside again in the backward pass.

        `gradient_checkpointing_func(module, *args)` replaces torch's non-reentrant checkpoint.
        """
        for stack in self._resnet_stacks():
            stack.gradient_checkpointing = True
            stack.checkpoint_func = gradient_checkpointing_func or checkpoint_without_reentry

    def disable_gradient_checkpointing(self) -> None:
        for stack in self._resnet_stacks():
            stack.gradient_checkpointing = False

    def _resnet_stacks(self) -> list[ResnetStack]:
        return [module for module in self.modules() if isinstance(module, ResnetStack)]

    # Encoding and decoding

    def encode(self, x: Tensor, return_dict: bool = True) -> AutoencoderKLOutput | tuple[DiagonalGaussianDistribution]:
        """Frames [B, 3, T, H, W], -1 to 1, to the posterior over unscaled latents [B, C, t, h, w].

        Any T >= 1 is taken; only 8k+1 and 8k frames come back with their count. Odd sizes round down. Frames of another
        dtype than the encoder's are cast to it.
        """
        check_frames(x, self.config)
        posterior = DiagonalGaussianDistribution(self._cut_frames(x).run(self._encode_clips, x))
        return AutoencoderKLOutput(latent_dist=posterior) if return_dict else (posterior,)

    def decode(self, z: Tensor, return_dict: bool = True) -> DecoderOutput | tuple[Tensor]:
        """Unscaled latents [B, C, t, h, w] to frames [B, 3, T, H, W], about -1 to 1, not clamped.

        An odd t gives 4(t-1)+1 frames, an even one 4t, at the default temporal compression. Latents of another dtype
        than the decoder's are cast to it.
        """
        check_latents(z, self.config)
        frames = self._cut_latents(z).run(self._decode_clips, z)
        return DecoderOutput(sample=frames) if return_dict else (frames,)

    def encode_stream(
        self, frames: Tensor | Iterable[Tensor], num_frames: int | None = None, *, uint8: bool = False
    ) -> Iterator[Tensor]:
        """Frames in pieces [B, 3, any T, H, W] to moments [B, 2*C, t, h, w], chunk by chunk: `encode` in the memory of a chunk.

        `num_frames` is how many frames come in all. None: as many as a single tensor has; pieces must then add up
        to 8k+1. With `uint8` the frames are pixels of that dtype, 0 to 255.

        Settings, and whether gradients are wanted, are read at the first chunk; weights at every one, so leave them
        alone until the stream has ended.

        Raises: ValueError, while it runs, if the pieces do not fit together or end elsewhere, or if one requires
            gradients after a first that did not.
        """
        check = functools.partial(check_frames, config=self.config, uint8=uint8)
        chunks = self._chunks(frames, num_frames, self.num_sample_frames_batch_size, check)
        if uint8:
            dtype = find_dtype(self.encoder) or torch.float32
            chunks = ((from_uint8(chunk, dtype), is_last) for chunk, is_last in chunks)
        return run_stream(self._encoding_loop, chunks, self._cut_frames)

    def decode_stream(
        self, latents: Tensor | Iterable[Tensor], num_frames: int | None = None, *, uint8: bool = False
    ) -> Iterator[Tensor]:
        """Unscaled latents in pieces [B, C, any t, h, w] to frames [B, 3, T, H, W]: `decode`, as `encode_stream` is `encode`.

        `num_frames` counts latent frames, as they are what comes in. None: as many as a single tensor has; pieces
        must then add up to an odd number. With `uint8` the frames are clamped pixels of that dtype, 0 to 255.

        Raises: as `encode_stream` does.
        """
        check = functools.partial(check_latents, config=self.config)
        chunks = self._chunks(latents, num_frames, self.num_latent_frames_batch_size, check)
        frames = run_stream(self._decoding_loop, chunks, self._cut_latents)
        return map(to_uint8, frames) if uint8 else frames

    def forward(
        self,
        sample: Tensor,
        sample_posterior: bool = False,
        return_dict: bool = True,
        generator: Generator | list[Generator] | None = None,
    ) -> DecoderOutput | tuple[Tensor]:
        """Encodes frames and decodes the posterior's mode, or a sample of it."""
        posterior: DiagonalGaussianDistribution = self.encode(sample)[0]
        z = posterior.sample(generator) if sample_posterior else posterior.mode()
        return self.decode(z, return_dict=return_dict)

    def tiled_encode(self, x: Tensor) -> Tensor:
        """Frames [B, 3, T, H, W] to moments [B, 2*C, t, h, w] by blend tiling, whatever `use_tiling` says."""
        check_frames(x, self.config)
        return self._cut(self.config.spatial_compression_ratio, 1, tiled=True).run(self._encode_clips, x)

    def tiled_decode(self, z: Tensor, return_dict: bool = True) -> DecoderOutput | tuple[Tensor]:
        """Latents [B, C, t, h, w] to frames by blend tiling, whatever `use_tiling` says."""
        check_latents(z, self.config)
        frames = self._cut(1, self.config.spatial_compression_ratio, tiled=True).run(self._decode_clips, z)
        return DecoderOutput(sample=frames) if return_dict else (frames,)

    def _cut_frames(self, x: Tensor) -> Cut:
        larger = x.shape[3] > self.tile_sample_min_height or x.shape[4] > self.tile_sample_min_width
        return self._cut(self.config.spatial_compression_ratio, 1, tiled=self.use_tiling and larger)

    def _cut_latents(self, z: Tensor) -> Cut:
        larger = z.shape[3] > self.tile_latent_min_height or z.shape[4] > self.tile_latent_min_width
        return self._cut(1, self.config.spatial_compression_ratio, tiled=self.use_tiling and larger)

    def _cut(self, in_scale: int, out_scale: int, *, tiled: bool) -> Cut:
        # Read at every call: users also set these attributes one by one.
        return Cut(self.use_slicing, self._tile_axes() if tiled else None, in_scale, out_scale)

    def _tile_axes(self) -> tuple[TileAxis, TileAxis]:
        scale = self.config.spatial_compression_ratio
        sample, latent = self.tile_sample_min_height, self.tile_latent_min_height
        height = tile_axis("height", sample, latent, self.tile_overlap_factor_height, scale)
        sample, latent = self.tile_sample_min_width, self.tile_latent_min_width
        width = tile_axis("width", sample, latent, self.tile_overlap_factor_width, scale)
        return height, width

    def _encode_clips(self, x: Tensor) -> Tensor:
        return run_in_chunks(self._encoding_loop(), x, self.num_sample_frames_batch_size)

    def _decode_clips(self, z: Tensor) -> Tensor:
        return run_in_chunks(self._decoding_loop(), z, self.num_latent_frames_batch_size)

    # The exact engine where it applies. The modules themselves are the reference path, which it is checked against.

    def _encoding_loop(self) -> ChunkFunction:
        return self._loop(exact.encoding_loop, self.encoder, self.quant_conv, self._encode_chunk, first=self.encoder)

    def _decoding_loop(self) -> ChunkFunction:
        first = self.decoder if self.post_quant_conv is None else self.post_quant_conv
        return self._loop(exact.decoding_loop, self.decoder, self.post_quant_conv, self._decode_chunk, first=first)

    def _loop(
        self,
        engine: Callable[..., ChunkFunction],
        network: nn.Module,
        quant_conv: nn.Module | None,
        by_modules: Callable[[Tensor, Tails], tuple[Tensor, Tails]],
        *,
        first: nn.Module,
    ) -> ChunkFunction:
        """Of a half of the model, whose `first` module sees the chunks."""
        limits = dataclasses.replace(self._limits, triton=self.use_triton)

        def start(x: Tensor, is_last: bool) -> ChunkFunction:
            obstacle = exact.find_obstacle(network, quant_conv, cast(x, network))
            if obstacle is None:
                return engine(network, quant_conv, x, is_last, limits)
            exact.report_obstacle(obstacle, limits)
            return FrameLoop(by_modules, Tails())

        return cast_chunks(LateLoop(start), first)

    def _encode_chunk(self, x: Tensor, tails: Tails) -> tuple[Tensor, Tails]:
        moments, tails = self.encoder(x, tails)
        return (moments if self.quant_conv is None else self.quant_conv(cast(moments, self.quant_conv))), tails

    def _decode_chunk(self, z: Tensor, tails: Tails) -> tuple[Tensor, Tails]:
        if self.post_quant_conv is not None:
            z = cast(self.post_quant_conv(z), self.decoder)
        frames, tails = self.decoder(z, tails)
        return frames, tails

    @staticmethod
    def _chunks(
        given: Tensor | Iterable[Tensor], num_frames: int | None, chunk_frames: int, check: Callable[[Tensor], None]
    ) -> Iterator[tuple[Tensor, bool]]:
        if isinstance(given, Tensor):
            check(given)
            num_frames, given = given.shape[2] if num_frames is None else num_frames, [given]
        return split_in_chunks(check_pieces(given, check), chunk_frames, num_frames)
