"""What a file says of itself before any frame is decoded, and when each of its frames is shown: the same for every decoder.

Time 0 is where the file's presentation begins: with its first stream, after edit lists. A frame is on screen from its time
stamp until that of the next; before the first there is the first.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from evaat_fast.data.decode import members
from evaat_fast.data.decode.errors import VideoError, reason
from evaat_fast.data.decode.mp4 import UPRIGHT, missing_bytes, rotation_of, track_matrix
from evaat_fast.data.decode.sums import Sums

# One packet, one frame, with its time stamp. Others have packets that show nothing (VP8) or two frames (MPEG-4 in AVI).
EXACT = frozenset({"h264", "hevc", "vp9", "av1"})
SLACK = 2  # frames that a last one may stand, where the file does not say how long
_PATIENCE = 60  # seconds
_FAST = 1000  # frames per second: a rate above it is a time base that was taken for one


@dataclass(frozen=True)
class VideoInfo:
    """A video file, from its headers.

    duration: seconds to the end of its last frame, None where the file does not say. fps: frames per second on average.
    width, height: as displayed. rotation: degrees, counter-clockwise, of what is stored to what is displayed. matrix: the
    same as (a, b, c, d) of x' = a x + c y, y' = b x + d y, with mirrors. codec: FFmpeg's name. container: FFmpeg's names.
    frames: how many the file says it has, 0 where it does not. missing_bytes: by how many an mp4 was cut short.
    """

    path: Path
    duration: float | None
    fps: float
    width: int
    height: int
    rotation: int
    matrix: tuple[int, int, int, int]
    codec: str
    container: str
    frames: int
    missing_bytes: int


@dataclass(frozen=True)
class Shown:
    """When frames are shown.

    stamps: int64, of all shown frames, in order. end: of the last of them. hidden: whether others are not shown. opened:
    whether frames that are stored after a key frame are shown before it.
    """

    stamps: np.ndarray
    end: int
    hidden: bool
    opened: bool


class Header:
    """An open container with the numbers that turn seconds into time stamps; `close` it. sums: what its bytes are held to."""

    def __init__(self, path: Path, sums: Sums | None = None):
        import av

        self.path, self._sums = path, sums
        self._checked = None if sums is None else sums.open(path)
        try:
            # "file:": a name with a colon is no protocol. Tags in another encoding are no reason to refuse a video: from
            # version 19 on PyAV keeps their bytes as surrogates. A demuxer that turns in circles on damaged bytes is stopped.
            how: dict[str, Any] = {"timeout": _PATIENCE}
            if hasattr(av.container.InputContainer, "metadata_errors"):
                how["metadata_errors"] = "replace"
            self.container: Any = av.open(_url(path) if self._checked is None else self._checked, **how)
        except VideoError:
            self._let_go()
            raise
        except Exception as error:  # FFmpegError, OSError, or UnicodeDecodeError
            self._let_go()
            raise VideoError(f"{path}: {reason(path, error)}") from error
        try:
            self._read()
        except VideoError:
            self.close()
            raise
        except Exception as error:
            self.close()
            raise VideoError(f"{path}: {reason(path, error)}") from error

    def _read(self):
        container = self.container
        stream = container.streams.best("video")
        if stream is None or stream.codec_context is None:
            what = "no video stream" if stream is None else "a video stream that no decoder here reads"
            raise VideoError(f"{self.path}: {what}")
        self.stream: Any = stream
        self.codec: str = stream.codec_context.codec.name
        self.canonical: str = stream.codec_context.codec.canonical_name
        self.format: str = container.format.name
        self.ordered = "avi" not in self.format.split(",")  # AVI's time stamps are those of packets as stored, not as shown
        base = rational(stream.time_base)
        if base is None:
            raise VideoError(f"{self.path}: no time base")
        self.base: Fraction = base
        begin = stream.start_time or 0
        first = Fraction(container.start_time, 1_000_000) if container.start_time is not None else begin * self.base
        # Rounded to microseconds; and a start after the video's own would be another mistake.
        apart = begin * self.base - first
        self.zero: int = begin if apart < Fraction(1, 500) else round(first / self.base)
        rates = (rational(r) for r in (stream.average_rate, stream.guessed_rate))
        rate = next((r for r in rates if r is not None and 0 < r <= _FAST), None)
        if rate is None:
            raise VideoError(f"{self.path}: no frame rate")
        self.rate: Fraction = rate
        self.fps: float = float(rate)
        self.own_duration = True  # the video's, not the longest stream's
        self.others_end = 0.0
        self.duration: float | None = None
        if stream.duration:
            self.duration = float((stream.duration + begin - self.zero) * self.base)
        elif tag := _clock(stream.metadata.get("DURATION", "")):
            self.duration = tag - float(first)
        elif container.duration:
            self.duration, self.own_duration = container.duration / 1e6, len(container.streams) == 1
        self.missing_bytes: int = missing_bytes(self.path) if _is_mp4(self.format) else 0

    def reopen(self) -> None:
        """From the beginning, for a container in which one cannot seek."""
        self.close()
        self.__init__(self.path, self._sums)  # type: ignore[misc]

    def info(self) -> VideoInfo:
        context, matrix = self.stream.codec_context, self.matrix()
        width, height = (context.height, context.width) if matrix[0] == 0 else (context.width, context.height)
        if not (width > 0 and height > 0):
            raise VideoError(f"{self.path}: frames of {width} x {height} pixels")
        return VideoInfo(
            self.path,
            self.duration,
            self.fps,
            width,
            height,
            rotation_of(matrix),
            matrix,
            self.canonical,
            self.format,
            self.stream.frames,
            self.missing_bytes,
        )

    def matrix(self) -> tuple[int, int, int, int]:
        """How the stored picture is turned for display."""
        return track_matrix(self.path) if _is_mp4(self.format) else UPRIGHT

    def ticks(self, seconds: float) -> int:
        """The time stamp of a time; of one that is a frame's own, that frame's."""
        return self.zero + int(np.floor(seconds / float(self.base) + 1e-4))

    def seconds(self, ticks: int) -> float:
        return float((ticks - self.zero) * self.base)

    def checked_end(self, end: float) -> float:
        """Where the last frame ends, by its packet; VideoError if the header knows of more."""
        if self.missing_bytes:
            raise VideoError(f"{self.path}: cut short: {self.missing_bytes} bytes are missing, its data end at {end:.2f} s")
        # A duration of the longest stream is held against the longest one.
        last = end if self.own_duration else max(end, self.others_end)
        if self.duration is not None and last < self.duration - max(0.1, SLACK / self.fps):
            raise VideoError(
                f"{self.path}: ends at {last:.2f} s where its header says {self.duration:.2f} s: was it cut short?"
            )
        return end

    def packets(self) -> Iterator[Any]:
        """The video's packets from here on; notes on the way where those of other streams end."""
        alone = self.own_duration
        for packet in self.container.demux(self.stream) if alone else self.container.demux():
            if packet.stream_index == self.stream.index:
                yield packet
            elif packet.pts is not None:
                end = float((packet.pts + (packet.duration or 0)) * packet.time_base - self.zero * self.base)
                self.others_end = max(self.others_end, end)

    def check_last(self, target: int, end: int) -> None:
        """VideoError for what is asked for after the end of the last frame, and for the last packets of a file cut short."""
        until = self.checked_end(self.seconds(end))
        if self.seconds(target) > until + SLACK / self.fps:
            raise VideoError(f"{self.path}: no frame at {self.seconds(target):.2f} s: it ends at {until:.2f} s")

    def shown(self) -> Shown:
        """When each frame is shown, from the packets of the whole file."""
        stamps, end, hidden, key, opened = [], 0, False, None, False
        try:
            for packet in self.packets():
                if packet.size == 0:
                    continue
                if packet.pts is None or not self.ordered:
                    raise VideoError(f"{self.path}: frames without time stamps of their own; use the decoder 'av'")
                key = packet.pts if packet.is_keyframe else key
                opened = opened or (key is not None and packet.pts < key)
                if packet.is_discard:
                    hidden = True
                else:
                    stamps.append(packet.pts)
                    end = max(end, packet.pts + (packet.duration or round(1 / (self.fps * self.base))))
        except VideoError:
            raise
        except Exception as error:
            raise VideoError(f"{self.path}: {reason(self.path, error)}") from error
        if not stamps:
            raise VideoError(f"{self.path}: no frames")
        return Shown(np.sort(np.array(stamps, np.int64)), end, hidden, opened)

    def check_bytes(self) -> None:
        """VideoError where a byte that was read is not what its checksums say, though the demuxer went on."""
        if self._checked is not None and self._checked.failed:
            raise VideoError(self._checked.failed)

    def close(self) -> None:
        self.container.close()
        self._let_go()

    def _let_go(self):
        if self._checked is not None:
            self._checked.close()


def rational(value: Any) -> Fraction | None:
    """A rational of PyAV's: to version 18 that is a Fraction or None, from 19 on an AVRational. None where it is not set."""
    return Fraction(value.numerator, value.denominator) if value else None


def _url(path):
    found = members.place(path)
    if found is None or found[0] == path:
        return f"file:{path}"
    file, first, size = found
    return f"subfile,,start,{first},end,{first + size},,:file:{file}"


def _is_mp4(names):
    return "mp4" in names.split(",")


def _clock(text):
    """Seconds of "00:00:03.333000000", Matroska's; None of anything else."""
    try:
        hours, minutes, seconds = text.split(":")
        return 3600 * int(hours) + 60 * int(minutes) + float(seconds)
    except ValueError:
        return None
