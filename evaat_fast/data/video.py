"""Frames of a clip from a video file, or from a folder of chunks named by their first second.

Times are seconds times the file's own frame rate: annotated frame numbers belong to the original recordings and are
wrong for re-encoded ones. A reader is opened for each clip and dropped after it; kept ones decode ahead and fill the
memory.
"""

import math
import os
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

Sampler = Literal["avion", "lavila"]
Decoder = Literal["decord", "av"]
SAMPLERS: tuple[Sampler, ...] = get_args(Sampler)
DECODERS: tuple[Decoder, ...] = get_args(Decoder)

__all__ = ["DECODERS", "SAMPLERS", "VideoError", "frame_ids", "read_clip"]


class VideoError(RuntimeError):
    """A file that is missing or cannot be decoded; the message names it."""


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
    if sampler not in SAMPLERS:
        raise ValueError(f"sampler: expected one of {', '.join(SAMPLERS)}, got {sampler!r}")
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
    path: str | os.PathLike[str],
    start: float,
    stop: float,
    num_frames: int,
    *,
    sampler: Sampler = "avion",
    jitter: bool = False,
    generator: torch.Generator | None = None,
    decoder: Decoder = "decord",
) -> Tensor:
    """Decodes num_frames frames of a clip.

    Args:
        path: a video file, or a folder of chunks named by their first second.
        start, stop: seconds.
        num_frames, sampler, jitter, generator: as in `frame_ids`.
        decoder: "decord" or "av" (PyAV). Neither replaces the other unasked.

    Returns:
        uint8 [num_frames, H, W, 3], RGB. A frame beyond the end of its file becomes the file's last one.

    Raises:
        VideoError: a file that is missing or cannot be decoded, or chunks of different sizes.
        ImportError: the decoder is not installed.
        ValueError: as in `frame_ids`, an unknown decoder, or start < 0.
    """
    if not (math.isfinite(start) and start >= 0):
        raise ValueError(f"start: expected a time of 0 seconds or later, got {start!r}")
    if not (math.isfinite(stop) and stop >= start):
        raise ValueError(f"stop: expected a time not before start={start!r}, got {stop!r}")
    reader_of = _reader(decoder)
    chunks = _chunks(Path(path))
    seconds = np.array([second for second, _ in chunks])
    current = max(0, int(np.searchsorted(seconds, start, "right")) - 1)
    reader = reader_of(chunks[current][1])
    try:
        fps = reader.fps
        wanted = frame_ids(round(start * fps), round(stop * fps), num_frames, sampler, jitter, generator)
        first = np.round(seconds * fps).astype(int)
        home = np.maximum(np.searchsorted(first, wanted, "right") - 1, 0)
        frames = []
        for chunk in dict.fromkeys(home.tolist()):  # in order of appearance, which is that of time
            if chunk != current:
                reader.close()
                reader, current = reader_of(chunks[chunk][1]), chunk
            # Chunks may be a frame short of their nominal length, and clips may end after their video.
            inside = (np.array(wanted)[home == chunk] - first[chunk]).clip(0, reader.length - 1)
            frames.append(reader.read(inside.tolist()))
    finally:
        reader.close()
    if len({f.shape[1:] for f in frames}) > 1:
        raise VideoError(f"{path}: its chunks have different frame sizes, {sorted({f.shape[1:3] for f in frames})}")
    return torch.from_numpy(frames[0] if len(frames) == 1 else np.concatenate(frames))


def _chunks(path):
    """[(first second, file)] in order of time; one entry for a video in one file."""
    if path.is_file():
        return [(0, path)]
    if not path.is_dir():
        raise VideoError(f"{path}: no such video")
    chunks = sorted((int(p.stem), p) for p in path.iterdir() if p.stem.isascii() and p.stem.isdigit())
    if not chunks:
        raise VideoError(f"{path}: a folder without chunks named by their first second (0{path.suffix}, 15{path.suffix}, ...)")
    return chunks


def _reader(decoder):
    """The reader class of a decoder, its module imported."""
    if decoder not in DECODERS:
        raise ValueError(f"decoder: expected one of {', '.join(DECODERS)}, got {decoder!r}")
    other = DECODERS[1 - DECODERS.index(decoder)]
    try:
        if decoder == "decord":
            import decord

            decord.logging.set_level(decord.logging.QUIET)  # what goes wrong is in the exception
        else:
            import av  # noqa: F401
    except (ImportError, OSError) as error:
        raise ImportError(
            f"decoder {decoder!r} cannot be imported ({error}): pip install evaat-fast[video], or choose {other!r}"
        ) from error
    return _Decord if decoder == "decord" else _Av


class _Decord:
    def __init__(self, path):
        import decord

        self.path = path
        try:
            # One thread: data loaders bring their own, and a second one slows short clips down.
            self._video = decord.VideoReader(str(path), num_threads=1)
            self.fps, self.length = float(self._video.get_avg_fps()), len(self._video)
        except Exception as error:  # decord raises its own error, RuntimeError or OSError, by version
            raise VideoError(f"{path}: {_reason(path, error)}") from error
        if self.length == 0 or not self.fps > 0:
            raise VideoError(f"{path}: {self.length} frames at {self.fps} frames per second")

    def read(self, indices):
        try:
            batch = self._video.get_batch(indices)
            return batch.asnumpy() if hasattr(batch, "asnumpy") else np.asarray(batch)
        except Exception as error:
            raise VideoError(f"{self.path}: {_reason(self.path, error)}") from error

    def close(self):
        self._video = None


class _Av:
    def __init__(self, path):
        import av

        self.path = path
        try:
            self._container = av.open(str(path))
        except Exception as error:  # a damaged file makes PyAV raise FFmpegError, OSError or UnicodeDecodeError
            raise VideoError(f"{path}: {_reason(path, error)}") from error
        try:
            self._stream = self._container.streams.video[0]
            self._stream.codec_context.thread_count = 1
            self.fps, self.length = float(self._stream.average_rate or 0), self._stream.frames
        except Exception as error:  # no stream: IndexError; one that its build cannot decode: AttributeError
            self.close()
            raise VideoError(f"{path}: no video stream ({error})") from error
        if self.length == 0 or not self.fps > 0:
            self.close()
            raise VideoError(f"{path}: {self.length} frames at {self.fps} frames per second")

    def read(self, indices):
        stream: Any = self._stream
        base = float(stream.time_base)
        begin = stream.start_time or 0
        wanted, found = set(indices), {}
        try:
            # To the key frame at or before it.
            self._container.seek(begin + int(min(indices) / self.fps / base), stream=stream)
            for frame in self._container.decode(stream):
                number = round((frame.pts - begin) * base * self.fps)
                if number in wanted:
                    found[number] = frame.to_ndarray(format="rgb24")
                if number >= max(indices):
                    break
            return np.stack([found[i] for i in indices])
        except KeyError as error:
            raise VideoError(f"{self.path}: frame {error} of {self.length} cannot be decoded") from None
        except Exception as error:
            raise VideoError(f"{self.path}: {_reason(self.path, error)}") from error

    def close(self):
        self._container.close()


def _reason(path, error):
    """The first line of a decoder's error, which may be pages long; what is plain to see comes first."""
    if path.exists() and path.stat().st_size == 0:
        return "the file is empty"
    if "size must exactly match" in str(error):
        # decord2 3.4 takes a padded row for a fourth channel, which rows of up to 97 pixels can have.
        return "decord2 cannot read frames this narrow on this CPU; use the decoder 'av'"
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'cannot be decoded'}"
