"""Reading a video's frames in order, packet by packet, past whatever is damaged.

Every frame comes with its time since the first presentation time, as an exact fraction of a second, and with word on
whether it can be trusted: after a packet that did not decode, frames lean on a picture that is missing, up to the next
key frame.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import chain

import av
from av.error import FFmpegError
from av.filter import Graph
from av.packet import Packet
from av.video.stream import VideoStream

from pipeline.picture import filter_graph
from pipeline.video_file import VideoFile, describe, fraction_of, raise_if_transient

_log = logging.getLogger(__name__)

_FALLBACK_RATE = Fraction(25)
_MAX_FAILED_READS = 20
"""Failed reads in a row after which the rest of the file is given up."""
_MAX_ERROR_SHARE = Fraction(1, 10)


@dataclass(frozen=True, slots=True)
class TimedFrame:
    """A decoded frame and when it is shown."""

    frame: av.VideoFrame
    time_s: Fraction
    """Since the first presentation time of the video."""
    duration_s: Fraction
    is_intact: bool


class FrameReader:
    """One pass over the frames of a video, in order of presentation and strictly forward in time."""

    def __init__(self, video: VideoFile) -> None:
        self.damage_s: list[Fraction] = []
        """Times of packets that did not decode."""
        self.end_s = Fraction(0)
        """End of the last frame read so far."""
        self.period_s = 1 / (video.frame_rate or _FALLBACK_RATE)
        """Usual time from frame to frame."""
        self._video = video
        self._stream: VideoStream = video.stream
        self._num_packets = 0
        self._packets_end_s = Fraction(0)
        self._num_frames = 0
        self._num_backward = 0
        self._origin_s: Fraction | None = None
        self._uses_dts = video.has_decoding_times_only
        self._last_s: Fraction | None = None
        self._damaged_since_s: Fraction | None = None
        self._last_error = ""

    def __iter__(self) -> Iterator[TimedFrame]:
        return deinterlaced(self._frames())

    def skip_to(self, start_s: Fraction) -> Iterator[TimedFrame]:
        """The frames from the one shown at ``start_s`` or from some frame before it, after at least one frame was read.

        A seek is trusted only by where it lands: after a frame that comes too late, it is tried again from further ahead.
        """
        ahead_s = Fraction(1)
        while True:
            goal_s = max(start_s - ahead_s, Fraction(0))
            self._seek(goal_s)
            frames = iter(self)
            landing = next(frames, None)
            if landing is not None and landing.time_s <= start_s:
                return chain([landing], frames)
            if goal_s == 0:
                return iter(())
            ahead_s *= 4

    def _seek(self, goal_s: Fraction) -> None:
        assert self._origin_s is not None
        assert self._stream.time_base is not None
        ticks = math.floor((self._origin_s + goal_s) / fraction_of(self._stream.time_base))
        with contextlib.suppress(FFmpegError):  # then the position is what it was, and the landing tells
            self._video.container.seek(ticks, stream=self._stream)
        self._last_s = self._damaged_since_s = None

    def check(self) -> None:
        """Judge the file as a whole, after as much of it as was read.

        Raises:
            TerminalError: nothing could be decoded, or too much could not.
        """
        if self._num_frames == 0:
            raise self._video.reject(*self._nothing())
        errors = len(self.damage_s)
        if errors > 1 and errors > self._num_packets * _MAX_ERROR_SHARE:
            raise self._video.reject("corrupt", f"{errors} of {self._num_packets} packets cannot be decoded ({self._last_error})")
        if self._num_backward > 1 and self._num_backward > self._num_frames * _MAX_ERROR_SHARE:
            raise self._video.reject("bad_timestamps", f"{self._num_backward} of {self._num_frames} frames go back in time")

    def _nothing(self) -> tuple[str, str]:
        if self._stream.width == 0:
            # VP9, FFV1 and GIF tell their size only by decoding, which max_pixels forbade.
            allowed = self._video.limits.max_pixels
            return "too_large", f"its picture has more than decode.max_pixels ({allowed}), or its first frame is damaged"
        return "undecodable", f"not one frame could be decoded ({self._last_error or 'no packets'})"

    def is_damaged(self, start_s: Fraction, end_s: Fraction) -> bool:
        """Whether a packet was lost in this span of time or a frame beside it."""
        # With several threads an error is reported so many packets late.
        late_s = self.period_s * self._video.limits.threads
        return any(start_s - self.period_s <= time_s <= end_s + late_s for time_s in self.damage_s)

    def measure(self) -> tuple[Fraction, Fraction]:
        """Read all packets that are left. Returns the video's length in seconds and its frames a second."""
        for _ in self._packets():
            pass
        length_s = max(self._packets_end_s - (self._origin_s or Fraction(0)), self.end_s)
        return length_s, max(1, self._num_packets) / length_s

    def _frames(self) -> Iterator[TimedFrame]:
        for packet in self._packets():
            try:
                frames = packet.decode()
            except FFmpegError as error:
                self._note_damage(error, packet)
                continue
            for frame in frames:
                timed = self._timed(frame)
                if timed is not None:
                    yield timed

    def _packets(self) -> Iterator[Packet[VideoStream]]:
        demuxer = self._video.container.demux(self._stream)
        failed_reads = 0
        while failed_reads < _MAX_FAILED_READS:
            try:
                packet = next(demuxer)
            except StopIteration:
                return
            except FFmpegError as error:
                self._note_damage(error, None)
                failed_reads += 1
                demuxer = self._video.container.demux(self._stream)  # a generator that raised is finished
                continue
            failed_reads = 0
            self._count(packet)
            if packet.has_sidedata("encryption_info"):
                raise self._video.reject("encrypted", "its samples are encrypted")
            yield packet

    def _count(self, packet: Packet[VideoStream]) -> None:
        ticks = packet.pts if packet.pts is not None else packet.dts
        self._num_packets += packet.size > 0
        if ticks is not None:
            tick_s = fraction_of(packet.time_base)
            length_s = packet.duration * tick_s if packet.duration else self.period_s
            self._packets_end_s = max(self._packets_end_s, ticks * tick_s + length_s)

    def _note_damage(self, error: FFmpegError, packet: Packet[VideoStream] | None) -> None:
        if isinstance(error, MemoryError):
            raise error
        raise_if_transient(error, self._video.path, self._video.name)
        self._last_error = describe(error)
        if self._origin_s is None:
            time_s = -self.period_s  # nothing was decoded yet: the beginning is damaged
        elif packet is None or packet.pts is None or self._uses_dts:
            time_s = (self._last_s or Fraction(0)) + self.period_s
        else:
            time_s = packet.pts * fraction_of(packet.time_base) - self._origin_s
        self.damage_s.append(time_s)
        self._damaged_since_s = time_s
        _log.debug("packet lost video=%s time_s=%.3f error=%s", self._video.name, float(time_s), self._last_error)

    def _timed(self, frame: av.VideoFrame) -> TimedFrame | None:
        """The frame with its time; None for one that is not later than the frame before."""
        self._num_frames += 1
        time_s = self._time_of(frame)
        if self._last_s is not None and time_s <= self._last_s:
            self._num_backward += 1
            return None
        if self._damaged_since_s is not None and frame.key_frame and time_s > self._damaged_since_s:
            self._damaged_since_s = None
        duration_s = frame.duration * fraction_of(frame.time_base) if frame.duration and frame.time_base else self.period_s
        self._last_s = time_s
        self.end_s = time_s + duration_s
        return TimedFrame(frame, time_s, duration_s, not frame.is_corrupt and self._damaged_since_s is None)

    def _time_of(self, frame: av.VideoFrame) -> Fraction:
        if self._origin_s is None and frame.pts is None:
            self._uses_dts = True
        ticks = frame.dts if self._uses_dts else frame.pts
        if ticks is None or frame.time_base is None:
            self._origin_s = self._origin_s or Fraction(0)
            return Fraction(0) if self._last_s is None else self._last_s + self.period_s
        absolute_s = ticks * fraction_of(frame.time_base)
        if self._origin_s is None:
            self._origin_s = absolute_s
        return absolute_s - self._origin_s


