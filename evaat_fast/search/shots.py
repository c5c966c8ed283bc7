"""Where a video is cut: the frames at which another shot begins.

What is asked of a frame is what PySceneDetect's adaptive detector asks, that it differ from the last one more than its
neighbours do from theirs; and that the picture before does not come back, as it does after a flash. PySceneDetect itself would
bring OpenCV, and decode with other time stamps than ours.

Source: B. Castellano, PySceneDetect (https://www.scenedetect.com), AdaptiveDetector.
"""

import itertools
from collections.abc import Iterable, Iterator

import numpy as np

SIZE = (64, 36)  # width and height that pictures are compared at
_NEAR = 0.4  # seconds around a frame that it is compared with
_LEAST = 12.0  # of 3 x 255, the mean difference of luminance and both colours to the frame before, of a cut
_MORE = 2.0  # times the difference that four fifths of its neighbours have at most
_HALF = 0.5  # of the largest of theirs, as that may be a flash's, after which much changes
_STAYS = 0.5  # of its difference, which every frame shortly before has at least to every one shortly after

__all__ = ["SIZE", "Detector", "cuts", "limits"]


class Detector:
    """Finds cuts while frames come in, each 0.4 s after it was there.

    Hard cuts are found, unless shots are alike or move so fast that a cut changes little more; fades and wipes are none, and
    neither are shots of less than 0.4 s between two of the same picture.

    Args:
        fps: frames per second.
    """

    def __init__(self, fps: float):
        self.reach = max(2, round(_NEAR * fps))  # frames before and after
        self._times: list[float] = []
        self._pictures: list[np.ndarray] = []
        self._steps: list[float | None] = []  # from the frame before to each
        self._at = 0  # the frame that is looked at next

    def add(self, time: float, picture: np.ndarray) -> list[tuple[float, bool]]:
        """Takes the next frame, at `time` in seconds, uint8 [H, W, 3], luminance and colours.

        Returns:
            (seconds, whether another shot begins there) of each frame of which it is known now, in order.
        """
        wide = picture.astype(np.int16)
        self._steps.append(_apart(self._pictures[-1], wide) if self._pictures else None)
        self._times.append(time)
        self._pictures.append(wide)
        known = self._known(self.reach)
        if (gone := self._at - self.reach) > 0:
            del self._times[:gone], self._pictures[:gone], self._steps[:gone]
            self._at = self.reach
        return known

    def finish(self) -> list[tuple[float, bool]]:
        """Those that were left, after the last frame."""
        return self._known(1)

    @property
    def likely(self) -> bool:
        """Whether another shot may begin with the frame that came last."""
        *before, step = self._steps
        return step is not None and step >= max([_LEAST, *(_HALF * other for other in before if other is not None)])

    def _known(self, behind):
        known = []
        while self._at + behind <= len(self._times):
            known.append((self._times[self._at], self._is_cut(self._at)))
            self._at += 1
        return known

    def _is_cut(self, at):
        step, reach = self._steps[at], self.reach
        if step is None or step < _LEAST:
            return False
        others = [*self._steps[max(0, at - reach) : at], *self._steps[at + 1 : at + reach]]
        around = sorted(other for other in others if other is not None)
        if around and step < max(_MORE * _share(around, 0.8), _HALF * around[-1]):
            return False
        pairs = itertools.product(self._pictures[max(0, at - reach) : at], self._pictures[at : at + reach])
        return all(_apart(a, b) >= _STAYS * step for a, b in pairs)


def cuts(frames: Iterable[tuple[float, np.ndarray]], fps: float) -> list[float]:
    """Seconds of the first frame of each shot but the first one; see `Detector`."""
    detector = Detector(fps)
    known = [detector.add(*frame) for frame in frames] + [detector.finish()]
    return [time for some in known for time, begins in some if begins]


def _share(ordered, share):
    """The value that a share of some have at most, between two of them in proportion; np.percentile takes ten times as long."""
    below, part = divmod(share * (len(ordered) - 1), 1)
    pair = ordered[int(below) : int(below) + 2]
    return pair[0] + part * (pair[-1] - pair[0])


def _apart(a, b):
    return int(np.abs(a - b).sum(dtype=np.int32)) / a[..., 0].size


def limits(times: Iterable[float], end: float) -> Iterator[tuple[float, float]]:
    """(start, stop) of each shot, seconds, by the cuts of a video and its end."""
    return itertools.pairwise([0.0, *(time for time in times if 0 < time < end), end])
