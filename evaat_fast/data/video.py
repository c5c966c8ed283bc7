"""Frames of a clip from a video in one file, in chunks, or cut out of it: see `evaat_fast.data.layout`.

Times are seconds: annotated frame numbers belong to the original recordings and are wrong for re-encoded ones. A sampler's
frame f, on the grid of the file's average rate, is the time (f + 0.5) / rate, and what comes back is the frame on screen then,
whatever the rate is there. A reader is opened for each clip and dropped after it; kept ones decode ahead and fill the memory.
"""

import contextlib
import math
import os

import numpy as np
import torch
from torch import Tensor

from evaat_fast.data.choices import DECODERS, SAMPLERS, Decoder, Sampler, check_choice
from evaat_fast.data.decode import OutsideError, Sums, VideoError, VideoInfo, open_video, probe, reader_of
from evaat_fast.data.layout import Source, home, of_path

# Seconds by which a chunk may end before the next begins: a frame of 10 per second, and some of faster ones.
_SHORT = 0.1

__all__ = [
    "DECODERS",
    "SAMPLERS",
    "Decoder",
    "OutsideError",
    "Sampler",
    "VideoError",
    "VideoInfo",
    "frame_ids",
    "probe",
    "read_clip",
]


def frame_ids(
    start: float,
    stop: float,
    count: int,
    sampler: Sampler = "avion",
    jitter: bool = False,
    generator: torch.Generator | None = None,
) -> list[int]:
    """`count` frame numbers spread over [start, stop).

    Args:
        start, stop: frame numbers, may be fractional. count: how many.
        sampler: "avion": midpoints of equal segments; "lavila": midpoints of segments with bounds rounded to frames.
        jitter: instead of midpoints draw one frame of each segment. generator: a torch.Generator; None: torch's own.

    Returns:
        A list of ints, not decreasing; a clip shorter than `count` repeats frames.

    Raises:
        ValueError: an unknown sampler, a count below 1, or stop before start.
    """
    check_choice("sampler", sampler, SAMPLERS)
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise ValueError(f"num_frames: expected a positive int, got {count!r}")
    if not (math.isfinite(start) and math.isfinite(stop) and start <= stop):
        raise ValueError(f"stop: expected a frame not before start={start!r}, got {stop!r}")
    segment = max(0.0, stop - start - 1) / count
    random = torch.rand(count, generator=generator, dtype=torch.float64).numpy() if jitter else np.full(count, 0.5)
    if sampler == "avion":
        middle = start + (stop - start) / count * (np.arange(count) + 0.5)
        return [int(f) for f in middle + (random - 0.5) * segment]
    bounds = (start + np.round(segment * np.arange(count + 1))).astype(int)
    first, last = bounds[:-1], bounds[1:]
    drawn = first + (random * (last - first + 1)).astype(int) if jitter else (first + last) // 2
    return drawn.tolist()


def read_clip(
    path: str | os.PathLike[str] | Source,
    start: float,
    stop: float,
    num_frames: int,
    *,
    sampler: Sampler = "avion",
    jitter: bool = False,
    generator: torch.Generator | None = None,
    decoder: Decoder = "auto",
    sums: Sums | None = None,
) -> Tensor:
    """Decodes num_frames frames of a clip.

    Args:
        path: a video file, a folder of chunks, or a Source that `layout.find` found.
        start, stop: seconds in the video; NaN for both: the whole video.
        num_frames, sampler, jitter, generator: as in `frame_ids`.
        decoder: "auto", "av" (PyAV), "torchcodec" or "decord", see `evaat_fast.data.decode`. None replaces another unasked.
        sums: checksums that its files are held to, `evaat_fast.data.decode.sums.Sums`.

    Returns:
        uint8 [num_frames, H, W, 3], RGB, as displayed. Of a clip that ends after its video the frames beyond are the last one.

    Raises:
        OutsideError: the clip begins after the video's end, or a frame lies in a chunk that is not there.
        VideoError: a file that is missing, cannot be decoded or is not what its checksums say, or chunks of different sizes.
        ImportError: the decoder is not installed.
        ValueError: as in `frame_ids`, an unknown decoder, or start < 0.
    """
    entire = math.isnan(start) and math.isnan(stop)
    if not entire and not (math.isfinite(start) and start >= 0):
        raise ValueError(f"start: expected a time of 0 seconds or later, got {start!r}")
    if not entire and not (math.isfinite(stop) and stop >= start):
        raise ValueError(f"stop: expected a time not before start={start!r}, got {stop!r}")
    reader_of(decoder)  # before any file is looked at
    source = path if isinstance(path, Source) else of_path(path)
    begins = np.array(source.starts if source.layout != "clips" else [0.0])
    if source.layout == "clips" and not entire:
        # On the grid of the cut file, whose first frame is the clip's.
        start, stop = max(0.0, start - source.starts[0]), max(0.0, stop - source.starts[0])
    if entire:
        with open_video(source.files[-1], decoder, sums) as reader:
            start, stop = float(begins[0]), float(begins[-1] + reader.end)
    current = home(source, start) if source.layout != "clips" else 0
    with contextlib.ExitStack() as opened:
        reader = opened.enter_context(open_video(source.files[current], decoder, sums))
        fps = reader.fps
        wanted = frame_ids(round(start * fps), round(stop * fps), num_frames, sampler, jitter, generator)
        times = (np.array(wanted) + 0.5) / fps
        homes = np.maximum(np.searchsorted(begins, times, "right") - 1, 0)
        frames = []
        for chunk in dict.fromkeys(homes.tolist()):  # in order of appearance, which is that of time
            if chunk != current:
                opened.close()
                reader, current = opened.enter_context(open_video(source.files[chunk], decoder, sums)), chunk
            local = times[homes == chunk] - begins[chunk]
            last = chunk == len(begins) - 1
            frames.append(reader.read(_inside(reader, local, start - begins[chunk], last, (start, stop))))
    if len({f.shape[1:] for f in frames}) > 1:
        raise VideoError(f"{path}: its chunks have different frame sizes, {sorted({f.shape[1:3] for f in frames})}")
    return torch.from_numpy(frames[0] if len(frames) == 1 else np.concatenate(frames))


def _inside(reader, times, start, last, clip):
    """Times in a file, those beyond its end at its last frame; OutsideError where they are of a file that is not there."""
    frame = 1 / reader.fps
    if reader.likely_end is not None and times.max() + frame < reader.likely_end:
        return times.tolist()
    end = reader.end
    named = f"{reader.path}: the clip from {clip[0]:.2f} to {clip[1]:.2f} s"
    if last and start >= end + frame:
        raise OutsideError(f"{named} begins after the end of its video, {end - start + clip[0]:.2f} s")
    if not last and times.max() >= end + max(_SHORT, 2 * frame):
        raise OutsideError(f"{named} lies in a chunk that is missing: this one ends at {end - start + clip[0]:.2f} s")
    return np.minimum(times, max(0.0, end - frame / 4)).tolist()
