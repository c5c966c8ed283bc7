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

__all__ = ["SIZE", "cuts", "limits"]


def cuts(frames: Iterable[tuple[float, np.ndarray]], fps: float) -> list[float]:
    """Seconds of the first frame of each shot but the first one.

    Hard cuts are found, unless shots are alike or move so fast that a cut changes little more; fades and wipes are none, and
    neither are shots of less than 0.4 s between two of the same picture.

    Args:
        frames: (seconds, uint8 [H, W, 3], luminance and colours), of a video in order. fps: frames per second.
    """
    reach = max(2, round(_NEAR * fps))
    times: list[float] = []
    pictures: list[np.ndarray] = []
    steps: list[float] = []  # from the frame before to each
    found: list[float] = []
    at = 1  # the frame that is looked at

    for frame in itertools.chain(frames, itertools.repeat(None, reach)):
        if frame is not None:
            picture = frame[1].astype(np.int16)
            steps.append(_apart(pictures[-1], picture) if pictures else 0.0)
            times.append(frame[0])
            pictures.append(picture)
        if at < len(pictures) and (frame is None or len(pictures) >= at + reach):
            if _is_cut(steps, pictures, at, reach):
                found.append(times[at])
            at += 1
        if at > reach:  # what is further away is forgotten
            del times[: at - reach], pictures[: at - reach], steps[: at - reach]
            at = reach
    return found


def _is_cut(steps, pictures, at, reach):
    if steps[at] < _LEAST:
        return False
    around = [*steps[max(0, at - reach) : at], *steps[at + 1 : at + reach]]
    if around and steps[at] < max(_MORE * np.percentile(around, 80), _HALF * max(around)):
        return False
    pairs = itertools.product(pictures[max(0, at - reach) : at], pictures[at : at + reach])
    return all(_apart(a, b) >= _STAYS * steps[at] for a, b in pairs)


def _apart(a, b):
    return float(np.abs(a - b).mean() * a.shape[2])


def limits(times: Iterable[float], end: float) -> Iterator[tuple[float, float]]:
    """(start, stop) of each shot, seconds, by the cuts of a video and its end."""
    return itertools.pairwise([0.0, *(time for time in times if 0 < time < end), end])
