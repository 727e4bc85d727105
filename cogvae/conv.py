"""The convolutions of the VAE: causal in time, and the two that change resolution.

Shape legend: B batch, C channels, T frames of the chunk, P past frames, H/W pixels or latent cells.
"""

from collections.abc import Mapping
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Of a convolution's input and of its output. cuDNN is trusted below 2^31 only; half leaves room for its workspace.
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


def convolve(conv: nn.Module, x_BCTHW: Tensor) -> Tensor:
    """`conv(x)` in as many calls as keep the input and the output of each within MAX_CONV_ELEMENTS.

    The split is over clips, then over frames, then over rows; all give the numbers of one call. `conv` moves
    one cell at a time, pads no frames, and keeps height and width. What wraps a convolution is called once, as it is.
    """
    if not isinstance(conv, nn.Conv3d):
        return conv(x_BCTHW)  # type: ignore[no-any-return]
    batch, channels, frames, height, width = x_BCTHW.shape
    past, border = conv.kernel_size[0] - 1, conv.kernel_size[1] // 2
    largest = max(x_BCTHW.numel(), batch * conv.out_channels * (frames - past) * height * width)
    if largest <= MAX_CONV_ELEMENTS:
        return conv(x_BCTHW)  # type: ignore[no-any-return]
    if batch > 1:
        clips = torch.split(x_BCTHW, max(1, MAX_CONV_ELEMENTS * batch // largest))
        return torch.cat([convolve(conv, some) for some in clips])

    def fit(cells: int, overlap: int) -> int:
        """How many frames, or rows, of so many cells one call may give, if it reads `overlap` more."""
        read, given = MAX_CONV_ELEMENTS // (channels * cells), MAX_CONV_ELEMENTS // (conv.out_channels * cells)
        return max(1, min(read - overlap, given))

    if frames > past + 1:
        step = fit(height * width, past)
        chunks = [x_BCTHW[:, :, t : t + step + past] for t in range(0, frames - past, step)]
        return torch.cat([convolve(conv, chunk) for chunk in chunks], dim=2)
    strips = []
    step = fit(frames * width, 2 * border)
    for row in range(0, height, step):
        start = max(0, row - border)
        strip = conv(x_BCTHW[..., start : row + step + border, :])
        # The rows beside a cut were padded with zeros where the frame goes on: their neighbour has them right.
        strips.append(strip[..., row - start : row - start + step, :])
    return torch.cat(strips, dim=3)


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


def convolve_frames(conv: nn.Module, x_BCTHW: Tensor) -> Tensor:
    """Applies a 2D convolution to every frame, to no more at once than MAX_CONV_ELEMENTS allows.

    `conv` makes frames no larger than they are. What wraps a convolution gets all at once.
    """
    batch, channels, _, height, width = x_BCTHW.shape
    frames = x_BCTHW.transpose(1, 2).flatten(0, 1)
    fit = len(frames)
    if isinstance(conv, nn.Conv2d):
        fit = max(1, MAX_CONV_ELEMENTS // (max(channels, conv.out_channels) * height * width))
    y: Tensor = conv(frames) if len(frames) <= fit else torch.cat([conv(some) for some in torch.split(frames, fit)])
    return torch.unflatten(y, 0, (batch, -1)).transpose(1, 2)
