"""Draws and encodes the toy kitchen's videos: a head camera looks around while one object at a time is handled.

Why the middle frame tells nothing of the verb: there the object's position, size and orientation have the same distribution
whatever the verb. The three sliders (x, y, log size) are drawn alike for all verbs and the orientation is uniform on the
circle; a verb only decides which of them passes through its value, and in which direction. Opposite verbs are one
movement, run backwards.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

VERBS = ("push left", "push right", "lift", "put down", "inflate", "squeeze", "shake", "rotate")
COLOURS = {"red": (224, 40, 40), "green": (40, 180, 60), "blue": (44, 80, 232), "yellow": (244, 212, 40)}
SHAPES = ("cup", "block", "bottle")

_STROKE = 1.2  # how far a slider moves in a clip, of the 2 from end to end
_SWING = 0.3  # how far a shaken object swings to either side
_SHAKES = 2.2  # periods per second of shaking: below half the rate at which 8 frames sample a one-second clip
_REACH = 0.24  # of the frame's side: how far from the middle a slider at 1 puts the object
_RADIUS = 0.17  # of the frame's side: the mean radius of an object
_GROWTH = 0.45  # the radius is exp(0.45 size) times that: inflating multiplies it by 1.7


@dataclass(frozen=True)
class Segment:
    """One clip's stretch of a video, in frames. `seed` draws everything about it but verb, colour and shape."""

    verb: int
    colour: int
    shape: int
    start: int
    length: int
    seed: int


def swing(phase: np.ndarray) -> np.ndarray:
    """[-1, 1] over a period of 1: there and back at constant speed, so that its values are uniform."""
    return 2 * np.abs(2 * (phase % 1.0) - 1) - 1


