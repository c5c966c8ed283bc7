"""Sliding clips of a video: when they begin and end, and the frames that they are made of, each decoded once."""

import contextlib
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from evaat_fast.data.decode import VideoError
from evaat_fast.data.video import frame_ids
from evaat_fast.search import shots

_LEAST = 4  # bytes of a file for each of its frames: time stamps that promise more are damaged
_INSIDE = 0.1  # frames from a cut at which its shot is surely on screen
_TAIL = 0.25  # of a clip: what is left at a video's end gets a clip of its own from this share on

__all__ = ["Windows", "around", "decode", "windows"]


@dataclass(frozen=True)
class Windows:
    """The clips of a video. start, stop: float64 [n], seconds. times: float64 [n, T], of their frames."""

    start: np.ndarray
    stop: np.ndarray
    times: np.ndarray

    def __len__(self) -> int:
        return len(self.start)


def windows(path: str, seconds: float, stride: float, frames: int, by_shot: bool = False) -> Windows:
    """Clips of `seconds` every `stride` seconds; the last one ends with the video, and a shorter video is one clip.

    Args:
        path: a video. frames: T, of a clip: those that `read_clip` takes. by_shot: each shot is cut up as if it were a video of
            its own, for which all frames are decoded.

    Raises:
        VideoError: it cannot be read, or its end makes no sense.
    """
    fps, end, times = _facts(path, by_shot)
    limits = list(shots.limits(times, end))
    parts = [first + _sliding(last - first, seconds, stride) for first, last in limits]
    first, last = np.repeat(limits, [len(part) for part in parts], axis=0).T[:, :, None]
    start = np.concatenate(parts)
    found = _of(start, np.minimum(start + seconds, last[:, 0]), fps, end, frames)
    if len(limits) == 1:
        return found
    return replace(found, times=np.clip(found.times, first + _INSIDE / fps, last - _INSIDE / fps))


def _sliding(end, seconds, stride):
    """When clips begin in [0, end)."""
    count = max(1, math.floor((end - seconds) / stride + 1e-6) + 1)
    start = np.arange(count) * stride
    if end - (start[-1] + seconds) >= _TAIL * seconds - 1e-6:
        start = np.append(start, end - seconds)
    return start


def around(path: str, time: float, seconds: float, frames: int) -> Windows:
    """The one clip of `seconds` with `time` in its middle, or as near to it as the video allows.

    Raises:
        VideoError: it cannot be read. ValueError: the time is not in the video.
    """
    fps, end, _ = _facts(path)
    if not 0 <= time <= end:
        raise ValueError(f"expected a time from 0 to {end:.2f} s in {path!r}, got {time:g}")
    start = max(0.0, min(time - seconds / 2, end - seconds))
    return _of(np.array([start]), np.array([min(start + seconds, end)]), fps, end, frames)


def _facts(path, by_shot=False):
    """(frames per second, end in seconds, cuts in seconds)."""
    from evaat_fast.data.decode.pyav import AvReader

    with contextlib.closing(AvReader(Path(path))) as reader:
        fps, end = reader.fps, reader.end
    size = os.path.getsize(path)
    if not 0 < end * fps <= size / _LEAST:
        raise VideoError(f"{path}: its time stamps reach {end:.2f} s, at {fps:.4g} frames per second, in {size:,} bytes")
    if not by_shot:
        return fps, end, []
    with contextlib.closing(AvReader(Path(path))) as reader:
        return fps, end, shots.cuts(reader.pictures(*shots.SIZE), fps)


def _of(start, stop, fps, end, frames):
    numbers = [frame_ids(round(a * fps), round(b * fps), frames) for a, b in zip(start, stop, strict=True)]
    times = (np.array(numbers) + 0.5) / fps
    return Windows(start, stop, np.minimum(times, max(0.0, end - 1 / fps / 4)))


def decode(path: str, times: np.ndarray, crop: Callable[[Tensor], Tensor]) -> tuple[np.ndarray, np.ndarray]:
    """The frames of clips, cropped as soon as each is decoded.

    Args:
        path: a video. times: float64 [n, T]. crop: uint8 [1, H, W, 3] to [1, S, S, 3].

    Returns:
        (uint8 [U, S, S, 3], int64 [n, T]): frames, and which of them each clip has.

    Raises:
        VideoError: it cannot be decoded.
    """
    from evaat_fast.data.decode.pyav import AvReader

    def small(frame: np.ndarray) -> np.ndarray:
        return crop(torch.from_numpy(np.ascontiguousarray(frame))[None])[0].numpy()

    unique, where = np.unique(times, return_inverse=True)
    with contextlib.closing(AvReader(Path(path), small)) as reader:
        return reader.read(unique.tolist()), where.reshape(times.shape)
