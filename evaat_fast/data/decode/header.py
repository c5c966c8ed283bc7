"""What a file says of itself before any frame is decoded, and when each of its frames is shown: the same for every decoder.

Time 0 is where the file's presentation begins: with its first stream, after edit lists. A frame is on screen from its time
stamp until that of the next; before the first there is the first.
"""

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from evaat_fast.data.decode.errors import VideoError, reason

# One packet, one frame, with its time stamp. Others have packets that show nothing (VP8) or two frames (MPEG-4 in AVI).
EXACT = frozenset({"h264", "hevc", "vp9", "av1"})
UPRIGHT = (1, 0, 0, 1)
SLACK = 2  # frames that a last one may stand, where the file does not say how long
_MOST = 200_000  # boxes of a file; damaged ones have more
_PATIENCE = 60  # seconds
_FAST = 1000.0  # frames per second: a rate above it is a time base that was taken for one


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
    """An open container with the numbers that turn seconds into time stamps; `close` it."""

    def __init__(self, path: Path):
        import av

        self.path = path
        try:
            # "file:": a name with a colon is no protocol. Tags in another encoding are no reason to refuse a video. A demuxer
            # that turns in circles on damaged bytes is stopped.
            self.container: Any = av.open(f"file:{path}", metadata_errors="replace", timeout=_PATIENCE)
        except Exception as error:  # FFmpegError, OSError, or UnicodeDecodeError
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
        self.base: Fraction = stream.time_base
        begin = stream.start_time or 0
        first = Fraction(container.start_time, 1_000_000) if container.start_time is not None else begin * self.base
        # Rounded to microseconds; and a start after the video's own would be another mistake.
        apart = begin * self.base - first
        self.zero: int = begin if apart < Fraction(1, 500) else round(first / self.base)
        rates = [float(r) for r in (stream.average_rate, stream.guessed_rate) if r]
        self.fps: float = next((r for r in rates if 0 < r <= _FAST), 0.0)
        if not self.fps:
            raise VideoError(f"{self.path}: no frame rate")
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
        self.__init__(self.path)  # type: ignore[misc]

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

    def close(self) -> None:
        self.container.close()


def rotation_of(matrix: tuple[int, int, int, int]) -> int:
    """Degrees counter-clockwise, mirrors left out."""
    return {(1, 0): 0, (0, -1): 90, (-1, 0): 180, (0, 1): 270}.get(matrix[:2], 0)


def turned(frame: np.ndarray, matrix: tuple[int, int, int, int]) -> np.ndarray:
    """A frame [H, W, 3] as displayed; a view."""
    a, b, c, d = matrix
    across, down = (c, b) if a == 0 else (a, d)
    frame = frame.transpose(1, 0, 2) if a == 0 else frame
    return frame[:: -1 if down < 0 else 1, :: -1 if across < 0 else 1]


def right_angles(nine: Sequence[float]) -> tuple[int, int, int, int]:
    """A display matrix of nine fixed-point numbers as signs; one that is not of right angles is left out."""
    a, b, c, d = (int(np.sign(nine[i])) for i in (0, 1, 3, 4))
    return (a, b, c, d) if abs(a * d - b * c) == 1 and a * b == 0 else UPRIGHT


def track_matrix(path: Path) -> tuple[int, int, int, int]:
    """The display matrix of an mp4's (first, if there are several) video track, from its boxes."""
    try:
        with open(path, "rb") as file:
            size = path.stat().st_size
            moov = next((body for name, body in _boxes(file, 0, size) if name == b"moov"), None)
            for name, trak in _boxes(file, *moov) if moov else ():
                if name != b"trak":
                    continue
                inside = dict(_boxes(file, *trak))
                handler = dict(_boxes(file, *inside[b"mdia"])).get(b"hdlr") if b"mdia" in inside else None
                if handler is None or b"tkhd" not in inside or _bytes(file, handler)[8:12] != b"vide":
                    continue
                head = _bytes(file, inside[b"tkhd"])
                at = 52 if head[0] == 1 else 40
                return right_angles(struct.unpack(">9i", head[at : at + 36]))
    except (OSError, struct.error, IndexError, ValueError):  # what is wrong with it, its decoder says better
        pass
    return UPRIGHT


def missing_bytes(path: Path) -> int:
    """By how many bytes the last box of an mp4 is longer than the file."""
    with open(path, "rb") as file:
        size = path.stat().st_size
        return max([0, *(end - size for _, (_, end) in _boxes(file, 0, size))])


def _boxes(file, at, end):
    """(name, (first byte of the body, end)) of each box of a range; the last one may end beyond it."""
    for _ in range(_MOST):
        if at + 8 > end:
            return
        file.seek(at)
        head = file.read(16)
        size, name = struct.unpack(">I4s", head[:8])
        body = at + 8
        if size == 1:
            size, body = struct.unpack(">Q", head[8:16])[0], at + 16
        size = end - at if size == 0 else size
        if size < body - at:
            return
        yield name, (body, at + size)
        at += size


def _bytes(file, span):
    file.seek(span[0])
    return file.read(min(span[1] - span[0], 4096))


def _is_mp4(names):
    return "mp4" in names.split(",")


def _clock(text):
    """Seconds of "00:00:03.333000000", Matroska's; None of anything else."""
    try:
        hours, minutes, seconds = text.split(":")
        return 3600 * int(hours) + 60 * int(minutes) + float(seconds)
    except ValueError:
        return None
