"""The convolutions of the VAE: causal in time, and the two that change resolution.

Shape legend: B batch, C channels, T frames of the chunk, P past frames, H/W pixels or latent cells.
"""

from collections.abc import Mapping
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# cuDNN's conv3d is trusted below 2^31 elements only; half of it leaves room for its workspace.
MAX_CONV_ELEMENTS = 2**30


class Tails:
    """What the causal convolutions saw last: the state between two chunks of one clip. Immutable.

    A network takes the tails of the chunk before and returns those of its own. Nothing is kept on the
    modules, so threads, streams, deepcopy and gradient checkpointing cannot see each other's clips.
    """

    def __init__(self, frames: Mapping["CausalConv3d", Tensor] = MappingProxyType({}), last_chunk: bool = False) -> None:
        self._frames = frames
        self._last_chunk = last_chunk

    def for_last_chunk(self) -> "Tails":
        """The same past, for a chunk that no other follows: its own tails are not kept."""
        return Tails(self._frames, last_chunk=True)

    def of(self, conv: "CausalConv3d") -> Tensor | None:
        """The P frames [B, C, P, H, W] before this chunk, or None at the clip's start."""
        return self._frames.get(conv)

    def after(self, conv: "CausalConv3d", frames_BCPHW: Tensor) -> "Tails":
        """These tails with what `conv` saw last in this chunk."""
        if self._last_chunk:
            return self
        # A view would keep the whole padded chunk alive.
        return Tails({**self._frames, conv: frames_BCPHW.clone()})


class CausalConv3d(nn.Module):
    """Conv3d that sees the present and the past, never the future.

    Time is padded on the left only: by the previous chunk's tail, or at the clip's start by copies of
    frame 0. Height and width are padded with zeros and keep their size.

    Source: CogVideoX, arXiv:2408.06072, section 2.1; matches diffusers' CogVideoXCausalConv3d.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int) -> None:
        super().__init__()
        self.past_frames = kernel_size - 1
        padding = (0, kernel_size // 2, kernel_size // 2)
        self.conv = nn.Conv3d(in_channels, out_channels, kernel_size, padding=padding)

    def forward(self, x_BCTHW: Tensor, tails: Tails) -> tuple[Tensor, Tails]:
        past = self.past_frames
        if past == 0:
            return convolve(self.conv, x_BCTHW), tails
        past_BCPHW = tails.of(self)
        if past_BCPHW is None:
            past_BCPHW = x_BCTHW[:, :, :1].expand(-1, -1, past, -1, -1)
        padded = torch.cat([past_BCPHW, x_BCTHW], dim=2)
        return convolve(self.conv, padded), tails.after(self, padded[:, :, -past:])


def convolve(conv: nn.Conv3d, x_BCTHW: Tensor) -> Tensor:
    """`conv(x)`, a few frames at a time where the whole would exceed what one kernel call can take."""
    overlap = conv.kernel_size[0] - 1
    frames = x_BCTHW.shape[2]
    fit = MAX_CONV_ELEMENTS // max(1, x_BCTHW[:, :, 0].numel())
    if frames <= fit:
        return conv(x_BCTHW)  # type: ignore[no-any-return]
    step = max(1, fit - overlap)
    pieces = [x_BCTHW[:, :, t : t + step + overlap] for t in range(0, frames - overlap, step)]
    return torch.cat([conv(piece) for piece in pieces], dim=2)


def resize_nearest(x_BCTHW: Tensor, num_frames: int, height: int, width: int) -> Tensor:
    """Repeats frames and cells up to the given size, each a whole multiple of the present one.

    Where the frame count grows to an odd number, frame 0 stands alone and the rest are repeated.
    """
    if x_BCTHW.shape[2:] == (num_frames, height, width):
        return x_BCTHW
    if num_frames != x_BCTHW.shape[2] and num_frames % 2 == 1:
        first = F.interpolate(x_BCTHW[:, :, :1], size=(1, height, width))
        rest = F.interpolate(x_BCTHW[:, :, 1:], size=(num_frames - 1, height, width))
        return torch.cat([first, rest], dim=2)
    return F.interpolate(x_BCTHW, size=(num_frames, height, width))


class Downsample(nn.Module):
    """Halves height and width with a strided convolution, and the frame count by pair averages if asked.

    Frame 0 of an odd chunk stands alone; odd heights and widths round down.

    Source: matches diffusers' CogVideoXDownsample3D.
    """

    def __init__(self, channels: int, compress_time: bool) -> None:
        super().__init__()
        self.compress_time = compress_time
        self.conv = nn.Conv2d(channels, channels, kernel_size=3, stride=2)

    def forward(self, x_BCTHW: Tensor) -> Tensor:
        if self.compress_time:
            alone = x_BCTHW.shape[2] % 2
            pairs = torch.unflatten(x_BCTHW[:, :, alone:], 2, (-1, 2))
            x_BCTHW = torch.cat([x_BCTHW[:, :, :alone], pairs.mean(dim=3)], dim=2)
        return convolve_frames(self.conv, F.pad(x_BCTHW, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Doubles height and width by repetition and a convolution, and the frame count by repetition if asked.

    Source: matches diffusers' CogVideoXUpsample3D.
    """

    def __init__(self, channels: int, compress_time: bool) -> None:
        super().__init__()
        self.compress_time = compress_time
        self.conv = nn.Conv2d(channels, channels, kernel_size=3, padding=1)

    def forward(self, x_BCTHW: Tensor) -> Tensor:
        frames, height, width = x_BCTHW.shape[2:]
        if self.compress_time and frames > 1:
            frames = 2 * frames - frames % 2
        return convolve_frames(self.conv, resize_nearest(x_BCTHW, frames, 2 * height, 2 * width))


def convolve_frames(conv: nn.Conv2d, x_BCTHW: Tensor) -> Tensor:
    """Applies a 2D convolution to every frame."""
    batch = x_BCTHW.shape[0]
    y: Tensor = conv(x_BCTHW.transpose(1, 2).flatten(0, 1))
    return torch.unflatten(y, 0, (batch, -1)).transpose(1, 2)
