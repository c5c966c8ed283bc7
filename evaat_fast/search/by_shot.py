"""Clips that keep to their shot, from one pass over a video: cuts are found among the frames that it decodes, and those that
clips may be made of are kept until it is known where their shot ends.

A clip that begins on the grid of its shot has the frames that it would have without cuts around it: they are known beforehand.
The last clip of a shot ends with it, and where that is shows when it is over. For it every frame of the last seconds is kept
where these are small, else some of them at equal distances, of which it takes the last one at or before each of its times.
"""

import bisect
import contextlib
import heapq
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from evaat_fast.search import shots, windows
from evaat_fast.search.windows import Span

_HELD = 64 << 20  # bytes of decoded frames that are kept at equal distances
_RECENT = 96 << 20  # bytes of all those of which it is not known whether a shot begins with them; larger ones are not kept

__all__ = ["spans"]


@dataclass
class _Kept:
    """A frame. time: seconds. frame: as it was decoded, or uint8 [S, S, 3]. stays: whether it is kept after it is known whether
    a shot begins with it."""

    time: float
    frame: Any
    stays: bool


@dataclass(frozen=True)
class _Clip:
    """start, stop: seconds. frames: T of uint8 [S, S, 3], which clips share."""

    start: float
    stop: float
    frames: list[np.ndarray]


def spans(
    path: str,
    seconds: float,
    stride: float,
    frames: int,
    crop: Callable[[Tensor], Tensor],
    size: int,
    skip: int = 0,
) -> Iterator[Span]:
    """All clips of a video, decoded, `size` at a time.

    Args:
        path: a video. seconds, stride, frames: as for `windows.windows`. crop: as for `windows.decode`. skip: clips at the
            beginning that are left out.

    Raises:
        VideoError: it cannot be read, or its end makes no sense.
    """
    fps, end = windows.facts(path)
    waiting: list[_Clip] = []
    with contextlib.closing(_Shots(path, (fps, end), (seconds, stride, frames), crop)) as pieces:
        for time, clips in pieces:
            waiting += clips[max(0, skip) :]
            skip -= len(clips)
            while len(waiting) > size:  # the last clips are in the last span
                yield _span(waiting[:size], min(time / end, 0.999))
                waiting = waiting[size:]
    yield _span(waiting, 1.0)


def _span(clips, share):
    if not clips:  # of a video whose rest is another one now
        return Span(np.zeros((0, 1, 1, 3), np.uint8), np.zeros((0, 1), np.int64), np.zeros(0), np.zeros(0), share)
    number: dict[int, int] = {}
    unique: list[np.ndarray] = []
    for frame in (frame for clip in clips for frame in clip.frames):
        if number.setdefault(id(frame), len(unique)) == len(unique):
            unique.append(frame)
    where = np.array([[number[id(frame)] for frame in clip.frames] for clip in clips])
    start, stop = np.array([(clip.start, clip.stop) for clip in clips]).T
    return Span(np.stack(unique), where, start, stop, share)