def motion(
    verb: int, seconds: np.ndarray, duration: float, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """x, y, log size and angle (radians) at the `seconds` [T] of a clip that lasts `duration`; sliders are 0 in the middle."""
    x, y, size = (np.full(seconds.shape, value) for value in rng.uniform(-0.4, 0.4, 3))
    angle, phase, side = rng.uniform(0, 2 * np.pi), rng.uniform(), rng.choice((-1.0, 1.0))
    turn = 2 * np.pi * rng.uniform(0.6, 0.85)
    passed = seconds / duration - 0.5
    forward = _STROKE * passed
    # A shaken object is anywhere in its swing; so is every other one, where it stays.
    x = x + _SWING * swing(phase + (_SHAKES * seconds if verb == 6 else 0 * seconds))
    if verb == 0:
        x = x - forward
    elif verb == 1:
        x = x + forward
    elif verb == 2:
        y = y - forward  # rows grow downwards: lifting is towards smaller y
    elif verb == 3:
        y = y + forward
    elif verb == 4:
        size = size + forward
    elif verb == 5:
        size = size - forward
    orientation = angle + (side * turn * passed if verb == 7 else 0 * seconds)
    return x, y, size, orientation


def panorama(height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    """float32 [height, width, 3]: a wall of muted boards, tiles and stains to look along. It repeats at its borders."""
    image = np.full((height, width, 3), rng.uniform(95, 150), np.float32) + rng.uniform(-14, 14, 3).astype(np.float32)
    for cell, strength in ((48, 16), (24, 13), (12, 11), (6, 8)):
        grid = rng.normal(0, strength, (-(-height // cell), -(-width // cell), 1)).astype(np.float32)
        grid = grid + rng.normal(0, strength / 6, (*grid.shape[:2], 3)).astype(np.float32)
        image += _enlarge(grid, cell)[:height, :width]
    for _ in range(height * width // 2600):
        h, w = rng.integers(6, 34, 2)
        top, left = rng.integers(0, height - h), rng.integers(0, width - w)
        image[top : top + h, left : left + w] += rng.uniform(-26, 26) + rng.uniform(-5, 5, 3).astype(np.float32)
    return image.clip(20, 225)


def _enlarge(grid, cell):
    """Bilinear enlargement by `cell`, wrapping around."""
    for axis in (0, 1):
        n = grid.shape[axis]
        at = np.arange(n * cell) / cell
        low = at.astype(int)
        weight = (at - low).astype(np.float32).reshape([-1 if a == axis else 1 for a in range(3)])
        grid = grid.take(low, axis) * (1 - weight) + grid.take((low + 1) % n, axis) * weight
    return grid


def head(frames: int, fps: int, size: int, rng: np.random.Generator) -> np.ndarray:
    """float32 [frames, 2]: where the camera looks, in pixels (y, x): slow sways, and a drift along the wall."""
    seconds = np.arange(frames) / fps
    path = np.outer(seconds, rng.choice((-1, 1), 2) * rng.uniform(0.01, 0.03, 2) * size)
    for rate, reach in ((0.17, 0.05), (0.41, 0.02), (1.1, 0.006)):
        rates = rate * rng.uniform(0.8, 1.25, 2)
        path += reach * size * np.sin(2 * np.pi * (np.outer(seconds, rates) + rng.uniform(0, 1, 2)))
    return path.astype(np.float32)


def look(wall: np.ndarray, path: np.ndarray, size: int) -> np.ndarray:
    """float32 [T, size, size, 3]: the wall through the camera at subpixel positions path [T, 2]."""
    H, W, _ = wall.shape
    out = np.empty((len(path), size, size, 3), np.float32)
    for t, (y, x) in enumerate(path):
        top, left = int(np.floor(y)), int(np.floor(x))
        fy, fx = np.float32(y - top), np.float32(x - left)
        rows, columns = np.arange(top, top + size + 1) % H, np.arange(left, left + size + 1) % W
        view = wall[rows[:, None], columns]
        view = view[:-1] + fy * (view[1:] - view[:-1])
        out[t] = view[:, :-1] + fx * (view[:, 1:] - view[:, :-1])
    return out


def draw(frames: np.ndarray, segment: Segment, sway: np.ndarray, fps: int) -> None:
    """Paints one segment's object over float32 frames [T, S, S, 3], in place; sway [T, 2] is the head's path."""
    T, S = frames.shape[:2]
    rng = np.random.default_rng(segment.seed)
    x, y, size, angle = motion(segment.verb, np.arange(T) / fps, T / fps, rng)
    sway = sway - sway[T // 2]
    x = (S / 2 + _REACH * S * x - sway[:, 1]).astype(np.float32)
    y = (S / 2 + _REACH * S * y - sway[:, 0]).astype(np.float32)
    radius = (_RADIUS * S * np.exp(_GROWTH * size)).astype(np.float32)
    cos, sin = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
    colour = np.array(list(COLOURS.values())[segment.colour], np.float32) * np.float32(rng.uniform(0.9, 1.05))
    parts = _PARTS[SHAPES[segment.shape]]
    pixels = np.arange(S, dtype=np.float32) + np.float32(0.5)
    for t in range(T):
        reach = int(radius[t] * 1.15) + 2
        rows = slice(max(0, int(y[t]) - reach), max(0, int(y[t]) + reach + 1))
        columns = slice(max(0, int(x[t]) - reach), max(0, int(x[t]) + reach + 1))
        dy, dx = pixels[rows, None] - y[t], pixels[None, columns] - x[t]
        u, v = (cos[t] * dx + sin[t] * dy) / radius[t], (cos[t] * dy - sin[t] * dx) / radius[t]
        area = frames[t, rows, columns]
        body, mark = parts(u, v)
        area *= 1 - 0.75 * _cover(body - 0.08, radius[t])[..., None]  # a dark rim
        area += _cover(body, radius[t])[..., None] * (colour - area)
        area += _cover(mark, radius[t])[..., None] * (0.25 * colour - area)


def _cup(u, v):
    handle = np.abs(np.hypot(u - 0.5, v) - 0.34) - 0.11
    return np.minimum(np.hypot(u + 0.25, v) - 0.7, handle), np.hypot(u + 0.25, v) - 0.42


def _block(u, v):
    return _rectangle(u, v, 0.86, 0.62), _rectangle(u - 0.55, v, 0.13, 0.62)


def _bottle(u, v):
    body, neck = _rectangle(u + 0.35, v, 0.6, 0.42), _rectangle(u - 0.45, v, 0.5, 0.17)
    return np.minimum(body, neck), _rectangle(u - 0.85, v, 0.13, 0.2)


_PARTS = {"cup": _cup, "block": _block, "bottle": _bottle}


def _rectangle(u, v, width, height):
    return np.maximum(np.abs(u) - width, np.abs(v) - height)


def _cover(distance, radius):
    """Share of a pixel covered, from a distance in units of the radius."""
    return np.clip(0.5 - distance * radius, 0, 1)


def render_video(segments: Sequence[Segment], size: int, fps: int, seed: int) -> Iterator[np.ndarray]:
    """Yields uint8 [T, size, size, 3] for each of the segments, which follow one another without a gap."""
    rng = np.random.default_rng(seed)
    wall = panorama(3 * size, 6 * size, rng)
    path = head(sum(s.length for s in segments), fps, size, rng)
    for segment in segments:
        sway = path[segment.start : segment.start + segment.length]
        frames = look(wall, sway, size)
        draw(frames, segment, sway, fps)
        yield np.clip(frames + 0.5, 0, 255).astype(np.uint8)


def encode_video(
    target: Path, segments: Sequence[Segment], size: int, fps: int, seed: int, chunk_seconds: int, short_chunk: bool
) -> None:
    """Writes one video: a folder of chunks named by their first second, or one file where chunk_seconds is 0.

    short_chunk leaves the last frame of the first chunk out, as re-encoded data sets have it.
    """
    import av

    per_chunk = chunk_seconds * fps
    if chunk_seconds:
        target.mkdir(parents=True)
    else:
        target.parent.mkdir(parents=True, exist_ok=True)
    at, container = 0, None
    try:
        for frames in render_video(segments, size, fps, seed):
            for frame in frames:
                if container is None or (per_chunk and at % per_chunk == 0):
                    done, container = container, None
                    finish(done)
                    path = target / f"{at // fps}.MP4" if chunk_seconds else target
                    container = open_film(av, path, size, fps)
                if not (short_chunk and at == per_chunk - 1):
                    picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
                    container[0].mux(container[1].encode(picture))
                at += 1
    finally:
        finish(container)


def open_film(av: Any, path: Path, size: int, fps: float) -> tuple[Any, Any]:
    container = av.open(str(path), "w", format="mp4")
    stream = container.add_stream("libx264", rate=Fraction(fps))
    stream.width = stream.height = size
    stream.pix_fmt = "yuv420p"
    # A short GOP without B-frames: a clip decodes 3 to 5 times as fast as with x264's default of 250. Without
    # mbtree: with it the last block of a frame now and then got another quantiser, so that one file in a few hundred
    # differed from its repetition.
    stream.options = {"preset": "veryfast", "tune": "fastdecode", "crf": "25", "g": "15", "bf": "0", "mbtree": "0"}
    stream.codec_context.thread_count = 1
    return container, stream


def finish(container: tuple[Any, Any] | None) -> None:
    if container is not None:
        container[0].mux(container[1].encode(None))
        container[0].close()
