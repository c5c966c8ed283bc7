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

_LEAST = 4  # bytes of a file for each of its frames: time stamps that promise more are damaged
_INSIDE = 0.1  # frames from a cut at which its shot is surely on screen
_TAIL = 0.25  # of a clip: what is left at a video's end gets a clip of its own from this share on

__all__ = ["Span", "Windows", "around", "cropped", "decode", "facts", "of", "of_shot", "sliding", "windows"]


@dataclass(frozen=True)
class Windows:
    """The clips of a video. start, stop: float64 [n], seconds. times: float64 [n, T], of their frames."""

    start: np.ndarray
    stop: np.ndarray
    times: np.ndarray

    def __len__(self) -> int:
        return len(self.start)


@dataclass(frozen=True)
class Span:
    """Some clips of a video, decoded. frames: uint8 [U, S, S, 3]. where: int64 [n, T], each clip's. start, stop: float64 [n],
    seconds. share: of the video that is done, 1 after its last clip and before that less."""

    frames: np.ndarray
    where: np.ndarray
    start: np.ndarray
    stop: np.ndarray
    share: float


def windows(path: str, seconds: float, stride: float, frames: int) -> Windows:
    """Clips of `seconds` every `stride` seconds; the last one ends with the video, and a shorter video is one clip.

    Args:
        path: a video. frames: T, of a clip: those that `read_clip` takes.

    Raises:
        VideoError: it cannot be read, or its end makes no sense.
    """
    fps, end = facts(path)
    start = sliding(end, seconds, stride)
    return of(start, np.minimum(start + seconds, end), fps, end, frames)


def of_shot(first: float, last: float, start: np.ndarray, seconds: float, fps: float, end: float, frames: int) -> Windows:
    """The clips of a shot, [first, last) of a video that ends at `end`, by their starts: no frame of another one is theirs."""
    found = of(start, np.minimum(start + seconds, last), fps, end, frames)
    return replace(found, times=np.clip(found.times, first + _INSIDE / fps, last - _INSIDE / fps))


def sliding(end: float, seconds: float, stride: float) -> np.ndarray:
    """float64 [n]: when clips begin in [0, end)."""
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
    fps, end = facts(path)
    if not 0 <= time <= end:
        raise ValueError(f"expected a time from 0 to {end:.2f} s in {path!r}, got {time:g}")
    start = max(0.0, min(time - seconds / 2, end - seconds))
    return of(np.array([start]), np.array([min(start + seconds, end)]), fps, end, frames)


def facts(path: str) -> tuple[float, float]:
    """(frames per second, end in seconds).

    Raises:
        VideoError: it cannot be read, or its end makes no sense.
    """
    from evaat_fast.data.decode.pyav import AvReader

    with contextlib.closing(AvReader(Path(path))) as reader:
        fps, end = reader.fps, reader.end
    size = os.path.getsize(path)
    if not 0 < end * fps <= size / _LEAST:
        raise VideoError(f"{path}: its time stamps reach {end:.2f} s, at {fps:.4g} frames per second, in {size:,} bytes")
    return fps, end


def of(start: np.ndarray, stop: np.ndarray, fps: float, end: float, frames: int) -> Windows:
    """Clips by their limits, with the times of T frames each."""
    numbers = [frame_ids(round(a * fps), round(b * fps), frames) for a, b in zip(start, stop, strict=True)]
    times = (np.array(numbers) + 0.5) / fps
    return Windows(start, stop, np.minimum(times, max(0.0, end - 1 / fps / 4)))


def cropped(crop: Callable[[Tensor], Tensor]) -> Callable[[np.ndarray], np.ndarray]:
    """From uint8 [H, W, 3] to [S, S, 3], by a crop of clips, uint8 [1, H, W, 3] to [1, S, S, 3]."""
    return lambda frame: crop(torch.from_numpy(np.ascontiguousarray(frame))[None])[0].numpy()


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

    unique, where = np.unique(times, return_inverse=True)
    with contextlib.closing(AvReader(Path(path), cropped(crop))) as reader:
        return reader.read(unique.tolist()), where.reshape(times.shape)