class _Shots:
    """The clips of a video as it goes by."""

    def __init__(self, path, facts, clips, crop):
        from evaat_fast.data.decode.pyav import AvReader

        self.path, (self.fps, self.end), (self.seconds, self.stride, self.frames) = path, facts, clips
        self.cropped = windows.cropped(crop)
        self.reader = AvReader(Path(path), self.cropped)
        self.detector = shots.Detector(self.fps)
        self.kept: list[_Kept] = []  # in order of time
        self.newest: Any = None
        self.known = 0.0  # up to when cuts are known
        self.every: float | None = None  # seconds between those that are kept for the last clip
        self.large = False
        self._begin(0.0)

    def close(self):
        self.kept.clear()
        self.reader.close()

    def _begin(self, first):
        """Another shot, that may last to the end."""
        self.first, self.done, self.begun = first, 0, 0
        self.start = first + windows.sliding(self.end - first, self.seconds, self.stride)
        self.wanted: list[float] = []  # times of frames that are to come, a heap

    def __iter__(self):
        """(seconds that are done, the clips that are known since)"""
        for shown in self.reader.frames(*shots.SIZE):
            self._want(shown.time)
            known = self.detector.add(shown.time, shown.picture)
            self._keep(shown)
            yield self.known, [clip for time, begins in known for clip in self._judged(time, begins)]
        self._want(math.inf)
        yield self.known, [clip for time, begins in self.detector.finish() for clip in self._judged(time, begins)]
        yield self.end, self._clips(self.end, self.start[self.done :])

    # What is kept.

    def _want(self, now):
        """Takes what the frames before `now` are wanted for."""
        while self.begun < len(self.start) and self.start[self.begun] < now:
            for time in self._times(self.end, self.start[self.begun : self.begun + 1]).times[0].tolist():
                heapq.heappush(self.wanted, self.reader.floor(time))
            self.begun += 1
        while self.wanted and self.wanted[0] < now and self.kept:
            time = heapq.heappop(self.wanted)
            if (kept := self._shown(time)) is not None:
                kept.stays = True
                self._take(kept)

    def _keep(self, shown):
        """The newest frame; the one before it only if it may be of use."""
        if self.every is None:
            size = shown.bytes
            most = max(2 * self.frames, _HELD // max(1, size))
            self.every = 0.0 if most >= self.seconds * self.fps else self.seconds / most
            self.large = size * self.detector.reach > _RECENT
        before, self.newest = self.newest, shown
        stays = not before or not self.every or before.time // self.every != shown.time // self.every
        self.kept.append(_Kept(shown.time, shown, stays))
        if self.large:
            if len(self.kept) > 1 and isinstance(self.kept[-2].frame, type(shown)):
                del self.kept[-2]
            if stays or self.detector.likely:
                self._take(self.kept[-1])

    def _judged(self, time, begins):
        """The clips that are known, as it is known whether a shot begins at `time`."""
        found = []
        if begins and 0 < time < self.end:
            found = self._clips(time, self.first + windows.sliding(time - self.first, self.seconds, self.stride)[self.done :])
            self._begin(time)
            self._want(self.newest.time)
        self.known = time
        done = self.done
        while done < len(self.start) and self.start[done] + self.seconds <= min(time, self.end):
            done += 1
        found += self._clips(self.end, self.start[self.done : done])
        self.done = done
        at = bisect.bisect_left(self.kept, time, key=_time)
        if not begins and at < len(self.kept) - 1 and self.kept[at].time == time and not self.kept[at].stays:
            del self.kept[at]
        oldest = max(self.first, time - self.seconds - 1 / self.fps)
        del self.kept[: max(0, bisect.bisect_right(self.kept, oldest, key=_time) - 1)]
        return found

    def _shown(self, time):
        """What is kept of the frame at a time; None where it is not."""
        at = bisect.bisect_right(self.kept, time, key=_time)
        if not at or self.kept[at - 1].time < self.first:  # before the first frame there is the first
            return next((kept for kept in self.kept if kept.time >= self.first), None)
        return self.kept[at - 1]

    def _take(self, kept):
        """Makes of a decoded frame what clips are made of."""
        if not isinstance(kept.frame, np.ndarray) and kept.frame.whole:
            kept.frame = self.reader.take(kept.frame)

    # What is made of it.

    def _times(self, last, start):
        return windows.of_shot(self.first, last, start, self.seconds, self.fps, self.end, self.frames)

    def _clips(self, last, start):
        if not len(start):
            return []
        some = self._times(last, start)
        made = [[self._frame(time) for time in times] for times in some.times.tolist()]
        return [_Clip(*one) for one in zip(some.start.tolist(), some.stop.tolist(), made, strict=True)]

    def _frame(self, time):
        kept = self._shown(self.reader.floor(time))
        if kept is not None:
            self._take(kept)
            missed = any(kept.time < lost <= time or max(lost, time) < kept.time for lost in self.reader.lost)
            if isinstance(kept.frame, np.ndarray) and not missed:
                return kept.frame
        # Of what is damaged it depends on which frames are asked for.
        from evaat_fast.data.decode.pyav import AvReader

        with contextlib.closing(AvReader(Path(self.path), self.cropped)) as reader:
            return reader.read([time])[0]


def _time(kept):
    return kept.time
