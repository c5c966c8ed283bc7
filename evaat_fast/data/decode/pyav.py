"""PyAV: packets are read first, so that only what the wanted frames are made of is decoded, and only they are converted."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from evaat_fast.data.decode.errors import VideoError, reason
from evaat_fast.data.decode.header import EXACT, Header
from evaat_fast.data.decode.mp4 import UPRIGHT, right_angles, turned
from evaat_fast.data.decode.sums import Sums

_FAR = 1.0  # seconds from which a seek is cheaper than reading the packets between
_END = 2**62


class Shown(NamedTuple):
    """A frame of a file. time: seconds. picture: uint8 [h, w, 3]: luminance and two colours, as stored. whole: whether nothing
    that it may be made of was damaged. frame: PyAV's."""

    time: float
    picture: np.ndarray
    whole: bool
    frame: Any

    @property
    def bytes(self) -> int:
        return sum(plane.buffer_size for plane in self.frame.planes)


class AvReader:
    """Frames of a file by time; see `decode.Reader`.

    change: what to make of each frame, uint8 [H, W, 3], as soon as it is decoded: a smaller one, where many are read at once.
    sums: checksums that all bytes read are held to.
    """

    def __init__(self, path: Path, change: Callable[[np.ndarray], np.ndarray] | None = None, sums: Sums | None = None):
        self._head = Header(path, sums)
        self.path, self.fps, self._change = path, self._head.fps, change
        self._turn: tuple[int, int, int, int] | None = None
        self._step = round(1 / (self.fps * self._head.base))  # of a frame without a duration of its own
        self.lost: list[float] = []  # seconds of what `frames` left out
        self._seeks = True
        self._open()

    def _open(self):
        from av.video.reformatter import VideoReformatter

        self._reformatter = VideoReformatter()
        context = self._head.stream.codec_context
        context.thread_count = 1  # data loaders bring their own processes
        context.options = {"err_detect": "explode"}  # a damaged slice is an error, not a picture that looks like one
        self._context: Any = context
        self._packets: Iterator[Any] = iter(())
        self._pushed: Any = None  # a packet that was looked at
        self._group: list[Any] = []  # packets from a key frame on, in decoding order
        self._read_to = -_END  # the decoding time up to which packets were read
        self._from_start = False
        self._first_key: int | None = None  # the time stamp of the first key frame, once it was seen
        self._keyless = _END  # of frames before the first key frame, which should be none, the first time stamp
        self._placed = False

    @property
    def likely_end(self) -> float | None:
        """Seconds, by the headers; None where they say nothing of the video alone."""
        return self._head.duration if self._head.own_duration else None

    @cached_property
    def end(self) -> float:
        """Seconds: where the last frame ends, from the last packets; VideoError for a file cut short."""
        head = self._head
        try:
            end = self._last_packets()
        except VideoError:
            raise
        except Exception as error:
            raise VideoError(f"{self.path}: {reason(self.path, error)}") from error
        head.check_bytes()
        return head.checked_end(end)

    def read(self, times: Sequence[float]) -> np.ndarray:
        """uint8 [len(times), H, W, 3], or what `change` makes of it."""
        head = self._head
        wanted = [head.ticks(t) for t in times]
        try:
            exact = head.ordered and head.canonical in EXACT
            found = (self._by_packets if exact else self._by_frames)(sorted(set(wanted)))
        except VideoError:
            raise
        except Exception as error:
            raise VideoError(f"{self.path}: {reason(self.path, error)}") from error
        head.check_bytes()
        shapes = {frame.shape for frame in found.values()}
        if len(shapes) > 1:
            raise VideoError(f"{self.path}: frames of different sizes, {sorted(s[:2] for s in shapes)}")
        return np.stack([found[t] for t in wanted])

    def floor(self, time: float) -> float:
        """Seconds: the time on the grid of the file's time stamps by which `read` finds the frame that is on screen then."""
        return self._head.seconds(self._head.ticks(time))

    def close(self) -> None:
        self._packets, self._group, self._pushed = iter(()), [], None
        self._head.close()

    def frames(self, width: int, height: int) -> Iterator["Shown"]:
        """All frames that are shown, in order, without those that cannot be decoded, with a picture of this size of each. To be
        read to the end, and nothing else meanwhile but what `take` makes of them."""
        from av.error import FFmpegError

        context, head, stamps = self._context, self._head, []
        context.skip_frame = "DEFAULT"
        packet: Any = True
        latest = -1.0  # in damaged files frames come out in another order
        whole_from: int | None = -_END  # the time stamp from which on nothing is missing; None: from the next key frame on
        try:
            self._go(head.stream.start_time or 0)
            while packet is not None:
                packet = self._next()
                if packet is not None:
                    stamp = packet.pts if head.ordered else packet.dts
                    stamps += [] if head.ordered else [stamp]
                    if packet.is_keyframe and whole_from is None:
                        whole_from = stamp
                try:
                    damaged = packet is not None and packet.is_corrupt
                    frames = context.decode(packet)
                except FFmpegError:
                    del stamps[-1:]
                    damaged, frames = True, []
                if damaged:
                    whole_from = None
                    if packet is not None and stamp is not None:
                        self.lost.append(head.seconds(stamp))
                for frame in frames:
                    at = frame.pts if head.ordered else stamps.pop(0)
                    if at is None or (time := head.seconds(at)) < 0:
                        continue
                    if time <= latest:
                        self.lost.append(time)
                    else:
                        latest = time
                        whole = whole_from is not None and at >= whole_from and not frame.is_corrupt
                        yield Shown(time, self._small(frame, width, height), whole, frame)
        except VideoError:
            raise
        except Exception as error:
            raise VideoError(f"{self.path}: {reason(self.path, error)}") from error
        finally:
            self._placed = False

    def take(self, frame: "Shown") -> np.ndarray:
        """uint8 [H, W, 3], or what `change` makes of it."""
        try:
            return self._converted(frame.frame)
        except VideoError:
            raise
        except Exception as error:
            raise VideoError(f"{self.path}: {reason(self.path, error)}") from error

    def _small(self, frame, width, height):
        how: dict[str, Any] = {"format": "yuv444p", "interpolation": "AREA", "threads": 1}
        planes = self._reformatter.reformat(frame, width=width, height=height, **how).planes
        rows = (np.frombuffer(memoryview(p), np.uint8).reshape(p.height, p.line_size)[:, : p.width] for p in planes)
        return np.stack(list(rows), axis=2)

    # Codecs of one packet a frame.

    def _by_packets(self, wanted):
        """{wanted: frame}."""
        found: dict[int, np.ndarray] = {}
        runs: list[tuple[list, dict]] = []  # packets from one key frame on, and {wanted: time stamp of the frame shown then}
        for target in wanted:
            group = self._collect(target)
            if not runs or runs[-1][0][0] is not group[0]:
                if runs:
                    found |= self._decode_run(*runs.pop())
                runs.append((group, {}))
            runs[-1][1][target] = self._shown(group, target)
        return found | self._decode_run(*runs.pop())

    def _collect(self, target):
        """The packets from the last key frame shown at or before the target up to past the target."""
        group = self._group
        if not self._placed or (group and group[0].pts > target and group[0].pts != self._first_key):
            self._seek(target)
        elif self._seeks and target - self._read_to > _FAR / self._head.base:
            self._seek(target)
        group = self._group
        keys = [i for i, p in enumerate(group) if i and p.is_keyframe and p.pts <= target]
        if keys:  # of packets that an earlier target read
            group = [p for p in group[keys[-1] :] if p.pts >= group[keys[-1]].pts]
        while not group or self._read_to <= target:
            packet = self._next()
            if packet is None:
                break
            if packet.pts is None:
                raise VideoError(f"{self.path}: frames without time stamps")
            if packet.is_keyframe and (packet.pts <= target or (not group and self._from_start)):
                if not group and self._from_start:
                    self._first_key = packet.pts
                group = [packet]
            elif not group and self._from_start and not packet.is_discard:
                self._keyless = min(self._keyless, packet.pts)
            elif group and (packet.pts >= group[0].pts or packet.is_keyframe):
                # Others belong to the frames before the key frame, some of which were not decoded.
                group.append(packet)
            if packet.dts is not None:
                self._read_to = packet.dts
        if not group:
            raise VideoError(f"{self.path}: no frame at {self._head.seconds(target):.2f} s")
        self._group = group
        return group

    def _shown(self, group, target):
        """The time stamp of the frame on screen."""
        stamps = [p.pts for p in group if not p.is_discard]
        before = [s for s in stamps if s <= target]
        if before:
            last = max(before)
            if self._read_to == _END:
                # Of a file cut short the last pictures may lack some between them.
                end = max(p.pts + (p.duration or self._step) for p in group if not p.is_discard)
                self._head.check_last(target if last == max(stamps) else last, end)
            return last
        if stamps and group[0].pts == self._first_key and self._keyless >= min(stamps):
            return min(stamps)  # before the first frame there is the first
        raise VideoError(f"{self.path}: no frame at {self._head.seconds(target):.2f} s")

    def _decode_run(self, group, run):
        """{wanted: frame} of one key frame's packets."""
        from av.error import FFmpegError

        try:
            return self._decoded([], group, run)
        except FFmpegError:
            # An open group may name frames before its key frame, if only to forget them. Damage is there the second time too.
            warm_up = self._before(group)
            if not warm_up:
                raise
            return self._decoded(warm_up, group, run)

    def _decoded(self, warm_up, group, run):
        """Frames that no wanted one is made of are left out."""
        from av.error import FFmpegError

        need, context = set(run.values()), self._context
        last = max(i for i, p in enumerate(group) if p.pts in need)
        context.flush_buffers()
        context.skip_frame = "DEFAULT"
        for packet in warm_up:
            with contextlib.suppress(FFmpegError):
                context.decode(packet)
        found: dict[int, np.ndarray] = {}
        skipping = False
        for packet in group[: last + 1]:
            if packet.is_corrupt:
                raise VideoError(f"{self.path}: damaged at {self._head.seconds(packet.pts):.2f} s")
            if skipping != (packet.pts not in need):
                skipping = not skipping
                context.skip_frame = "NONREF" if skipping else "DEFAULT"
            self._take(context.decode(packet), need, found)
        self._take(context.decode(None), need, found)
        if missing := need - found.keys():
            raise VideoError(f"{self.path}: the frame at {self._head.seconds(min(missing)):.2f} s cannot be decoded")
        return {target: found[stamp] for target, stamp in run.items()}

    def _before(self, group):
        """The packets of the key frame before a group's, up to the group."""
        end = (group[0].pts, group[0].dts)
        self._seek(group[0].pts - 1)
        packets: list[Any] = []
        while (packet := self._next()) is not None and (packet.pts, packet.dts) != end:
            packets.append(packet)
        self._placed = False
        return packets if packet is not None else []

    def _take(self, frames, need, found):
        for frame in frames:
            if frame.pts in need:
                found[frame.pts] = self._converted(frame)

    # Other codecs and containers: frames in the order in which they come out.

    def _by_frames(self, wanted):
        """{wanted: frame}: decodes all frames from a key frame on."""
        found: dict[int, np.ndarray] = {}
        context, head = self._context, self._head
        context.skip_frame = "DEFAULT"
        if head.ordered:
            self._seek(wanted[0])
        else:  # how many frames a decoder leaves out after a seek, nothing says
            self._go(head.stream.start_time or 0)
            self._from_start = True
        waiting, stamps, before = list(wanted), [], None
        at = 0
        while waiting:
            packet = self._next()
            if packet is not None:
                stamps.append(packet.dts if packet.pts is None or not head.ordered else packet.pts)
            for frame in context.decode(packet):
                # In AVI the order is right and the time stamps are not: the n-th frame has the n-th packet's place.
                stamp = stamps.pop(0) if not head.ordered else frame.pts
                if stamp is None:
                    raise VideoError(f"{self.path}: frames without time stamps")
                while waiting and stamp > waiting[0]:
                    if before is None and not self._from_start:
                        raise VideoError(f"{self.path}: no frame at {head.seconds(waiting[0]):.2f} s")
                    found[waiting.pop(0)] = self._converted(frame if before is None else before)
                before, at = frame, stamp
            if packet is None:
                break
        self._placed = False
        for target in waiting:
            if before is None:
                raise VideoError(f"{self.path}: no frame at {head.seconds(target):.2f} s")
            head.check_last(target, at + self._step)
            found[target] = self._converted(before)
        return found

    # Both.

    def _converted(self, frame):
        if frame.is_corrupt:
            raise VideoError(f"{self.path}: the frame at {self._head.seconds(frame.pts):.2f} s is damaged")
        rgb = self._reformatter.reformat(frame, format="rgb24", threads=1)
        if self._turn is None:
            data = frame.side_data.get("DISPLAYMATRIX")
            self._turn = UPRIGHT if data is None else right_angles(np.frombuffer(bytes(data), np.int32).tolist())
        plane = rgb.planes[0]
        rows = np.frombuffer(memoryview(plane), np.uint8).reshape(plane.height, plane.line_size)
        pixels = rows[:, : 3 * plane.width].reshape(plane.height, plane.width, 3)
        upright = turned(pixels, self._turn)
        return upright if self._change is None else self._change(upright)

    def _next(self):
        """The next packet; None at the end."""
        packet, self._pushed = self._pushed, None
        if packet is None:
            packet = next(self._packets, None)
        if packet is None or packet.size == 0:
            self._read_to = _END
            return None
        return packet

    def _seek(self, target):
        """To a key frame shown at or before the target; containers seek by decoding time, which is earlier."""
        head, before = self._head, self._read_to
        first = head.stream.start_time or 0
        for back in (0, 1, 5, 30, None):
            place = first if back is None else max(first, target - round(back / head.base))
            self._from_start = place == first
            self._go(place)
            packet = self._pushed = self._next()
            good = packet is not None and packet.is_keyframe and packet.pts is not None and packet.pts <= target
            if good or place == first:
                break
        if packet is not None and packet.dts is not None and packet.dts < before < target:
            self._seeks = False  # there is no index: it went back, so from now on packets are read one after another

    def _go(self, place):
        from av.error import FFmpegError

        try:
            self._head.container.seek(place, stream=self._head.stream)
        except FFmpegError:  # a container without an index
            self._head.reopen()
            self._open()
            self._from_start, self._seeks = True, False
        self._packets, self._pushed, self._group = self._head.packets(), None, []
        self._read_to, self._placed = -_END, True

    def _last_packets(self):
        """Seconds."""
        head, ends = self._head, []
        for place in (None if head.duration is None else head.ticks(head.duration), head.stream.start_time or 0):
            if place is not None:
                self._go(place)
                while (packet := self._next()) is not None:
                    stamp = packet.dts if packet.pts is None or not head.ordered else packet.pts
                    if stamp is not None and not packet.is_discard:
                        ends.append(stamp + (packet.duration or self._step))
            if ends:
                break
        self._placed = False
        if not ends:
            raise VideoError(f"{self.path}: no frames")
        return head.seconds(max(ends))