def deinterlaced(frames: Iterator[TimedFrame]) -> Iterator[TimedFrame]:
    """Replace interlaced frames by whole pictures of the same time (bwdif, one frame out for one in).

    Progressive video passes untouched and at no cost. Once a frame is interlaced, all later frames go through the
    filter, which itself leaves the progressive ones alone.
    """
    graph: Graph | None = None
    size = (0, 0)
    waiting: deque[TimedFrame] = deque()
    for timed in frames:
        frame = timed.frame
        if graph is not None and size != (frame.width, frame.height):
            yield from _pull(graph, waiting, last=True)
            graph = None
        if graph is None and frame.interlaced_frame:
            graph, size = filter_graph(frame, "bwdif", "mode=send_frame:deint=interlaced"), (frame.width, frame.height)
        if graph is None:
            yield timed
            continue
        waiting.append(timed)
        graph.vpush(frame)
        yield from _pull(graph, waiting)
    if graph is not None:
        yield from _pull(graph, waiting, last=True)


def _pull(graph: Graph, waiting: deque[TimedFrame], *, last: bool = False) -> Iterator[TimedFrame]:
    if last:
        graph.vpush(None)
    while waiting:
        try:
            frame = graph.vpull()
        except (BlockingIOError, EOFError):
            return
        yield replace(waiting.popleft(), frame=frame)
